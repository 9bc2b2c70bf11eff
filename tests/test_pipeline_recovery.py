"""Ends of supervised training: by a signal, an error or a kill. The same call goes on, to the same weights and logs."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from textrl_gym import files
from textrl_gym.cli import main
from textrl_gym.envs.tldr_summarize import TLDRSummarize
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.persistence import run_lock
from textrl_gym.persistence.save_schedule import SaveOptions
from textrl_gym.persistence.signals import Terminated
from textrl_gym.pipeline import reward_ensemble, reward_model, sft, trainer
from textrl_gym.pipeline.optim import TunedModel
from textrl_gym.pipeline.reward_data import RewardModelConfig
from textrl_gym.pipeline.sft import SFTConfig
from textrl_gym.pipeline.trainer import CHECKPOINT, Trainer

ENV = "TLDRSummarize-v0"
SFT = SFTConfig(
    steps=12,
    batch_size=1,
    copy_steps=4,
    copy_run=8,
    copy_batch_size=2,
    warmup_steps=2,
    vocab_size=300,
    hidden_size=16,
    intermediate_size=32,
    layers=2,
    eval_rows=4,
)
REWARD = RewardModelConfig(
    prompts=12, samples=1, candidates=2, batch_size=2, eval_prompts=2, warmup_steps=1, replaced_token_steps=3
)
EVERY_5 = SaveOptions(save_every=5, save_every_minutes=0)
Work = Callable[[Path], dict[str, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EnvSettings:
    """60 of the task's rows: a tokenizer learns from all of them for ten seconds."""
    rows = TLDRSummarize().demonstrations("train")
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("\n".join(json.dumps(rows[i]) for i in range(60)))
    return EnvSettings(dataset=str(file))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, data: EnvSettings) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    sft.sft(ENV, dataclasses.replace(SFT, steps=1, copy_steps=0), folder, data)
    return str(folder)


def works(data: EnvSettings, policy: str) -> dict[str, Work]:
    """The work of each command in a folder."""
    reward = dataclasses.replace(REWARD, model=policy, policy=policy)
    return {
        "sft": lambda out: sft.sft(ENV, SFT, out, data, EVERY_5),
        "reward": lambda out: reward_ensemble.train_rewards(ENV, reward, out, None, EVERY_5),
        "curve": lambda out: reward_ensemble.train_rewards(
            ENV, dataclasses.replace(reward, curve=(3, 12)), out, None, EVERY_5
        ),
        "sft-lora": lambda out: sft.sft(
            ENV, dataclasses.replace(SFT, model=policy, lora_rank=2, epochs=0.3, eval_every=3), out, data, EVERY_5
        ),
        "reward-lora": lambda out: reward_ensemble.train_rewards(
            ENV,
            RewardModelConfig(
                model=policy, dataset=(pairs(policy),), lora_rank=2, epochs=2, batch_size=4, warmup_steps=1
            ),
            out,
            None,
            EVERY_5,
        ),
        "ensemble": lambda out: reward_ensemble.train_rewards(
            ENV, dataclasses.replace(reward, ensemble=2), out, None, EVERY_5
        ),
    }


def pairs(policy: str) -> str:
    """A user's pairs, in a file beside the policy."""
    file = Path(policy).with_name("pairs.jsonl")
    if not file.is_file():
        rows = [{"prompt": f"Post {i}\n\nTL;DR:", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(24)]
        file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


class AtUpdate:
    """Calls `do` behind the log of so many updates, counted over all trainers."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int, do: Callable[[Trainer], object]) -> None:
        self.calls, log = 0, Trainer._log

        def watched(run: Trainer, *args: Any) -> None:
            log(run, *args)
            self.calls += 1
            if self.calls == number:
                do(run)

        patch.setattr(Trainer, "_log", watched)


def fail(*_: object, **__: object) -> None:
    raise ConnectionError("the disk is away")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all models that were saved in a folder."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.rglob("model.safetensors")):
        tensors |= {f"{file.relative_to(folder)} {name}": tensor for name, tensor in load_file(file).items()}
    return tensors


def logged(folder: Path) -> list[dict[str, float]]:
    rows = []
    for file in sorted(folder.rglob("progress*.json")):
        rows += [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: (row["train/updates"], sorted(row), sorted(map(str, row.values()))))


def assert_same(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert logged(a) == logged(b)
    # Nothing of the way there is left.
    for folder in (a, b):
        assert [path for path in folder.rglob("*") if path.name in (CHECKPOINT, "curve", ".previous")] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: EnvSettings, policy: str) -> dict[str, Path]:
    """A run of each that was never stopped."""
    out = tmp_path_factory.mktemp("whole")
    for name, work in works(data, policy).items():
        work(out / name)
    return {name: out / name for name in works(data, policy)}


# sft: 4 updates of copying, 12 of the rows; reward: 3 of replaced tokens, 6 of comparisons; curve: another 1 and 6.
STOPS: list[Any] = [
    ("sft", 2),
    ("sft", 4),
    ("sft", 7),
    ("sft", 16),
    ("reward", 2),
    ("reward", 3),
    ("reward", 6),
    ("reward", 9),
]
STOPS += [
    ("sft-lora", 8),
    ("reward-lora", 4),
    ("reward-lora", 9),
    ("curve", 11),
    ("ensemble", 5),
]
STOPS += [pytest.param(name, updates, marks=pytest.mark.slow) for name, updates in (("curve", 8), ("ensemble", 13))]


@pytest.mark.parametrize(("name", "updates"), STOPS)
def test_a_killed_training_goes_on_as_if_it_had_not_been(
    name: str,
    updates: int,
    whole: dict[str, Path],
    data: EnvSettings,
    policy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, killed = tmp_path / "out", tmp_path / "killed"

    def kill(run: Trainer) -> None:
        run.logger.output_formats[0].file.flush()  # type: ignore[attr-defined] # SB3's JSON writer
        shutil.copytree(out, killed)  # what a kill leaves
        log = killed / run.folder.relative_to(out) / "progress.json"
        log.write_bytes(log.read_bytes()[:-9])  # and the last line is torn
        fail()

    with monkeypatch.context() as patch:
        AtUpdate(patch, updates, kill)
        with pytest.raises(ConnectionError):
            works(data, policy)[name](out)
    record = works(data, policy)[name](killed)
    assert_same(killed, whole[name])
    # The one that the error ended has saved its last whole update, and goes on too.
    assert works(data, policy)[name](out) == record
    assert_same(out, whole[name])


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_a_signal_saves_and_resume_goes_on(
    name: str,
    whole: dict[str, Path],
    data: EnvSettings,
    policy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        AtUpdate(patch, 7, lambda run: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Terminated, match="SIGTERM"):
            works(data, policy)[name](out)
    assert files.read_json(out / CHECKPOINT / trainer.STATE_FILE)["updates"] == 7
    assert "saved the checkpoint of update 7" in capsys.readouterr().err
    command = {"sft": "sft", "reward": "reward-model"}
    assert main.main([command[name], "--resume", str(out)]) == 0
    assert_same(out, whole[name])
    other = {"sft": "reward-model", "reward": "sft"}[name]
    assert main.main([other, "--resume", str(out)]) == 2
    assert f"is not of textrl-gym {other}" in capsys.readouterr().err
    assert main.main([command[name], "--resume", str(tmp_path)]) == 2
    assert "holds no run to go on with: it has no run.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_it_is_saved_before_it_is_measured(
    name: str, whole: dict[str, Path], data: EnvSettings, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, out = works(data, policy)[name], tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(*{"sft": (sft, "heldout_losses"), "reward": (reward_model, "measure")}[name], fail)
        with pytest.raises(ConnectionError):
            work(out)
    with monkeypatch.context() as patch:
        again = AtUpdate(patch, 1, fail)
        record = work(out)
        assert again.calls == 0
        # Nor is one that has ended trained again; other settings are another training.
        assert work(out) == record
        assert again.calls == 0
    assert_same(out, whole[name])
    train: Any = {"sft": sft.sft, "reward": reward_model.train_reward_model}[name]
    config: Any = {"sft": SFT, "reward": dataclasses.replace(REWARD, model=policy, policy=policy)}[name]
    with pytest.raises(ValueError, match=r"holds a training with seed=0, not 1: go on with that"):
        train(ENV, dataclasses.replace(config, seed=1), out, data if name == "sft" else None)


def test_an_update_that_breaks_off_in_its_middle_is_not_saved(
    data: EnvSettings, whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = torch.optim.AdamW.step, 0

    def broken(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        result = step(self, *args)
        if calls == 8:
            raise torch.OutOfMemoryError("no memory left")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", broken)
        with pytest.raises(torch.OutOfMemoryError):
            sft.sft(ENV, SFT, tmp_path, data, EVERY_5)
    assert files.read_json(tmp_path / CHECKPOINT / trainer.STATE_FILE)["updates"] == 5
    sft.sft(ENV, SFT, tmp_path, data, EVERY_5)
    assert_same(tmp_path, whole["sft"])


def stopped_at_11(out: Path, data: EnvSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        AtUpdate(patch, 11, fail)
        with pytest.raises(ConnectionError):
            sft.sft(ENV, SFT, out, data, EVERY_5)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    data: EnvSettings,
    whole: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    stopped_at_11(out, data, monkeypatch)
    shutil.copytree(out, tmp_path / "other")
    newest = out / CHECKPOINT
    tensors = newest / trainer.TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-100])
    sft.sft(ENV, SFT, out, data, EVERY_5)
    assert "is damaged" in capsys.readouterr().err
    assert_same(out, whole["sft"])
    out = tmp_path / "other"
    for folder in (out / CHECKPOINT, out / CHECKPOINT / files.PREVIOUS):
        (folder / "model" / "model.safetensors").unlink()
    before = sorted(out.rglob("*"))
    with pytest.raises(ValueError, match=r"is damaged: .*model.safetensors' is missing; the one before it too"):
        sft.sft(ENV, SFT, out, data, EVERY_5)
    assert sorted(out.rglob("*")) == before


def test_one_training_a_folder_and_only_of_its_own_data(
    data: EnvSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with run_lock.alone(out), pytest.raises(ValueError, match="another process or agent trains in"):
        sft.sft(ENV, SFT, out, data)
    stopped_at_11(out, data, monkeypatch)
    with pytest.raises(ValueError, match=r"holds a training with batch_size=1, not 2"):
        sft.sft(ENV, dataclasses.replace(SFT, batch_size=2), out, data)
    assert data.dataset is not None
    monkeypatch.setattr(TLDRSummarize, "rows", lambda self, split, dataset: [{"prompt": "a", "completion": "b"}] * 7)
    with pytest.raises(ValueError, match=r"the run was started on \d+ rows, and there are 7 now"):
        sft.sft(ENV, SFT, out, data)


def test_a_training_goes_on_where_and_in_what_memory_one_likes(
    data: EnvSettings, whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_at_11(tmp_path, data, monkeypatch)
    other = dataclasses.replace(SFT, device="cpu", micro_batch_tokens=10_000, gradient_checkpointing=True, shard=True)
    record = sft.sft(ENV, other, tmp_path, data, EVERY_5)
    assert record["config"]["micro_batch_tokens"] == 10_000
    assert sft.sft(ENV, SFT, tmp_path, data, EVERY_5) == record  # it has ended
    one, two = weights(tmp_path), weights(whole["sft"])
    assert list(one) == list(two)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], atol=1e-6, rtol=0)


def test_a_folder_in_which_nothing_was_trained_is_free(
    data: EnvSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sft, "completion_nll", fail)
        with pytest.raises(ConnectionError):
            sft.sft(ENV, dataclasses.replace(SFT, copy_steps=0), tmp_path, data)
    record = sft.sft(ENV, dataclasses.replace(SFT, steps=1), tmp_path, data)
    assert record["config"]["steps"] == 1


def test_checkpoints_come_by_time(data: EnvSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for minutes, saved in ((1e-9, 6), (0.0, 0)):
        out = tmp_path / str(minutes)
        found: list[int] = []

        def look(run: Trainer, found: list[int] = found) -> None:
            found.append(files.read_json(run.folder / CHECKPOINT / trainer.STATE_FILE)["updates"])

        with monkeypatch.context() as patch:
            AtUpdate(patch, 7, look)  # behind update 7, before its own checkpoint
            sft.sft(ENV, SFT, out, data, SaveOptions(save_every_minutes=minutes))
        assert found == [saved]


def test_what_cannot_be_saved_is_found_out_before_the_first_update(
    data: EnvSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = AtUpdate(monkeypatch, 0, fail)
    monkeypatch.setattr(TunedModel, "save", fail)
    with pytest.raises(ConnectionError):
        sft.sft(ENV, SFT, tmp_path, data)
    assert updates.calls == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        sft.sft(ENV, SFT, tmp_path / "file", data)


def test_a_run_keeps_the_logs_of_the_runs_in_its_subfolders(
    data: EnvSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft.sft(ENV, dataclasses.replace(SFT, steps=1), tmp_path / "one", data)
    before = logged(tmp_path / "one")
    assert before
    sft.sft(ENV, dataclasses.replace(SFT, steps=1), tmp_path, data)
    assert logged(tmp_path / "one") == before
