"""Text environments as OpenEnv servers: an action is a whole turn, as text.

app = server("TLDRSummarize-v0")            # in app.py; uvicorn app:app
with GenericEnvClient(base_url="http://localhost:8000").sync() as client: ...
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, EnvironmentMetadata, Observation, State
from pydantic import Field

from textrl_gym.core import Message, StopReason
from textrl_gym.rollouts.text_actions import TextActions, maker

if TYPE_CHECKING:
    from fastapi import FastAPI

SESSIONS = 64
"""Conversations at a time that a server has, where its caller does not say."""


class Turn(Action):
    """A turn of the agent."""

    text: str = Field(description="All that is said in this turn")


class Said(Observation):
    """What was said so far; `reward` is that of the last turn, `done` tells the end of the conversation."""

    messages: list[Message] = Field(description="The conversation, the prompt's messages first")
    reply: str | None = Field(default=None, description="What the environment said to the last turn")


class Conversation(State):
    """Where a conversation stands: the return of its turns, and why it has ended."""

    total_reward: float = 0.0
    score: float | None = None
    stop_reason: str | None = None


class TextServer(Environment[Turn, Said, Conversation]):
    """One conversation of a client.

    Args:
        env: steps whole turns.
        name: of the environment.
    """

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, env: TextActions, name: str = "") -> None:
        super().__init__()
        self._env, self._name, self._state = env, name, Conversation()

    def reset(
        self, seed: int | None = None, episode_id: str | None = None, row: int | None = None, **settings: Any
    ) -> Said:
        """Begin a conversation.

        Args:
            seed: of the prompts that are drawn.
            episode_id: what the state names it by.
            row: the prompt's place in the split; None: one that is drawn.
        """
        if settings:
            raise ValueError(f"unknown settings of reset: {', '.join(settings)}; allowed: seed, episode_id, row")
        messages, _ = self._env.reset(seed=seed, options=None if row is None else {"prompt_indices": [row]})
        self._state = Conversation(episode_id=episode_id or str(uuid.uuid4()))
        return Said(messages=list(messages))

    def step(self, action: Turn, timeout_s: float | None = None, **settings: Any) -> Said:
        """Say a turn."""
        if self._state.episode_id is None or self._state.stop_reason is not None:
            raise gym.error.ResetNeeded("the conversation is over: call reset()")
        messages, reward, terminated, truncated, info = self._env.step(action.text)
        done = terminated or truncated
        state = self._state
        state.step_count, state.total_reward = state.step_count + 1, state.total_reward + float(reward)
        if done:
            state.score, state.stop_reason = float(info["score"]), StopReason(info["stop_reason"]).name
        extra = {name: info[name] for name in ("turn_ids", "cut_tokens")}
        return Said(messages=list(messages), reply=info.get("reply"), reward=float(reward), done=done, metadata=extra)

    @property
    def state(self) -> Conversation:
        """Where the conversation stands."""
        return self._state

    def get_metadata(self) -> EnvironmentMetadata:
        """The environment's name and the first line of its card."""
        task = self._env.mdp.task
        card = (type(task).__doc__ or "").strip().partition("\n")[0]
        return EnvironmentMetadata(name=self._name or type(task).__name__, description=card, version="1.0.0")


def server(env: object, *, sessions: int = SESSIONS, **settings: Any) -> FastAPI:
    """An application that serves an environment to OpenEnv's clients, a conversation to each session.

    Sessions share what is loaded: the tokenizer, the rows and the reward.

    Args:
        env: an id, or a text environment that the sessions' are to be like.
        sessions: at a time.
        settings: of an id, those of the environment.
    """
    make, name = maker(env, **settings), env if isinstance(env, str) else ""

    def begin() -> TextServer:
        return TextServer(make(), name)

    return create_fastapi_app(begin, Turn, Said, sessions, env_name=name or None, state_cls=Conversation)
