"""A text environment as an OpenEnv server, and OpenEnv's client on it.

pip install '.[openenv]'
python examples/openenv_server.py
"""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator

import uvicorn
from openenv import GenericEnvClient

import textrl_gym  # noqa: F401 - registers the environments
from textrl_gym.integrations.openenv import server


@contextlib.contextmanager
def serving(env: object) -> Iterator[str]:
    """The address of a server on this machine; `uvicorn app:app` serves an `app = server(env)` for good."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(server(env), host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join()


def main(env_id: str = "CopyText-v0") -> float:
    with serving(env_id) as address, GenericEnvClient(base_url=address).sync() as client:
        result = client.reset(row=3)
        prompt = result.observation["messages"][-1]["content"]
        result = client.step({"text": prompt})
        print(f"{prompt!r} copied: reward {result.reward}, over: {result.done}, {client.state()}")
    return float(result.reward)


if __name__ == "__main__":
    main(*sys.argv[1:2])
