"""Replaced-token detection: which tokens of corrupted texts are labelled as replaced, and the loss by hand."""

import math
import random
from typing import Any

import pytest
import torch

from textrl_gym.envs.tldr_summarize import ASSETS, TLDRSummarize
from textrl_gym.models import loading
from textrl_gym.pipeline import replaced_tokens, reward_model
from textrl_gym.rewards.tldr_gold import score_parts


@pytest.mark.parametrize(
    ("original", "false", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], [True, True, True]),
        ([1, 2, 3], [1, 9, 3], [True, False, True]),  # replaced
        ([1, 2, 3], [1, 2, 9, 3], [True, True, False, True]),  # put in
        ([1, 2, 3], [1, 3], [True, True]),  # what is left out labels nothing
        ([1, 2, 3], [], []),
    ],
)
def test_original_tokens_by_hand(original: list[int], false: list[int], expected: list[bool]) -> None:
    assert replaced_tokens.original_tokens(original, false) == expected


def test_replacements_change_one_to_three_tokens_and_leave_the_rest() -> None:
    rng, ids, prompt = random.Random(0), list(range(100, 120)), [7, 8]
    changed = []
    for _ in range(200):
        changed_ids = replaced_tokens.replace_tokens(ids, prompt, 2048, rng)
        assert len(ids) <= len(changed_ids) <= len(ids) + 3
        changed.append(replaced_tokens.original_tokens(ids, changed_ids).count(False))
    # A replacement may put back the very token, or fall on an earlier one, so 0 of three may show; more never do.
    assert max(changed) == 3
    assert sum(changed) > 200


@pytest.fixture(scope="module")
def task() -> TLDRSummarize:
    return TLDRSummarize()


def test_the_labels_are_those_of_the_facts(task: TLDRSummarize) -> None:
    """Corrupted summaries are worse than their originals by the judge, unless the draw left them as they were."""
    rng, source = random.Random(0), task.rows("train")
    same = worse = 0
    for i in range(60):
        row = dict(source[i])
        for true, false in task.corrupted(row, rng, 4):
            before, after = score_parts(row["facts"], true)["gold"], score_parts(row["facts"], false)["gold"]
            same += true == false
            worse += after < before
            assert after <= before + 1e-9, (true, false)
    assert worse > 0.7 * 240
    assert same < 0.25 * 240


def test_corrupt_keeps_texts_that_are_mostly_true_within_the_budget(task: TLDRSummarize) -> None:
    tokenizer, rng = task.load_tokenizer(), random.Random(0)
    false = total = 0
    for i in range(20):
        read = replaced_tokens.corrupt(task, tokenizer, task.rows("train")[i], rng)
        for ids, true in zip(read.text_ids, read.original, strict=True):
            assert 0 < len(ids) == len(true) <= task.max_new_tokens
            assert sum(true) > 0.5 * len(true)
            false, total = false + true.count(False), total + len(true)
    assert 0.05 < false / total < 0.4


def test_replaced_token_loss_by_hand() -> None:
    model: Any = reward_model.new_reward_model(loading.load_model(f"{ASSETS}/policy"), seed=0)
    batch = [
        replaced_tokens.CorruptedTexts([5, 6, 7], [[8, 9], [10]], [[True, False], [True]]),
        replaced_tokens.CorruptedTexts([3], [[4, 5, 6]], [[False, True, True]]),
    ]
    losses: list[float] = []
    for one in batch:
        for ids, true in zip(one.text_ids, one.original, strict=True):
            hidden: Any = model.base_model(input_ids=torch.tensor([one.prompt_ids + ids]))[0][0]
            scores = model.score(hidden)[len(one.prompt_ids) :, 0].tolist()
            # -log sigmoid(s) for a true token, -log(1 - sigmoid(s)) = -log sigmoid(-s) for a false one
            losses += [math.log1p(math.exp(-s if t else s)) for s, t in zip(scores, true, strict=True)]
    found = replaced_tokens.replaced_token_loss(model, batch).item()
    assert found == pytest.approx(sum(losses) / len(losses), abs=1e-5)
