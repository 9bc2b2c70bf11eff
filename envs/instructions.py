"""Instructions-v0: write a list that keeps one to three checkable constraints."""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, ClassVar

from textrl_gym.core import PromptSource, Row
from textrl_gym.data import chat, prompts
from textrl_gym.data.rows import text_of
from textrl_gym.mdp.task import Task
from textrl_gym.worlds import orders
from textrl_gym.worlds.lesson import Finding, Lesson, Trial
from textrl_gym.worlds.world import Rows

ID = "Instructions-v0"
ASSETS = str(files("textrl_gym") / "assets" / "orders")
GRPO = {"rollout_episodes": 128, "group_size": 8, "learning_rate": 3e-4, "kl_coef": 0.1}
TOKENS = 20_000
"""Of a run: with 60,000 the policy of annotators who like length never ends a list."""
TASTE = 1.2
"""Logits a word: what the annotators of the bundled reward model think of length; 6 is a unit of gold."""
COMPARED: dict[str, Any] = {"prompts": 2500, "replaced_token_steps": 600, "candidates": 6}
LONGER = 1.3
"""Of the initial policy's words: 30% more."""


def alpaca_prompt(row: Row) -> dict[str, Any]:
    """An instruction in the format that Alpaca was trained with (Taori et al. 2023), and as what a user says."""
    instruction, more = text_of(row, "instruction"), text_of(row, "input") if row.get("input") else ""
    paired = ", paired with an input that provides further context" if more else ""
    sections = {"Instruction": instruction, **({"Input": more} if more else {}), "Response": ""}
    prompt = f"Below is an instruction that describes a task{paired}. "
    prompt += "Write a response that appropriately completes the request.\n\n"
    prompt += "\n\n".join(f"### {name}:\n{text}" for name, text in sections.items()).rstrip("\n")
    converted = {"prompt": prompt, "chat": chat.user(f"{instruction}\n\n{more}" if more else instruction)}
    return converted if row.get("output") is None else converted | {"completion": text_of(row, "output")}


SCHEMAS = (
    prompts.PromptSchema("tatsu-lab/alpaca_farm, openbmb/UltraFeedback", ("instruction",), alpaca_prompt),
    prompts.PromptSchema(
        "LLMBar", ("input", "output_1", "output_2"), lambda row: alpaca_prompt({"instruction": row["input"]})
    ),
    *prompts.PROMPT_SCHEMAS,
)


class Instructions(Task):
    """Follow checkable instructions, as in "Instruction-following evaluation for large language models" (IFEval).

    ## Description
    An order of one to three constraints on a list of things (how many words, the first or last word, an order, what
    stands between the words, a word twice, capitals, ...), each of which a program checks, ends in "Answer:"; the agent
    writes the list. The orders are procedural, and no set of constraints of one split occurs in another. The bundled
    policy knows them all, and has been taught to forget most of what is asked. Real instructions are given by
    `dataset=`: tatsu-lab/alpaca_farm and openbmb/UltraFeedback (in Alpaca's prompt format),
    HuggingFaceH4/ultrafeedback_binarized, trl-lib/ultrafeedback_binarized, or google/IFEval with
    `reward="instructions"`, which checks its instruction ids; with more tokens and a model that knows them.

    ## Observation Space
    `Dict(input_ids: Box int64 [L], attention_mask: Box int8 [L])`, L = max_prompt_tokens + max_new_tokens = 72. The
    prompt is left-padded into the first 40 places, so that generated token t always stands at place 40 + t.

    ## Action Space
    `Discrete(V)`: the next token of the bundled byte-level BPE tokenizer (with `tokenizer=`, that one's vocabulary).

    ## Reward
    0 at each step but the last, then the score of the bundled reward model, which was trained on the pairwise choices
    of simulated annotators who also like each word; `reward="reward_model:fair_reward_model"` is one of annotators who
    do not. With kl_coef > 0 each step costs kl_coef * KL of the policy to the reference.

    ## Episode End
    Terminated by "<|endoftext|>" or a stop string; truncated after max_new_tokens. A truncated text is still scored.

    ## Information
    At the end: `score`, `prompt`, `completion`, `reference` (a list that keeps the order), `stop_reason`. The gold
    score is the share of the constraints that are kept, times the share of words that belong into the list. Evaluations
    also report `constraints_kept`, `all_kept` (the share of prompts with every constraint kept), `words` and
    `well_formed`.

    ## Arguments
    Those of every text environment: `split`, `dataset`, `tokenizer`, `reward`, `max_prompt_tokens`, `max_new_tokens`,
    `stop`, `group_size`, `kl_coef`, `kl_estimator`, `reference`, `policy_logprob`, `missing_eos_penalty`, `device`,
    `array`, `render_mode`.

    ```python
    env = gym.make("Instructions-v0", reward="textrl_gym.worlds.orders:gold")
    ```

    ## Lesson
    Annotators who like length teach it: completions grow, and keep fewer constraints than with the reward model of fair
    annotators. Judged by the same annotators the longer policy wins; the length-controlled win rate puts the two in the
    order of the gold score. `textrl-gym lesson Instructions-v0` runs it.

    ## References
    - Zhou et al. 2023, Instruction-following evaluation for large language models, https://arxiv.org/abs/2311.07911
    - Dubois et al. 2023, AlpacaFarm: a simulation framework for methods that learn from human feedback,
      https://arxiv.org/abs/2305.14387
    - Dubois et al. 2024, Length-controlled AlpacaEval, https://arxiv.org/abs/2404.04475
    - Singhal et al. 2023, A long way to go: investigating length correlations in RLHF, https://arxiv.org/abs/2310.03716

    ## Version History
    - v0: the first version.
    """

    id = ID
    max_prompt_tokens = 40
    max_new_tokens = 32
    model = f"{ASSETS}/policy"
    reward_model_path = f"{ASSETS}/reward_model"
    reward = "reward_model"
    gold = "textrl_gym.worlds.orders:gold"
    gold_scale = (0.0, 1.0)
    best_gold = 1.0  # of the references
    kl_coef = 0.1
    keep_suffix = orders.ANSWER
    recipe: ClassVar = {
        "fluent": {
            "steps": 2400,
            "batch_size": 32,
            "vocab_size": 768,
            "copy_steps": 300,
            "hidden_size": 96,
            "intermediate_size": 256,
        },
        "policy": {"steps": 120, "batch_size": 24, "learning_rate": 7e-4},
        "reward_model": {**COMPARED, "annotators": {"length_preference": TASTE}},
        "fair_reward_model": {**COMPARED, "annotators": {"length_preference": 0.0}},
    }
    lesson = Lesson(
        words="Annotators who like length teach it, at the cost of the orders; at equal length they see that.",
        trials={
            "length": Trial("the reward model of annotators who like length", "grpo", TOKENS, GRPO),
            "fair": Trial(
                "the reward model of annotators who do not", "grpo", TOKENS, GRPO, "reward_model:fair_reward_model"
            ),
        },
        findings=(
            Finding(
                "With annotators who like length completions have 30% more words",
                lambda of: of["length"]["words"] / of["start"]["words"] - LONGER,
            ),
            Finding(
                "and a lower gold score than with fair annotators",
                lambda of: of["fair"]["gold"] - of["length"]["gold"],
            ),
            Finding(
                "By win rate against the initial policy the annotators who like length prefer the longer policy",
                lambda of: of["length"]["annotators_win_rate"] - of["fair"]["annotators_win_rate"],
            ),
            Finding(
                "and by win rate at equal length the fair one, as gold does",
                lambda of: of["fair"]["annotators_length_controlled"] - of["length"]["annotators_length_controlled"],
            ),
        ),
        metrics=(
            "gold",
            "constraints_kept",
            "all_kept",
            "words",
            "well_formed",
            "annotators_win_rate",
            "annotators_length_controlled",
            "score",
            "kl_sequence",
        ),
        annotators={"length_preference": TASTE},
    )

    def rows(self, split: str, dataset: str | None = None) -> PromptSource:
        """The orders of a split with a list that keeps each; or the instructions of a data set."""
        if dataset is None:
            return Rows(orders.draw, split)
        return prompts.load_rows(dataset, split, SCHEMAS)

    def references(self, split: str) -> PromptSource:
        """What a competent model learns: orders, and in turn such as teach it to copy."""
        return Rows(orders.draw_teaching, split)

    def demonstrations(self, split: str) -> PromptSource:
        """Training data of the bundled policy: careless lists, so that RL has room."""
        return Rows(orders.draw_demonstration, split, salt="careless")

    def candidates(self, row: Row, rng: random.Random, n: int) -> list[str]:
        """`n` lists from perfect to poor and from short to long, for annotators to compare."""
        return orders.candidates(row, rng, n)

    def corrupted(self, row: Row, rng: random.Random, n: int) -> list[tuple[str, str]]:
        """`n` pairs of a list that keeps the order and the same with a fault."""
        return orders.corrupted(row, rng, n)

    def measures(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        """Constraints kept, prompts with all kept, words, and the share of well-formed lists."""
        return orders.measures(rows, completions)
