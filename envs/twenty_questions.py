"""TwentyQuestions-v0: find out which of 256 things is meant, by questions about its attributes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import ClassVar

from textrl_gym.conversations import things
from textrl_gym.core import Message, PromptSource, Reply, Row
from textrl_gym.data import prompts
from textrl_gym.mdp.task import Task
from textrl_gym.worlds.lesson import Finding, Lesson, Trial
from textrl_gym.worlds.world import Rows

ID = "TwentyQuestions-v0"
ASSETS = str(files("textrl_gym") / "assets" / "things")
GRPO = {"rollout_episodes": 128, "group_size": 8, "learning_rate": 5e-4, "kl_coef": 0.01}


class TwentyQuestions(Task):
    """Find out which of 256 things is meant by as few questions as possible, as in the game of twenty questions.

    ## Description
    The environment has a thing in mind, of a size, a colour, a material and a kind, with four values each. In its turn
    the agent names one value of an attribute or two, "is it red or blue", and the environment answers "yes" or "no" and
    what is still possible of that attribute: "no green black". Or it guesses, "is it a tiny green wooden spoon": the
    game is over when the guess is right, or after twenty turns. What is neither is answered by "what ?". Questions that
    halve what is possible need eight answers for any thing. The bundled policy was taught by games of a careless
    player, who asks for single values, at times for what is known already, and guesses too early.

    ## Observation Space
    `Dict(input_ids: Box int64 [L], attention_mask: Box int8 [L])`, L = max_prompt_tokens + max_new_tokens = 240. The
    prompt has the first 4 places; the agent's turns and the replies are behind it.

    ## Action Space
    `Discrete(27)`: EOS, which ends a turn, the values of attributes, and the other words of the game.

    ## Reward
    At the end of each turn -0.025 where it does not find the thing, and 1 where it does; the score at the end is 0.
    With kl_coef > 0 each step costs kl_coef * KL of the policy to the reference.

    ## Episode End
    Terminated by the right guess (`StopReason.DONE`); truncated after twenty turns (`MAX_TURNS`), or when no place for
    an action is left (`LENGTH`).

    ## Information
    At each step `turn`; where a turn ended `turn_reward` and `reply`; at the end `score`, `prompt`, `completion` (the
    agent's turns, a line each), `turns`, `stop_reason`. The gold score is the return of the game, 0 where the thing is
    not found: at best 0.8125 in the mean. Evaluations also report `solved`, `turns`, `halves` (the share of questions
    that leave half of an attribute's values, whatever the answer), `idle` (the share whose answer was known) and
    `guesses`.

    ## Arguments
    Those of every text environment: `split`, `dataset`, `tokenizer`, `reward`, `max_prompt_tokens`, `max_new_tokens`,
    `max_turns`, `max_turn_tokens`, `turn_template`, `stop`, `group_size`, `kl_coef`, `kl_estimator`, `reference`,
    `policy_logprob`, `missing_eos_penalty`, `device`, `array`, `render_mode`. Rows of a `dataset` have the column
    `thing`, its four values in a text.

    ```python
    env = gym.make("TwentyQuestions-v0", split="validation")
    ```

    ## Lesson
    Whether a careless player learns to ask what it does not know, with credit for whole games and for turns. With five
    seeds it did not: docs/lessons.md has the numbers. `textrl-gym lesson TwentyQuestions-v0` runs it.

    ## References
    - Abdulhai et al. 2023, LMRL Gym: benchmarks for multi-turn reinforcement learning with language models (its twenty
      questions), https://arxiv.org/abs/2311.18232
    - Shannon 1948, A mathematical theory of communication: an answer of yes or no tells at most one bit

    ## Version History
    - v0: the first version.
    """

    id = ID
    model = f"{ASSETS}/policy"
    symbols = things.SYMBOLS
    max_prompt_tokens = 4
    max_new_tokens = 236
    max_turns = things.MAX_TURNS
    max_turn_tokens = 8
    turn_markers = ("", "")
    reward = "zero"
    gold = "textrl_gym.conversations.things:quickness"
    gold_scale = (0.0, 1.0)
    best_gold = 1 - things.COST * things.FEWEST_TURNS
    kl_coef = 0.01
    recipe: ClassVar = {
        "fluent": {
            "references": 20_000,
            "steps": 600,
            "batch_size": 32,
            "layers": 3,
            "hidden_size": 96,
            "intermediate_size": 192,
            "copy_run": 24,
            "copy_steps": 100,
            "copy_batch_size": 32,
        },
        "policy": {"steps": 200, "batch_size": 32, "learning_rate": 7e-4},
    }
    lesson = Lesson(
        words="A careless player learns to ask what it does not know, and needs fewer turns.",
        trials={
            "trajectory": Trial("credit for the whole game", "grpo", 150_000, GRPO),
            "turn": Trial("credit from each turn on", "grpo", 150_000, {**GRPO, "credit": "turn"}),
        },
        findings=(
            Finding(
                "With credit for the whole game the return is better by 0.05 or more",
                lambda of: of["trajectory"]["gold"] - of["start"]["gold"] - 0.05,
            ),
            Finding(
                "and with credit for turns",
                lambda of: of["turn"]["gold"] - of["start"]["gold"] - 0.05,
            ),
            Finding(
                "Both ask fewer questions whose answer is known",
                lambda of: of["start"]["idle"] - max(of["trajectory"]["idle"], of["turn"]["idle"]),
            ),
        ),
        metrics=("gold", "gold_greedy", "solved", "turns", "halves", "idle", "guesses", "kl_sequence"),
    )

    def rows(self, split: str, dataset: str | None = None) -> PromptSource:
        """The things, with the turns of the best player; all splits have all things."""
        return Rows(things.draw, split) if dataset is None else prompts.load_rows(dataset, split)

    def references(self, split: str) -> PromptSource:
        """What a competent model learns: to halve, and to guess when the thing is known."""
        return Rows(things.draw_reference, split)

    def demonstrations(self, split: str) -> PromptSource:
        """Training data of the bundled policy: careless games, so that RL has room."""
        return Rows(things.draw_demonstration, split, salt="careless")

    def reply(self, row: Row, turns: Sequence[Message]) -> Reply:
        """What the oracle answers."""
        return things.reply(row, turns)

    def measures(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        """Things found, turns, questions that halve or are idle, and guesses."""
        return things.measures(rows, completions)
