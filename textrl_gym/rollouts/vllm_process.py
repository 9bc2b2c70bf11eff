"""A vLLM server in a Python environment of its own, which is started for a run and ends with it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from textrl_gym.models import lora
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts.vllm_client import Client, ServerError, TransferName

START_SECONDS = 900.0
"""Until it must be healthy: a large model, and the compilation of its graphs, take minutes."""
END_SECONDS = 30.0
LOG_LINES = 15
OWN_VARIABLES = ("PYTHONPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Of this process, and of torchrun: vLLM would take them for its own."""


@contextlib.contextmanager
def started(
    python: str,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    places: int,
    transfer: TransferName,
    arguments: str = "",
) -> Iterator[str]:
    """A server of the policy's model while the block lasts; gives its url.

    Args:
        python: the interpreter of an environment with vLLM.
        folder: of the run; the server's log is vllm.log in it.
        places: tokens of the longest prompt with its completion.
        transfer: how weights will get there.
        arguments: more of `vllm serve`, as a shell would take them.

    Raises:
        ServerError: it ends instead of answering, with the end of its log.
    """
    model, log = folder / "vllm_model", folder / "vllm.log"
    bare = lora.bare(policy.model)
    if transfer == "disk":
        bare.save_pretrained(model, state_dict=dict(lora.whole_weights(policy.model)))
    else:  # the first weights are sent as all others are
        bare.config.save_pretrained(model)
    tokenizer.save_pretrained(model)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dtype = str(policy.dtype).removeprefix("torch.")
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", str(model.resolve()), "--dtype", dtype]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(places)]
    command += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    if transfer != "disk":
        command += ["--load-format", "dummy", "--weight-transfer-config", json.dumps({"backend": transfer})]
    environ = server_environment(os.environ, transfer)
    url = f"http://127.0.0.1:{port}"
    client = Client(url)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, *shlex.split(arguments)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,  # Ctrl-C is the run's, which ends the server when it has saved
        )
    try:
        client.wait(START_SECONDS, lambda: _require_running(process, log))
        yield url
    finally:
        client.close()
        _end(process)
        shutil.rmtree(model, ignore_errors=True)


def server_environment(environ: Mapping[str, str], transfer: TransferName) -> dict[str, str]:
    """The environment variables of a server that is started beside a run.

    Over NCCL the two sides need GPUs of their own: the training processes take the first ones that are visible, and the
    server sees the others. By IPC it sees the first one alone.

    Raises:
        ValueError: CUDA_VISIBLE_DEVICES leaves the server no GPU.
    """
    server = {name: value for name, value in environ.items() if name not in OWN_VARIABLES}
    server["VLLM_SERVER_DEV_MODE"] = "1"  # the RL endpoints
    if transfer == "ipc":
        server["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles are pickles; it listens to this machine alone
    if transfer == "disk":
        return server
    visible, training = _visible_gpus(environ), int(environ.get("LOCAL_WORLD_SIZE", "1"))
    chosen = visible[:1] if transfer == "ipc" else visible[training:]
    if not chosen:
        raise ValueError(
            f"{len(visible)} GPU(s) ({','.join(visible)}) for {training} training process(es) leave none for "
            f"the server: vllm_transfer={transfer!r} needs more; with one GPU take 'ipc'"
        )
    server["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    return server


def _visible_gpus(environ: Mapping[str, str]) -> Sequence[str]:
    if "CUDA_VISIBLE_DEVICES" in environ:
        return [name for name in environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _require_running(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.poll() is not None:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
        raise ServerError(f"the vLLM server ended with {process.returncode} before it answered; {log} ends:\n{tail}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and its workers, which are one session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
            break
