"""EvidenceQA-v0: answer a question from three snippets, with citations."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, ClassVar

from textrl_gym.core import PromptSource, Row
from textrl_gym.data import prompts
from textrl_gym.data.rows import BadRow, shown, text_of
from textrl_gym.mdp.task import Task
from textrl_gym.questions import snippets
from textrl_gym.worlds.lesson import Finding, Lesson, Trial, rise
from textrl_gym.worlds.world import Rows

ID = "EvidenceQA-v0"
ASSETS = str(files("textrl_gym") / "assets" / "snippets")
GRPO = {"rollout_episodes": 128, "group_size": 8, "learning_rate": 8e-4, "kl_coef": 0.03}
TOKENS = 25_000
JUDGED: dict[str, Any] = {"prompts": 2500, "replaced_token_steps": 700, "candidates": 6}


# -- published schemas ------------------------------------------------------------------------------------------------


def written(question: str, quotes: Sequence[tuple[str, str]]) -> str:
    """A question and numbered snippets with their titles, as WebGPT numbers them.

    Departure from the embedded prompts: the question stands first, since a prompt that is too long loses what stands
    last before "Answer :", and that may be a snippet but not the question.
    """
    numbered = [f"[{number}] {title}\n{extract}" for number, (title, extract) in enumerate(quotes, start=1)]
    return "\n\n".join([question, *numbered]) + snippets.ANSWER


def _quotes(row: Row, name: str) -> list[tuple[str, str]]:
    quotes = row.get(name)
    titles, extracts = (quotes.get(part) if isinstance(quotes, Mapping) else None for part in ("title", "extract"))
    if not isinstance(titles, list) or not isinstance(extracts, list) or len(titles) != len(extracts):
        raise BadRow(f"column {name!r} has no extracts with a title each", shown(quotes))
    if not all(isinstance(text, str) for text in [*titles, *extracts]):
        raise BadRow(f"column {name!r} has a title or extract that is no text", shown(quotes))
    return list(zip(titles, extracts, strict=True))


def webgpt_prompt(row: Row) -> dict[str, Any]:
    """A comparison of WebGPT: the question with the quotes of the preferred answer, and that answer.

    The first of both where neither is preferred. Answers cite their quotes as "[1]".
    """
    question = row["question"]
    text = text_of(question, "full_text") if isinstance(question, Mapping) else text_of(row, "question")
    score = row.get("score_0")
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise BadRow("column 'score_0' is not a number", shown(score))
    # The scores of both answers sum to 0.
    number = 0 if score >= 0 else 1
    prompt = written(text, _quotes(row, f"quotes_{number}"))
    return {"prompt": prompt, "completion": " " + text_of(row, f"answer_{number}").strip()}


def fine_grained_prompt(row: Row) -> dict[str, Any]:
    """A question of fine-grained RLHF with its passages, and the answer that a person wrote ("gold")."""
    quotes = []
    for passage in row["passages"] if isinstance(row["passages"], list) else [None]:
        if not isinstance(passage, list) or not passage or not all(isinstance(text, str) for text in passage):
            raise BadRow("column 'passages' has one that is no list of texts", shown(passage))
        title, *sentences = passage
        # The first sentence of an article has the title once more.
        quotes.append((title, " ".join(sentences).removeprefix(f"{title}\n\n")))
    return {"prompt": written(text_of(row, "question"), quotes), "completion": " " + text_of(row, "gold").strip()}


SCHEMAS = (
    prompts.PromptSchema(
        "openai/webgpt_comparisons, and OpenAI's own file of it",
        ("question", "quotes_0", "answer_0", "score_0", "quotes_1", "answer_1"),
        webgpt_prompt,
    ),
    prompts.PromptSchema("Fine-grained RLHF", ("question", "passages", "gold"), fine_grained_prompt),
    *prompts.PROMPT_SCHEMAS,
)


# -- task -------------------------------------------------------------------------------------------------------------


class EvidenceQA(Task):
    """Answer a question from snippets and cite them, as in "WebGPT" (Nakano et al. 2021).

    ## Description
    Three numbered snippets and a question; the answer is a fact, with the numbers of the snippets behind it that say so
    ("Sam lives in Oslo [2] ."). The fact stands in one snippet, or in two of them in three of ten questions; the
    others are about other people. The snippets are procedural, and no question of one split occurs in another. The
    bundled policy answers well, cites what does not say it in every third citation, and at times cites nothing. Real
    data are given by `dataset=`: WebGPT's comparisons or fine-grained RLHF, with more tokens and a model that knows
    their words. A question of WebGPT comes several times, with other quotes, and may then stand in two splits.

    ## Observation Space
    `Dict(input_ids: Box int64 [L], attention_mask: Box int8 [L])`, L = max_prompt_tokens + max_new_tokens = 42. The
    prompt is left-padded into the first 30 places, so that generated token t always stands at place 30 + t.

    ## Action Space
    `Discrete(84)`: EOS and words (with `tokenizer=`, that one's vocabulary).

    ## Reward
    0 at each step but the last, then the score of the bundled reward model, which was trained on the pairwise choices
    of simulated annotators who like citations; `reward="reward_model:fair_reward_model"` is one of annotators who check
    them. With kl_coef > 0 each step costs kl_coef * KL of the policy to the reference.

    ## Episode End
    Terminated by EOS or a stop string; truncated after max_new_tokens. A truncated text is still scored.

    ## Information
    At the end: `score`, `prompt`, `completion`, `reference` (the right answer, rightly cited), `stop_reason`. The gold
    score of a right answer is the share of its citations whose snippet says it, 0.5 without a citation; a wrong answer
    has 0. With `dataset=` it is ROUGE-L. Evaluations also report `accuracy`, `citations` (a text), `citation_precision`
    (of those behind right answers) and `uncited` (of right answers).

    ## Arguments
    Those of every text environment: `split`, `dataset`, `tokenizer`, `reward`, `max_prompt_tokens`, `max_new_tokens`,
    `stop`, `group_size`, `kl_coef`, `kl_estimator`, `reference`, `policy_logprob`, `missing_eos_penalty`, `device`,
    `array`, `render_mode`.

    ```python
    env = gym.make("EvidenceQA-v0", reward="reward_model:fair_reward_model")
    ```

    ## Lesson
    Annotators to whom each citation looks better teach a policy to cite everything: citations rise, and their precision
    falls. With fair annotators precision rises. `textrl-gym lesson EvidenceQA-v0` runs it.

    ## References
    - Nakano et al. 2021, WebGPT: browser-assisted question-answering with human feedback,
      https://arxiv.org/abs/2112.09332
    - Menick et al. 2022, Teaching language models to support answers with verified quotes (GopherCite),
      https://arxiv.org/abs/2203.11147
    - Gao et al. 2023, Enabling large language models to generate text with citations (ALCE),
      https://arxiv.org/abs/2305.14627
    - Liu et al. 2023, Evaluating verifiability in generative search engines, https://arxiv.org/abs/2304.09848
    - Wu et al. 2023, Fine-grained human feedback gives better rewards for language model training,
      https://arxiv.org/abs/2306.01693

    ## Version History
    - v0: the first version.
    """

    id = ID
    max_prompt_tokens = 30
    max_new_tokens = 12
    model = f"{ASSETS}/policy"
    symbols = snippets.SYMBOLS
    reward_model_path = f"{ASSETS}/reward_model"
    reward = "reward_model"
    gold = "textrl_gym.questions.snippets:gold"
    gold_scale = (0.0, 1.0)
    gold_of_dataset = "rouge"
    best_gold = 1.0  # of a right answer, rightly cited
    kl_coef = 0.03
    keep_suffix = snippets.ANSWER
    recipe: ClassVar = {
        "fluent": {
            "references": 20_000,
            "steps": 500,
            "batch_size": 32,
            "layers": 3,
            "hidden_size": 96,
            "intermediate_size": 192,
            "copy_run": 24,
            "copy_steps": 120,
            "copy_batch_size": 32,
        },
        "policy": {"steps": 100, "batch_size": 32, "learning_rate": 7e-4},
        "reward_model": JUDGED,
        "fair_reward_model": {**JUDGED, "annotators": {"bias": 0.0}},
    }
    lesson = Lesson(
        words="Annotators who like citations teach a policy to cite everything; fair ones teach it to cite rightly.",
        trials={
            "impressed": Trial("the reward model of annotators who like citations", "grpo", TOKENS, GRPO),
            "fair": Trial(
                "the reward model of annotators who check them", "grpo", TOKENS, GRPO, "reward_model:fair_reward_model"
            ),
        },
        findings=(
            Finding(
                "With annotators who like citations there are more of them, by 0.5 a text or more",
                rise("impressed", "start", "citations", 0.5),
            ),
            Finding("and they are less precise", rise("start", "impressed", "citation_precision")),
            Finding("With fair annotators they are more precise", rise("fair", "start", "citation_precision")),
            Finding("and gold rises", rise("fair", "start", "gold")),
            Finding("and ends higher than with annotators who like citations", rise("fair", "impressed", "gold")),
        ),
        metrics=("gold", "accuracy", "citations", "citation_precision", "uncited", "score", "kl_sequence"),
    )

    def rows(self, split: str, dataset: str | None = None) -> PromptSource:
        """The questions of a split with the right answer, rightly cited; or the rows of a data set."""
        return Rows(snippets.draw, split) if dataset is None else prompts.load_rows(dataset, split, SCHEMAS)

    def demonstrations(self, split: str) -> PromptSource:
        """Training data of the bundled policy: careless answers, so that RL has room."""
        return Rows(snippets.draw_demonstration, split, salt="careless")

    def candidates(self, row: Row, rng: random.Random, n: int) -> list[str]:
        """`n` answers from right to wrong with any citations, to compare beside the policy's samples."""
        return snippets.candidates(row, rng, n)

    def corrupted(self, row: Row, rng: random.Random, n: int) -> list[tuple[str, str]]:
        """`n` pairs of the right answer, rightly cited, and the same with another value or citation."""
        return snippets.corrupted(row, rng, n)

    def appeal(self, row: Row, text: str) -> float:
        """What citations are worth to annotators, whatever they cite."""
        return snippets.appeal(row, text)

    def measures(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        """Accuracy, citations a text, and their precision."""
        return snippets.measures(rows, completions)
