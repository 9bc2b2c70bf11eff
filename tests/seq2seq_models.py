"""Tiny random encoder-decoders made in code, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from textrl_gym.models import tiny

# Dropout is on in the configurations, as in published models: a policy must switch it off.
T5: dict[str, Any] = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.5}
BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 24,
    "dropout": 0.5,
    "forced_bos_token_id": 1,
    "forced_eos_token_id": 0,
}


def seeded(make: Callable[[], Any], seed: int, scale: float) -> Any:
    """A model with weights far from uniform: small ones would give every token the same logit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.ndim > 1:
                    p.normal_(0, scale / (p.shape[-1] ** 0.5 if "embed" not in name and "shared" not in name else 1))
    return model.eval()


def t5(vocab_size: int, seed: int = 0, scale: float = 1.0, **changes: Any) -> T5ForConditionalGeneration:
    """A T5 whose decoder starts from its padding, and that ends with token 0."""
    special = {"pad_token_id": vocab_size - 1, "decoder_start_token_id": vocab_size - 1, "eos_token_id": 0}
    config = T5Config(**({"vocab_size": vocab_size} | special | T5 | changes))
    return seeded(lambda: T5ForConditionalGeneration(config), seed, scale)


def flan_t5(vocab_size: int, seed: int = 0, scale: float = 0.2) -> T5ForConditionalGeneration:
    """A T5 1.1, as FLAN-T5 is: gated layers, a head of its own, and logits that are not scaled."""
    model = t5(vocab_size, seed, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    # transformers ties the new one; of weights that are loaded it finds out that they differ.
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().flip(1) * scale)
    return model


def bart(vocab_size: int, seed: int = 0, scale: float = 1.0, **changes: Any) -> BartForConditionalGeneration:
    """A BART whose decoder starts from its EOS, with positions from a table and tokens that generate() would force."""
    special = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 0, "decoder_start_token_id": 0}
    config = BartConfig(**({"vocab_size": vocab_size} | special | BART | changes))
    model = seeded(lambda: BartForConditionalGeneration(config), seed, scale)
    model.final_logits_bias.copy_(torch.linspace(-0.5, 0.5, vocab_size)[None])  # so that it is seen if it is left out
    return model


MODELS: dict[str, Callable[..., Any]] = {"t5": t5, "flan-t5": flan_t5, "bart": bart}


def learner(name: str, seed: int = 0) -> Any:
    """A T5 or BART of one layer with the initial weights of transformers, from which CopyText-v0 is learnt.

    The head is a small one of its own, so that the policy begins near uniform. T5's relative positions are made ten
    times as large: its cross-attention has none, so that they are all by which it can tell one symbol from the next.
    """

    def make() -> Any:
        special = {"vocab_size": 6, "pad_token_id": 5, "bos_token_id": 5, "eos_token_id": 0}
        if name == "t5":
            more: dict[str, Any] = {"num_layers": 1, "decoder_start_token_id": 5, "tie_word_embeddings": False}
            model: Any = T5ForConditionalGeneration(T5Config(**(special | T5 | more)))
        else:
            more = {"encoder_layers": 1, "decoder_layers": 1, "decoder_start_token_id": 0, "init_std": 0.2}
            model = BartForConditionalGeneration(BartConfig(**(BART | special | more)))
        head = torch.randn_like(model.lm_head.weight) * 0.05
        model.lm_head.weight = torch.nn.Parameter(head)
        with torch.no_grad():
            for label, p in model.named_parameters():
                if "relative_attention_bias" in label:
                    p.mul_(10)
        return model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def tokenizer_with_end(words: list[str]) -> Any:
    """A tokenizer of words that puts EOS behind every text, as T5's and BART's do."""
    from tokenizers import processors

    made = tiny.symbol_tokenizer(words)
    backend = made.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
