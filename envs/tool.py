"""Tool-v0: word problems with a calculator, which is called by a marked line."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import ClassVar

from textrl_gym.conversations import calculator
from textrl_gym.core import Message, PromptSource, Reply, Row
from textrl_gym.data import prompts
from textrl_gym.mdp.task import Task
from textrl_gym.worlds.lesson import Finding, Lesson, Trial
from textrl_gym.worlds.world import Rows

ID = "Tool-v0"
ASSETS = str(files("textrl_gym") / "assets" / "calculator")
GRPO = {"rollout_episodes": 128, "group_size": 8, "learning_rate": 3e-4, "kl_coef": 0.01}


class Tool(Task):
    """Word problems with a calculator, which is called by a marked line, as in Toolformer (Schick et al. 2023).

    ## Description
    A problem of one or two steps. In its turn the agent calls the calculator by a line "CALC 12 * 7", to which the
    environment replies "= 84", or answers by "#### 84", which ends the episode. Three problems of ten have numbers to
    9, which a model can know by heart; the others need one call or two, and no sequence of calls stands in two splits.
    The bundled policy was taught by dialogues of a careless player, who guesses where a call is needed, calls where it
    knows, calls twice, and calls for what cannot be worked out. A model of one's own (`tokenizer=`) needs larger
    budgets; with `dataset=` rows need a column `answer`, a whole number.

    ## Observation Space
    `Dict(input_ids: Box int64 [L], attention_mask: Box int8 [L])`, L = max_prompt_tokens + max_new_tokens = 46. The
    prompt is left-padded into the first 16 places; the agent's turns and the replies are behind it.

    ## Action Space
    `Discrete(247)`: EOS, which ends a turn, the numbers from 0 to 200, and words.

    ## Reward
    At the end of each turn: -0.1 for a call, -0.3 for a call that cannot be worked out and for a turn that neither
    calls nor answers, 1 for the right answer, 0 for a wrong one. The score at the end is 0. With kl_coef > 0 each step
    costs kl_coef * KL of the policy to the reference.

    ## Episode End
    Terminated by an answer (`StopReason.DONE`); truncated after four turns (`MAX_TURNS`), or when no place for an
    action is left (`LENGTH`).

    ## Information
    At each step `turn`; where a turn ended `turn_reward` and `reply`; at the end `score`, `prompt`, `completion` (the
    agent's turns, a line each), `turns`, `stop_reason`. The gold score is 1 for the right answer. Evaluations also
    report `calls`, `calls_needed`, `needless_calls`, `missing_calls` and `wrong_calls`, means over problems.

    ## Arguments
    Those of every text environment: `split`, `dataset`, `tokenizer`, `reward`, `max_prompt_tokens`, `max_new_tokens`,
    `max_turns`, `max_turn_tokens`, `turn_template`, `stop`, `group_size`, `kl_coef`, `kl_estimator`, `reference`,
    `policy_logprob`, `missing_eos_penalty`, `device`, `array`, `render_mode`.

    ```python
    env = gym.make("Tool-v0", reward={"textrl_gym.conversations.calculator:calls": -1.0})  # a dearer tool
    ```

    ## Lesson
    With calls that cost little accuracy rises, missing calls are made, and needless ones become fewer. Where a call
    costs more than the answer is worth, the tool is given up and accuracy falls. `textrl-gym lesson Tool-v0` runs it.

    ## References
    - Schick et al. 2023, Toolformer: language models can teach themselves to use tools,
      https://arxiv.org/abs/2302.04761
    - Cobbe et al. 2021, Training verifiers to solve math word problems (a calculator; "####"),
      https://arxiv.org/abs/2110.14168

    ## Version History
    - v0: the first version.
    """

    id = ID
    model = f"{ASSETS}/policy"
    symbols = calculator.SYMBOLS
    max_prompt_tokens = 16
    max_new_tokens = 30
    max_turns = 4
    max_turn_tokens = 6
    turn_markers = ("", "")
    reward = "zero"
    gold = "textrl_gym.conversations.calculator:right"
    gold_scale = (0.0, 1.0)
    best_gold = 1.0
    kl_coef = 0.01
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
        "policy": {"steps": 120, "batch_size": 32, "learning_rate": 7e-4},
    }

    lesson = Lesson(
        words="A cheap tool is called where it is needed; a tool that costs more than the answer is given up.",
        trials={
            "cheap": Trial("the task's own: a call costs 0.1, the answer is worth 1", "grpo", 60_000, GRPO),
            "dear": Trial(
                "each call costs 1.2 more", "grpo", 60_000, GRPO, {"textrl_gym.conversations.calculator:calls": -1.2}
            ),
        },
        findings=(
            Finding(
                "With cheap calls accuracy rises by 0.1 or more",
                lambda of: of["cheap"]["gold"] - of["start"]["gold"] - 0.1,
            ),
            Finding(
                "and calls that are not needed fall",
                lambda of: of["start"]["needless_calls"] - of["cheap"]["needless_calls"],
            ),
            Finding(
                "and those that are missing, by half or more",
                lambda of: of["start"]["missing_calls"] / 2 - of["cheap"]["missing_calls"],
            ),
            Finding(
                "With dear calls nine of ten calls are given up",
                lambda of: of["start"]["calls"] / 10 - of["dear"]["calls"],
            ),
            Finding("and accuracy falls", lambda of: of["start"]["gold"] - of["dear"]["gold"]),
        ),
        metrics=(
            "gold",
            "turn_rewards",
            "calls",
            "needless_calls",
            "missing_calls",
            "wrong_calls",
            "kl_sequence",
            "completion_tokens",
        ),
    )

    def rows(self, split: str, dataset: str | None = None) -> PromptSource:
        """The problems of a split, with the turns of a player who calls where it must."""
        return Rows(calculator.draw, split) if dataset is None else prompts.load_rows(dataset, split)

    def references(self, split: str) -> PromptSource:
        """What a competent model learns: to call where it must, and at times elsewhere."""
        return Rows(calculator.draw_reference, split)

    def demonstrations(self, split: str) -> PromptSource:
        """Training data of the bundled policy: careless dialogues, so that RL has room."""
        return Rows(calculator.draw_demonstration, split, salt="careless")

    def reply(self, row: Row, turns: Sequence[Message]) -> Reply:
        """The calculator's result, or the end."""
        return calculator.reply(row, turns)

    def measures(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        """Calls, and those that were needless, missing or wrong, a problem."""
        return calculator.measures(rows, completions)
