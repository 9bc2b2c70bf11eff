"""What a run holds in memory: weights, optimizer, caches, activations and logits, counted before anything is loaded.

Weights, gradients and optimizer states are exact. Keys and values are those of the rollout's fullest moment. What a
backward pass keeps is counted on tensors without data (PyTorch's FakeTensorMode), of a plain forward pass; attention
that is shared among a prompt's completions keeps a little less. Workspaces of libraries are not counted: leave a tenth.

Shape legend: B rows, U unique prompts, P prompt tokens, T new tokens.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from textrl_gym.bounds import check_settings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FLOAT32 = 4
"""Bytes of a number; weights, gradients and Adam's two moments are float32 whatever the forward passes are."""
WIDTHS = {"float32": 4, "bfloat16": 2}
LOGITS_AT_A_TIME = 2**23
"""As many as policy.policy holds: a test compares them."""
LOGIT_COPIES = 3
"""Logits, their log-softmax and the gradient of a chunk."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What a run does, as far as memory depends on it; the names are those of an agent's settings."""

    rollout_episodes: Annotated[int, Ge(1)] = 64
    """Completions of a rollout."""
    group_size: Annotated[int, Ge(1)] = 8
    """Completions of each prompt."""
    prompt_tokens: Annotated[int, Ge(1)] = 512
    """Tokens of a prompt."""
    new_tokens: Annotated[int, Ge(1)] = 256
    """Tokens of a completion."""
    micro_batch_tokens: Annotated[int, Ge(1)] = 8_192
    """Tokens in one forward and backward pass."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the forward passes."""
    lora_rank: Annotated[int, Ge(0)] = 0
    """0: every weight is trained; else a LoRA of this rank, and no second copy of the weights as the reference."""
    separate_value_model: bool = False
    """PPO with a critic of its own."""

    def __post_init__(self) -> None:
        check_settings(self)


def estimate(config: PretrainedConfig, work: Work) -> dict[str, int]:
    """Bytes by what holds them.

    Args:
        config: of a causal LM of transformers.

    Returns:
        weights, reference, gradients, optimizer, cast weights (bfloat16 copies), cache, activations, logits.

    Raises:
        ValueError: it is an encoder-decoder's, whose passes are of other lengths.
    """
    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type!r} is an encoder-decoder, whose memory is not counted here yet")
    width = WIDTHS[work.dtype]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _model(config)
        total = sum(p.numel() for p in model.parameters())
        trained = _lora_parameters(model, work.lora_rank) if work.lora_rank else total
        activations = _kept_for_backward(model, work)
    critics = total if work.separate_value_model else 0
    held, learnt = total + (trained if work.lora_rank else 0) + critics, trained + critics
    prompts = -(-work.rollout_episodes // work.group_size)
    tokens = prompts * work.prompt_tokens + work.rollout_episodes * work.new_tokens
    vocab = config.get_text_config().vocab_size
    return {
        "weights": held * FLOAT32,
        "reference": 0 if work.lora_rank else total * FLOAT32,
        "gradients": learnt * FLOAT32,
        "optimizer": 2 * learnt * FLOAT32,
        "cast weights": 0 if width == FLOAT32 else total * width,
        "cache": tokens * cache_numbers(config) * width,
        "activations": activations,
        "logits": LOGIT_COPIES * min(LOGITS_AT_A_TIME, work.micro_batch_tokens * vocab) * FLOAT32,
    }


def at_its_fullest(parts: dict[str, int]) -> int:
    """The most that is held at once: caches of a rollout are gone when gradients and activations of an update come."""
    always = parts["weights"] + parts["reference"] + parts["optimizer"] + parts["cast weights"] + parts["logits"]
    return always + max(parts["cache"], parts["gradients"] + parts["activations"])


def cache_numbers(config: PretrainedConfig) -> int:
    """Keys and values of one token, as numbers."""
    text: Any = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * size


def _model(config: PretrainedConfig) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _lora_parameters(model: Any, rank: int) -> int:
    head = model.get_output_embeddings()
    linear = (m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    return sum(rank * (layer.in_features + layer.out_features) for layer in linear)


def _kept_for_backward(model: Any, work: Work) -> int:
    """Bytes that the backward pass of a micro-batch keeps, weights not among them."""
    length = min(work.prompt_tokens + work.new_tokens, work.micro_batch_tokens)
    rows = max(1, work.micro_batch_tokens // length)
    # A linear layer keeps its weight, or in bfloat16 the copy of it, transposed: both are counted by themselves.
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim > 1}
    shapes |= {shape[::-1] for shape in shapes}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no two have one address

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in shapes and not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            storages[StorageWeakRef(storage).cdata] = storage
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long)
    casting = torch.autocast("cpu", dtype=torch.bfloat16, enabled=work.dtype == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), casting:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    del hidden
    return sum(storage.nbytes() for storage in storages.values())
