"""Filtered behaviour cloning: imitate the best share of given trajectories (the "%BC" of Chen et al. 2021,
arXiv:2106.01345). Offline: the data are all that is learnt from, and the environment is only evaluated on.

Of N trajectories with returns R those of the best share q are learnt as supervised examples:

    D_q = the ceil(q N) trajectories with the highest R,    L = - 1/tokens sum_{D_q} sum_t log pi(a_t | s_t)

Its optimum is the distribution of D_q: it can imitate the best that was done, and do nothing better. RAFT is its online
form. A share of 1 is behaviour cloning.

The trajectories come from `dataset=`, a file of data.trajectories or a Minari data set; or, where none is given,
num_trajectories are sampled from the reference (the initial policy, unless another is given) before the first update. A
timestep is a token of the agent trained on.

Departures: the share is taken over all prompts together, as there; where some prompts are easier, theirs are learnt
more often. Of equal returns the first count.

Shape legend: B rows, T response places, N trajectories.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from textrl_gym.agents.raft import raft_loss
from textrl_gym.core import Rollout
from textrl_gym.data.trajectories import Trajectory, as_rollout, read_trajectories, write_trajectories
from textrl_gym.functional import mean_of
from textrl_gym.integrations import minari
from textrl_gym.mdp.text_env import TextVectorEnv
from textrl_gym.rollouts.collect import collect
from textrl_gym.rollouts.recording import record
from textrl_gym.training.agent import Agent, EnvLike, ModelLike
from textrl_gym.training.config import AgentConfig
from textrl_gym.training.minibatch import places_of_update, sum_of
from textrl_gym.training.preference_pairs import with_logprobs

FILE = "trajectories.jsonl"


@dataclasses.dataclass(frozen=True)
class FilteredBCConfig(AgentConfig):
    """Settings of filtered behaviour cloning."""

    dataset: str | None = None
    """Trajectories to learn: a file that `textrl-gym collect` wrote, or minari:ID; None: sampled from the reference."""
    num_trajectories: Annotated[int, Ge(1)] = 2_000
    """So many are sampled."""
    share: Annotated[float, Gt(0), Le(1)] = 0.25
    """Of the trajectories, those with the best returns, which are learnt."""


def best_share(return_N: Tensor, share: float) -> Tensor:
    """The rows with the highest returns, ceil(share N) of them, in their order; of equals the first. int64."""
    assert return_N.ndim == 1 and 0 < share <= 1, (return_N.shape, share)
    order_N = return_N.argsort(descending=True, stable=True)
    return order_N[: math.ceil(share * len(return_N))].sort().values


class FilteredBC(Agent):
    """Filtered behaviour cloning; see the head of this file."""

    Config = FilteredBCConfig
    config: FilteredBCConfig
    kl_where = "loss"
    is_offline = True

    def __init__(self, env: EnvLike, model: ModelLike = None, reference: ModelLike = None, **settings: Any) -> None:
        super().__init__(env, model, reference, **settings)
        self.trajectories: list[Trajectory] = []
        """All, the learnt and the others."""
        self._learnt: list[Trajectory] = []
        if self.config.dataset is not None:
            self._use(read_dataset(self.config.dataset, self.env))

    def _use(self, trajectories: list[Trajectory]) -> None:
        self.trajectories = trajectories
        # float64, in which equal sums of rewards are equal.
        return_N = torch.tensor([one.total for one in trajectories], dtype=torch.float64)
        self._learnt = [trajectories[i] for i in best_share(return_N, self.config.share).tolist()]

    # -- collecting ---------------------------------------------------------------------------------------------------

    def collect(self) -> Rollout:
        """The next trajectories in the order of this pass, as a rollout."""
        if not self.trajectories:
            self._sample()
        places = places_of_update(self.num_updates, self.config.rollout_episodes, len(self._learnt), self.seed)
        return with_logprobs(as_rollout([self._learnt[i] for i in places], self.device), self.policy)

    def _sample(self) -> None:
        reference = self.policy.reference
        assert reference is not None
        play = functools.partial(collect, policy=reference, kl_coef=0.0)
        batches = record(self.env, play, self.config.num_trajectories, self.seed, self.device)
        self._use([one for batch in batches for one in batch])

    # -- learning -----------------------------------------------------------------------------------------------------

    def update(self, rollout: Rollout) -> dict[str, float]:
        steps = []
        for minibatch in self.minibatches(rollout):
            parts = []
            for part in minibatch.micro_batches():
                loss, metrics = raft_loss(self.policy.logprobs(part), part)
                loss.backward()
                parts.append(metrics)
            steps.append(sum_of(parts) | {"grad_norm": self.step()})
        return mean_of(steps)

    # -- save and load ------------------------------------------------------------------------------------------------

    def save_extra(self, folder: Path) -> None:
        if self.config.dataset is None and self.trajectories:
            write_trajectories(folder / FILE, self.trajectories, self.env.tokenizer)

    def load_extra(self, folder: Path) -> None:
        if self.config.dataset is None and (folder / FILE).is_file():
            self._use(read_trajectories(folder / FILE, self.env.tokenizer).trajectories)


def read_dataset(dataset: str, env: TextVectorEnv) -> list[Trajectory]:
    """The trajectories of a file, or of "minari:ID".

    Raises:
        ValueError: there are none, or one does not fit into the environment's budgets.
    """
    if dataset.startswith(minari.PREFIX):
        trajectories = minari.from_minari(dataset.removeprefix(minari.PREFIX), env.tokenizer)
    else:
        trajectories = read_trajectories(dataset, env.tokenizer).trajectories
    for number, one in enumerate(trajectories):
        for name, ids, most in (
            ("max_prompt_tokens", one.prompt_ids, env.max_prompt_tokens),
            ("max_new_tokens", one.token_ids, env.max_new_tokens),
        ):
            if len(ids) > most:
                raise ValueError(f"{dataset!r}: episode {number} has {len(ids)} tokens, over {name}={most}")
    return trajectories
