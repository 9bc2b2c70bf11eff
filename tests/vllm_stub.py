"""A server that speaks as a vLLM server does, over the project's own sampler, and misbehaves as it is told to.

    with running(Stub(folder)) as stub: VLLMSampler(Client(stub.url), DiskTransfer(...))

`python tests/vllm_stub.py -m vllm.entrypoints.cli.main serve FOLDER --port N ...` is one in a process of its own.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file
from torch import Tensor

from textrl_gym.models import loading
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts import sampler


def uniforms(seed: int, places: int) -> Tensor:
    """The random numbers that the stub samples a row with: a function of the request's seed. [T]"""
    return torch.rand(places, generator=torch.Generator().manual_seed(seed))


class Stub(ThreadingHTTPServer):
    """Serves the model of a folder.

    Args:
        folder: of the model that a request names, and whose weights it has until it is sent others.
        vocab_size: of the tokenizer, where the model has more rows.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.folder, self.lock = folder, threading.RLock()
        self.calls: Counter[str] = Counter()
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        """Paths and objects of all requests but completions."""
        self.requests: list[dict[str, Any]] = []
        """Objects of completions."""
        self.config: dict[str, Any] = {
            "model_config": {"logprobs_mode": "processed_logprobs", "max_model_len": 4096},
            "weight_transfer_config": {"backend": "nccl"},
        }
        # How it misbehaves.
        self.drops = 0
        """So many completions more are asked for in vain: the connection is closed."""
        self.restarts_after = -1
        """Completions until it loses its weights, as a server that is started again."""
        self.keeps_weights = False
        """Whether it does not take the weights that it is sent."""
        self.refusal = ""
        """What it says to each completion, in place of one."""
        self.leaves_out: tuple[str, ...] = ()
        """Fields of a completion."""
        self.most_tokens = 10_000
        """After which a completion breaks off."""
        self.seconds = 0.0
        """That a completion takes."""
        self.changes_logprobs = 0.0
        """Added to each, as other kernels would."""
        self.restart()

    def restart(self) -> None:
        """Go back to the weights of the folder, of which the server knows no version."""
        with self.lock:
            self.policy = Policy(loading.load_model(str(self.folder)).float())
            self.version = "default"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that one side has closed is no news."""

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The one choice of a request for one row."""
        prompt, places = torch.tensor([body["prompt"]]), min(body["max_tokens"], self.most_tokens)
        forbidden = {int(token) for token, bias in body.get("logit_bias", {}).items() if bias == -100}
        with self.lock:
            self.requests.append(body)
            if self.restarts_after == 0:
                self.restart()
            self.restarts_after -= 1
            policy = self.policy
            policy.temperature = body["temperature"] or 1.0
            policy.vocab_size = policy.rows - len(forbidden)
            assert forbidden == set(range(policy.vocab_size, policy.rows))
            out = sampler.generate(
                policy,
                prompt,
                torch.ones_like(prompt, dtype=torch.bool),
                torch.tensor([0]),
                uniforms(body["seed"], places)[None] if body["temperature"] else None,
                max_new_tokens=places,
                end_ids=body["stop_token_ids"],
            )
        ids, logps = out.token_BT[out.mask_BT].tolist(), (out.logp_BT[out.mask_BT] + self.changes_logprobs).tolist()
        choice = {"index": 0, "token_ids": ids, "logprobs": {"token_logprobs": logps}, "finish_reason": "stop"}
        return {name: value for name, value in choice.items() if name not in self.leaves_out}

    def take_weights(self, folder: str) -> None:
        """Read weights, as the worker's reload_weights does."""
        if not self.keeps_weights:
            with self.lock:
                self.policy.model.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=False)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Stub

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        stub, path = self.server, urlsplit(self.path).path
        answers: dict[str, Any] = {
            "/health": None,
            "/v1/models": {"data": [{"id": str(stub.folder)}]},
            "/weight_info": {"weight_version": stub.version},
            "/server_info": {"vllm_config": stub.config},
            "/get_world_size": {"world_size": 2},
        }
        stub.calls[path] += 1
        if path in answers:
            self._say(200, answers[path])
        else:
            self._say(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        stub, path = self.server, urlsplit(self.path).path
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stub.calls[path] += 1
        if path == "/v1/completions":
            self._complete(body)
            return
        stub.bodies.append((self.path, body))
        if path == "/collective_rpc":
            stub.take_weights(body["kwargs"]["weights_path"])
        elif not stub.keeps_weights:
            stub.version = body.get("new_version") or body.get("weight_version") or stub.version
        self._say(200, {"message": path})

    def _complete(self, body: dict[str, Any]) -> None:
        stub = self.server
        with stub.lock:
            dropped, stub.drops = stub.drops > 0, max(stub.drops - 1, 0)
        if dropped:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif stub.refusal:
            self._say(400, {"error": {"message": stub.refusal, "type": "BadRequestError", "code": 400}})
        else:
            time.sleep(stub.seconds)
            self._say(200, {"choices": [stub.complete(body)]})

    def _say(self, status: int, answer: Any) -> None:
        content = b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--break" in arguments:
        sys.exit("no GPU today")
    model = Path(arguments[arguments.index("serve") + 1])
    print("serving", *arguments, flush=True)
    Stub(model, int(arguments[arguments.index("--port") + 1])).serve_forever()
