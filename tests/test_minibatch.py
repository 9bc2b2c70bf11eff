"""Minibatches: what an update adds goes with its rows, and the parts' shares of a mean add up to it."""

from __future__ import annotations

import copy

import pytest
import torch
from minibatches import minibatch

from textrl_gym.agents import GRPO
from textrl_gym.core import Rollout
from textrl_gym.training.minibatch import Minibatch


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    """16 rows of different lengths."""
    return GRPO("CopyText-v0", rollout_episodes=16, group_size=4).collect()


def test_what_was_added_goes_with_its_rows(rollout: Rollout) -> None:
    # Each row's tensors are made of its own tokens, so that they can be checked against them anywhere.
    batch = rollout.with_(twice_BT=2.0 * rollout.token_BT, sum_B=rollout.token_BT.sum(1))
    joined = Rollout.cat([batch.select(torch.tensor([3, 1])), batch])
    seen = 0
    for part in Minibatch.of(joined, micro_batch_tokens=20).micro_batches():
        assert part.twice_BT.tolist() == (2.0 * part.token_BT).tolist()
        assert part.sum_B.tolist() == part.token_BT.sum(1).tolist()
        assert (part.rows, part.tokens) == (18, joined.num_tokens)
        seen += len(part)
    assert seen == 18
    assert rollout.extra == {}, "the rollout itself is as it was"


def test_a_wrong_tensor_names_itself(rollout: Rollout) -> None:
    with pytest.raises(ValueError, match=r"advantage_B must have the shape \(16,\), got \(15,\)"):
        rollout.with_(advantage_B=torch.zeros(15))
    for name in ("advantage", "advantage_BP", "reward_BT"):
        with pytest.raises(ValueError, match=f"ends in _B or _BT, got '{name}'"):
            rollout.with_(**{name: rollout.reward_BT})
    part = Minibatch.of(rollout.with_(advantage_B=rollout.score_B))
    with pytest.raises(AttributeError, match=r"no 'advantages_B' in this minibatch; .* gave it \['advantage_B'\]"):
        part.advantages_B  # noqa: B018
    assert copy.deepcopy(part).advantage_B.tolist() == rollout.score_B.tolist()


def test_shares_of_a_mean_by_hand() -> None:
    # Rows 1, 2, 6 and 3. Tokens: 12 / 4 = 3. Sequences: (3 + 3) / 2 = 3. As parts of a row: 9 / 4 and 3 / 4; 3 / 2 and
    # 3 / 2. Rows 5 and 7: 5 / 2 and 7 / 2. A mean over each part's own would give 3 and 3 instead of 9 / 4 and 3 / 4.
    mask_BT = torch.tensor([[True, True, True], [True, False, False]])
    x_BT, x_B = torch.tensor([[1.0, 2, 6], [3, 99, 99]]), torch.tensor([5.0, 7.0])
    whole = minibatch(mask_BT)
    parts = [minibatch(mask_BT[rows], rows=2, tokens=4) for rows in ([0], [1])]
    for over, expected in (("token", [9 / 4, 3 / 4]), ("sequence", [3 / 2, 3 / 2])):
        shares = [float(part.mean(x_BT[[row]], over)) for row, part in enumerate(parts)]  # type: ignore[arg-type]
        assert shares == expected
        assert float(whole.mean(x_BT, over)) == sum(expected)  # type: ignore[arg-type]
    assert [float(part.mean(x_B[[row]])) for row, part in enumerate(parts)] == [5 / 2, 7 / 2]
    assert float(whole.mean(x_B)) == 6


def test_a_gradient_of_an_interrupted_update_is_not_in_the_next() -> None:
    agent = GRPO("CopyText-v0", rollout_episodes=16)
    agent.policy.logprobs(agent.collect()).sum().backward()
    next(agent.minibatches(agent.collect()))
    assert all(p.grad is None for p in agent.policy.parameters())
    agent.policy.logprobs(agent.collect()).sum().backward()
    assert agent.step() > 0
    assert all(p.grad is None for p in agent.policy.parameters())
