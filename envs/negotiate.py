"""Negotiate-v0: buy a car from a scripted dealer, who comes down to a hidden reserve price by a rule."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import ClassVar

from textrl_gym.conversations import dealer
from textrl_gym.core import Message, PromptSource, Reply, Row
from textrl_gym.data import prompts
from textrl_gym.mdp.task import Task
from textrl_gym.worlds.lesson import Finding, Lesson, Trial
from textrl_gym.worlds.world import Rows

ID = "Negotiate-v0"
ASSETS = str(files("textrl_gym") / "assets" / "dealer")
GRPO = {"rollout_episodes": 128, "group_size": 8, "learning_rate": 5e-4, "kl_coef": 0.01}


class Negotiate(Task):
    """Buy a car as cheaply as a scripted dealer lets it go, as in "Deal or no deal?" (Lewis et al. 2017).

    ## Description
    The prompt names a car and its first price. In its turn the agent says "offer 43", to which the dealer replies
    "then 73" with what it asks now, or "deal". After a serious offer, half of the first price or more, the dealer comes
    down by a quarter of what is between the two, and never below its reserve; another offer it answers by "no 73", and
    after a second such one it leaves. "last 65" is the last price: what is no deal then is none. The reserve (60 to 75%
    of the first price) and the number of answers (three to five) are hidden. The bundled policy was taught by dialogues
    of a careless buyer, who offers anything and often takes an early answer.

    ## Observation Space
    `Dict(input_ids: Box int64 [L], attention_mask: Box int8 [L])`, L = max_prompt_tokens + max_new_tokens = 44. The
    prompt is left-padded into the first 10 places; the agent's turns and the replies are behind it.

    ## Action Space
    `Discrete(151)`: EOS, which ends a turn, the numbers from 20 to 98, and words.

    ## Reward
    At the end of each turn what the price has come down by it, as a share of the most that this dealer can be brought
    down, and without a deal all of that back at the end: so the rewards of a conversation sum to how low the price is,
    from 0, the first price or no deal, to 1, the lowest that is possible. The score at the end is 0. With kl_coef > 0
    each step costs kl_coef * KL of the policy to the reference.

    ## Episode End
    Terminated by a deal or when the dealer leaves (`StopReason.DONE`); truncated after six turns (`MAX_TURNS`), or when
    no place for an action is left (`LENGTH`).

    ## Information
    At each step `turn`; where a turn ended `turn_reward` and `reply`; at the end `score`, `prompt`, `completion` (the
    agent's turns, a line each), `turns`, `stop_reason`. The gold score is how low the price is. Evaluations also report
    `deals`, `patience` (the share of the dealer's answers that were waited for) and `insults` (offers not serious).

    ## Arguments
    Those of every text environment: `split`, `dataset`, `tokenizer`, `reward`, `max_prompt_tokens`, `max_new_tokens`,
    `max_turns`, `max_turn_tokens`, `turn_template`, `stop`, `group_size`, `kl_coef`, `kl_estimator`, `reference`,
    `policy_logprob`, `missing_eos_penalty`, `device`, `array`, `render_mode`. Rows of a `dataset` have the columns
    `first`, `reserve`, `patience` and `best`, whole numbers.

    ```python
    env = gym.make("Negotiate-v0", split="validation")
    ```

    ## Lesson
    A hasty buyer learns to offer little and to wait for the last price. Credit for whole conversations and for turns
    are two trials; that one of them is better is no finding. `textrl-gym lesson Negotiate-v0` runs it.

    ## References
    - Lewis et al. 2017, Deal or no deal? End-to-end learning for negotiation dialogues,
      https://arxiv.org/abs/1706.05125
    - He et al. 2018, Decoupling strategy and generation in negotiation dialogues (CraigslistBargain),
      https://arxiv.org/abs/1808.09637
    - Ng et al. 1999, Policy invariance under reward transformations (rewards that sum to the outcome)

    ## Version History
    - v0: the first version.
    """

    id = ID
    model = f"{ASSETS}/policy"
    symbols = dealer.SYMBOLS
    max_prompt_tokens = 10
    max_new_tokens = 34
    max_turns = 6
    max_turn_tokens = 4
    turn_markers = ("", "")
    reward = "zero"
    gold = "textrl_gym.conversations.dealer:bargain"
    gold_scale = (0.0, 1.0)
    best_gold = 1.0  # the lowest price that the script can be brought to
    kl_coef = 0.01
    recipe: ClassVar = {
        "fluent": {
            "references": 20_000,
            "steps": 400,
            "batch_size": 32,
            "layers": 3,
            "hidden_size": 96,
            "intermediate_size": 192,
            "copy_run": 24,
            "copy_steps": 100,
            "copy_batch_size": 32,
        },
        "policy": {"steps": 120, "batch_size": 32, "learning_rate": 7e-4},
    }
    lesson = Lesson(
        words="A hasty buyer learns to offer little and to wait for the last price.",
        trials={
            "trajectory": Trial("credit for the whole conversation", "grpo", 32_000, GRPO),
            "turn": Trial("credit from each turn on", "grpo", 32_000, {**GRPO, "credit": "turn"}),
        },
        findings=(
            Finding(
                "With credit for the whole conversation the bargain is better by 0.2 or more",
                lambda of: of["trajectory"]["gold"] - of["start"]["gold"] - 0.2,
            ),
            Finding(
                "and with credit for turns",
                lambda of: of["turn"]["gold"] - of["start"]["gold"] - 0.2,
            ),
            Finding(
                "Both wait for more of the dealer's answers",
                lambda of: min(of["trajectory"]["patience"], of["turn"]["patience"]) - of["start"]["patience"],
            ),
        ),
        metrics=("gold", "gold_greedy", "deals", "patience", "insults", "kl_sequence", "completion_tokens"),
    )

    def rows(self, split: str, dataset: str | None = None) -> PromptSource:
        """The cars of a split, with the turns of the best buyer."""
        return Rows(dealer.draw, split) if dataset is None else prompts.load_rows(dataset, split)

    def references(self, split: str) -> PromptSource:
        """What a competent model learns: to wait for the last price."""
        return Rows(dealer.draw_reference, split)

    def demonstrations(self, split: str) -> PromptSource:
        """Training data of the bundled policy: hasty talks, so that RL has room."""
        return Rows(dealer.draw_demonstration, split, salt="hasty")

    def reply(self, row: Row, turns: Sequence[Message]) -> Reply:
        """What the dealer says."""
        return dealer.reply(row, turns)

    def measures(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        """Deals, patience and offers that are not serious."""
        return dealer.measures(rows, completions)
