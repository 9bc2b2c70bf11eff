"""Ensembles of reward models: combinations by hand, folders, and a training that goes on with what is missing."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from textrl_gym.cli import main
from textrl_gym.data.ranked import RankedCompletions
from textrl_gym.models import loading, tiny
from textrl_gym.pipeline import reward_data, reward_ensemble, reward_model, sft
from textrl_gym.pipeline.reward_data import RewardModelConfig
from textrl_gym.rewards import ensemble, load_reward
from textrl_gym.rewards.reward_model import RewardModel

SYMBOLS = ("a", "b", "c", "d")
PROMPTS, TEXTS = ["a b", "c"], ["b c", "d d"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three reward models of their own scales, and an ensemble.json."""
    out, tokenizer = tmp_path_factory.mktemp("ensemble"), tiny.symbol_tokenizer(SYMBOLS)
    for number in range(3):
        model = reward_model.new_reward_model(tiny.gpt2(len(SYMBOLS) + 1, 8), seed=number)
        RewardModel(model, tokenizer, bias=0.1 * number, scale=1.0 + number).save(out / str(number))
    write(out, ["0", "1", "2"])
    return out


def write(out: Path, members: list[str], combine: str = "mean", coefficient: Any = 0.5) -> None:
    found = {"members": members, "combine": combine, "coefficient": coefficient}
    (out / ensemble.ENSEMBLE_FILE).write_text(json.dumps(found))


def score(spec: Any) -> torch.Tensor:
    return load_reward(spec, tokenizer=tiny.symbol_tokenizer(SYMBOLS))(PROMPTS, TEXTS)


# -- the reward -------------------------------------------------------------------------------------------------------


def test_combinations_by_hand() -> None:
    score_MB = torch.tensor([[0.0, 5.0], [3.0, 1.0], [6.0, 3.0]])
    assert ensemble.combine(score_MB, "mean").tolist() == [3.0, 3.0]
    assert ensemble.combine(score_MB, "worst").tolist() == [0.0, 1.0]
    # variances with 1/M: (9 + 0 + 9) / 3 = 6 and (4 + 4 + 0) / 3 = 8 / 3
    expected = torch.tensor([3 - 0.5 * 6, 3 - 0.5 * 8 / 3])
    torch.testing.assert_close(ensemble.combine(score_MB, "uncertainty", 0.5), expected, atol=1e-6, rtol=0)
    assert ensemble.combine(score_MB, "uncertainty", 0.0).tolist() == [3.0, 3.0]


def test_an_ensemble_is_what_its_members_say(folder: Path) -> None:
    score_MB = torch.stack([score(folder / str(number)) for number in range(3)])
    assert score_MB.std(0).min() > 0.05  # or the combinations could not be told apart
    mean_B, worst_B = score_MB.mean(0), score_MB.min(0).values
    variance_B = ((score_MB - mean_B) ** 2).mean(0)
    for spec, expected in (
        (f"ensemble:{folder}", mean_B),
        (folder, mean_B),  # a bare folder
        (f"ensemble:mean:{folder}", mean_B),
        (f"ensemble:worst:{folder}", worst_B),
        (f"ensemble:uncertainty:{folder}", mean_B - 0.5 * variance_B),
        (f"ensemble:uncertainty:2:{folder}", mean_B - 2 * variance_B),
        ({f"ensemble:worst:{folder}": -0.5}, -0.5 * worst_B),
    ):
        torch.testing.assert_close(score(spec), expected, atol=1e-5, rtol=0)


def test_the_folder_says_how_its_members_are_combined(folder: Path, tmp_path: Path) -> None:
    write(tmp_path, [str(folder / "2"), str(folder / "0")], "uncertainty", 3)  # members may stand elsewhere
    a_B, b_B = score(folder / "0"), score(folder / "2")
    # the variance of two is a quarter of their squared difference
    torch.testing.assert_close(score(tmp_path), (a_B + b_B) / 2 - 3 * (a_B - b_B) ** 2 / 4, atol=1e-5, rtol=0)


def test_the_order_of_members_does_not_matter(folder: Path, tmp_path: Path) -> None:
    write(tmp_path, [str(folder / name) for name in "201"])
    for how in ("mean", "worst", "uncertainty"):
        torch.testing.assert_close(
            score(f"ensemble:{how}:{tmp_path}"), score(f"ensemble:{how}:{folder}"), atol=1e-6, rtol=0
        )


def test_one_member_is_the_reward_model(folder: Path, tmp_path: Path) -> None:
    write(tmp_path, [str(folder / "1")])
    for how in ("mean", "worst", "uncertainty"):
        assert torch.equal(score(f"ensemble:{how}:{tmp_path}"), score(folder / "1"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ensemble", r"reward 'ensemble' needs a folder: ensemble:FOLDER"),
        ("ensemble:nowhere", r"'nowhere' is no ensemble of reward models: it holds no ensemble.json"),
        ("ensemble:median:{}", r"unknown combination of an ensemble 'median'; allowed: mean, worst, uncertainty"),
        ("ensemble:uncertainty:much:{}", r"'much' is no coefficient"),
        ("ensemble:uncertainty:-1:{}", r"coefficient of an ensemble must be a finite number >= 0, got -1.0"),
        ("ensemble:worst:0.5:{}", r"only uncertainty takes a coefficient"),
        ("ensemble:{}/0", r"0' is no ensemble of reward models"),
    ],
)
def test_a_wrong_specification_is_named(folder: Path, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(spec.format(folder))


def test_a_wrong_file_is_named(folder: Path, tmp_path: Path) -> None:
    for members, how, coefficient, message in (
        ([], "mean", 0.5, "must hold"),
        (["0"], "median", 0.5, "unknown combination of an ensemble 'median'"),
        (["0"], "mean", math.nan, "must be a finite number >= 0, got nan"),
        (["0"], "mean", True, "must be a finite number >= 0, got True"),
        (["gone"], "mean", 0.5, "gone"),
    ):
        write(tmp_path, members, how, coefficient)
        with pytest.raises(ValueError, match=message):
            score(tmp_path)
    (tmp_path / ensemble.ENSEMBLE_FILE).write_text('{"members": ["0"]}')
    with pytest.raises(ValueError, match=r'must hold \{"members"'):
        score(tmp_path)


# -- training ---------------------------------------------------------------------------------------------------------

TINY = RewardModelConfig(
    prompts=8, samples=2, candidates=3, batch_size=4, eval_prompts=8, warmup_steps=1, replaced_token_steps=1, seed=3
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = sft.SFTConfig(
        steps=2, batch_size=2, copy_steps=0, hidden_size=16, intermediate_size=32, layers=2, eval_rows=2
    )
    sft.sft("TLDRSummarize-v0", config, folder)
    return str(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return loading.load_classifier(folder).state_dict()


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
def test_training_goes_on_with_the_members_that_are_missing(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env, config = "TLDRSummarize-v0", dataclasses.replace(TINY, model=tiny_model, policy=tiny_model, ensemble=2)
    learnt: list[tuple[str, list[RankedCompletions]]] = []
    train_on = reward_model.train_on

    def watched(data: Any, member: RewardModelConfig, out: Path, save: Any) -> Any:
        data.train = list(data.train)  # of a single model it is a stream
        learnt.append((out.name, list(reward_data.in_order(data.train, member))))
        return train_on(data, member, out, save)

    monkeypatch.setattr(reward_ensemble, "train_on", watched)
    out = tmp_path / "both"
    record = reward_ensemble.train_rewards(env, config, out)
    # 1. The same comparisons in another order, other weights; member 0 is what is trained without an ensemble.
    assert [name for name, _ in learnt] == ["0", "1"]
    orders = [[(c.prompt_ids, c.completion_ids, c.pairs) for c in order] for _, order in learnt]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    assert not same(out / "0", out / "1")
    reward_ensemble.train_rewards(env, dataclasses.replace(config, ensemble=0), tmp_path / "single")
    assert same(out / "0", tmp_path / "single")
    # 2. What is told of them.
    assert json.loads((out / reward_ensemble.ENSEMBLE_RECORD).read_text()) == record
    rows = {row["reward"]: row for row in record["accuracy"]}
    assert list(rows) == ["member 0", "member 1", "mean", "worst", "uncertainty"]
    single = json.loads((tmp_path / "single" / "reward_training.json").read_text())
    assert rows["member 0"]["accuracy"] == single["accuracy"][0]["accuracy"]
    assert rows["member 0"]["gold_agreement"] == pytest.approx(single["measured"]["gold_agreement"], abs=1e-9)
    assert record["measured"]["apart_samples"] > 0
    assert load_reward(str(out), tokenizer=loading.load_tokenizer(tiny_model))(["p"], [" text"]).shape == (1,)
    # 3. One is lost, and made again as it was; one more is welcome.
    learnt.clear()
    before = weights(out / "1")
    shutil.rmtree(out / "1")
    (out / ensemble.ENSEMBLE_FILE).unlink()
    assert reward_ensemble.train_rewards(env, config, out) == record
    assert [name for name, _ in learnt] == ["1"]
    assert all(torch.equal(value, before[name]) for name, value in weights(out / "1").items())
    reward_ensemble.train_rewards(env, dataclasses.replace(config, ensemble=3, combine="worst"), out)
    assert [name for name, _ in learnt] == ["1", "2"]
    assert json.loads((out / ensemble.ENSEMBLE_FILE).read_text()) == {
        "members": ["0", "1", "2"],
        "combine": "worst",
        "coefficient": 0.5,
    }
    # 4. A member that version 0.1 wrote is known again: its record has the old names of three keys.
    file = out / "0" / reward_model.TRAINING_RECORD
    today = file.read_text()
    old = today.replace("replaced_token_steps", "reading_steps").replace(
        "replaced_token_batch_size", "reading_batch_size"
    )
    file.write_text(old.replace("replaced_token_loss", "reading_loss"))
    assert file.read_text() != today
    assert reward_model.read_record(file) == json.loads(today)
    learnt.clear()
    reward_ensemble.train_rewards(env, dataclasses.replace(config, ensemble=3, combine="worst"), out)
    assert learnt == []
    # 5. Others are not mixed with them.
    with pytest.raises(ValueError, match=r"0' holds a training with batch_size=4, not 2: go on with that"):
        reward_ensemble.train_rewards(env, dataclasses.replace(config, batch_size=2), out)
    with pytest.raises(ValueError, match=r"holds ensemble.json, so a reward model cannot be written to it"):
        reward_ensemble.train_rewards(env, dataclasses.replace(config, ensemble=0), out)
    with pytest.raises(ValueError, match=r"holds reward_model.json, so an ensemble cannot be written to it"):
        reward_ensemble.train_rewards(env, config, tmp_path / "single")


def test_an_ensemble_on_a_users_pairs_by_the_command_line(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [{"prompt": f"Post {i}\n\nTL;DR:", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    args = ["reward-model", "TLDRSummarize-v0", "--model", tiny_model, "--dataset", str(tmp_path / "pairs.jsonl")]
    args += ["--learning-rate", "1e-2", "--warmup-steps", "2", "--batch-size", "4", "--ensemble", "2"]
    assert main.main([*args, "--combine", "worst", "--out", str(tmp_path / "two")]) == 0
    told = capsys.readouterr().out
    assert "accuracy_worst" in told and "member 1" in told and "Calibration" not in told
    record = json.loads((tmp_path / "two" / reward_ensemble.ENSEMBLE_RECORD).read_text())
    assert [row["accuracy"] for row in record["accuracy"]] == [1.0] * 5  # "yes" against "no"
    assert [row["pairs"] for row in record["accuracy"]] == [4] * 5
    assert "gold_agreement" not in record["accuracy"][0]
    assert set(record["measured"]) == {"accuracy_members", "accuracy_worst", "apart_heldout"}


def test_combined_scores_keep_their_places() -> None:
    members = [[[1.0, 2.0], [3.0]], [[3.0, 0.0], [1.0]]]
    assert reward_ensemble.combined(members, "worst", 0.5) == [[1.0, 0.0], [1.0]]


def test_wrong_settings_name_themselves() -> None:
    for change, message in (
        ({"ensemble": -1}, "ensemble must be at least 0, got -1"),
        ({"ensemble": 2, "curve": (3,)}, "curve is of a single reward model"),
        ({"combine": "median"}, "combine must be one of mean, worst, uncertainty, got 'median'"),
        ({"coefficient": -0.5}, "must be a finite number >= 0, got -0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **change)
