"""DPO: direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290), offline, on pairs of completions.

For a prompt x with a chosen completion y_w and a rejected one y_l, and beta = kl_coef,

    L = - log sigmoid(beta log pi(y_w | x) / pi_ref(y_w | x) - beta log pi(y_l | x) / pi_ref(y_l | x))    (equation 7)

At the reference its gradient is -beta/2 times the difference of the completions' d log pi. loss="ipo" and "hinge" are
other functions of the same difference (textrl_gym.training.preference_pairs has them, with their sources).

The pairs come from `pairs=`, a file or a Hub id in any schema of data.preferences; or, where none is given, two
completions of a prompt are sampled from the reference (the initial policy, unless another is given) and labelled by the
environment's own reward, as section 4 of the paper has it. They are sampled as they are first needed, num_pairs at
most, and never again: nothing that the trained policy writes is ever seen. Then, or where a file ends, the next pass
over the same pairs begins, in another order.

A pair of a file may have a probability, how sure a judge is: a soft label, of which preference_pairs has the loss.

A timestep is a token of a completion trained on. The rollout's score is 1 for chosen and -1 for rejected rows, its "KL"
the mean log-ratio of the pairs' texts, which says nothing of the policy's own (an evaluation does); so an adaptive
kl_target makes little sense here.

Departures: AdamW with a linear schedule instead of RMSprop with warm-up. Padding and length: log-ratios are sums.

Shape legend: B rows (2 for each pair), T response places, N pairs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from safetensors.torch import load_file, save_file

from textrl_gym.core import Rollout
from textrl_gym.data.rows import say_once
from textrl_gym.training.agent import Agent, EnvLike, ModelLike
from textrl_gym.training.minibatch import places_of_update
from textrl_gym.training.preference_pairs import (
    BETA,
    PAIR_BAR,
    Pair,
    PairConfig,
    learn_pairs,
    pair_metrics,
    pairs_of,
    pairs_rollout,
    sample_pairs,
    with_logprobs,
)

FILE = "pairs.safetensors"
HELD_OUT = 64  # held-out rows of a file, or prompts to sample pairs of
MOST_DRAWS = 50  # rollouts of the reference in a row that may give no pair


@dataclasses.dataclass(frozen=True)
class DPOConfig(PairConfig):
    """Settings of DPO."""

    learning_rate: float = 3e-4
    """Adam's step size. On the embedded task 5e-4 went further from the reference for no more gold."""
    pairs: str | None = None
    """Preferences to learn: a local file or folder, or a Hub id; None: pairs sampled from the reference."""
    num_pairs: Annotated[int, Ge(1)] = 2000
    """At most so many pairs are sampled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout_episodes % 2:
            raise ValueError(
                f"rollout_episodes counts both rows of each pair: it must be even, got {self.rollout_episodes}"
            )


class DPO(Agent):
    """Direct preference optimization; see the head of this file."""

    Config = DPOConfig
    config: DPOConfig
    kl_where = "loss"
    kl_coef_of_none = BETA
    is_offline = True
    bar_metrics = PAIR_BAR

    def __init__(self, env: EnvLike, model: ModelLike = None, reference: ModelLike = None, **settings: Any) -> None:
        super().__init__(env, model, reference, **settings)
        self.pairs: list[Pair] = []
        self.draws = 0
        """Rollouts of the reference that pairs have been sampled from."""
        self._held_out: Rollout | None = None
        if self.config.pairs is not None:
            self.pairs = pairs_of(self.env.read_preferences(self.config.pairs))

    # -- collecting ---------------------------------------------------------------------------------------------------

    def collect(self) -> Rollout:
        """The next pairs in the order of this pass, as a rollout."""
        # 1. Which. Sampled ones come as they are made in the first pass.
        num_pairs, sampled = self.config.rollout_episodes // 2, self.config.pairs is None
        if sampled:
            self._sample(min((self.num_updates + 1) * num_pairs, self.config.num_pairs))
        size = self.config.num_pairs if sampled else len(self.pairs)
        places = places_of_update(self.num_updates, num_pairs, size, self.seed, first_in_order=sampled)
        # 2. Their log-probabilities, now and under the reference.
        return with_logprobs(pairs_rollout(self.env, [self.pairs[i] for i in places], self.device), self.policy)

    # -- sampling pairs -----------------------------------------------------------------------------------------------

    def _sample(self, wanted: int) -> None:
        """Sample until there are so many pairs. Each draw has a seed of its own, so that resuming draws the same."""
        self._say_unused()
        empty = 0
        while len(self.pairs) < wanted:
            drawn = sample_pairs(self, self.env, (self.seed, self.draws))
            # Never more than num_pairs, so that later passes are over the same set whatever the last draw brought.
            self.pairs += drawn[: self.config.num_pairs - len(self.pairs)]
            self.draws += 1
            empty = 0 if drawn else empty + 1
            if empty == MOST_DRAWS:
                raise ValueError(f"in {MOST_DRAWS} rollouts no prompt had two completions of different reward")

    def _say_unused(self) -> None:
        """Say once that pairs of the environment's data are not what is learnt, where they have any."""
        dataset = self.env.settings.get("dataset")
        if dataset is not None and {"chosen", "rejected"} <= self.env.source[0].keys():
            say_once(
                f"dataset {dataset!r} gives its prompts alone: its columns chosen and rejected are not used, pairs are "
                f"sampled and labelled by the reward. --pairs {dataset} (in Python pairs={dataset!r}) trains on them"
            )

    # -- learning -----------------------------------------------------------------------------------------------------

    def update(self, rollout: Rollout) -> dict[str, float]:
        return learn_pairs(self, rollout)

    def extra_metrics(self, rollouts: list[Rollout]) -> dict[str, float]:
        """Accuracy and margin on held-out pairs: the file's, or as many sampled from the reference."""
        if self._held_out is None:
            if self.config.pairs is None:
                env = self.env.remake(2 * HELD_OUT, split="validation", group_size=2)
                pairs = sample_pairs(self, env, (self.seed, 0))
            else:
                pairs = pairs_of(self.env.read_preferences(self.config.pairs, "validation", most=HELD_OUT))
            self._held_out = pairs_rollout(self.env, pairs, self.device) if pairs else None
        return {} if self._held_out is None else pair_metrics(self, self._held_out)

    # -- save and load ------------------------------------------------------------------------------------------------

    def save_extra(self, folder: Path) -> None:
        if self.config.pairs is None and self.pairs:
            texts = [ids for pair in self.pairs for ids in (pair.prompt, pair.chosen, pair.rejected)]
            # One flat tensor and lengths: safetensors has no ragged arrays, and a tensor a text would be thousands of
            # entries.
            flat = torch.tensor([token for ids in texts for token in ids], dtype=torch.int32)
            save_file({"tokens": flat, "lengths": torch.tensor([len(ids) for ids in texts])}, folder / FILE)

    def load_extra(self, folder: Path) -> None:
        if self.config.pairs is None and (folder / FILE).is_file():
            saved = load_file(folder / FILE)
            texts = [ids.tolist() for ids in saved["tokens"].split(saved["lengths"].tolist())]
            self.pairs = [Pair(*texts[at : at + 3]) for at in range(0, len(texts), 3)]

    def extra_state(self) -> dict[str, Any]:
        return {"draws": self.draws}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.draws = state["draws"]
