"""Text environments as a taskset of verifiers (v1): whole rollouts through its interception, with a stub model."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import textrl_gym
from textrl_gym import registry
from textrl_gym.rollouts.text_actions import TextActions

reason = "needs verifiers: pip install '.[verifiers]'"
pytest.importorskip("verifiers.v1", reason=reason)

pytestmark = [
    pytest.mark.filterwarnings("default::DeprecationWarning"),  # of its dependencies
    pytest.mark.filterwarnings("default::ResourceWarning"),
]
HALVING = "Halving-v0"


@pytest.fixture
def example(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's module, which is a taskset too."""
    monkeypatch.syspath_prepend(str(root / "examples"))
    return importlib.import_module("verifiers_rollout")


@pytest.fixture
def halving() -> Iterator[str]:
    """A conversation with an id."""
    textrl_gym.register(HALVING, "conversations:Halving")
    yield HALVING
    del gym.registry[HALVING]


def play(example: Any, answer: Any, episodes: int, **taskset: Any) -> list[Any]:
    """The traces of episodes with a model that answers by a function."""
    with example.endpoint(answer) as address:
        traces: list[Any] = asyncio.run(example.play(address, taskset, episodes))
    return traces


def test_the_example(example: Any) -> None:
    assert example.main() == [1.0] * 4


def test_a_conversation_is_that_of_text_actions(example: Any, halving: str) -> None:
    def answer(messages: list[dict[str, Any]]) -> str:
        """Always "b" first, then by what was said."""
        return {"lower": "a", "higher": "c"}.get(messages[-1]["content"], "b" if len(messages) == 1 else "c")

    traces = play(example, answer, 3, env=halving)
    assert [trace.reward for trace in traces] == [1.0] * 3
    assert [trace.metrics["turns"] for trace in traces] == [2.0, 1.0, 2.0]  # a, b, c
    direct = TextActions(halving)
    for row, trace in enumerate(traces):
        messages, _ = direct.reset(options={"prompt_indices": [row]})
        over = False
        while not over:
            messages, _, terminated, truncated, _ = direct.step(answer(list(messages)))
            over = terminated or truncated
        spoken = [(message.role, str(message.content)) for message in trace.branches[-1].messages]
        said = [(message["role"], message["content"].strip()) for message in messages]
        assert spoken == said[: len(spoken)] and len(said) - len(spoken) == 1  # the last reply is heard by nobody
        assert trace.info["stop_reason"] == "DONE"


def test_budgets_end_an_episode(example: Any, halving: str) -> None:
    traces = play(example, lambda messages: "a b c", 1, env=halving)
    # Two of three tokens fit into a turn, three turns into an episode, and each costs 0.25.
    assert traces[0].reward == -0.75
    assert traces[0].metrics["turns"] == 3.0 and traces[0].metrics["cut_tokens"] == 3.0
    assert traces[0].info["stop_reason"] == "MAX_TURNS"


def test_rows_and_settings(example: Any) -> None:
    from verifiers.v1.utils.loaders import load_environment, resolve_env_config

    def taskset(**config: Any) -> Any:
        return load_environment(resolve_env_config({"taskset": {"id": "verifiers_rollout", **config}})).taskset

    tasks = list(taskset(env="CopyText-v0", rows=3))
    source = gym.make("CopyText-v0").unwrapped.source  # type: ignore[attr-defined]
    assert [(task.data.row, task.data.prompt) for task in tasks] == [(i, source[i]["prompt"]) for i in range(3)]
    for rows in (0, 17):
        with pytest.raises(ValueError, match=f"rows must be 1 to 16, got {rows}"):
            list(taskset(env="CopyText-v0", rows=rows))
    with pytest.raises(ValueError, match=r"kl_coef=0\.1"):
        list(taskset(env="CopyText-v0", settings={"kl_coef": 0.1}))
    assert "CopyText-v0" in registry.env_ids()
