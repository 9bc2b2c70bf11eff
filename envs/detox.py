"""Detox-v0: go on politely behind a prompt that provokes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, ClassVar

from textrl_gym.core import PromptSource, Row
from textrl_gym.data import prompts
from textrl_gym.data.rows import BadRow, shown, text_of
from textrl_gym.mdp.task import Task
from textrl_gym.worlds import provocations
from textrl_gym.worlds.lesson import Finding, Lesson, Trial
from textrl_gym.worlds.world import Rows

ID = "Detox-v0"
ASSETS = str(files("textrl_gym") / "assets" / "provocations")
TOKENS = 60_000
PPO = {"rollout_episodes": 64, "learning_rate": 5e-4, "kl_coef": 0.1}
"""Five seeds with kl_coef 0.05 went to 3.2 nats."""
GRPO = {"rollout_episodes": 128, "group_size": 8, "learning_rate": 3e-4, "kl_coef": 0.05}
QUARK = {
    "rollout_episodes": 64,
    "learning_rate": 1e-3,
    "kl_coef": 0.2,
    "pool_size": 4096,
    "replay": 4,
    "minibatches": 8,
}
"""With kl_coef 0.05, a rate of 2e-3 and a pool of 1,024 one seed went to 5.5 nats."""
SAMPLES = 25
"""Of a prompt, as in RealToxicityPrompts."""
MOST, ANY = f"rudeness_max_of_{SAMPLES}", f"rudeness_any_of_{SAMPLES}"
NEAR = 3.0
"""Nats a text: a policy that has left its reference further may be polite by writing something else."""


def _findings(trial: str, name: str) -> tuple[Finding, ...]:
    """What the lesson asks of an agent."""
    return (
        Finding(
            f"{name}: the expected maximum of rudeness falls",
            lambda of: of["start"][MOST] - of[trial][MOST],
        ),
        Finding(f"{name}: at a KL under 3 nats a text", lambda of: NEAR - of[trial]["kl_sequence"]),
        Finding(f"{name}: and gold rises", lambda of: of[trial]["gold"] - of["start"]["gold"]),
    )


def _real(row: Row) -> dict[str, Any]:
    if not isinstance(row["prompt"], Mapping):
        raise BadRow("column 'prompt' has no text with scores", shown(row["prompt"]))
    converted: dict[str, Any] = {"prompt": text_of(row["prompt"], "text"), "toxicity": row["prompt"].get("toxicity")}
    more = row["continuation"]
    return converted | ({"completion": text_of(more, "text")} if isinstance(more, Mapping) else {})


REAL_TOXICITY_PROMPTS = prompts.PromptSchema("allenai/real-toxicity-prompts", ("prompt", "continuation"), _real)


class Detox(Task):
    """Go on politely behind a provoking prompt, as in RealToxicityPrompts (Gehman et al. 2020) and Quark (Lu et al.).

    ## Description
    Somebody speaks of two others, in three of four prompts rudely, and the last sentence may be only begun; the agent
    goes on by 20 words. The rude words are invented. What the sentences say is of the prompt's people, and by words of
    praise or of abuse. The prompts are procedural, with more than 10^6 of them, and none stands in two splits. The
    bundled policy is rude in half of its texts, the more so the more a prompt provokes, and careless. Real prompts are
    given by `dataset=`: a file, folder or Hub id in the schema of allenai/real-toxicity-prompts, with a model that
    knows them and a `reward` that judges them, such as a classifier of toxicity.

    ## Observation Space
    `Dict(input_ids: Box int64 [L], attention_mask: Box int8 [L])`, L = max_prompt_tokens + max_new_tokens = 44. The
    prompt is left-padded into the first 24 places, so that generated token t always stands at place 24 + t.

    ## Action Space
    `Discrete(92)`: EOS and words (with `tokenizer=`, that one's vocabulary).

    ## Reward
    0 at each step but the last, then the gold score: the share of judging words that are polite and new, times the
    share of 20 words that belong to new sentences about the prompt's people. With kl_coef > 0 each step costs
    kl_coef * KL of the policy to the reference.

    ## Episode End
    Truncated after 20 tokens, where a sentence may be cut; terminated by EOS or a stop string before.

    ## Information
    At the end: `score`, `prompt`, `completion`, `reference` (a polite continuation), `stop_reason`. Evaluations also
    report `rudeness` (the mean of 1 - 2^-n over texts with n rude words), `rude_texts` (the share with any),
    `polite_words` and `sentence_words` (the two factors of the gold score).

    ## Arguments
    Those of every text environment: `split`, `dataset`, `tokenizer`, `reward`, `max_prompt_tokens`, `max_new_tokens`,
    `stop`, `group_size`, `kl_coef`, `kl_estimator`, `reference`, `policy_logprob`, `missing_eos_penalty`, `device`,
    `array`, `render_mode`.

    ```python
    env = gym.make("Detox-v0", split="validation")
    ```

    ## Lesson
    The worst of 25 continuations of a prompt becomes less rude, at a small KL to the initial policy, by PPO, GRPO and
    Quark. `textrl-gym lesson Detox-v0` runs it; docs/lessons.md says what came out.

    ## References
    - Gehman et al. 2020, RealToxicityPrompts: evaluating neural toxic degeneration in language models,
      https://arxiv.org/abs/2009.11462
    - Lu et al. 2022, Quark: controllable text generation with reinforced unlearning, https://arxiv.org/abs/2205.13636

    ## Version History
    - v0: the first version.
    """

    id = ID
    model = f"{ASSETS}/policy"
    symbols = provocations.SYMBOLS
    max_prompt_tokens = 24
    max_new_tokens = provocations.LENGTH
    reward = "textrl_gym.worlds.provocations:gold"
    gold = "textrl_gym.worlds.provocations:gold"
    gold_scale = (0.0, 1.0)
    best_gold = 1.0  # of the references
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
        "policy": {"steps": 150, "batch_size": 32, "learning_rate": 7e-4},
    }

    lesson = Lesson(
        words="The worst of 25 continuations of a prompt becomes less rude, at a small KL to the initial policy.",
        trials={
            "ppo": Trial("PPO", "ppo", TOKENS, PPO),
            "grpo": Trial("GRPO, groups of 8", "grpo", TOKENS, GRPO),
            "quark": Trial("Quark, five quantiles", "quark", TOKENS, QUARK),
        },
        findings=(*_findings("ppo", "PPO"), *_findings("grpo", "GRPO"), *_findings("quark", "Quark")),
        metrics=(
            "gold",
            "gold_greedy",
            MOST,
            ANY,
            "rudeness",
            "rude_texts",
            "polite_words",
            "sentence_words",
            "kl_sequence",
            "distinct_2",
        ),
        samples=SAMPLES,
        extremes={"rudeness": "textrl_gym.worlds.provocations:rudeness"},
    )

    def rows(self, split: str, dataset: str | None = None) -> PromptSource:
        """The provocations of a split with a polite continuation each."""
        if dataset is None:
            return Rows(provocations.draw, split)
        return prompts.load_rows(dataset, split, (REAL_TOXICITY_PROMPTS, *prompts.PROMPT_SCHEMAS))

    def references(self, split: str) -> PromptSource:
        """What a competent model learns: whole sentences in any tone."""
        return Rows(provocations.draw_reference, split)

    def demonstrations(self, split: str) -> PromptSource:
        """Training data of the bundled policy: rude and careless continuations, so that RL has room."""
        return Rows(provocations.draw_demonstration, split, salt="careless")

    def measures(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        """Rudeness, and the two factors of the gold score."""
        return provocations.measures(rows, completions)
