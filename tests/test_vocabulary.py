"""The size of a vocabulary is its highest id and one: tokenizers may leave ids out."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from textrl_gym.core import Row, StopReason
from textrl_gym.envs.copy_text import CopyText
from textrl_gym.mdp.text_env import TextVectorEnv
from textrl_gym.models import loading, tiny
from textrl_gym.models.tokenizer import train_tokenizer, vocab_size
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts.collect import collect


def with_holes() -> PreTrainedTokenizerFast:
    """Four tokens with ids up to 9, the highest of them EOS."""
    inner = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 7, "<eos>": 9}, unk_token="a"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


class Holes(CopyText):
    """CopyText's prompts in a vocabulary whose ids are not all there."""

    def rows(self, split: str, dataset: str | None = None) -> list[Row]:
        return [{"prompt": text, "completion": text} for text in ("a b", "c a")]

    def load_tokenizer(self, name: str | None = None) -> PreTrainedTokenizerFast:
        return with_holes()

    def load_model(self, name: str | None = None, **settings: Any) -> torch.nn.Module:
        return tiny.llama(10)


def test_the_highest_id_and_one() -> None:
    assert vocab_size(with_holes()) == 10
    tokenizer = train_tokenizer(["a b"], 300)
    assert vocab_size(tokenizer) == len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    assert vocab_size(tokenizer) == len(tokenizer)
    python = ByT5Tokenizer()
    assert vocab_size(python) == len(python)


def test_an_id_without_a_row_is_an_error_of_both_numbers() -> None:
    tokenizer = with_holes()
    loading.check_vocab(tokenizer, tiny.llama(10))
    with pytest.raises(ValueError, match=r"has ids up to 9 but the model's vocabulary has 9 rows.*embeddings\(10\)"):
        loading.check_vocab(tokenizer, tiny.llama(9))
    # A head that was not resized with the embedding.
    model = tiny.llama(10)
    model.lm_head = torch.nn.Linear(32, 8)
    with pytest.raises(ValueError, match=r"has ids up to 9 but the model's vocabulary has 8 rows"):
        loading.check_vocab(tokenizer, model)


def test_eos_above_the_number_of_tokens_can_be_written() -> None:
    assert len(with_holes()) == 4
    env = TextVectorEnv(8, task=Holes, group_size=4, reward="length", autoreset_mode="DISABLED")
    assert (env.vocab_size, env.eos_id, env.single_action_space) == (10, 9, gym.spaces.Discrete(10))
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    *_, terminated, _, infos = env.step(np.full(8, 9))
    assert terminated.all()
    assert infos["stop_reason"].tolist() == [StopReason.EOS] * 8
    # Ids without a token are the model's to write, as in transformers' generate, and have no text.
    policy = Policy(tiny.llama(10), vocab_size=10)
    rollout = collect(env, policy, generator=torch.Generator().manual_seed(0))
    assert {9, *range(2, 7)} <= set(rollout.token_BT[rollout.mask_BT].tolist())
    assert env.scorer.decode([0, 3, 7, 8, 9]) == "a c"
