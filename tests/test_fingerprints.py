"""Fingerprints: what a run depends on is known again after it was moved, and another model in its place is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from textrl_gym.agents import DPO, GRPO
from textrl_gym.cli.main import main
from textrl_gym.data import sources
from textrl_gym.feedback.questions import environment_of
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.mdp.text_env import TextVectorEnv
from textrl_gym.models import fingerprint, tiny
from textrl_gym.rewards import folder_of
from textrl_gym.training import dependencies

SMALL: dict[str, Any] = {"rollout_episodes": 8, "group_size": 4, "learning_rate": 1e-2, "device": "cpu"}
SYMBOLS = ("a", "b", "c", "d")


def model(folder: Path, seed: int = 0) -> Path:
    tiny.llama(5, scale=0.3, seed=seed).save_pretrained(folder)
    tiny.symbol_tokenizer(SYMBOLS).save_pretrained(folder)
    return folder


def reward(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=5, pad_token_id=0, **sizes)
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny.symbol_tokenizer(SYMBOLS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a start model, a reward model, and runs that name them relatively."""
    folder = tmp_path_factory.mktemp("made")
    model(folder / "start")
    reward(folder / "rm")
    common = ["--rollout-episodes", "8", "--group-size", "4", "--eval-episodes", "4", "--eval-every", "0"]
    train = ["train", "grpo", "CopyText-v0", "--total-timesteps", "30", "--show-samples", "0", "--device", "cpu"]
    with contextlib.chdir(folder):
        for name, more in {"whole": [], "lora": ["--lora-rank", "2"]}.items():
            named = ["--model", "start", "--env.reward", "rm", "--out", f"runs/{name}"]
            assert main([*train, *common, *named, *more]) == 0
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working folder."""
    folder = shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(folder)
    return folder


def kl(folder: str, *more: str) -> float:
    file = Path("numbers.json")
    assert main(["evaluate", folder, "--episodes", "4", "--device", "cpu", "--json", str(file), *more]) == 0
    return float(json.loads(file.read_text())["kl_sequence"])


@pytest.mark.parametrize("name", ["whole", "lora"])
def test_a_moved_run_knows_its_models(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = kl(f"runs/{name}")
    # From another folder, with the models where they were.
    (away := tmp_path / "away").mkdir()
    monkeypatch.chdir(away)
    assert kl(str(home / "runs" / name)) == pytest.approx(expected, abs=1e-6)
    # The run alone was moved.
    run = shutil.copytree(home / "runs" / name, away / "run")
    assert main(["evaluate", "run", "--episodes", "4"]) == 2
    words = capsys.readouterr().err.replace("\n", " ")
    assert "depends on the model 'rm' with the fingerprint" in words and "--env.reward" in words
    # Other models under the same names, here and in the working folder.
    reward(away / "rm", seed=1)
    model(away / "start", seed=1)
    for flags, what in (([], "rm"), (["--env.reward", str(home / "rm")], "start")):
        assert main(["evaluate", "run", "--episodes", "4", *flags]) == 2
        words = capsys.readouterr().err.replace("\n", " ")
        for path in (home / what, away / what):  # what it was, and what it is
            assert str(fingerprint.of(path)) in words
        assert str(away / what) in words
    where = ["--env.reward", str(home / "rm"), "--base-model"]
    assert main(["evaluate", "run", "--episodes", "4", *where, "start"]) == 2
    assert "say where it is with --base-model" in capsys.readouterr().err.replace("\n", " ")
    assert kl("run", *where, str(home / "start")) == pytest.approx(expected, abs=1e-6)
    # Going on: with the same reward model only, and the new places are kept.
    resume = ["train", "--resume", "run", "--total-timesteps", "10", "--device", "cpu"]
    assert main([*resume, "--env.reward", "rm", "--base-model", str(home / "start")]) == 2
    assert "was trained on" in capsys.readouterr().err.replace("\n", " ")
    assert main([*resume, *where, str(home / "start")]) == 0
    state = json.loads((run / "agent.json").read_text())
    assert state["model"] == str(home / "start") and state["env"]["reward"] == str(home / "rm")
    again = GRPO.load(run, device="cpu")
    assert again.fingerprints["model"] == fingerprint.of(home / "start")


def test_a_name_that_is_right_here_stays(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = GRPO.load("runs/whole", device="cpu")
    assert (agent.model_spec, agent.env.settings["reward"]) == ("start", "rm")
    # From elsewhere the saved hash counts, and not that of what has the name there.
    model(tmp_path / "start", seed=1)
    monkeypatch.chdir(tmp_path)
    agent = GRPO.load(home / "runs" / "whole", device="cpu")
    assert agent.fingerprints["model"] == fingerprint.of(home / "start") != fingerprint.of("start")


def test_a_reference_by_name_is_known(home: Path) -> None:
    model(home / "other", seed=2)
    agent = GRPO("CopyText-v0", "start", "other", **SMALL)
    agent.save("saved")
    model(home / "other", seed=3)
    with pytest.raises(ValueError, match="depends on the model 'other' with the fingerprint"):
        GRPO.load("saved", device="cpu")


def test_python_says_where_things_are(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (away := tmp_path / "away").mkdir()
    run = str(shutil.copytree(home / "runs" / "whole", away / "run"))
    monkeypatch.chdir(away)
    moved = {"reward": str(home / "rm")}
    agent = GRPO.load(run, device="cpu", base_model=str(home / "start"), env_settings=moved)
    assert agent.env.settings["reward"] == str(home / "rm") and agent.model_spec == str(home / "start")
    with pytest.warns(UserWarning, match="has the fingerprint .*, and .* was trained on"):
        GRPO.load(run, base_model=str(home / "start"), env_settings={"reward": str(reward(away / "rm", seed=1))})
    with pytest.raises(ValueError, match=r"env_settings=\['reward'\] are of the saved environment"):
        GRPO.load(run, "CopyText-v0", env_settings=moved)
    with pytest.raises(ValueError, match="base_model='no/folder' is no folder of a model"):
        GRPO.load(run, base_model="no/folder", env_settings=moved)


def test_folders_without_fingerprints_load(home: Path) -> None:
    file = home / "runs" / "whole" / "agent.json"
    state = json.loads(file.read_text())
    assert set(state["fingerprints"]) == {"model", "reference", "reward"}
    file.write_text(json.dumps({k: v for k, v in state.items() if k != "fingerprints"}))
    GRPO.load("runs/whole", device="cpu")
    file.write_text(json.dumps(state | {"fingerprints": {"model": 3, "reference": None, "reward": {}}}))
    with pytest.raises(ValueError, match=r"agent.json' is damaged: 'model' must be str or null, got 3"):
        GRPO.load("runs/whole", device="cpu")


def test_a_fingerprint_is_of_the_weights(home: Path, tmp_path: Path) -> None:
    start = fingerprint.of("start")
    assert start is not None and start == fingerprint.of(shutil.copytree("start", "copy"))
    assert start != fingerprint.of(model(tmp_path / "other", seed=1))
    assert fingerprint.of("gpt2") is None and fingerprint.of("no/folder") is None
    (home / "copy" / "config.json").unlink()  # what a newer transformers writes otherwise
    assert fingerprint.of("copy") == start
    # An agent's folder is its model; an adapter's has its base in it.
    assert fingerprint.of("runs/whole") == fingerprint.of("runs/whole/model") != start
    adapter = home / "adapter"
    shutil.copytree("runs/lora/model", adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "start"}))
    before = fingerprint.of(adapter)
    model(home / "start", seed=1)
    assert fingerprint.of(adapter) != before
    # A reward's normalisation is part of it, and so are an ensemble's members.
    one = fingerprint.of("rm")
    (home / "rm" / "reward_model.json").write_text('{"bias": 0.0, "scale": 2.0}')
    assert fingerprint.of("rm") != one
    (home / "both").mkdir()
    (home / "both" / "ensemble.json").write_text('{"members": ["../rm"], "combine": "mean", "coefficient": 1.0}')
    both = fingerprint.of("both")
    reward(home / "rm", seed=4)
    assert both is not None and fingerprint.of("both") != both


def test_a_run_finds_its_data_from_another_folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "data").mkdir()
    lines = "".join(json.dumps({"prompt": f"a b {n}", "chosen": "a", "rejected": "b"}) + "\n" for n in range(30))
    (home / "data" / "x.jsonl").write_text(lines)
    (work := home / "work").mkdir()
    monkeypatch.chdir(work)
    task = "textrl_gym.envs.tldr_summarize"
    env = TextVectorEnv(8, task=task, dataset="../data/x.jsonl", reward="length", max_new_tokens=2)
    DPO(env, pairs="../data/x.jsonl", rollout_episodes=8, device="cpu").save(home / "runs" / "mine")
    expected = str(home / "data" / "x.jsonl")
    for folder in (work, home, tmp_path):
        monkeypatch.chdir(folder)
        agent = DPO.load(home / "runs" / "mine", device="cpu")
        at = "../data/x.jsonl" if folder == work else expected  # a name that is right here stays
        assert (agent.env.settings["dataset"], agent.config.pairs) == (at, at)
    assert environment_of(home / "runs" / "mine", EnvSettings())[1].dataset == expected
    # Where there is none, how to name one is said.
    (home / "data").rename(tmp_path / "else")
    with pytest.raises(ValueError, match=r"there is no such file or folder.* --env.dataset \(in Python env_settings="):
        DPO.load(home / "runs" / "mine", device="cpu")
    there = str(tmp_path / "else" / "x.jsonl")
    moved = DPO.load(home / "runs" / "mine", device="cpu", env_settings={"dataset": there}, pairs=there)
    assert (moved.env.settings["dataset"], moved.config.pairs) == (there, there)


def test_a_hub_id_stays_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cwd := tmp_path / "cwd").mkdir()
    monkeypatch.chdir(cwd)
    for name in ("runs/imdb", "runs/mine", "owner/name", "posts"):
        (tmp_path / name).mkdir(parents=True)
    run = tmp_path / "runs" / "mine"
    for other in ("imdb", "mine"):  # runs have logs
        (run.parent / other / "agent.json").write_text("{}")
        (run.parent / other / "metrics.jsonl").write_text("{}")
    for name in ("imdb", "mine", "owner/name", "owner/name:part", "openai/gsm8k", "/no/such", "posts"):
        assert sources.located(name, run) == name
    for name in ("owner/name", "posts"):  # a folder with data is no Hub id
        (tmp_path / name / "train.jsonl").write_text("{}")
        assert sources.located(name, run) == str(tmp_path / name)
    # Here comes first, then beside the run.
    (run.parent / "x.csv").write_text("")
    (tmp_path / "x.csv").write_text("")
    assert sources.located("x.csv", run) == str(run.parent / "x.csv")
    (cwd / "x.csv").write_text("")
    assert sources.located("x.csv", run) == "x.csv"


def test_the_folder_in_a_rewards_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").mkdir()
    assert folder_of("rouge") == folder_of("reward_model") == ("", None)
    assert folder_of("regex:the=1") == ("", None)
    assert folder_of("runs/rm") == ("", "runs/rm")
    assert folder_of("reward_model:rm") == ("reward_model:", "rm")
    assert folder_of("ensemble:a:b") == ("ensemble:", "a:b")
    assert folder_of("ensemble:worst:a:b") == ("ensemble:worst:", "a:b")
    assert folder_of("ensemble:uncertainty:2:a:b") == ("ensemble:uncertainty:2:", "a:b")
    assert dependencies.of_rewards({"a:b": 1.0, "rouge": 0.5}) == {}
