"""ReasoningGym-v0: any task of reasoning-gym, as problems with answers that are checked by rule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

from textrl_gym.core import PromptSource, Row
from textrl_gym.data import prompts
from textrl_gym.mdp.task import Task
from textrl_gym.questions import problems
from textrl_gym.worlds.lesson import Finding, Lesson, Trial, rise
from textrl_gym.worlds.world import Rows

ID = "ReasoningGym-v0"
ASSETS = str(files("textrl_gym") / "assets" / "spelling")
EXACT = "textrl_gym.questions.problems:exact"
GRPO = {"rollout_episodes": 128, "group_size": 8, "learning_rate": 4e-4, "kl_coef": 0.01}
TOKENS = 16_000
LONG = f"spell_backward:{json.dumps(problems.WORDS[-1])}"


class ReasoningGym(Task):
    """Solve procedural problems, as in "Reasoning Gym: reasoning environments for RL with verifiable rewards" (2025).

    ## Description
    A problem of reasoning-gym, of which the package of that name must be installed; the completion is the answer. Which
    of its 106 tasks, and how hard, is said by `dataset`: `chain_sum`, `chain_sum:{"max_terms": 3}`,
    `chain_sum:{"level": 2}` (of the library's curriculum), or a list of settings, from which prompts are taken in turn:
    `chain_sum:[{"level": 0}, {"level": 2}]`. A hash of the problem says which split it is in. By default a word of 3 to
    8 letters is to be spelled backward, and the bundled policy reads bytes and slips in half of the letters. Other
    tasks need a model that knows them (`tokenizer=`, and `model=` of the agent), and more tokens. Rows of one's own are
    given by a file or folder, and need a `reward` that can score them.

    ## Observation Space
    `Dict(input_ids: Box int64 [L], attention_mask: Box int8 [L])`, L = max_prompt_tokens + max_new_tokens = 84. The
    prompt is left-padded into the first 72 places, so that generated token t always stands at place 72 + t.

    ## Action Space
    `Discrete(258)`: a byte, EOS or a pad token (with `tokenizer=`, that one's vocabulary).

    ## Reward
    0 at each step but the last, then the score of the task's own scorer, in [0, 1] (of spelling: the share of the
    letters that are right). It is exact match where the task has the library's default scorer, which also pays a wrong
    answer that contains the right one, and where the scorer would run the completion as Python code. With kl_coef > 0
    each step costs kl_coef * KL of the policy to the reference model.

    ## Episode End
    Terminated by EOS or a stop string; truncated after max_new_tokens. A truncated text is still scored.

    ## Information
    At the end: `score`, `prompt`, `completion`, `reference` (the answer, where there is one alone), `stop_reason`. The
    gold score is exact match. Evaluations of the default problems also report `solved_hardest`: the share of exact
    answers to words of 7 and 8 letters.

    ## Arguments
    Those of every text environment: `split`, `dataset`, `tokenizer`, `reward`, `max_prompt_tokens`, `max_new_tokens`,
    `stop`, `group_size`, `kl_coef`, `kl_estimator`, `reference`, `policy_logprob`, `missing_eos_penalty`, `device`,
    `array`, `render_mode`.

    ```python
    env = gym.make("ReasoningGym-v0", dataset='spell_backward:{"level": 1}')
    ```

    ## Lesson
    A reward for the exact answer says nothing where all answers of a group are wrong. On long words alone GRPO learns
    by luck, and late; on words of all lengths, a curriculum by mixture, it learns the long ones too. Credit for each
    right letter is a signal from the start, and makes letters right before words. `textrl-gym lesson ReasoningGym-v0`
    runs it.

    ## References
    - Stojanovski et al. 2025, Reasoning Gym: reasoning environments for reinforcement learning with verifiable rewards,
      https://arxiv.org/abs/2505.24760
    - Bengio et al. 2009, Curriculum learning, https://dl.acm.org/doi/10.1145/1553374.1553380

    ## Version History
    - v0: the first version.
    """

    id = ID
    problems: ClassVar = problems.SPELLING
    """Where the environment's `dataset` names none."""
    suffix = "\nAnswer:"
    """Behind each problem."""
    max_prompt_tokens = 72
    max_new_tokens = 12
    model = f"{ASSETS}/policy"
    reward = "textrl_gym.questions.problems:score"
    gold = gold_of_dataset = EXACT
    gold_scale = (0.0, 1.0)
    best_gold = 1.0  # every word can be spelled
    kl_coef = 0.01
    keep_suffix = suffix
    recipe: ClassVar = {
        "fluent": {
            "references": 30_000,
            "steps": 900,
            "batch_size": 32,
            "vocab_size": 258,
            "layers": 3,
            "hidden_size": 96,
            "intermediate_size": 192,
            "copy_run": 24,
            "copy_steps": 120,
            "copy_batch_size": 32,
        },
        "policy": {"steps": 150, "batch_size": 32, "learning_rate": 7e-4},
    }
    lesson = Lesson(
        words="A reward for the exact answer teaches nothing where every answer is wrong: mix in what is easier.",
        trials={
            "hard": Trial(
                "words of 7 and 8 letters, 1 for an exact answer",
                "grpo",
                TOKENS,
                GRPO,
                EXACT,
                LONG,
                on_bad_health="warn",  # all answers of the first rollout may be wrong
            ),
            "mixed": Trial("words of 3 to 8 letters, 1 for an exact answer", "grpo", TOKENS, GRPO, EXACT),
            "partial": Trial(
                "words of 7 and 8 letters, the share of right letters", "grpo", TOKENS, GRPO, dataset=LONG
            ),
        },
        findings=(
            Finding(
                "With words of all lengths long ones are right more often than with long ones alone, by 0.1 or more",
                lambda of: of["mixed"]["solved_hardest"] - of["hard"]["gold"] - 0.1,
            ),
            Finding(
                "With credit for each right letter more letters are right, by 0.2 or more",
                rise("partial", "start", "score", 0.2),
            ),
            Finding(
                "but fewer long words than with words of all lengths",
                lambda of: of["mixed"]["solved_hardest"] - of["partial"]["gold"],
            ),
        ),
        metrics=("gold", "gold_greedy", "solved_hardest", "score", "kl_sequence", "completion_tokens"),
    )

    def rows(self, split: str, dataset: str | None = None) -> PromptSource:
        """The problems of a split, made when they are asked for; or the rows of a file or folder."""
        if dataset is not None and Path(dataset).exists():
            return prompts.load_rows(dataset, split)
        return problems.Problems(dataset or self.problems, split, self.suffix)

    def demonstrations(self, split: str) -> PromptSource:
        """Training data of the bundled policy: spellings with wrong letters, so that RL has room."""
        return Rows(problems.draw_misspelled, split, salt=self.suffix)

    def measures(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        """Exact answers to the hardest problems."""
        return problems.measures(rows, completions)
