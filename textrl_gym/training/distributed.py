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
from textrl_gym.policy.backbone import Trunk
from textrl_gym.policy.policy import Policy

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

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
        from torch.distributed.device_mesh import init_device_mesh

        self.whole = agent.policy
        mesh = init_device_mesh(agent.policy.device.type, (processes.size(),))
        self.twin = _twin(agent.policy, mesh)
        agent.optimizer = _with_moments(agent.new_optimizer(self.twin), agent.optimizer)

    @torch.no_grad()
    def gather(self) -> None:
        """Give the twin's weights to the whole policy; all processes together."""
        for own, sharded in zip(self.whole.parameters(), self.twin.parameters(), strict=True):
            if own.requires_grad:
                own.copy_(processes.whole(sharded.detach()))


def shard(agent: Shardable, sharded: bool) -> None:
    """Shard an agent's updates from now on, or no longer; nothing where there is one process."""
    sharded = sharded and processes.size() > 1
    if sharded and agent.shards is None:
        agent.shards = Shards(agent)
    elif not sharded and agent.shards is not None:
        agent.shards = None
        agent.optimizer = _with_moments(agent.new_optimizer(agent.policy), agent.optimizer)


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


def _twin(policy: Policy, mesh: DeviceMesh) -> Policy:
    """A copy of a policy with sharded layers; its reference is the policy's own."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # deepcopy takes what its memo has for a copy.
    memo: dict[int, Any] = {} if policy.reference is None else {id(policy.reference): policy.reference}
    twin = copy.deepcopy(policy, memo)
    for trunk in _trunks(twin):
        trunk.in_one_pass = True
    for layer in _layers(twin):
        fully_shard(layer, mesh=mesh)
    # What is left (embeddings, head, value head) is one group: whole from the beginning of a pass to the end of its
    # backward pass, as the head is called for a few positions at a time.
    fully_shard(twin, mesh=mesh)
    for method in ("response", "values"):
        register_fsdp_forward_method(twin, method)
    return twin


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The transformer layers: the items of the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (layer for layer in child if any(True for _ in layer.parameters()))
        else:
            yield from _layers(child)


def _with_moments(new: torch.optim.Optimizer, old: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The new optimizer with the old one's moments, cut or gathered as the new one's parameters are."""
    pairs = zip(_parameters(new), _parameters(old), strict=True)
    for p, before in pairs:
        for name, value in old.state.get(before, {}).items():
            new.state[p][name] = _as(p, processes.whole(value)) if torch.is_tensor(value) and value.ndim else value
    return new


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _as(p: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, or this process's part of it, as a parameter is."""
    if not processes.is_sharded(p):
        return value
    from torch.distributed.tensor import distribute_tensor

    untyped: Any = p
    # Every process has the whole: nothing is sent.
    return distribute_tensor(value, untyped.device_mesh, untyped.placements, src_data_rank=None)
