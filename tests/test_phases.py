"""Phases of training: who listens hears of each in its order, and changes no number."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import textrl_gym
from textrl_gym.agents import GRPO, PPO
from textrl_gym.experiments.worker import counted_flops
from textrl_gym.models import flops
from textrl_gym.rollouts.phases import Phase, listening, phase

QUIET: dict[str, Any] = {"progress_bar": False, "eval_every": 0, "eval_episodes": 4}
PLAYED = ["rollout", "scoring", "reference"]  # a rollout of few rows is one micro-batch: one pass of the reference


def small(out: Path, cls: Any = GRPO, **settings: Any) -> Any:
    return cls("CopyText-v0", rollout_episodes=8, device="cpu", out=out, **settings)


def test_a_listener_hears_phases_in_their_order(tmp_path: Path) -> None:
    agent, begun = small(tmp_path), list[str]()
    running: list[str] = []

    @contextlib.contextmanager
    def hear(name: Phase) -> Iterator[None]:
        begun.append("/".join([*running, name]))
        running.append(name)
        yield
        running.pop()

    with listening(hear):
        agent.learn(1, **QUIET)  # a whole rollout
    updates = begun[begun.index("collect") : begun.index("update") + 1]
    assert updates == ["collect", *(f"collect/{name}" for name in PLAYED), "update"]
    # An evaluation before the first update and one at the end, whatever is played in them.
    assert [name for name in begun if "/" not in name] == ["evaluate", "collect", "update", "evaluate"]
    assert running == []
    before = list(begun)
    agent.collect()  # nobody listens any more
    assert begun == before


def test_values_are_a_phase_of_a_critic_of_its_own(tmp_path: Path) -> None:
    # On the policy's trunk the critic's values come with the samples.
    for separate, extra in ((False, set()), (True, {"values"})):
        heard: list[str] = []

        def hear(name: Phase, heard: list[str] = heard) -> contextlib.AbstractContextManager[None]:
            heard.append(name)
            return contextlib.nullcontext()

        agent = small(tmp_path / str(separate), PPO, separate_value_model=separate)
        with listening(hear):
            agent.collect()
        assert set(heard) == set(PLAYED) | extra


def test_a_phase_that_fails_is_left() -> None:
    left = []

    @contextlib.contextmanager
    def hear(name: Phase) -> Iterator[None]:
        try:
            yield
        finally:
            left.append(name)

    with listening(hear), pytest.raises(KeyError), phase("collect"):
        raise KeyError
    assert left == ["collect"]


def test_flops_are_those_of_the_first_rollout_and_update(tmp_path: Path) -> None:
    agent, twin = small(tmp_path / "a"), small(tmp_path / "b")
    with counted_flops(agent, tmp_path / "flops.json"):
        agent.learn(60, **QUIET)
    assert agent.num_updates > 1
    # A model's first pass tries whether it can share prompts; of the agent that was in the evaluation before training.
    textrl_gym.evaluate(twin, episodes=4)
    # The twin does the first rollout and update alone, counted from outside: evaluations and the health card, which
    # run models too, are not in it.
    with flops.counter() as counter:
        rollout = twin.collect()
        twin.update(rollout)
    expected = {"flop": counter.get_total_flops(), "tokens": rollout.num_tokens}
    assert json.loads((tmp_path / "flops.json").read_text()) == expected
    assert torch.is_grad_enabled()
