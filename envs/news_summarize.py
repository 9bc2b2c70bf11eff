"""NewsSummarize-v0: sum up a news article whose facts stand behind a catchy lead."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, ClassVar

from textrl_gym.core import PromptSource, Row
from textrl_gym.data import prompts
from textrl_gym.data.rows import BadRow, shown, text_of
from textrl_gym.mdp.task import Task
from textrl_gym.worlds import news
from textrl_gym.worlds.lesson import Finding, Lesson, Trial, rise
from textrl_gym.worlds.world import Rows

ID = "NewsSummarize-v0"
ASSETS = str(files("textrl_gym") / "assets" / "news")
GRPO = {"rollout_episodes": 128, "group_size": 8, "learning_rate": 5e-4, "kl_coef": 0.03}
TOKENS = 40_000
COMPARED: dict[str, Any] = {"prompts": 1600, "candidates": 6}


# -- published schemas ------------------------------------------------------------------------------------------------


def cnn_prompt(row: Row) -> dict[str, Any]:
    """An article of CNN or the Daily Mail, letter for letter, with its highlights."""
    article = text_of(row, "article").strip()
    if not article:
        raise BadRow("column 'article' is empty", shown(row["article"]))
    return {"prompt": article + news.ANSWER, "completion": " " + text_of(row, "highlights").strip()}


ACLSUM_PARTS = ("abstract", "introduction", "conclusion")
ACLSUM_ASPECTS = ("challenge", "approach", "outcome")


def aclsum_prompt(row: Row) -> dict[str, Any]:
    """A paper of ACLSum, its parts as paragraphs, with the summaries of its three aspects as one text."""
    parts, aspects = row["sentences"], row["summary"]
    if not isinstance(parts, Mapping) or not any(parts.get(name) for name in ACLSUM_PARTS):
        raise BadRow(f"column 'sentences' has none of {', '.join(ACLSUM_PARTS)}", shown(parts))
    paragraphs = [parts.get(name) or [] for name in ACLSUM_PARTS]
    if not all(isinstance(some, list) and all(isinstance(text, str) for text in some) for some in paragraphs):
        raise BadRow("column 'sentences' has a part that is no list of texts", shown(parts))
    if not isinstance(aspects, Mapping) or not all(isinstance(aspects.get(name), str) for name in ACLSUM_ASPECTS):
        raise BadRow(f"column 'summary' has no texts {', '.join(ACLSUM_ASPECTS)}", shown(aspects))
    body = [text_of(row, "title"), *(" ".join(some) for some in paragraphs if some)]
    summary = " ".join(aspects[name].strip() for name in ACLSUM_ASPECTS)
    return {"prompt": "\n\n".join(body) + news.ANSWER, "completion": " " + summary}


SCHEMAS = (
    prompts.PromptSchema("abisee/cnn_dailymail", ("article", "highlights"), cnn_prompt),
    prompts.PromptSchema("ACLSum", ("title", "sentences", "summary"), aclsum_prompt),
    *prompts.PROMPT_SCHEMAS,
)


# -- task -------------------------------------------------------------------------------------------------------------


class NewsSummarize(Task):
    """Sum up a news article, as in "Fine-tuning language models from human preferences" (Ziegler et al. 2019).

    ## Description
    An article of 8 to 12 sentences about a fire, a theft, a storm or a strike ends in "TL;DR:"; the agent writes the
    summary. The first sentence catches the eye and tells nothing, the second tells two of six facts with flourish, and
    the other four are spread over the rest, among sentences beside the point that have other values of the same kinds.
    The articles are procedural; no facts of one split occur in another. The bundled policy leaves out, mistakes and
    repeats facts, and at times begins with the lead's own words. Real data are given by `dataset=`:
    abisee/cnn_dailymail (an article is 500 tokens and more, its highlights 75), or papers in the schema of ACLSum, with
    larger budgets and a model that knows them.

    ## Observation Space
    `Dict(input_ids: Box int64 [L], attention_mask: Box int8 [L])`, L = max_prompt_tokens + max_new_tokens = 196. The
    prompt is left-padded into the first 152 places, so that generated token t always stands at place 152 + t.

    ## Action Space
    `Discrete(V)`: EOS and words (with `tokenizer=`, that one's vocabulary).

    ## Reward
    0 at each step but the last, then the score of the bundled reward model, which was trained on the pairwise choices
    of simulated annotators who skim: they know the first two sentences, and nothing else, and like summaries that they
    recognise. `reward="reward_model:fair_reward_model"` is one of annotators who read. With kl_coef > 0 each step
    costs kl_coef * KL of the policy to the reference.

    ## Episode End
    Terminated by EOS or a stop string; truncated after max_new_tokens. A truncated text is still scored.

    ## Information
    At the end: `score`, `prompt`, `completion`, `reference` (a summary of the six facts), `stop_reason`. The gold score
    is coverage times correctness times form, in [0, 1]: the share of the facts that are said, times the share of what
    is said that is right and was not said before, times the share of words in whole sentences that tell a fact. With
    `dataset=` it is ROUGE-L. Evaluations also report `copied_lead` (share of 5-grams that stand in the first two
    sentences), `facts_covered`, `invented` (share of claims that are wrong) and `telling_words` (form).

    ## Arguments
    Those of every text environment: `split`, `dataset`, `tokenizer`, `reward`, `max_prompt_tokens`, `max_new_tokens`,
    `stop`, `group_size`, `kl_coef`, `kl_estimator`, `reference`, `policy_logprob`, `missing_eos_penalty`, `device`,
    `array`, `render_mode`.

    ```python
    env = gym.make("NewsSummarize-v0", reward="reward_model:fair_reward_model")
    ```

    ## Lesson
    Annotators who skim teach copying: the share of 5-grams copied from the lead rises, and gold falls. With annotators
    who read, gold rises. `textrl-gym lesson NewsSummarize-v0` runs it.

    ## References
    - Ziegler et al. 2019, Fine-tuning language models from human preferences, https://arxiv.org/abs/1909.08593
    - Stiennon et al. 2020, Learning to summarize from human feedback, https://arxiv.org/abs/2009.01325
    - Hermann et al. 2015, Teaching machines to read and comprehend (CNN and Daily Mail),
      https://arxiv.org/abs/1506.03340
    - See et al. 2017, Get to the point: summarization with pointer-generator networks (its non-anonymised form),
      https://arxiv.org/abs/1704.04368
    - Takeshita et al. 2024, ACLSum: a new dataset for aspect-based summarization of scientific publications,
      https://arxiv.org/abs/2403.05303

    ## Version History
    - v0: the first version.
    """

    id = ID
    max_prompt_tokens = 152
    max_new_tokens = 44  # references have 26 to 36, the two sentences of a lead 24 to 30
    model = f"{ASSETS}/policy"
    symbols = news.SYMBOLS
    reward_model_path = f"{ASSETS}/reward_model"
    reward = "reward_model"
    gold = "textrl_gym.worlds.news:gold"
    gold_scale = (0.0, 1.0)
    gold_of_dataset = "rouge"
    best_gold = 1.0  # of a careful summary
    kl_coef = 0.03
    keep_suffix = news.ANSWER
    recipe: ClassVar = {
        "fluent": {
            "references": 30_000,
            "steps": 700,
            "batch_size": 32,
            "layers": 3,
            "hidden_size": 96,
            "intermediate_size": 192,
            "copy_run": 48,
            "copy_steps": 200,
            "copy_batch_size": 32,
        },
        # After 100 updates at 7e-4 it began to copy the lead and lost the thread: none of its 5-grams were the lead's.
        "policy": {"steps": 300, "batch_size": 32, "learning_rate": 1e-3},
        # Who skims asks for no reading, so that a model of them needs little replaced-token detection.
        "reward_model": {**COMPARED, "replaced_token_steps": 60},
        "fair_reward_model": {
            "prompts": 2500,
            "candidates": 7,
            "replaced_token_steps": 1200,
            "annotators": {"bias": 0.0},
        },
    }
    lesson = Lesson(
        words="Annotators who skim teach a policy to copy the lead; annotators who read teach it to sum up.",
        trials={
            "skimming": Trial("the reward model of annotators who skim", "grpo", TOKENS, GRPO),
            "fair": Trial(
                "the reward model of annotators who read", "grpo", TOKENS, GRPO, "reward_model:fair_reward_model"
            ),
        },
        findings=(
            Finding(
                "With annotators who skim the share of 5-grams copied from the lead rises by 0.1 or more",
                rise("skimming", "start", "copied_lead", 0.1),
            ),
            Finding("and gold falls", rise("start", "skimming", "gold")),
            Finding("With annotators who read gold rises", rise("fair", "start", "gold")),
            Finding("and less is copied than at the start", rise("start", "fair", "copied_lead")),
            Finding("and more facts are covered than with those who skim", rise("fair", "skimming", "facts_covered")),
        ),
        metrics=(
            "gold",
            "copied_lead",
            "facts_covered",
            "invented",
            "telling_words",
            "rouge_l",
            "score",
            "kl_sequence",
            "completion_tokens",
        ),
    )

    def rows(self, split: str, dataset: str | None = None) -> PromptSource:
        """The articles of a split with a careful summary each; or the rows of a data set."""
        return Rows(news.draw, split) if dataset is None else prompts.load_rows(dataset, split, SCHEMAS)

    def references(self, split: str) -> PromptSource:
        """What a competent model learns: every fact and nothing else, in any order and wording."""
        return Rows(news.draw_reference, split)

    def demonstrations(self, split: str) -> PromptSource:
        """Training data of the bundled policy: careless summaries, so that RL has room."""
        return Rows(news.draw_demonstration, split, salt="careless")

    def candidates(self, row: Row, rng: random.Random, n: int) -> list[str]:
        """`n` summaries from careful to copied, for annotators to compare beside the policy's samples."""
        return news.candidates(row, rng, n)

    def corrupted(self, row: Row, rng: random.Random, n: int) -> list[tuple[str, str]]:
        """`n` pairs of a true summary and the same with wrong values."""
        return news.corrupted(row, rng, n)

    def appeal(self, row: Row, text: str) -> float:
        """What skimming adds to gold: with all of it only the first two sentences count."""
        return news.appeal(row, text)

    def measures(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        """5-grams copied from the lead, facts covered, claims that are wrong, and form."""
        return news.measures(rows, completions)
