"""Text environments as a taskset of verifiers (v1), its environment, and a harness that only talks.

verifiers loads a taskset by the name of a top-level module, so that one line makes yours:

    from textrl_gym.integrations.verifiers import *        # my_taskset.py
    eval my-taskset --env.taskset.env CopyText-v0           # in a shell
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import verifiers.v1 as vf
from pydantic import Field
from verifiers.v1.dialects.chat import message_to_wire

from textrl_gym.core import StopReason
from textrl_gym.rollouts.text_actions import TextActions, maker

__all__ = ["ChatHarness", "TextGame", "TextTaskset"]


class TextTasksetConfig(vf.TasksetConfig):
    """Which environment, and which of its prompts."""

    env: str = "CopyText-v0"
    """An id of textrl_gym."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Of the environment: split, dataset, tokenizer, reward, max_new_tokens, ..."""
    rows: int | None = None
    """The first so many prompts of the split; None: all."""


class TextData(vf.TaskData):
    """A prompt, the place of its row in the split, and the environment that it is of."""

    row: int
    env: str
    settings: dict[str, Any]


class TextTask(vf.Task[TextData, vf.State, vf.TaskConfig]):
    """An episode. Its rewards come from the environment, when TextGame has played it."""


class TextTaskset(vf.Taskset[TextTask, TextTasksetConfig]):
    """The prompts of a split."""

    def load(self) -> Iterator[TextTask]:
        """A task for each row.

        Raises:
            ValueError: no such environment, or fewer rows than are asked for.
        """
        config = self.config
        talk = _maker(config.env, json.dumps(config.settings, sort_keys=True))()
        source = talk.mdp.source
        count = len(source) if config.rows is None else config.rows
        if not 0 < count <= len(source):
            raise ValueError(f"rows must be 1 to {len(source)}, got {config.rows}")
        for row in range(count):
            messages, _ = talk.reset(options={"prompt_indices": [row]})
            prompt = messages[0]["content"] if len(messages) == 1 else list(messages)
            data = TextData(
                name=f"{config.env}#{row}", prompt=prompt, row=row, env=config.env, settings=config.settings
            )
            yield TextTask(data, config.task)


class TextGameConfig(vf.EnvConfig):
    """The one seat."""

    player: vf.AgentConfig = vf.AgentConfig(runtime=vf.SubprocessConfig())
    """The policy. The harness of this module runs no program, so that it needs no sandbox."""


class TextGame(vf.Env[TextGameConfig]):
    """Plays an episode: the agent's replies are turns, and the environment's replies are what the user says next.

    The trace's reward `episode_return` is the sum of the turns' rewards; its metrics are the raw `score`, the number of
    `turns`, and `cut_tokens`, those that the budget had no place for.
    """

    async def run(self, task: vf.Task, agents: Any) -> None:
        """Play one episode."""
        data: Any = task.data
        talk = _maker(data.env, json.dumps(data.settings, sort_keys=True))()
        talk.reset(options={"prompt_indices": [data.row]})
        total, cut, turns, info = 0.0, 0, 0, dict[str, Any]()
        async with agents.player.interaction(task) as interaction:
            segment = await interaction.turn()  # the prompt is the task's
            while not segment.terminated:
                _, reward, terminated, truncated, info = talk.step(segment.last_reply)
                total, cut, turns = total + float(reward), cut + info["cut_tokens"], turns + 1
                if terminated or truncated:
                    break
                segment = await interaction.turn(info["reply"])
        trace = interaction.trace
        trace.record_reward("episode_return", total, 1.0)
        trace.record_metrics({"turns": float(turns), "cut_tokens": float(cut)})
        if "score" in info:
            trace.record_metric("score", float(info["score"]))
            trace.info["stop_reason"] = StopReason(info["stop_reason"]).name


class ChatHarnessConfig(vf.HarnessConfig):
    """Nothing to set."""


class ChatHarness(vf.Harness[ChatHarnessConfig]):
    """Asks the model for one message, in this process: no program, no tools, no sandbox."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: Mapping[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        """Send the conversation so far; verifiers takes the answer from what passes through `endpoint`."""
        system, prompt = self.resolve_prompt(data)
        messages = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [message_to_wire(message) for message in prompt or []]
        body = {"model": ctx.model, "messages": messages}
        async with httpx.AsyncClient(timeout=None, trust_env=False) as client:
            headers = {"Authorization": f"Bearer {secret}"}
            response = await client.post(f"{endpoint}/chat/completions", json=body, headers=headers)
        if response.is_error:
            return vf.ProgramResult(1, "", f"{response.status_code}: {response.text}")
        return vf.ProgramResult(0, response.text, "")


@functools.lru_cache(maxsize=8)
def _maker(env: str, settings: str) -> Callable[[], TextActions]:
    """What episodes of an environment share: tokenizer, rows, reward."""
    return maker(env, **json.loads(settings))
