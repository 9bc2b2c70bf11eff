"""The estimate of memory: counted without data, and equal to what the parts hold."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from textrl_gym.models import lora, memory
from textrl_gym.models.memory import Work, at_its_fullest, estimate
from textrl_gym.policy.backbone import cache_name
from textrl_gym.policy.policy import CHUNK_NUMBERS

CONFIG = LlamaConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=101,
    tie_word_embeddings=True,
)
WORK = Work(rollout_episodes=6, group_size=2, prompt_tokens=5, new_tokens=3, micro_batch_tokens=40, dtype="float32")


def test_weights_gradients_and_adam_are_exact() -> None:
    model = AutoModelForCausalLM.from_config(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    parts = estimate(CONFIG, WORK)
    assert parts["weights"] == parts["reference"] == sum(p.nbytes for p in model.parameters())
    assert parts["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    moments = [s[name].nbytes for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert parts["optimizer"] == sum(moments)
    assert parts["cast weights"] == 0
    assert estimate(CONFIG, dataclasses.replace(WORK, dtype="bfloat16"))["cast weights"] == parts["weights"] // 2


def test_the_cache_is_that_of_prompts_once_and_completions() -> None:
    model = AutoModelForCausalLM.from_config(CONFIG)
    cache = DynamicCache()
    # 3 prompts of 5 tokens, 6 completions of 3: 33 tokens
    model(input_ids=torch.zeros(1, 33, dtype=torch.long), **{cache_name(model): cache})
    layers: Any = cache.layers
    assert estimate(CONFIG, WORK)["cache"] == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def test_what_the_backward_pass_keeps_is_counted_without_data() -> None:
    """The same tensors with data: their storages, weights not among them."""
    model = AutoModelForCausalLM.from_config(CONFIG).eval()
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.model(input_ids=torch.zeros(5, 8, dtype=torch.long), use_cache=False).last_hidden_state
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    expected = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in weights)
    # Attention is not split among the same kernels with and without data.
    assert estimate(CONFIG, WORK)["activations"] == pytest.approx(expected, rel=0.1)
    assert hidden.shape == (5, 8, 32)


def test_a_lora_trains_what_peft_says() -> None:
    pytest.importorskip("peft")
    adapted = lora.add_lora(AutoModelForCausalLM.from_config(CONFIG), rank=4, alpha=8, seed=0)
    trained = sum(p.nbytes for p in adapted.parameters() if p.requires_grad)
    parts = estimate(CONFIG, dataclasses.replace(WORK, lora_rank=4))
    assert (parts["gradients"], parts["optimizer"], parts["reference"]) == (trained, 2 * trained, 0)


def test_more_work_needs_more() -> None:
    base = estimate(CONFIG, WORK)
    more = dataclasses.replace(WORK, micro_batch_tokens=80)
    assert estimate(CONFIG, more)["activations"] > base["activations"]
    critic = dataclasses.replace(WORK, separate_value_model=True)
    assert estimate(CONFIG, critic)["optimizer"] == 2 * base["optimizer"]
    always = base["weights"] * 2 + base["optimizer"] + base["logits"]
    assert at_its_fullest(base) == always + max(base["cache"], base["gradients"] + base["activations"])
    assert memory.LOGITS_AT_A_TIME == CHUNK_NUMBERS
    with pytest.raises(ValueError, match="prompt_tokens must be at least 1, got 0"):
        Work(prompt_tokens=0)


def test_the_documented_table_is_what_is_computed(root: Path) -> None:
    examples = root / "examples" / "memory_table.py"
    spec = importlib.util.spec_from_file_location("memory_table", examples)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The smallest alone: the others are the same arithmetic.
    name = "SmolLM2-135M"
    lines = module.rows({name: module.config_of(name)}, Work(micro_batch_tokens=2048))
    page = (root / "docs" / "pipeline.md").read_text(encoding="utf-8")
    assert all(line in page for line in lines)
