"""verifiers (v1) plays a text environment, with a model behind an OpenAI-compatible endpoint.

    pip install '.[verifiers]'
    python examples/verifiers_rollout.py

The endpoint here repeats what it is told, which is what CopyText-v0 asks for. This file is a taskset of verifiers too.
"""

import asyncio
import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import verifiers.v1 as vf
from verifiers.v1.utils.loaders import load_environment, resolve_env_config

import textrl_gym  # noqa: F401 - registers the environments
from textrl_gym.integrations.verifiers import ChatHarness, TextGame, TextTaskset

__all__ = ["ChatHarness", "TextGame", "TextTaskset"]


@contextlib.contextmanager
def endpoint(answer: Callable[[list[dict[str, Any]]], str]) -> Iterator[str]:
    """The address of an endpoint on this machine that answers conversations by a function."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            message = {"role": "assistant", "content": answer(body["messages"])}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "usage": usage}
            data = json.dumps(reply | {"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


async def play(address: str, taskset: dict[str, Any], episodes: int) -> list[vf.Trace]:
    """The traces of the first episodes of a taskset."""
    os.environ.setdefault("NO_KEY", "none")
    env = load_environment(resolve_env_config({"taskset": {"id": "verifiers_rollout", **taskset}}))
    model = vf.ModelContext("stub", vf.EvalClientConfig(base_url=address, api_key_var="NO_KEY"))
    traces = []
    async with env.serving():
        for task in env.taskset.take(episodes):
            episode = await env.run_slot(env.slots(task)[0], model)
            assert not episode.errors, episode.errors
            traces += episode.traces
    return traces


def main(env_id: str = "CopyText-v0") -> list[float]:
    with endpoint(lambda messages: str(messages[-1]["content"])) as address:
        traces = asyncio.run(play(address, {"env": env_id}, 4))
    for trace in traces:
        print(trace.task.data.prompt, trace.reward, trace.metrics)
    return [trace.reward for trace in traces]


if __name__ == "__main__":
    main(*sys.argv[1:2])
