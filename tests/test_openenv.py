"""Text environments behind an OpenEnv server, played by OpenEnv's own client on this machine."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import textrl_gym  # noqa: F401 - registers the environments
from textrl_gym.rollouts.text_actions import TextActions

reason = "needs OpenEnv: pip install '.[openenv]'"
openenv: Any = pytest.importorskip("openenv", reason=reason)
pytest.importorskip("gradio", reason=reason)  # another distribution of that name has no server

from conversations import Halving  # noqa: E402

from textrl_gym.mdp.text_env import TextEnv  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("default::DeprecationWarning"),  # of FastAPI and its relatives
    pytest.mark.filterwarnings("default::ResourceWarning"),
]


@pytest.fixture
def example(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's module."""
    monkeypatch.syspath_prepend(str(root / "examples"))
    return importlib.import_module("openenv_server")


@pytest.fixture
def address(example: Any) -> Iterator[str]:
    """Of a server of conversations."""
    with example.serving(TextEnv(task=Halving)) as where:
        yield where


def test_the_example(example: Any) -> None:
    assert example.main() == 1.0


def test_a_conversation_is_that_of_text_actions(address: str) -> None:
    direct = TextActions(TextEnv(task=Halving))
    with openenv.GenericEnvClient(base_url=address).sync() as client:
        messages, _ = direct.reset(options={"prompt_indices": [2]})
        result = client.reset(row=2)
        assert result.observation["messages"] == list(messages) and not result.done
        total = 0.0
        for text in ("c", "b", "a"):
            messages, reward, terminated, truncated, info = direct.step(text)
            result = client.step({"text": text})
            total += float(reward)
            assert result.observation["messages"] == list(messages)
            assert (result.reward, result.done) == (reward, terminated or truncated)
            assert result.observation["reply"] == info["reply"]
            if result.done:
                break
        state = client.state()
        assert result.done and state["total_reward"] == total and state["stop_reason"] == info["stop_reason"].name


def test_sessions_are_apart(address: str) -> None:
    clients = [openenv.GenericEnvClient(base_url=address).sync() for _ in range(2)]
    with clients[0] as one, clients[1] as two:
        first, second = one.reset(row=0), two.reset(row=1)
        assert first.observation != second.observation
        one.step({"text": "b"})
        assert (one.state()["step_count"], two.state()["step_count"]) == (1, 0)


def test_seeds(address: str) -> None:
    with openenv.GenericEnvClient(base_url=address).sync() as client:
        drawn = [client.reset(seed=seed).observation["messages"] for seed in (0, 1, 2, 3, 0)]
    assert drawn[0] == drawn[-1] and len({str(messages) for messages in drawn}) > 1
    direct = TextActions(TextEnv(task=Halving))
    assert drawn[1] == list(direct.reset(seed=1)[0])


def test_what_is_refused(address: str) -> None:
    from textrl_gym.integrations.openenv import TextServer, server

    with openenv.GenericEnvClient(base_url=address).sync() as client, pytest.raises(RuntimeError):
        client.step({"text": "a"})  # before reset
    with pytest.raises(ValueError, match=r"kl_coef=0\.1"):
        server("CopyText-v0", kl_coef=0.1)
    with pytest.raises(ValueError, match="unknown settings of reset: rows; allowed: seed, episode_id, row"):
        TextServer(TextActions(gym.make("CopyText-v0"))).reset(rows=3)


@pytest.mark.slow  # a command that loads much
def test_openenvs_own_checks_pass(address: str) -> None:
    command = [str(Path(sys.executable).with_name("openenv")), "validate", "--url", address, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
