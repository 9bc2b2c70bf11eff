"""Reward models: the loss by hand, packed = alone, normalisation, users' pairs, and what the bundled one achieves."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from textrl_gym.cli import main
from textrl_gym.data.ranked import RankedCompletions
from textrl_gym.envs.tldr_summarize import ASSETS, TLDRSummarize
from textrl_gym.models import loading
from textrl_gym.pipeline import reward_data, reward_metrics, reward_model, sft, simulated_comparisons
from textrl_gym.pipeline.optim import TunedModel
from textrl_gym.pipeline.reward_data import RewardModelConfig
from textrl_gym.pipeline.simulated_comparisons import Comparer
from textrl_gym.policy.policy import Policy
from textrl_gym.rewards import load_reward
from textrl_gym.stats import pairwise

TINY_SFT = sft.SFTConfig(
    steps=2, batch_size=2, copy_steps=0, hidden_size=16, intermediate_size=32, layers=2, eval_rows=2
)
TINY = RewardModelConfig(
    prompts=8, samples=2, candidates=3, batch_size=4, eval_prompts=8, warmup_steps=1, replaced_token_steps=2
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    sft.sft("TLDRSummarize-v0", TINY_SFT, folder)
    return str(folder)


# -- loss -------------------------------------------------------------------------------------------------------------


def test_bradley_terry_by_hand() -> None:
    raw_BK = torch.tensor([[1.0, 0.0, 3.0], [2.0, 2.0, 0.0]])
    winner_N3 = torch.tensor([[0, 0, 1], [0, 1, 2], [1, 0, 1]])
    # r_w - r_l = 1, -3, 0: -log sigmoid = log(1 + e^-1), log(1 + e^3), log 2
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(3)) + math.log(2)) / 3
    loss = reward_model.bradley_terry_loss(raw_BK, winner_N3)
    torch.testing.assert_close(loss.item(), expected, atol=1e-6, rtol=0)


def test_completions_of_one_prompt_together_score_as_each_alone(tiny_model: str) -> None:
    model: Any = reward_model.new_reward_model(loading.load_model(tiny_model), seed=0)
    batch = [
        RankedCompletions([5, 6, 7], [[8, 9, 0], [10, 0], [11]], []),
        RankedCompletions([3], [[4, 5, 6, 7, 0]], []),
    ]
    with torch.no_grad():
        raw_BK = reward_metrics.raw_rewards(model, batch)
        for row, comparison in enumerate(batch):
            for place, ids in enumerate(comparison.completion_ids):
                hidden_LD = model.base_model(input_ids=torch.tensor([comparison.prompt_ids + ids]))[0][0]
                torch.testing.assert_close(raw_BK[row, place], model.score(hidden_LD[-1])[0], atol=1e-5, rtol=0)
    assert raw_BK[1, 1:].tolist() == [0.0, 0.0]  # no such completions


def test_texts_without_a_pair_teach_nothing(tiny_model: str) -> None:
    model: Any = reward_model.new_reward_model(loading.load_model(tiny_model), seed=0)
    config = RewardModelConfig(batch_size=2, micro_batch_tokens=1, device="cpu")  # each prompt is a part
    tuned = TunedModel(model, config, 0)
    pair, none = RankedCompletions([5], [[8, 0], [9, 0]], [(0, 1)]), RankedCompletions([6, 7], [[8, 0], [8, 0]], [])

    def losses(*batch: RankedCompletions) -> list[float]:
        phase = reward_model.PreferenceUpdates(tuned, batch, len(batch), config)
        phase.go_to(0, {})
        return [loss.item() for loss in phase.losses(0)]

    first, second = reward_metrics.raw_rewards(model, [pair])[0].tolist()
    assert losses(pair, none) == pytest.approx([math.log1p(math.exp(second - first)), 0.0], abs=1e-6)
    assert losses(none, none) == []  # an update with a loss of 0 would move the model by its momentum


def test_the_head_starts_with_the_published_spread() -> None:
    model: Any = reward_model.new_reward_model(loading.load_model(f"{ASSETS}/policy"), seed=0)
    width = model.score.weight.numel()
    # The standard error of a standard deviation of n draws is about 1 / sqrt(2 n) of it: 6% of 128.
    assert model.score.weight.std().item() == pytest.approx(1 / math.sqrt(width + 1), rel=0.25)


# -- measures ---------------------------------------------------------------------------------------------------------


def test_agreements_by_hand() -> None:
    compared = [RankedCompletions([1], [[2], [3], [4]], [(0, 1), (2, 0), (1, 2)], gold=[0.5, 0.6, 0.9], sampled=2)]
    raw = [[1.0, 0.0, 2.0]]
    # (1, 2) is lost: 0 < 2
    assert pairwise.agreement(reward_metrics.gaps(raw, compared)) == pytest.approx(2 / 3)
    # |0.5 - 0.6| is no clear difference; 0.5 < 0.9 and 0.6 < 0.9 are, and both are ordered so
    assert reward_metrics.gold_agreement(raw, compared) == 1.0
    assert reward_metrics.gold_agreement(raw, compared, samples_only=True) is None


def test_a_tie_of_the_rewards_counts_half_in_every_agreement() -> None:
    """A pair in order and a tied one: (1 + 1/2) / 2. The tie's better completion comes first once, and second once."""
    for tied in ((0, 1), (1, 0)):
        gold = [0.2, 0.2]
        gold[tied[0]] = 0.8
        rows = ([tied], gold), ([(0, 1)], [0.8, 0.2])
        compared = [RankedCompletions([1], [[2], [3]], pairs, gold=judged) for pairs, judged in rows]
        raw = [[1.0, 1.0], [1.0, 0.0]]
        gap_N = reward_metrics.gaps(raw, compared)
        assert pairwise.agreement(gap_N) == 0.75
        assert reward_metrics.gold_agreement(raw, compared) == 0.75
        assert reward_metrics.accuracy_row("x", gap_N)["accuracy"] == 0.75
        assert reward_metrics.calibration([0.0])["bins"][0]["observed"] == 0.5


def test_normalisation_by_hand() -> None:
    # mean of 1, 3 is 2; the unbiased variance of 0, 2, 4 is (4 + 0 + 4) / 2 = 4
    assert reward_metrics.normalisation([1.0, 3.0], [0.0, 2.0, 4.0]) == {"bias": 2.0, "scale": 0.5}


# -- the whole --------------------------------------------------------------------------------------------------------


def test_training_on_annotators_saves_a_reward_with_mean_0_on_references(tiny_model: str, tmp_path: Path) -> None:
    config = RewardModelConfig(**{**vars(TINY), "model": tiny_model, "policy": tiny_model})
    record = reward_model.train_reward_model("TLDRSummarize-v0", config, tmp_path / "rm")
    assert json.loads((tmp_path / "rm" / "reward_training.json").read_text()) == record
    task = TLDRSummarize()
    tokenizer = loading.load_tokenizer(tiny_model)
    source = task.rows("validation")
    rows = [source[i] for i in range(TINY.eval_prompts)]
    reward = load_reward(f"reward_model:{tmp_path / 'rm'}", task=task, tokenizer=tokenizer)
    encoded = [sft.encode_row(task, tokenizer, row) for row in rows]
    score_B = reward(
        [row["prompt"] for row in rows],
        [row["completion"] for row in rows],
        prompt_ids=[prompt for prompt, _ in encoded],
        completion_ids=[texts[0] for _, texts in encoded],
    )
    torch.testing.assert_close(score_B.mean().item(), 0.0, atol=1e-3, rtol=0)


def write_pairs(file: Path, rows: int) -> None:
    pairs = [{"prompt": f"Post {i}\n\nTL;DR:", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(rows)]
    file.write_text("\n".join(map(json.dumps, pairs)))


def test_a_users_pairs_are_learnt_and_the_seed_decides_the_weights(tiny_model: str, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl", 100)
    config = RewardModelConfig(
        model=tiny_model, dataset=(str(tmp_path / "pairs.jsonl"),), batch_size=4, learning_rate=1e-2, warmup_steps=5
    )
    records = [reward_model.train_reward_model("TLDRSummarize-v0", config, tmp_path / name) for name in "ab"]
    assert records[0]["measured"]["annotator_agreement"] == 1.0  # "yes" beats "no" in the ten pairs held out
    a, b = (loading.load_classifier(tmp_path / name) for name in "ab")
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key


def test_the_report_by_hand() -> None:
    # 0.75 of 4: Wilson centre (0.75 + z^2/8) / (1 + z^2/4), z^2 = 3.8415: 1.2302 / 1.9604 = 0.6275;
    # half width 1.96 / 1.9604 * sqrt(0.75 * 0.25 / 4 + 3.8415 / 64) = 0.3269
    row = reward_metrics.accuracy_row("x", [1.0, 2.0, 0.5, -1.0])
    assert row == pytest.approx(row | {"pairs": 4, "accuracy": 0.75}, abs=1e-12)
    assert (row["low"], row["high"]) == pytest.approx((0.3006, 0.9544), abs=1e-4)
    row = reward_metrics.accuracy_row("x", [1.0] * 10)
    assert (row["low"], row["high"]) == pytest.approx((0.7225, 1.0), abs=1e-4)  # 1 / (1 + z^2 / 10)
    # predicted sigmoid(log 3) = 0.75 twice, one right; sigmoid(log 9) = 0.9, right; sigmoid(0) = 0.5, which counts half
    found = reward_metrics.calibration([math.log(3) + 1e-9, -math.log(3) - 1e-9, math.log(9) + 1e-9, 0.0])
    bins = [(b["from"], b["pairs"], b["predicted"], b["observed"]) for b in found["bins"]]
    assert bins == [
        pytest.approx((0.5, 1, 0.5, 0.5), abs=1e-6),
        pytest.approx((0.75, 2, 0.75, 0.5), abs=1e-6),
        pytest.approx((0.9, 1, 0.9, 1.0), abs=1e-6),
    ]
    assert found["ece"] == pytest.approx((2 * 0.25 + 0.1) / 4, abs=1e-6)
    table = reward_metrics.accuracy_table({"a": [1.0], "b": [-1.0, 1.0, 1.0]})
    assert [(row["data"], row["pairs"], row["accuracy"]) for row in table] == [
        ("a", 1, 1.0),
        ("b", 3, pytest.approx(2 / 3)),
        ("all", 4, 0.75),
    ]


def test_gaps_and_first_pairs_by_hand() -> None:
    compared = [
        RankedCompletions([1], [[2], [3], [4]], [(0, 1), (2, 0), (1, 2)]),
        RankedCompletions([1], [[2], [3]], [(1, 0)]),
    ]
    assert reward_metrics.gaps([[1.0, 0.0, 2.0], [5.0, 3.0]], compared) == [1.0, 1.0, -2.0, -2.0]
    taken = reward_data.first_pairs(compared, 2)
    assert [c.pairs for c in taken] == [[(0, 1), (2, 0)]]
    assert [len(c.pairs) for c in reward_data.first_pairs(compared, 4)] == [3, 1]


def test_several_data_sets_and_a_curve(tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    write_pairs(Path(a), 40)
    write_pairs(Path(b), 30)
    write_pairs(Path(c), 20)
    args = ["reward-model", "TLDRSummarize-v0", "--model", tiny_model, "--out", str(tmp_path / "rm")]
    more = ["--learning-rate", "1e-2", "--warmup-steps", "2", "--batch-size", "4"]
    assert main.main([*args, *more, "--dataset", a, b, "--eval-dataset", c, "--curve", "4", "60"]) == 0
    record = json.loads((tmp_path / "rm" / "reward_training.json").read_text())
    # a tenth of the first two is held out; what is only measured on is taken whole
    assert [(row["data"], row["pairs"]) for row in record["accuracy"]] == [(a, 4), (b, 3), (c, 20), ("all", 27)]
    assert [row["training pairs"] for row in record["curve"]] == [4, 60]
    assert [row["pairs"] for row in record["curve"]] == [27, 27]
    assert record["curve"][1]["accuracy"] == 1.0  # "yes" against "no"
    assert sum(row["pairs"] for row in record["calibration"]["bins"]) == 27
    assert record["measured"]["annotator_agreement"] == 1.0
    out = capsys.readouterr().out
    for words in ("Accuracy on held-out pairs", "Calibration: expected error", "by the number of training pairs"):
        assert words in out


def test_a_curve_of_simulated_annotators_starts_where_the_model_does(tiny_model: str, tmp_path: Path) -> None:
    """All pairs of the curve give the model itself, so their accuracies are equal."""
    everything = RewardModelConfig(**{**vars(TINY), "model": tiny_model, "replaced_token_steps": 1})
    task = TLDRSummarize()
    policies = [Policy(task.load_model(name)) for name in (None, tiny_model)]
    comparer = Comparer(task, policies, loading.load_tokenizer(tiny_model), everything)
    total = sum(len(c.pairs) for c in comparer.stream(task.rows("train"), TINY.prompts, TINY.seed + 1))
    config = RewardModelConfig(**{**vars(everything), "curve": (total, 5)})
    record = reward_model.train_reward_model("TLDRSummarize-v0", config, tmp_path / "rm")
    ((accuracy,), curve) = record["accuracy"], record["curve"]
    assert accuracy["data"] == "simulated annotators"
    assert [row["training pairs"] for row in curve] == [5, total]
    assert curve[1]["accuracy"] == accuracy["accuracy"]
    config = RewardModelConfig(**{**vars(everything), "curve": (1000,)})
    with pytest.raises(ValueError, match=r"curve asks for 1000 pairs; there are \d+ to train on"):
        reward_model.train_reward_model("TLDRSummarize-v0", config, tmp_path / "more")
    with pytest.raises(ValueError, match="at least 1, got"):
        RewardModelConfig(curve=(0,))


def test_errors_name_what_was_found(tiny_model: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.jsonl"
    file.write_text('{"prompt": "a", "good": "b"}\n')
    config = RewardModelConfig(model=tiny_model, dataset=(str(file),))
    with pytest.raises(ValueError, match=r"columns prompt, good; expected: prompt, chosen, rejected"):
        reward_model.train_reward_model("TLDRSummarize-v0", config, tmp_path / "rm")
    write_pairs(tmp_path / "one.jsonl", 1)
    config = RewardModelConfig(model=tiny_model, dataset=(str(tmp_path / "one.jsonl"),))
    with pytest.raises(ValueError, match="too few pairs"):
        reward_model.train_reward_model("TLDRSummarize-v0", config, tmp_path / "rm")
    task: Any = TLDRSummarize()
    task.gold = None
    with pytest.raises(ValueError, match="TLDRSummarize has no gold score"):
        Comparer(task, [Policy(loading.load_model(tiny_model))], loading.load_tokenizer(tiny_model), TINY)


# -- the bundled assets -----------------------------------------------------------------------------------------------


def test_the_bundled_numbers_are_what_is_promised() -> None:
    policy = json.loads(Path(ASSETS, "policy", "sft.json").read_text())["measured"]
    assert policy["sampled_gold"] <= 0.5
    assert 0.45 <= policy["greedy_gold"] <= 0.7
    assert policy["best_of_8_gold"] >= 0.65
    assert policy["parameters"] <= 4_000_000
    reward = json.loads(Path(ASSETS, "reward_model", "reward_training.json").read_text())["measured"]
    assert 0.65 <= reward["annotator_agreement"] <= 0.75
    assert reward["gold_agreement"] >= 0.85
    assert reward["gold_agreement_samples"] >= 0.8  # between samples of one policy: harder, and not promised


@pytest.mark.slow
def test_the_bundled_assets_still_do_what_was_measured() -> None:
    task = TLDRSummarize()
    tokenizer = task.load_tokenizer()
    comparer = Comparer(task, [Policy(task.load_model())], tokenizer, RewardModelConfig())
    source = task.rows("validation")
    rows = [source[1000 + i] for i in range(200)]
    compared = comparer.compare(comparer.policies[0], rows, seed=1, samples=2, temperature=1.0, candidates=7)
    raw = reward_metrics.score_all(loading.load_classifier(task.reward_model_path), compared)
    sampled = [gold for c in compared for gold in c.gold[: c.sampled]]
    assert sum(sampled) / len(sampled) <= 0.52
    assert pairwise.agreement(reward_metrics.gaps(raw, compared)) >= 0.65
    ordered = reward_metrics.gold_agreement(raw, compared)
    assert ordered is not None
    assert ordered >= 0.85


def test_the_bundled_assets_are_small() -> None:
    assert sum(file.stat().st_size for file in Path(ASSETS).rglob("*") if file.is_file()) < 12e6


def test_temperature_0_is_greedy(tiny_model: str) -> None:
    task = TLDRSummarize()
    tokenizer = loading.load_tokenizer(tiny_model)
    rows = [task.rows("train")[0]] * 2
    policy = Policy(loading.load_model(tiny_model))
    (greedy, again), (one, other) = (
        simulated_comparisons.sample_texts(policy, task, tokenizer, rows, 1, temperature, seed=0)
        for temperature in (0.0, 1.0)
    )
    assert greedy == again
    assert one != other
    assert policy.temperature == 1.0
