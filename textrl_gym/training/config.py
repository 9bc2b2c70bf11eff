"""Settings: of every agent, of training around the updates, and how a config is made of keywords. Loads no torch."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from annotated_types import Ge, Gt, Le

from textrl_gym.bounds import MOST_ROWS, check_settings, unknown_settings
from textrl_gym.extras import install
from textrl_gym.kl import check_estimator
from textrl_gym.persistence.save_schedule import SaveOptions
from textrl_gym.rollouts.vllm_client import TransferName

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """Settings that every agent has. Bounds in the annotations, of subclasses too, are checked when one is made."""

    rollout_episodes: Annotated[int, Ge(1), Le(MOST_ROWS)] = 64
    """Episodes collected before each update: rows of the vector environment."""
    group_size: Annotated[int, Ge(1)] = 1
    """Completions of each prompt."""
    learning_rate: Annotated[float, Gt(0)] = 5e-4
    """Adam's step size. 5e-4 suits the embedded 1M-parameter model; 1e-6 to 1e-5 suits models of 100M and more."""
    lr_schedule: Literal["linear", "constant"] = "linear"
    """"linear" goes to 0 over total_timesteps."""
    epochs: Annotated[int, Ge(1), Le(10_000)] = 1
    """Passes over each rollout."""
    minibatches: Annotated[int, Ge(1)] = 1
    """Optimizer steps in each pass."""
    micro_batch_tokens: Annotated[int, Ge(1)] = 8_192
    """Prompt and response places in one forward and backward pass: memory, not result."""
    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    """Gradients are scaled down to this norm."""
    adam_eps: Annotated[float, Gt(0)] = 1e-5
    """Adam's epsilon (1e-5 as in OpenAI's code; PyTorch's default is 1e-8)."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """AdamW's decoupled weight decay."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Divides every logit, in sampling, KL and update alike."""
    kl_coef: Annotated[float | None, Ge(0)] = None
    """Coefficient of the KL to the reference; None: the environment's, where it was made with one, or else the task's
    own (0.1 on TLDRSummarize-v0)."""
    kl_estimator: str | None = None
    """Estimator of the KL in the reward: k1, k2, k3 or full; None: the environment's own (k1)."""
    kl_target: Annotated[float | None, Gt(0)] = None
    """Nats per sequence that an adaptive controller steers the KL to; None keeps kl_coef fixed."""
    kl_horizon: Annotated[int, Ge(1)] = 10_000
    """Episodes over which the adaptive controller moves."""
    importance_cap: Annotated[float | None, Gt(0)] = 2.0
    """Where a vLLM server samples: the policy loss of a token is weighed by its probability in the training forward
    over that at the server, at most by this (TIS, Yao et al. 2025); None: not weighed."""
    missing_eos_penalty: Annotated[float | None, Ge(0)] = None
    """Taken off the score of an episode whose budget ran out; None: the environment's own (0)."""
    lora_rank: Annotated[int, Ge(0)] = 0
    """Train a LoRA of this rank (needs peft); the reference is the model with it switched off. 0: none, or the one that
    a loaded model has. The folder of an adapter is merged into its base before."""
    lora_alpha: Annotated[int, Gt(0)] = 32
    """A LoRA's change is scaled by lora_alpha / lora_rank."""
    frozen_layers: Annotated[int, Ge(0)] = 0
    """Leave the embeddings and so many lower layers as they are; policy and reference hold them once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward passes; weights stay float32."""
    cuda_graphs: bool = False
    """Decode at fixed shapes, on a GPU as CUDA graphs. Tested on a CPU; it has not been run on a GPU yet."""
    compile: Literal["none", "update", "decode", "all"] = "none"
    """What torch.compile compiles: the passes of the update, the decode step (then at fixed shapes), or both. The first
    updates take a minute longer. Needs a C++ compiler on a CPU, Triton on a GPU."""

    def __post_init__(self) -> None:
        check_settings(self)
        # peft freezes every weight but the LoRA's, so frozen_layers would silently do nothing.
        if self.lora_rank and self.frozen_layers:
            raise ValueError(f"lora_rank={self.lora_rank} freezes the whole model: leave frozen_layers out")
        if self.rollout_episodes % self.group_size:
            raise ValueError(f"rollout_episodes={self.rollout_episodes} is no multiple of group_size={self.group_size}")
        if self.kl_estimator is not None:
            check_estimator(self.kl_estimator)


Tracker = Literal["none", "wandb", "trackio", "mlflow"]
"""Experiment trackers, each with an extra of its name."""


def require_tracker(name: Tracker) -> None:
    """Raise ValueError where the tracker's package is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ValueError(f"log_to={name!r} needs the package {name}: {install(name)}")


@dataclasses.dataclass(frozen=True)
class TrainOptions(SaveOptions):
    """What happens around the updates."""

    eval_every: Annotated[int, Ge(0)] = 20
    """Updates between two evaluations on the validation split, at most; every tenth of a run has one too, if it has so
    many updates. 0 for none but the first and the last."""
    eval_episodes: Annotated[int, Ge(1)] = 64
    """Held-out prompts of an evaluation during training."""
    gold: str | None = None
    """The gold score of the evaluations: gold (the task's own), or a reward (its name, module:function, a folder with a
    reward model); None: the task's own, where it has one."""
    show_samples: Annotated[int, Ge(0)] = 2
    """Sample completions printed at each evaluation; all of them are in samples.jsonl."""
    log_to: Tracker = "none"
    """An experiment tracker that gets all that TensorBoard gets: wandb, trackio or mlflow (an extra each)."""
    shard: bool = False
    """Of several processes (torchrun): each holds a part of what is trained, its gradients and moments, by fully_shard;
    weights are gathered to sample. False: each holds all, which is faster where there is room. See docs/distributed.md.
    """
    vllm_url: str | None = None
    """Rollouts by the vLLM server at http://HOST:PORT; None: in this process. See docs/vllm.md."""
    vllm_python: str | None = None
    """Rollouts by a vLLM server that is started for the run with this Python, of an environment with vLLM."""
    vllm_args: str = ""
    """More arguments of `vllm serve` for the server that is started."""
    vllm_transfer: TransferName = "nccl"
    """How weights get to the server: nccl to other GPUs, ipc on one GPU, disk by files."""
    rollouts_ahead: bool = False
    """With a vLLM server: sample the next rollout while the update runs, one step off-policy (weighed by
    importance_cap)."""
    on_bad_health: Literal["stop", "warn"] = "stop"
    """What to do when a line of the health card fails before the first update."""
    on_hacking: Literal["off", "warn", "stop"] = "warn"
    """What to do when evaluations show signs of reward hacking (see evaluation.reward_hacking). "stop" ends the run
    when the gold score falls while the score rises, and keeps the checkpoint of the best gold score in OUT/best."""

    def __post_init__(self) -> None:
        check_settings(self)
        require_tracker(self.log_to)
        if self.vllm_url is not None and self.vllm_python is not None:
            raise ValueError(
                f"vllm_url={self.vllm_url!r} and vllm_python={self.vllm_python!r}: give one of both, for a server "
                "that runs or for one to be started"
            )
        if self.vllm_args and self.vllm_python is None:
            raise ValueError(f"vllm_args={self.vllm_args!r} are of a server that is started: give vllm_python")
        if self.rollouts_ahead and not self.by_server:
            raise ValueError("rollouts_ahead is for rollouts by a vLLM server: give vllm_url or vllm_python")

    @property
    def by_server(self) -> bool:
        """Whether a vLLM server samples the rollouts."""
        return self.vllm_url is not None or self.vllm_python is not None


@dataclasses.dataclass(frozen=True)
class Clock:
    """Training progress, which the loop hands to the agent before each rollout."""

    update: int = 1
    """Number of the update that the rollout is for, from 1."""
    progress: float = 0.0
    """Share of the total timesteps done before the rollout. (With those of the rollout the last update would have a
    learning rate of 0.)"""


def make_config(config: type[ConfigT], settings: Mapping[str, object], whose: str) -> ConfigT:
    """A config from keyword settings.

    Raises:
        ValueError: naming the unknown key and the allowed ones.
    """
    allowed = [field.name for field in dataclasses.fields(config)]
    unknown = sorted(set(settings) - set(allowed))
    if unknown:
        raise unknown_settings(whose, unknown, allowed)
    make: Callable[..., ConfigT] = config  # the fields check their values themselves
    return make(**settings)
