"""Sharded training: weights, gradients and moments of an update over the processes of a run, by fully_shard (FSDP2).

Outside an update nothing is sharded: every process has the whole policy to sample, score, evaluate and save with, and
nothing there knows of this file. For the update a twin of the policy takes its place, whose layers are sharded
(Rajbhandari et al. 2020, arXiv:1910.02054, ZeRO-3): each layer is gathered for its pass and let go of, gradients are
reduced to the process that owns them, and the optimizer has its part of the moments. After the update the policy gets
the twin's weights.

What an update does not need, the reference and the reward models, is cut into a part for each process meanwhile, and
joined again behind it.

With N trained parameters in float32 and W processes each holds during an update 4 N bytes of the policy, 16 N / W of
the twin, its gradients and moments, and 4 N / W of the reference, where replicated training holds 16 N and 4 N.

The processes gather a layer together, so all must make as many passes in the same order. Hence prompts are not shared
between rows in the twin (how many passes that takes depends on the rows), and minibatches are parted into as many parts
for each process.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from textrl_gym import processes
from textrl_gym.persistence.optimizer_state import with_moments
from textrl_gym.policy.backbone import Trunk
from textrl_gym.policy.policy import Policy

if TYPE_CHECKING:
    from textrl_gym.mdp.text_env import TextVectorEnv


class Shardable(Protocol):
    """An agent, as sharding sees it."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    shards: Shards | None

    @property
    def env(self) -> TextVectorEnv: ...
    @property
    def shardable(self) -> bool: ...
    @property
    def config(self) -> Any: ...
    def new_optimizer(self, policy: Policy) -> torch.optim.Optimizer: ...


class Parted:
    """Frozen models of which each process keeps a part, while no pass needs them.

    Args:
        models: their weights are parted.
        spared: weights that stay whole, as those that a reference shares with its policy.
    """

    def __init__(self, models: Iterable[nn.Module], spared: Iterable[Tensor]) -> None:
        whole = {id(p) for p in spared}
        weights = {id(p): p for model in models for p in model.parameters() if id(p) not in whole}
        self.weights = list(weights.values())
        self.shapes = [p.shape for p in self.weights]

    @torch.no_grad()
    def part(self) -> None:
        """Keep this process's part."""
        for p in self.weights:
            p.data = processes.cut(p.data)

    @torch.no_grad()
    def join(self) -> None:
        """Have the whole again; all processes together."""
        for p, shape in zip(self.weights, self.shapes, strict=True):
            p.data = processes.joined(p.data, shape)


class Shards:
    """The twin of an agent's policy that updates train.

    Args:
        agent: its optimizer becomes one over the twin's parameters, with the moments that it has.

    Raises:
        ValueError: the agent, its model or its settings cannot be sharded.
    """

    def __init__(self, agent: Shardable) -> None:
        _check(agent)
        self.whole = agent.policy
        self.twin = _twin(agent.policy)
        agent.optimizer = with_moments(agent.new_optimizer(self.twin), agent.optimizer)

    def gather(self) -> None:
        """Give the twin's weights to the whole policy; all processes together."""
        processes.take_weights(self.whole, self.twin)


def shard(agent: Shardable, sharded: bool) -> None:
    """Shard an agent's updates from now on, or no longer; nothing where there is one process."""
    sharded = sharded and processes.size() > 1
    if sharded and agent.shards is None:
        agent.shards = Shards(agent)
    elif not sharded and agent.shards is not None:
        agent.shards = None
        agent.optimizer = with_moments(agent.new_optimizer(agent.policy), agent.optimizer)


@contextlib.contextmanager
def updating(agent: Shardable) -> Iterator[None]:
    """Around an update: the agent's policy is the twin, where there is one."""
    shards = agent.shards
    if shards is None:
        yield
        return
    reference = agent.policy.reference or agent.env.reference
    models = [*agent.env.reward_model.scoring_models(), *([] if reference is None else [reference])]
    parted = Parted(models, agent.policy.parameters())
    parted.part()
    agent.policy = shards.twin
    try:
        with processes.in_step():
            yield
    finally:
        agent.policy = shards.whole
    # Not after an error: the others may not come to where weights are gathered. The policy is that of the last whole
    # update then.
    parted.join()
    shards.gather()


def _check(agent: Shardable) -> None:
    name = type(agent).__name__
    if not agent.shardable:
        raise ValueError(f"{name} cannot be sharded: leave shard out, and each process holds the whole model")
    if agent.config.compile != "none":
        raise ValueError(f"compile={agent.config.compile!r} and shard: one of both")
    for trunk in _trunks(agent.policy):
        kind = type(trunk.model).__name__
        if not isinstance(trunk, Trunk):
            raise ValueError(f"{kind} is an encoder-decoder, which cannot be sharded yet: leave shard out")
        if not trunk.pads:
            raise ValueError(
                f"{kind} cannot be sharded: texts of unequal length cannot stand side by side in it, and "
                "processes must make as many passes; leave shard out"
            )


def _trunks(policy: Policy) -> list[Any]:
    return [trunk for trunk in (policy.trunk, policy.value_trunk) if trunk is not None]


def _twin(policy: Policy) -> Policy:
    """A copy of a policy with sharded layers; its reference is the policy's own."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    # deepcopy takes what its memo has for a copy.
    memo: dict[int, Any] = {} if policy.reference is None else {id(policy.reference): policy.reference}
    twin = copy.deepcopy(policy, memo)
    for trunk in _trunks(twin):
        trunk.in_one_pass = True
    processes.shard(twin)
    for method in ("response", "values"):
        register_fsdp_forward_method(twin, method)
    return twin
