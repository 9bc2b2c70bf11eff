"""When an episode ends: the one rule against its four users, and stop strings found in a bounded tail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from textrl_gym.agents.dpo import DPO
from textrl_gym.core import StopReason
from textrl_gym.envs.tldr_summarize import TLDRSummarize
from textrl_gym.mdp.scorer import Scorer
from textrl_gym.mdp.text_env import TextVectorEnv
from textrl_gym.mdp.transition import stop_reasons
from textrl_gym.models import tiny
from textrl_gym.rewards import RewardFunction
from textrl_gym.training.guided_decoding import Endings

EOS_ID, BUDGET = 0, 3
SYMBOLS = ("a", "b", "c", "d")
IDS = st.lists(st.integers(1, 4), min_size=1, max_size=BUDGET)


def env(rows: int = 1) -> TextVectorEnv:
    return TextVectorEnv(
        rows, task="textrl_gym.envs.copy_text", max_new_tokens=BUDGET, stop=["a b", "c"], autoreset_mode="DISABLED"
    )


ENV = env()


@pytest.mark.parametrize(
    ("last", "length", "hit", "reason"),
    [
        (EOS_ID, BUDGET, True, StopReason.EOS),
        (EOS_ID, 1, False, StopReason.EOS),
        (1, BUDGET, True, StopReason.STOP_STRING),
        (1, 1, True, StopReason.STOP_STRING),
        (1, BUDGET, False, StopReason.LENGTH),
        (1, BUDGET - 1, False, StopReason.RUNNING),
    ],
)
def test_the_rule(last: int, length: int, hit: bool, reason: StopReason) -> None:
    for array in (np.array, torch.tensor):
        found = stop_reasons(array([last]), array([length]), array([hit]), BUDGET, EOS_ID)
        assert found.tolist() == [reason]
        if not hit:
            assert stop_reasons(array([last]), array([length]), None, BUDGET, EOS_ID).tolist() == [reason]


@given(ids=IDS, ended=st.booleans())
@settings(max_examples=60)
def test_every_user_of_the_rule_agrees_with_stepping(ids: list[int], ended: bool) -> None:
    ids = [*ids[: BUDGET - 1], EOS_ID] if ended else ids
    ENV.reset(seed=0)
    for taken in range(1, len(ids) + 1):
        *_, infos = ENV.step(np.array([ids[taken - 1]]))
        if "stop_reason" in infos:
            break
    stepped = infos["stop_reason"][0] if "stop_reason" in infos else StopReason.RUNNING
    completion = ids[:taken]
    # Guided decoding.
    endings = Endings(ENV, [], [], scored=False)
    assert endings.stops([completion]) == [stepped]
    # Pairs of a file, where a completion that no rule ends was ended by its writer.
    pairs: Any = DPO.__new__(DPO)
    pairs.env = ENV
    assert pairs._stops([completion]).tolist() == [stepped or StopReason.STOP_STRING]


# -- stop strings -----------------------------------------------------------------------------------------------------


def scorer(tokenizer: Any, stop: tuple[str, ...]) -> Scorer:
    return Scorer(tokenizer, RewardFunction("none", {}), stop, torch.device("cpu"))


def first_stop(found: list[bool]) -> int | None:
    return found.index(True) if True in found else None


BPE = TLDRSummarize().load_tokenizer()
PLAIN = tiny.symbol_tokenizer(SYMBOLS)


@pytest.mark.parametrize("tokenizer", [BPE, PLAIN], ids=["byte-level BPE", "symbols"])
@given(data=st.data())
@settings(max_examples=120)
def test_a_tail_finds_the_stop_string_where_the_whole_text_does(tokenizer: Any, data: st.DataObject) -> None:
    # Any ids: halves of characters, special tokens that have no text, the same token many times.
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=80))
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    start = data.draw(st.integers(0, max(len(text) - 1, 0)))
    stop = text[start : start + data.draw(st.integers(1, 6))] or "a"
    one = scorer(tokenizer, (stop,))
    beginnings = [ids[:n] for n in range(1, len(ids) + 1)]
    assert first_stop(one.completes_stop(beginnings)) == first_stop(one.stopped(beginnings))


def test_a_tail_is_long_enough_for_characters_of_several_tokens() -> None:
    # A dragon is four bytes, and the tokenizer has none of them as one token: 4 tokens a character.
    stop = "\U0001f409" * 12
    ids = BPE("x" * 40 + stop, add_special_tokens=False)["input_ids"]
    assert len(BPE("\U0001f409", add_special_tokens=False)["input_ids"]) > 1
    one = scorer(BPE, (stop,))
    assert one.completes_stop([ids]) == [True] and one.completes_stop([ids[:-1]]) == [False]


def test_a_tail_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    decode = Scorer.decode

    def count(self: Scorer, ids: list[int]) -> str:
        seen.append(len(ids))
        return decode(self, ids)

    monkeypatch.setattr(Scorer, "decode", count)
    ids = BPE("word " * 2_000, add_special_tokens=False)["input_ids"]
    scorer(BPE, ("END",)).completes_stop([ids])
    assert len(ids) > 1_000 and max(seen) < 50


def test_texts_end_before_the_first_stop_string() -> None:
    one = scorer(PLAIN, ("c", "b"))
    assert one.text(PLAIN("a b c")["input_ids"]) == "a "
