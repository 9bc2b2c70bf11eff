"""A saved folder is data: what it names is imported only if it is ours, imported already, or trusted."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from textrl_gym import files, registry
from textrl_gym.agents import GRPO
from textrl_gym.cli import main
from textrl_gym.experiments import reproduce, results
from textrl_gym.experiments.compare import CompareConfig, prepare
from textrl_gym.experiments.launching import RunProcesses
from textrl_gym.mdp.task import load_task

PAYLOAD = """
from pathlib import Path
from textrl_gym.envs.copy_text import CopyText
from textrl_gym.agents import GRPO

Path("PWNED").write_text("")

class Agent(GRPO):
    pass

class Task(CopyText):
    pass

def reward(completions, **columns):
    return [float(len(completion)) for completion in completions]
"""


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with a Python file in it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "trust_all", False)
    GRPO("CopyText-v0", rollout_episodes=4, group_size=2).save("saved")
    Path("saved/payload.py").write_text(PAYLOAD)
    Path("payload_beside.py").write_text(PAYLOAD)
    monkeypatch.setitem(sys.modules, "payload_beside", None)  # so that each test begins without it
    monkeypatch.delitem(sys.modules, "payload_beside")
    return tmp_path / "saved"


def edit(folder: Path, **changes: Any) -> None:
    state = files.read_state(folder)
    state["env"] |= changes.pop("env", {})
    files.write_state(folder, state | changes)


NAMED: list[dict[str, Any]] = [
    {"agent": "saved.payload:Agent"},
    {"agent": "payload_beside:Agent"},
    {"task": "saved.payload:Task"},
    {"task": "payload_beside:Task"},
    {"task": "payload_beside"},
    {"env": {"reward": "saved.payload:reward"}},
    {"env": {"reward": "payload_beside:reward"}},
    {"env": {"reward": {"length": 1.0, "payload_beside:reward": 0.5}}},
]


@pytest.mark.parametrize("changes", NAMED, ids=str)
def test_what_a_checkpoint_names_is_not_imported(saved: Path, changes: dict[str, Any]) -> None:
    edit(saved, **changes)
    with pytest.raises(ValueError, match=r"agent\.json' names code of the module '[a-z._]+'.*--trust-code"):
        registry.load_agent(saved)
    if "agent" not in changes:
        with pytest.raises(ValueError, match="--trust-code"):
            GRPO.load(saved)
    assert not Path("PWNED").exists()


@pytest.mark.parametrize("changes", [c for c in NAMED if "saved." not in str(c)], ids=str)
def test_with_trust_it_is(saved: Path, changes: dict[str, Any]) -> None:
    edit(saved, **changes)
    registry.load_agent(saved, trust_code=True)
    assert Path("PWNED").exists()


def test_what_is_imported_already_counts_as_named_by_the_user(saved: Path) -> None:
    edit(saved, task="payload_beside:Task")
    __import__("payload_beside")
    assert type(registry.load_agent(saved).env.task).__name__ == "Task"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"env": {"reward": "os:system"}}, "code of the module 'os'"),
        ({"agent": "builtins:exec"}, "code of the module 'builtins'"),
        ({"agent": "torch.jit:ScriptModule"}, "which is no agent"),
        ({"task": "torch.nn:Linear"}, "no subclass or instance of textrl_gym.Task"),
    ],
)
def test_what_always_is_imported_is_no_way_round(saved: Path, changes: dict[str, Any], words: str) -> None:
    edit(saved, **changes)
    with pytest.raises(ValueError, match=words):
        registry.load_agent(saved)


def test_a_nested_checkpoint_is_as_trusted_as_the_outer_one(saved: Path) -> None:
    with registry.named_by("outer", trust=True), registry.named_by("inner", trust=False):
        registry.import_named("payload_beside")
    del sys.modules["payload_beside"]
    with (
        registry.named_by("outer", trust=False),
        registry.named_by("inner", trust=False),
        pytest.raises(ValueError, match="'inner' names code"),
    ):
        registry.import_named("payload_beside")


def test_a_folder_is_no_package_by_accident(saved: Path) -> None:
    with pytest.raises(ValueError, match="'saved' is a folder without Python code of its own"):
        registry.load_object("saved:reward")
    with pytest.raises(ValueError, match="'saved' is a folder without Python code of its own"):
        load_task("saved")


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "textrl_gym", *args], capture_output=True, text=True, timeout=300, check=False
    )


def test_the_command_line_asks_for_trust(saved: Path) -> None:
    edit(saved, env={"reward": "payload_beside:reward"})
    refused = command("evaluate", "saved", "--episodes", "4")
    assert refused.returncode == 2 and "--trust-code" in refused.stderr
    assert not Path("PWNED").exists()
    trusted = command("evaluate", "saved", "--episodes", "4", "--trust-code")
    assert trusted.returncode == 0, trusted.stderr


TRAIN = [
    "train",
    "grpo",
    "CopyText-v0",
    "--rollout-episodes",
    "4",
    "--group-size",
    "2",
    "--eval-episodes",
    "2",
    "--out",
    "run",
]


def test_the_same_command_resumes_a_reward_of_the_users(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [*TRAIN, "--total-timesteps", "40", "--env.reward", "payload_beside:reward"]
    assert main.main(args) == 0
    del sys.modules["payload_beside"]  # as in a new process
    edit(Path("run"), finished=False)
    assert main.main(args) == 0
    del sys.modules["payload_beside"]
    # A folder alone is not enough: it may be somebody else's.
    assert main.main(["train", "--resume", "run", "--total-timesteps", "20"]) == 2
    assert "--trust-code" in capsys.readouterr().err
    assert main.main(["train", "--resume", "run", "--total-timesteps", "20", "--trust-code"]) == 0


@pytest.mark.parametrize("more", [["--env.reward", "payload_beside:reward"], []])
def test_a_command_in_a_folder_imports_nothing(
    saved: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    agent = "grpo" if more else "payload_beside:Agent"
    run = Path("hostile")
    run.mkdir()
    line = [agent, "CopyText-v0", "--total-timesteps", "20", *more]
    (run / "run.json").write_text(json.dumps({"command": line, "environment": "CopyText-v0", "options": {}}))
    assert main.main(["train", "--resume", "hostile"]) == 2
    assert "run.json' names code of the module 'payload_beside'" in " ".join(capsys.readouterr().err.split())
    assert not Path("PWNED").exists()


RUNS: list[dict[str, Any]] = [
    {"agent": "payload_beside:Agent"},
    {"environment": "payload_beside:Task"},
    {"environment": "Other-v0", "registered": {"task": "payload_beside:Task"}},
    {"environment": "Other-v0", "registered": {"task": "textrl_gym.envs.copy_text", "reward": "payload_beside:reward"}},
    {"env": {"reward": "payload_beside:reward"}},
    {"env": {"reward": "conversational:payload_beside:reward"}},
    {"gold": "payload_beside:reward"},
]


@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_a_run_of_a_comparison_is_reproduced_only_with_trust(
    saved: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def again(folder: Path, how: RunProcesses) -> None:
        assert how.trust_code
        (folder / results.RESULT).write_text("{}")

    monkeypatch.setattr(reproduce, "_run", again)
    ours = dict(gymnasium.registry)
    for module in (gymnasium, gymnasium.envs.registration):  # what is registered here is forgotten
        monkeypatch.setattr(module, "registry", ours)
    run = prepare(Path("others"), "CopyText-v0", CompareConfig(("grpo",), seeds=1, total_timesteps=20))["grpo-0"]
    spec = json.loads((run / results.SPEC).read_text())
    (run / results.SPEC).write_text(json.dumps(spec | changes))
    (run / results.RESULT).write_text("{}")
    assert main.main(["reproduce", str(run)]) == 2
    assert f"{results.SPEC}' names code of the module 'payload_beside'" in " ".join(capsys.readouterr().err.split())
    assert not Path("PWNED").exists()
    assert main.main(["reproduce", str(run), "--trust-code"]) == 0
    assert Path("PWNED").exists()
