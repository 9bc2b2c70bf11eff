"""Recovery: an update that is broken off in its middle is undone, so that the last whole one can be saved."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from torch import Tensor

from textrl_gym import processes


class Recoverable(Protocol):
    """What an agent goes back by."""

    num_updates: int

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...
    @property
    def config(self) -> Any: ...
    def extra_state(self) -> dict[str, Any]: ...
    def load_extra_state(self, state: dict[str, Any]) -> None: ...
    def rng_state(self) -> tuple[dict[str, Any], Tensor]: ...
    def load_rng_state(self, numbers: dict[str, Any], generator: Tensor, env: bool = True) -> None: ...


class LastUpdate:
    """What an agent was after its last whole update, to go back to where a rollout or an update is broken off.

    Weights and moments are copied to host memory before each update of several optimizer steps. An update of one step
    is broken off before that step (its gradients are checked first), or after it, when nothing is left to do.
    """

    def __init__(self, agent: Recoverable) -> None:
        self.agent = agent
        self._streams: tuple[dict[str, Any], Tensor] | None = None
        self._extra: dict[str, Any] | None = None
        self._copied = False
        self._weights: list[Tensor] = []
        self._moments: dict[tuple[int, str], Tensor] = {}
        self._steps = 0
        # After the agent's own hooks, which refuse a step from gradients that are not finite.
        self._hook = agent.optimizer.register_step_pre_hook(self._count)

    def close(self) -> None:
        """Listen to the optimizer no longer."""
        self._hook.remove()

    def _count(self, *_: object) -> None:
        self._steps += 1

    def before_rollout(self) -> None:
        """Note where the random streams stand."""
        self._streams, self._extra = self.agent.rng_state(), None
        self._steps, self._copied = 0, False

    def before_update(self) -> None:
        """Copy what an update changes."""
        # Not before the rollout: what an agent collects (DPO its pairs) is kept beside this state, and stays with it.
        self._extra = copy.deepcopy(self.agent.extra_state())
        if self.agent.config.epochs * self.agent.config.minibatches == 1:
            return
        weights, state = self._parameters(), self.agent.optimizer.state
        if not self._weights:
            self._weights = [_host_copy(processes.local(p)) for p in weights]
        for saved, p in zip(self._weights, weights, strict=True):
            saved.copy_(processes.local(p.detach()))
        # No moments before the first step.
        for number, p in enumerate(weights):
            for name, value in state.get(p, {}).items():
                moment = processes.local(torch.as_tensor(value))
                if (number, name) not in self._moments:
                    self._moments[number, name] = _host_copy(moment)
                self._moments[number, name].copy_(moment)
        self._copied = True

    def done(self) -> None:
        """The update is whole: nothing to go back from."""
        self._streams = None

    def restore(self) -> bool:
        """Go back to the last whole update; False where its weights are lost."""
        if self._streams is None:
            return True
        if self._steps and not self._copied:
            return False
        if self._copied:
            self._restore_weights()
        if self._extra is not None:
            self.agent.load_extra_state(self._extra)
        self.agent.load_rng_state(*self._streams)
        self._streams = None
        return True

    @torch.no_grad()
    def _restore_weights(self) -> None:
        optimizer = self.agent.optimizer
        for number, (saved, p) in enumerate(zip(self._weights, self._parameters(), strict=True)):
            processes.local(p).copy_(saved)
            names = [name for at, name in self._moments if at == number]
            if not names:
                optimizer.state.pop(p, None)
            for name in names:
                processes.local(optimizer.state[p][name]).copy_(self._moments[number, name])

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.agent.optimizer.param_groups for p in group["params"]]


def _host_copy(tensor: Tensor) -> Tensor:
    # Pinned memory is copied to several times as fast from a GPU.
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
