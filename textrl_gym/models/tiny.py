"""Tiny tokenizers and language models made in code, for tasks that are solved in seconds and for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

SYMBOLS_EOS = "<eos>"


def symbol_tokenizer(symbols: Sequence[str]) -> Any:
    """A tokenizer of whitespace-separated symbols; token 0 is EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([SYMBOLS_EOS, *symbols])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token=SYMBOLS_EOS))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=SYMBOLS_EOS)


def llama(
    vocab_size: int, *, width: int = 32, layers: int = 2, heads: int = 2, seed: int = 0, scale: float = 0.02
) -> Any:
    """A random Llama of transformers, the same for the same arguments whatever was drawn before.

    Args:
        scale: standard deviation of the initial weights; larger ones give a less uniform language model.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        initializer_range=scale,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,  # a pad token's embedding is never trained
        tie_word_embeddings=False,
    )
    # A fork, so that making a model draws nothing from the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def gpt2(vocab_size: int, places: int, *, width: int = 32, layers: int = 2, heads: int = 2, seed: int = 0) -> Any:
    """A random GPT-2 of transformers with `places` learned positions, the same for the same arguments.

    Learned positions make "the third token" known from the start; a random rotary model has to find it out.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=places,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()
