"""How the policy's weights get into a vLLM server: over NCCL, by CUDA IPC, or as a folder that both see.

The server is told by HTTP what comes (its RL endpoints); these classes move the numbers. They follow the engines of
vLLM 0.33.0, vllm/distributed/weight_transfer/{nccl,ipc}_engine.py, and import nothing of vLLM.
"""

from __future__ import annotations

import base64
import pickle
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.cuda import nccl
from torch.multiprocessing.reductions import reduce_tensor

from textrl_gym.models import lora
from textrl_gym.rollouts.vllm_client import Client, TransferName

if TYPE_CHECKING:
    from textrl_gym.policy.policy import Policy


class WeightTransfer(Protocol):
    """One way of sending weights."""

    @property
    def needs(self) -> str | None:
        """The backend that the server must be started with (--weight-transfer-config); None: it does not matter."""

    def open(self, client: Client, device: torch.device) -> None:
        """Get ready for the weights of a server that has just been started, or started again.

        Args:
            device: of the policy.
        """

    def send(self, client: Client, policy: Policy, version: str) -> None:
        """Send all weights to a paused server, which has that version of them afterwards."""


def make(name: TransferName, folder: Path) -> WeightTransfer:
    """The way of that name.

    Args:
        folder: of the run; "disk" writes its weights there.
    """
    if name == "disk":
        return DiskTransfer(folder / "vllm_weights")
    return NCCLTransfer() if name == "nccl" else IPCTransfer()


def weights_of(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight, as a checkpoint of the model has them, in the dtype of the policy's passes."""
    for name, weight in lora.whole_weights(policy.model):
        yield name, weight.to(policy.dtype)


class DiskTransfer:
    """Weights as a file that the server reads: any device, one file system.

    By the worker's `reload_weights`, as there is no engine for files in vLLM 0.33.
    """

    needs = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()  # the server's working folder is another

    def open(self, client: Client, device: torch.device) -> None:
        """Nothing: each file is whole."""

    def send(self, client: Client, policy: Policy, version: str) -> None:
        """Write the file, have it read, and remove it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            weights = {name: weight.detach().cpu().contiguous() for name, weight in weights_of(policy)}
            save_file(weights, self.folder / "model.safetensors")
            kwargs = {"weights_path": str(self.folder)}
            client.post("collective_rpc", {"method": "reload_weights", "kwargs": kwargs})
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        client.post("update_weight_version", {"new_version": version})


class NCCLTransfer:
    """Weights by NCCL broadcast from the policy's GPU, which is rank 0, to the GPUs of the server.

    The server's communicators are vLLM's own and in no process group of torch.distributed: this side joins them by a
    unique id, through torch.cuda.nccl.
    """

    needs = "nccl"

    def __init__(self) -> None:
        self._communicator: object = None

    def open(self, client: Client, device: torch.device) -> None:
        """Make a communicator with all workers of the server."""
        size = client.get("get_world_size")["world_size"] + 1
        unique_id = nccl.unique_id()
        shared = base64.b64encode(unique_id).decode()
        init = {"nccl_unique_id_b64": shared, "rank_offset": 1, "world_size": size, "packed": False}

        def join() -> None:
            self._communicator = nccl.init_rank(size, unique_id, 0)
            # The workers begin with an all_reduce of one number, and wait for this side's.
            nccl.all_reduce([torch.zeros(1, device=device)], comms=[self._communicator])
            torch.cuda.synchronize(device)

        _beside(client, "init_weight_transfer_engine", {"init_info": init}, join)

    def send(self, client: Client, policy: Policy, version: str) -> None:
        """Broadcast each weight while the workers receive it."""
        weights = [(name, weight.detach().contiguous()) for name, weight in weights_of(policy)]

        def broadcast() -> None:
            for _, weight in weights:
                nccl.broadcast([weight], root=0, comms=[self._communicator])
            torch.cuda.synchronize(policy.device)

        client.post("start_weight_update")
        _beside(client, "update_weights", {"update_info": _described(weights)}, broadcast)
        client.post("finish_weight_update", {"weight_version": version})


class IPCTransfer:
    """Handles of the weights' GPU memory, which a server on the same GPU reads.

    Handles are sent as pickles, so that the server needs VLLM_ALLOW_INSECURE_SERIALIZATION=1 and must listen to this
    machine alone. Nothing is unpickled on this side.
    """

    needs = "ipc"

    def open(self, client: Client, device: torch.device) -> None:
        """Say in which form handles come: one for each weight."""
        client.post("init_weight_transfer_engine", {"init_info": {"packed": False}})

    def send(self, client: Client, policy: Policy, version: str) -> None:
        """Send the handles; the memory is held until the server has read it."""
        weights = [(name, weight.detach().contiguous()) for name, weight in weights_of(policy)]
        gpu = str(torch.cuda.get_device_properties(policy.device).uuid)
        handles = [{gpu: reduce_tensor(weight)[1]} for _, weight in weights]
        torch.cuda.synchronize(policy.device)
        pickled = base64.b64encode(pickle.dumps(handles)).decode()
        client.post("start_weight_update")
        client.post("update_weights", {"update_info": _described(weights) | {"ipc_handles_pickled": pickled}})
        client.post("finish_weight_update", {"weight_version": version})
        del weights
        torch.cuda.ipc_collect()


def _described(weights: list[tuple[str, Tensor]]) -> dict[str, Any]:
    """Names, dtypes and shapes, as the engines of both kinds are told them."""
    return {
        "names": [name for name, _ in weights],
        "dtype_names": [str(weight.dtype).removeprefix("torch.") for _, weight in weights],
        "shapes": [list(weight.shape) for _, weight in weights],
    }


def _beside(client: Client, path: str, body: dict[str, Any], work: Callable[[], object]) -> None:
    """Do work that the server answers a request by: both sides meet in the same calls of NCCL."""
    pool = ThreadPoolExecutor(1)
    try:
        answer = pool.submit(client.post, path, body)
        work()
        answer.result()
    finally:
        # Not waited for: after an error of this side the server hangs in a call that nobody answers.
        pool.shutdown(wait=False)
