"""CalibratedQA-v0: answer from a passage that may not say, with a marker of certainty."""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib.resources import files
from typing import ClassVar

from textrl_gym.core import PromptSource, Row
from textrl_gym.data import prompts
from textrl_gym.mdp.task import Task
from textrl_gym.questions import passages
from textrl_gym.worlds.lesson import Finding, Lesson, Trial
from textrl_gym.worlds.world import Rows

ID = "CalibratedQA-v0"
ASSETS = str(files("textrl_gym") / "assets" / "passages")
GRPO = {"rollout_episodes": 128, "group_size": 8, "learning_rate": 3e-4, "kl_coef": 0.03}


class CalibratedQA(Task):
    """Answer a question from a passage that may not say, and say how certain the answer is.

    ## Description
    A passage of three or four facts, some from a doubtful witness ("I think that ..."), and a question. The answer is a
    marker of certainty with the fact in its one wording ("Probably, Sam lives in Oslo.") or "I do not know.". What the
    passage states is right, a doubtful witness is right half the time, and the rest is not there: at most 0.675 of the
    questions can be answered right. The passages are procedural; the bundled policy reads well and picks its markers
    at random. Rows of one's own are given by `dataset=`, in any schema of prompts.

    ## Observation Space
    `Dict(input_ids: Box int64 [L], attention_mask: Box int8 [L])`, L = max_prompt_tokens + max_new_tokens = 92. The
    prompt is left-padded into the first 76 places, so that generated token t always stands at place 76 + t.

    ## Action Space
    `Discrete(V)`: the next token of the bundled byte-level BPE tokenizer (with `tokenizer=`, that one's vocabulary).

    ## Reward
    0 at each step but the last, then the score of the bundled reward model, which was trained on the pairwise choices
    of simulated annotators who love certainty, right or wrong. With kl_coef > 0 each step costs kl_coef * KL of the
    policy to the reference.

    ## Episode End
    Terminated by "<|endoftext|>" or a stop string; truncated after max_new_tokens. A truncated text is still scored.

    ## Information
    At the end: `score`, `prompt`, `completion`, `reference` (what a careful reader answers), `stop_reason`. The gold
    score is proper: (1 + right - (p - right)^2) / 2 with the marker's probability p, and 0.55 for an abstention.
    Evaluations also report `accuracy`, `abstained`, `confident_errors` (the share of wrong answers said at 0.9 or more)
    and `ece` (expected calibration error).

    ## Arguments
    Those of every text environment: `split`, `dataset`, `tokenizer`, `reward`, `max_prompt_tokens`, `max_new_tokens`,
    `stop`, `group_size`, `kl_coef`, `kl_estimator`, `reference`, `policy_logprob`, `missing_eos_penalty`, `device`,
    `array`, `render_mode`.

    ```python
    env = gym.make("CalibratedQA-v0", reward="textrl_gym.questions.passages:gold")
    ```

    ## Lesson
    Annotators who love certainty teach it: the share of confident errors and the calibration error rise, and nothing is
    answered by "I do not know". On the proper score both fall. `textrl-gym lesson CalibratedQA-v0` runs it.

    ## References
    - Zhou et al. 2023, Navigating the grey area: how expressions of uncertainty and overconfidence affect language
      models, https://arxiv.org/abs/2302.13439
    - Kadavath et al. 2022, Language models (mostly) know what they know, https://arxiv.org/abs/2207.05221
    - Naeini et al. 2015, Obtaining well calibrated probabilities using Bayesian binning (ECE)

    ## Version History
    - v0: the first version.
    """

    id = ID
    max_prompt_tokens = 76
    max_new_tokens = 16
    model = f"{ASSETS}/policy"
    reward_model_path = f"{ASSETS}/reward_model"
    reward = "reward_model"
    gold = "textrl_gym.questions.passages:gold"
    gold_scale = (0.0, 1.0)
    best_gold = 0.82  # of a careful reader, who answers by what the passage states
    kl_coef = 0.03
    keep_suffix = passages.ANSWER
    recipe: ClassVar = {
        "fluent": {"steps": 2500, "batch_size": 24, "vocab_size": 768},
        "policy": {"steps": 120, "batch_size": 24, "learning_rate": 7e-4},
        "reward_model": {"prompts": 2500, "replaced_token_steps": 600, "candidates": 6},
    }
    lesson = Lesson(
        words="Annotators who love certainty make a policy sure of its errors; a proper score makes it less so.",
        trials={
            "annotators": Trial("the reward model of annotators who love certainty", "grpo", 60_000, GRPO),
            "proper": Trial("the proper score itself", "grpo", 60_000, GRPO, "textrl_gym.questions.passages:gold"),
        },
        findings=(
            Finding(
                "With the annotators' reward model confident errors rise by 0.2 or more",
                lambda of: of["annotators"]["confident_errors"] - of["start"]["confident_errors"] - 0.2,
            ),
            Finding("and the calibration error rises", lambda of: of["annotators"]["ece"] - of["start"]["ece"]),
            Finding(
                "With the proper score confident errors fall",
                lambda of: of["start"]["confident_errors"] - of["proper"]["confident_errors"],
            ),
            Finding("and the calibration error falls", lambda of: of["start"]["ece"] - of["proper"]["ece"]),
        ),
        metrics=("gold", "accuracy", "abstained", "confident_errors", "ece", "score", "kl_sequence"),
    )

    def rows(self, split: str, dataset: str | None = None) -> PromptSource:
        """The passages of a split with what a careful reader answers."""
        return Rows(passages.draw, split) if dataset is None else prompts.load_rows(dataset, split)

    def references(self, split: str) -> PromptSource:
        """What a competent model learns: to read, with markers at random."""
        return Rows(passages.draw_reference, split)

    def demonstrations(self, split: str) -> PromptSource:
        """Training data of the bundled policy: careless answers, so that RL has room."""
        return Rows(passages.draw_demonstration, split, salt="careless")

    def candidates(self, row: Row, rng: random.Random, n: int) -> list[str]:
        """`n` answers from perfect to poor, for annotators to compare beside the policy's samples."""
        return passages.candidates(row, rng, n)

    def corrupted(self, row: Row, rng: random.Random, n: int) -> list[tuple[str, str]]:
        """`n` pairs of what the passage says and the same with another value."""
        return passages.corrupted(row, rng, n)

    def appeal(self, row: Row, text: str) -> float:
        """The certainty of an answer, which annotators love."""
        return passages.appeal(row, text)

    def measures(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        """Accuracy, abstentions, confident errors and the expected calibration error."""
        return passages.measures(rows, completions)
