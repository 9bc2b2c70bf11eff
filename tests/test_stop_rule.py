"""When an episode ends: the one rule against its four users, and stop strings found in a bounded tail."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from textrl_gym.core import StopReason
from textrl_gym.mdp.text_env import TextVectorEnv
from textrl_gym.mdp.transition import stop_reasons
from textrl_gym.models import tiny
from textrl_gym.training.guided_decoding import Endings
from textrl_gym.training.preference_pairs import stops_of

EOS_ID, OTHER_END, BUDGET = 0, 5, 3
SYMBOLS = ("a", "b", "c", "d")
IDS = st.lists(st.integers(1, 4), min_size=1, max_size=BUDGET)


def env(rows: int = 1) -> TextVectorEnv:
    """CopyText with a second token that ends, and stop strings."""
    tokenizer = tiny.symbol_tokenizer(SYMBOLS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    return TextVectorEnv(
        rows,
        task="textrl_gym.envs.copy_text",
        tokenizer=tokenizer,
        eos_token_id=[EOS_ID, OTHER_END],
        max_new_tokens=BUDGET,
        stop=["a b", "c"],
        autoreset_mode="DISABLED",
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
        (OTHER_END, BUDGET, True, StopReason.EOS),
        (OTHER_END, 1, False, StopReason.EOS),
    ],
)
def test_the_rule(last: int, length: int, hit: bool, reason: StopReason) -> None:
    for array in (np.array, torch.tensor):
        found = stop_reasons(array([last]), array([length]), array([hit]), BUDGET, (EOS_ID, OTHER_END))
        assert found.tolist() == [reason]
        if not hit:
            assert stop_reasons(array([last]), array([length]), None, BUDGET, (EOS_ID, OTHER_END)).tolist() == [reason]


@given(ids=IDS, end=st.sampled_from([None, EOS_ID, OTHER_END]))
@settings(max_examples=60)
def test_every_user_of_the_rule_agrees_with_stepping(ids: list[int], end: int | None) -> None:
    ids = ids if end is None else [*ids[: BUDGET - 1], end]
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
    assert stops_of(ENV, [completion]).tolist() == [stepped or StopReason.STOP_STRING]
