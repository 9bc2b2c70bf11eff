"""SentimentContinue-v0: continue a review warmly."""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, ClassVar

from textrl_gym.core import PromptSource, Row
from textrl_gym.data import prompts
from textrl_gym.data.rows import text_of
from textrl_gym.mdp.task import Task
from textrl_gym.worlds import reviews
from textrl_gym.worlds.lesson import Finding, Lesson, Trial
from textrl_gym.worlds.world import Rows

ID = "SentimentContinue-v0"
ASSETS = str(files("textrl_gym") / "assets" / "reviews")
TARGET = 6.0
"""Nats per sequence, as in Ziegler et al. 2019."""
GRPO = {"rollout_episodes": 64, "group_size": 8, "learning_rate": 1e-3}
TOKENS = 200_000
"""Of a run: after 80,000 a policy without a penalty is warm, and has not collapsed yet."""
ADAPTIVE = {"kl_coef": 0.3, "kl_target": TARGET, "kl_horizon": 200}


def _review(row: Row) -> dict[str, Any]:
    # The line breaks of the web page are in the texts as they are published.
    return {"prompt": text_of(row, "text").replace("<br />", "\n")}


IMDB = prompts.PromptSchema("stanfordnlp/imdb", ("text", "label"), _review)


class SentimentContinue(Task):
    """Continue a review warmly, as in "Fine-tuning language models from human preferences" (Ziegler et al. 2019).

    ## Description
    The beginning of a review of a film, a meal, a gadget or a stay, with two to four judgements, good and bad ("The
    plot was dull, but I thought the cast very good."). The agent goes on with 22 to 28 words: it is to praise, in whole
    sentences and in ever other words, what such a review judges. The reviews are procedural; there are more
    than 10^6, and no review of one split occurs in another. The bundled policy blames as often as it praises, repeats
    judgements and strays. Real reviews are given by `dataset=`: a file, folder or Hub id in the schema of
    stanfordnlp/imdb, whose first 64 tokens are the prompt, or in any schema of prompts.

    ## Observation Space
    `Dict(input_ids: Box int64 [L], attention_mask: Box int8 [L])`, L = max_prompt_tokens + max_new_tokens = 96. The
    prompt is left-padded into the first 64 places, so that generated token t always stands at place 64 + t.

    ## Action Space
    `Discrete(V)`: the next token of the bundled byte-level BPE tokenizer (with `tokenizer=`, that one's vocabulary).

    ## Reward
    0 at each step but the last, then the score of the bundled reward model, which was trained on the pairwise choices
    of simulated annotators who see sentiment only: how much praise there is, whatever it is said of and however often.
    With kl_coef > 0 each step costs kl_coef * KL of the policy to the reference. For real reviews
    `reward="vader"` is the sentiment by VADER's lexicon (extra `vader`).

    ## Episode End
    Terminated by "<|endoftext|>" or a stop string; truncated after max_new_tokens. A truncated text is still scored.
    Ziegler et al. have 24 new tokens; here there are 32, so that a sentence can end (`max_new_tokens=24`).

    ## Information
    At the end: `score`, `prompt`, `completion`, `reference` (what a warm reviewer writes), `stop_reason`. The gold
    score is warmth times form, in [0, 1]: the polarity of up to four new judgements, times the share of new judgements
    of the right subject among all, where each sentence that is none counts as one. With `dataset=` it is VADER's.
    Evaluations also report `polarity` (mean of all adjectives, in [-1, 1]), `repeated_judgements` and `whole_sentences`
    (share of sentences).

    ## Arguments
    Those of every text environment: `split`, `dataset`, `tokenizer`, `reward`, `max_prompt_tokens`, `max_new_tokens`,
    `stop`, `group_size`, `kl_coef`, `kl_estimator`, `reference`, `policy_logprob`, `missing_eos_penalty`, `device`,
    `array`, `render_mode`.

    ```python
    env = gym.make("SentimentContinue-v0", kl_coef=0.1)
    ```

    ## Lesson
    The same agent without a KL penalty and with one that adapts to a target of nats a text: how far the score and the
    gold score part, and how varied the texts stay. `textrl-gym lesson SentimentContinue-v0` runs it; docs/lessons.md
    says what came out.

    ## References
    - Ziegler et al. 2019, Fine-tuning language models from human preferences, https://arxiv.org/abs/1909.08593
    - Hutto and Gilbert 2014, VADER: a parsimonious rule-based model for sentiment analysis of social media text
    - Maas et al. 2011, Learning word vectors for sentiment analysis (IMDB), https://aclanthology.org/P11-1015

    ## Version History
    - v0: the first version.
    """

    id = ID
    max_prompt_tokens = 64
    max_new_tokens = 32
    model = f"{ASSETS}/policy"
    reward_model_path = f"{ASSETS}/reward_model"
    reward = "reward_model"
    gold = "textrl_gym.worlds.reviews:gold"
    gold_scale = (0.0, 1.0)
    gold_of_dataset = "vader"
    best_gold = 0.86  # of warm continuations
    kl_coef = 0.1
    recipe: ClassVar = {
        "fluent": {"steps": 3000, "batch_size": 24, "vocab_size": 896, "copy_steps": 300},
        "policy": {"steps": 120, "batch_size": 24, "learning_rate": 7e-4},
        "reward_model": {"prompts": 2500, "candidates": 6},
    }
    lesson = Lesson(
        words="Without a KL penalty the score rises and the text collapses; an adaptive one holds its target.",
        trials={
            "free": Trial("no KL penalty", "grpo", TOKENS, {**GRPO, "kl_coef": 0.0}),
            "adaptive": Trial("the KL penalty adapts to 6 nats a text", "grpo", TOKENS, {**GRPO, **ADAPTIVE}),
        },
        findings=(
            Finding("Without a penalty the score rises", lambda of: of["free"]["score"] - of["start"]["score"]),
            Finding("while distinct bigrams fall", lambda of: of["start"]["distinct_2"] - of["free"]["distinct_2"]),
            Finding("and gold falls", lambda of: of["start"]["gold"] - of["free"]["gold"]),
            Finding("With the adaptive penalty gold rises", lambda of: of["adaptive"]["gold"] - of["start"]["gold"]),
            Finding(
                "distinct bigrams are more than without one",
                lambda of: of["adaptive"]["distinct_2"] - of["free"]["distinct_2"],
            ),
            Finding(
                "and the KL is within 20% of its target",
                lambda of: 0.2 * TARGET - abs(of["adaptive"]["kl_sequence"] - TARGET),
            ),
        ),
        metrics=(
            "gold",
            "score",
            "kl_sequence",
            "distinct_2",
            "polarity",
            "repeated_judgements",
            "whole_sentences",
            "completion_tokens",
        ),
    )

    def rows(self, split: str, dataset: str | None = None) -> PromptSource:
        """The beginnings of reviews with warm continuations."""
        if dataset is None:
            return Rows(reviews.draw, split)
        return prompts.load_rows(dataset, split, (IMDB, *prompts.PROMPT_SCHEMAS))

    def references(self, split: str) -> PromptSource:
        """What a competent model learns: to judge what is new, good and bad alike."""
        return Rows(reviews.draw_reference, split)

    def demonstrations(self, split: str) -> PromptSource:
        """Training data of the bundled policy: cool and careless continuations, so that RL has room."""
        return Rows(reviews.draw_demonstration, split, salt="careless")

    def candidates(self, row: Row, rng: random.Random, n: int) -> list[str]:
        """`n` continuations from perfect to poor, for annotators to compare beside the policy's samples."""
        return reviews.candidates(row, rng, n)

    def appeal(self, row: Row, text: str) -> float:
        """How much praise there is instead of the gold score: annotators see sentiment only."""
        return reviews.appeal(row, text)

    def measures(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        """The mean polarity, and the shares of repeated judgements and of well-formed sentences."""
        return reviews.measures(rows, completions)
