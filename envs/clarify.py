"""Clarify-v0: requests of which half lack a fact, where asking first pays."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import ClassVar

from textrl_gym.conversations import bookings
from textrl_gym.core import Message, PromptSource, Reply, Row
from textrl_gym.data import prompts
from textrl_gym.mdp.task import Task
from textrl_gym.worlds.lesson import Finding, Lesson, Trial
from textrl_gym.worlds.world import Rows

ID = "Clarify-v0"
ASSETS = str(files("textrl_gym") / "assets" / "bookings")
QUESTIONS = "textrl_gym.conversations.bookings:questions"
GRPO = {"rollout_episodes": 128, "group_size": 8, "learning_rate": 5e-4, "kl_coef": 0.02}


class Clarify(Task):
    """Book what a person asks for, after a question where a fact is missing, as in Qulac (Aliannejadi et al. 2019).

    ## Description
    A request for a table, a taxi, a cake or a parcel, each with two facts, of which one is missing in half of the
    requests. In its turn the agent asks ("how many people ?"), to which the person replies by the fact or by "never
    mind" where it does not belong to the request, or books ("done table for four at seven"), which ends the episode.
    The bundled policy was taught by dialogues of a careless agent, who asks at random and guesses what it was not told.

    ## Observation Space
    `Dict(input_ids: Box int64 [L], attention_mask: Box int8 [L])`, L = max_prompt_tokens + max_new_tokens = 46. The
    prompt is left-padded into the first 18 places; the agent's turns and the replies are behind it.

    ## Action Space
    `Discrete(109)`: EOS, which ends a turn, and words.

    ## Reward
    At the end of each turn: -0.2 for a question, and for what is neither a question nor a booking, 1 for the right
    booking, -1 for a wrong one. A fact that is guessed is right once in 7 to 20 times. The score at the end is 0. With
    kl_coef > 0 each step costs kl_coef * KL of the policy to the reference.

    ## Episode End
    Terminated by a booking (`StopReason.DONE`); truncated after three turns (`MAX_TURNS`), or when no place for an
    action is left (`LENGTH`).

    ## Information
    At each step `turn`; where a turn ended `turn_reward` and `reply`; at the end `score`, `prompt`, `completion` (the
    agent's turns, a line each), `turns`, `stop_reason`. The gold score is 1 for the right booking. Evaluations also
    report `asked_missing` (share of the requests that lack a fact in which that was asked for), `asked_stated` (share
    of the others with a question) and `booked_wrong`.

    ## Arguments
    Those of every text environment: `split`, `dataset`, `tokenizer`, `reward`, `max_prompt_tokens`, `max_new_tokens`,
    `max_turns`, `max_turn_tokens`, `turn_template`, `stop`, `group_size`, `kl_coef`, `kl_estimator`, `reference`,
    `policy_logprob`, `missing_eos_penalty`, `device`, `array`, `render_mode`. Rows of a `dataset` have the columns
    `kind`, `facts` (an object) and `missing`.

    ```python
    env = gym.make("Clarify-v0", reward={"textrl_gym.conversations.bookings:questions": -1.0})  # who hates to be asked
    ```

    ## Lesson
    Whether questions become more where a fact is missing (in three of five seeds), and fewer where none is (in all).
    People who hate to be asked teach to guess. `textrl-gym lesson Clarify-v0` runs it; docs/lessons.md has the numbers.

    ## References
    - Aliannejadi et al. 2019, Asking clarifying questions in open-domain information-seeking conversations (Qulac),
      https://arxiv.org/abs/1907.06554
    - Rao and Daume 2018, Learning to ask good questions: ranking clarification questions by expected value of perfect
      information, https://arxiv.org/abs/1805.04655

    ## Version History
    - v0: the first version.
    """

    id = ID
    model = f"{ASSETS}/policy"
    symbols = bookings.SYMBOLS
    max_prompt_tokens = 18
    max_new_tokens = 28
    max_turns = 3
    max_turn_tokens = 8
    turn_markers = ("", "")
    reward = "zero"
    gold = "textrl_gym.conversations.bookings:booked"
    gold_scale = (0.0, 1.0)
    best_gold = 1.0
    kl_coef = 0.02
    recipe: ClassVar = {
        "fluent": {
            "references": 20_000,
            "steps": 800,
            "batch_size": 32,
            "layers": 3,
            "hidden_size": 96,
            "intermediate_size": 192,
            "copy_run": 24,
            "copy_steps": 150,
            "copy_batch_size": 32,
        },
        "policy": {"steps": 100, "batch_size": 32, "learning_rate": 7e-4},
    }
    lesson = Lesson(
        words="Questions become more where a fact is missing, and fewer where none is.",
        trials={
            "helpful": Trial("the task's own: a question costs 0.2, a wrong booking 1", "grpo", 50_000, GRPO),
            "impatient": Trial(
                "each question costs 2 more",
                "grpo",
                50_000,
                GRPO,
                {"textrl_gym.conversations.bookings:questions": -2.0},
            ),
        },
        findings=(
            Finding(
                "Where a fact is missing questions become more by 0.2 or more",
                lambda of: of["helpful"]["asked_missing"] - of["start"]["asked_missing"] - 0.2,
            ),
            Finding(
                "and fewer by half or more where none is",
                lambda of: of["start"]["asked_stated"] / 2 - of["helpful"]["asked_stated"],
            ),
            Finding("and more bookings are right", lambda of: of["helpful"]["gold"] - of["start"]["gold"]),
            Finding(
                "People who hate to be asked are asked less, also where a fact is missing",
                lambda of: of["start"]["asked_missing"] - of["impatient"]["asked_missing"],
            ),
        ),
        metrics=("gold", "turn_rewards", "asked_missing", "asked_stated", "booked_wrong", "turns", "kl_sequence"),
    )

    def rows(self, split: str, dataset: str | None = None) -> PromptSource:
        """The requests of a split, with the turns of an agent who asks where it must."""
        return Rows(bookings.draw, split) if dataset is None else prompts.load_rows(dataset, split)

    def references(self, split: str) -> PromptSource:
        """What a competent model learns: to ask for what is missing, and at times for more."""
        return Rows(bookings.draw_reference, split)

    def demonstrations(self, split: str) -> PromptSource:
        """Training data of the bundled policy: careless talks, so that RL has room."""
        return Rows(bookings.draw_demonstration, split, salt="careless")

    def reply(self, row: Row, turns: Sequence[Message]) -> Reply:
        """The fact that was asked for, or the end."""
        return bookings.reply(row, turns)

    def measures(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        """Shares of questions, where a fact is missing and where none is, and of wrong bookings."""
        return bookings.measures(rows, completions)
