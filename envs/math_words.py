"""MathWords-v0: solve an arithmetic word problem, with the working and the answer behind ####."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import ClassVar

from textrl_gym.core import PromptSource, Row
from textrl_gym.data import prompts
from textrl_gym.mdp.task import Task
from textrl_gym.questions import sums
from textrl_gym.worlds.lesson import Finding, Lesson, Trial
from textrl_gym.worlds.world import Rows

ID = "MathWords-v0"
ASSETS = str(files("textrl_gym") / "assets" / "sums")
GRPO = {"rollout_episodes": 64, "group_size": 8, "learning_rate": 1e-4, "kl_coef": 0.03}


class MathWords(Task):
    """Solve an arithmetic word problem, as in "Training verifiers to solve math word problems" (Cobbe et al. 2021).

    ## Description
    A problem of one to three steps with whole numbers to 20, some of which do not matter, ends in "Answer:"; the agent
    writes the working and "####" with the answer, as GSM8K does. The embedded problems are procedural, and no sequence
    of equations of one split occurs in another. The bundled policy can reckon, and has been taught bad habits: most
    often it writes the answer alone, which it then guesses. Real problems are given by `dataset=`: a file, folder or
    Hub id in the schema of openai/gsm8k (MIT licence), with more tokens and a model that knows them.

    ## Observation Space
    `Dict(input_ids: Box int64 [L], attention_mask: Box int8 [L])`, L = max_prompt_tokens + max_new_tokens = 112. The
    prompt is left-padded into the first 72 places, so that generated token t always stands at place 72 + t.

    ## Action Space
    `Discrete(V)`: the next token of the bundled byte-level BPE tokenizer (with `tokenizer=`, that one's vocabulary).

    ## Reward
    0 at each step but the last, then 1 where the final number is right, else 0 (`number`): a verifiable reward, which
    needs no reward model. With kl_coef > 0 each step costs kl_coef * KL of the policy to the reference.

    ## Episode End
    Terminated by "<|endoftext|>" or a stop string; truncated after max_new_tokens. A truncated text is still scored.

    ## Information
    At the end: `score`, `prompt`, `completion`, `reference` (the worked solution), `stop_reason`. Evaluations also
    report `working` (share of completions with an equation) and `format` (share that end in "#### number").

    ## Arguments
    Those of every text environment: `split`, `dataset`, `tokenizer`, `reward`, `max_prompt_tokens`, `max_new_tokens`,
    `stop`, `group_size`, `kl_coef`, `kl_estimator`, `reference`, `policy_logprob`, `missing_eos_penalty`, `device`,
    `array`, `render_mode`.

    ```python
    env = gym.make("MathWords-v0", split="validation")
    ```

    ## Lesson
    A reward that checks the answer alone makes the working appear, since worked answers are right more often. A reward
    for the format alone is hacked: every completion has the format, and fewer are right. `textrl-gym lesson
    MathWords-v0` runs it. RL brings back what the model could do before it was taught bad habits; it is not shown to
    pass it.

    ## References
    - Cobbe et al. 2021, Training verifiers to solve math word problems, https://arxiv.org/abs/2110.14168
    - Lambert et al. 2024, Tulu 3 (RL with verifiable rewards), https://arxiv.org/abs/2411.15124
    - Yue et al. 2025, Does reinforcement learning really incentivize reasoning capacity in LLMs beyond the base model?,
      https://arxiv.org/abs/2504.13837

    ## Version History
    - v0: the first version.
    """

    id = ID
    max_prompt_tokens = 72
    max_new_tokens = 40
    model = f"{ASSETS}/policy"
    reward = "number"
    gold = "number"
    gold_scale = (0.0, 1.0)
    best_gold = 0.91  # of the competent model that the bundled one was made of
    kl_coef = 0.03
    keep_suffix = sums.ANSWER
    recipe: ClassVar = {
        "fluent": {"steps": 3000, "batch_size": 24, "vocab_size": 1024, "copy_steps": 300},
        "policy": {"steps": 120, "batch_size": 24, "learning_rate": 7e-4},
    }
    lesson = Lesson(
        words="A reward on the answer alone makes the working appear; a reward on the format alone is hacked.",
        trials={
            "answer": Trial("1 for the right final number", "grpo", 60_000, GRPO),
            "format": Trial(
                "1 for ending in '#### number', right or wrong", "grpo", 60_000, GRPO, r"format:#### -?\d+"
            ),
        },
        findings=(
            Finding(
                "With the answer as the reward pass@1 rises by 0.2 or more",
                lambda of: of["answer"]["gold"] - of["start"]["gold"] - 0.2,
            ),
            Finding(
                "and the share of answers with working rises by 0.2 or more",
                lambda of: of["answer"]["working"] - of["start"]["working"] - 0.2,
            ),
            Finding(
                "With the format as the reward the format is kept by 0.95 or more",
                lambda of: of["format"]["format"] - 0.95,
            ),
            Finding("and pass@1 does not rise", lambda of: of["start"]["gold"] - of["format"]["gold"]),
        ),
        metrics=(
            "gold",
            "gold_greedy",
            "gold_best_of_8",
            "working",
            "format",
            "score",
            "kl_sequence",
            "completion_tokens",
        ),
        samples=8,
    )

    def rows(self, split: str, dataset: str | None = None) -> PromptSource:
        """The problems of a split with their worked solutions."""
        return Rows(sums.draw, split) if dataset is None else prompts.load_rows(dataset, split)

    def references(self, split: str) -> PromptSource:
        """What a competent model learns: worked problems, and bare equations in turn."""
        return Rows(sums.draw_teaching, split)

    def demonstrations(self, split: str) -> PromptSource:
        """Training data of the bundled policy: poor solutions, so that RL has room."""
        return Rows(sums.draw_spoiled, split, salt="spoiled")

    def measures(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        """The shares of completions with working, and of those that end in "#### number"."""
        return sums.measures(completions)
