"""Language models with random weights, in the shapes of published ones: speed does not depend on what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from textrl_gym.models import tiny

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
"""Fields of LlamaConfig. (Qwen2.5's biases of queries, keys and values are left out: a thousandth of its weights.)"""


def make(shape: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Any:
    """A random Llama of a shape, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=0, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(device):  # made where it is used: 0.5B random numbers take a CPU seconds
        model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def save(shape: str, folder: Path) -> None:
    """Write a random model and a tokenizer of its vocabulary into a folder, from which any library loads them."""
    make(shape).save_pretrained(folder)
    symbols = [f"t{i}" for i in range(1, SHAPES[shape]["vocab_size"])]
    tokenizer = tiny.symbol_tokenizer(symbols)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
