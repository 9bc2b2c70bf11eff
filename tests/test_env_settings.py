"""Settings of the environment: the same in every command and in one TOML file; tasks that are named by their file."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from textrl_gym import registry
from textrl_gym.cli.main import main
from textrl_gym.cli.options import read_toml
from textrl_gym.data import preferences
from textrl_gym.mdp.env_settings import EnvSettings, by_flag

TASK = '''
"""Tasks of a user."""
import textrl_gym
from textrl_gym.models import tiny


class Letters(textrl_gym.Task):
    """Write letters."""

    max_prompt_tokens, max_new_tokens, reward, kl_coef = 4, 3, "length", 0.0

    def rows(self, split, dataset=None):
        count = 8 if dataset is None else int(dataset)
        return [{"prompt": "a b" if i % 2 else "b", "completion": "a"} for i in range(count)]

    def load_tokenizer(self, name=None):
        return tiny.symbol_tokenizer(["a", "b"])

    def load_model(self, name=None, **keywords):
        return super().load_model(name) if name else tiny.llama(3, width=16, layers=1, heads=1)


class Other(Letters):
    id = "CopyText-v0"
'''


@pytest.fixture
def their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file with tasks, in a folder that Python does not look into."""
    before = list(sys.path)
    (tmp_path / "tasks").mkdir()
    file = tmp_path / "tasks" / "letter_tasks.py"
    file.write_text(TASK)
    yield file
    sys.path[:] = before
    sys.modules.pop("letter_tasks", None)
    gymnasium.registry.pop("Letters-v0", None)


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


# -- tasks by their file ----------------------------------------------------------------------------------------------


def test_a_task_is_named_by_its_file(their_file: Path) -> None:
    assert registry.find_env(f"{their_file}:Letters") == "Letters-v0"
    assert registry.find_env("letter_tasks:Letters") == "Letters-v0"  # again, and by its module
    env = gymnasium.make("Letters-v0")
    assert env.unwrapped.reset(seed=0)[0] is not None
    assert registry.registration("Letters-v0") == {"task": "letter_tasks:Letters"}  # as a worker imports it


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{folder}/none.py:Letters", "there is no file '.*none.py'"),
        ("{file}:Lettres", "unknown environment 'Lettres'"),
        ("{file}:textrl_gym", "unknown environment 'textrl_gym'"),
        ("{file}:Other", "has the id 'CopyText-v0', which is textrl_gym.envs.copy_text: give the class another id"),
        ("{folder}/bad-name.py:X", "'bad-name.py' cannot be imported"),
        ("{folder}/json.py:X", "'json' is another module already"),
        ("{folder}/classes.py:Mine", "classes:Mine is no subclass of textrl_gym.Task"),
    ],
)
def test_a_wrong_file_or_class_is_named(name: str, words: str, their_file: Path) -> None:
    folder = their_file.parent
    for other in ("bad-name", "json", "classes"):
        (folder / f"{other}.py").write_text("class Mine: ...\n")
    with pytest.raises(ValueError, match=words):
        registry.find_env(name.format(folder=folder, file=their_file))


def test_a_checkpoint_may_not_name_a_file(their_file: Path) -> None:
    with registry.named_by("agent.json", trust=False), pytest.raises(ValueError, match="not part of textrl-gym"):
        registry.load_object(f"{their_file}:Letters")
    assert "letter_tasks" not in sys.modules


# -- the same settings everywhere --------------------------------------------------------------------------------------

PIPELINE = """
[env]
max_new_tokens = 2
stop = ["-b"]

[sft]
steps = 2
batch_size = 2
eval_rows = 2

[preferences]
n = 4
label = "length"
batch_size = 8
noise = 0.1

[agent]
rollout_episodes = 8
group_size = 4

[train]
total_timesteps = 60
on_bad_health = "warn"

[compare]
agents = ["reinforce"]
seeds = 1
total_timesteps = 40
eval_episodes = 4
set = ["reinforce.rollout_episodes=8"]

[evaluate]
episodes = 4
"""


@pytest.mark.slow
def test_one_file_says_what_every_command_does(
    their_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    env, file = f"{their_file}:Letters", tmp_path / "pipeline.toml"
    file.write_text(PIPELINE)
    given = [env, "--config", file]
    assert run("check", *given) == 0
    assert run("train", "grpo", *given, "--out", "run", "--env.dataset", "6") == 0
    assert run("preferences", *given, "--out", "pairs.jsonl", "--model", "run") == 0
    assert run("sft", *given, "--model", "run/model", "--out", "tuned") == 0
    assert run("evaluate", "run", "--config", file, "--env.max-new-tokens", 1, "--json", "numbers.json") == 0
    assert run("compare", *given, "--out", "compared") == 0
    assert run("bench", env, "--prompts", 2, "--group", 2, "--iterations", 1, "--config", file) == 0
    capsys.readouterr()

    # 1. Each read its own table, and [env]; flags win.
    saved = read_toml(Path("run/config.toml"), {"env": (EnvSettings,)})["env"]
    assert (saved["max_new_tokens"], saved["stop"], saved["dataset"]) == (2, ("-b",), "6")
    assert json.loads(Path("run/evaluations.jsonl").read_text().splitlines()[-1])["completion_tokens"] <= 2
    assert json.loads(Path("tuned/sft.json").read_text())["env"]["max_new_tokens"] == 2
    assert "steps = 2" in Path("tuned/config.toml").read_text()
    assert len(Path("pairs.jsonl").read_text().splitlines()) == 4
    assert "noise = 0.1" in Path("pairs.toml").read_text()
    assert json.loads(Path("numbers.json").read_text())["completion_tokens"] == 1
    spec = json.loads(Path("compared/runs/reinforce-0/cell.json").read_text())
    assert (spec["env"]["max_new_tokens"], spec["env"]["stop"]) == (2, ["-b"])
    assert json.loads(Path("compared/runs/reinforce-0/evaluation.json").read_text())["completion_tokens"] <= 2
    assert preferences.load_preferences("pairs.jsonl", "train", None).rows

    # 2. What was resolved runs again as it is, and is the same run.
    assert run("train", "grpo", env, "--config", "run/config.toml") == 0
    assert "is finished" in capsys.readouterr().out
    assert run("compare", env, "--config", "compared/config.toml") == 0


def test_settings_that_do_not_fit_are_named(
    their_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.toml"
    for args, text, words in (
        (["sft", "CopyText-v0", "--out", "x"], "[sft]\nstep = 1", "[sft]: unknown key 'step' (did you mean 'steps'?)"),
        (["sft", "CopyText-v0", "--out", "x"], "[sfd]\nsteps = 1", "unknown table 'sfd' (did you mean 'sft'?)"),
        (["check", "CopyText-v0"], "[env]\nmax_new_tokens = 0", "max_new_tokens must be at least 1, got 0"),
        (["bench"], "[env]\nmax_new_tokens = 4", "need an environment: textrl-gym bench ENV"),
    ):
        file.write_text(text)
        assert run(*args, "--config", file) == 2
        assert words in capsys.readouterr().err
    assert list(tmp_path.glob("x*")) == []


@pytest.mark.parametrize("value", [{"max_new_tokens": 0}, {"split": "train "}, {"missing_eos_penalty": float("nan")}])
def test_settings_are_checked_in_python_too(value: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(value))):
        EnvSettings(**value)


def test_settings_of_an_earlier_version_are_the_defaults() -> None:
    assert by_flag({}) == by_flag({"split": "train"})
    assert by_flag({"stop": ["a"]})["env.stop"] == ["a"]
