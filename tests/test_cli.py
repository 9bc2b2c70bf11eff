"""The command line: in this process where that shows the same, in one of its own where the process matters."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import textrl_gym
from textrl_gym import files, registry
from textrl_gym.agents import GRPO, PPO
from textrl_gym.bounds import AROUND, ELSEWHERE
from textrl_gym.cli import main
from textrl_gym.cli.options import read_toml
from textrl_gym.mdp.env_settings import EnvSettings, parse_reward
from textrl_gym.registry import load_agent, text_envs

TINY = ["--total-timesteps", "400", "--rollout-episodes", "16", "--eval-episodes", "8"]


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


def one_error(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line that a wrong input gives, with exit code 2."""
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of GRPO on CopyText-v0."""
    out = tmp_path_factory.mktemp("runs") / "grpo"
    assert main.main(["train", "grpo", "CopyText-v0", *TINY, "--seed", "3", "--out", str(out)]) == 0
    return out


# -- help and names ---------------------------------------------------------------------------------------------------


LIGHT = {
    0: (
        ["--help"],
        [],
        ["envs"],
        ["agents"],
        ["--version"],
        *([command, "--help"] for command in ("train", "compare", "evaluate", "judge", "lesson", "check", "report")),
    ),
    2: (
        ["trian"],
        ["train", "grpo", "CopyTxt-v0"],
        ["train", "gpro", "CopyText-v0"],
        ["train", "CopyText-v0", "grpo"],
        ["compare", "CopyTxt-v0", "--agents", "grpo", "--out", "nowhere"],
        ["lesson", "Mathwords-v0"],
        ["evaluate", "nothing"],
    ),
}
"""What answers without torch, by the exit code."""


def test_help_and_wrong_names_load_no_torch(root: Path) -> None:
    code = f"""
import sys
from textrl_gym.cli.main import main
for expected, commands in {LIGHT!r}.items():
    for args in commands:
        assert main(args) == expected, args
        assert not {{"torch", "transformers", "pandas"}} & set(sys.modules), args
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "AGENT comes before ENV: textrl-gym train grpo CopyText-v0" in done.stderr


def test_threads_are_set_before_torch(root: Path) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    code = f"import os, textrl_gym.cli.main; print(*(os.environ[name] for name in {names}))"
    env = {k: v for k, v in os.environ.items() if k not in names}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["PASSIVE", "1000", str(min(8, len(os.sched_getaffinity(0))))], done.stderr


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(f"  {name}" in out for name in main.COMMANDS)


@pytest.mark.parametrize("command", sorted(main.COMMANDS))
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, command, "--help")
    assert code == 0
    assert f"textrl-gym {command}" in out
    assert err == ""


def test_help_of_train_lists_the_agents_settings(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "train", "grpo", "CopyText-v0", "--help")
    for flag in ("--total-timesteps", "--scale-by-std", "--eval-every", "--env.reward", "--config", "--device"):
        assert flag in out
    assert "standard deviation" in out  # a field's own sentence
    _, out, _ = run(capsys, "train", "ppo", "CopyText-v0", "--help")
    assert "--gae-lambda" in out
    assert "--scale-by-std" not in out


def test_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown command 'trian' (did you mean 'train'?); allowed: agents, annotate, bench, check, " in one_error(
        capsys, "trian"
    )
    line = one_error(capsys, "train", "grop", "CopyText-v0", *TINY)
    assert "unknown agent 'grop' (did you mean 'grpo'?); allowed: " in line
    assert ", grpo, " in line
    line = one_error(capsys, "train", "grpo", "copytext", *TINY)
    assert "unknown environment 'copytext' (did you mean 'CopyText-v0'?); allowed: " in line
    assert "unknown environment 'Cart'" in one_error(capsys, "check", "Cart")
    assert "there is no module 'nowhere'" in one_error(capsys, "train", "nowhere:Agent", "CopyText-v0", *TINY)
    assert "not a subclass" in one_error(capsys, "train", "json:dumps", "CopyText-v0", *TINY)
    assert "AGENT and ENV first" in one_error(capsys, "train", "--seed", "1", "grpo", "CopyText-v0")


def test_wrong_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # tyro wraps its words
    start = ["train", "grpo", "CopyText-v0", "--out", tmp_path / "run"]
    for more, words in [
        (["--total-timesteps", "x"], "--total-timesteps"),
        ([*TINY, "--learning-rat", "1"], "--learning-rate"),  # what was meant
        ([*TINY, "--group-size", "1"], "group_size must be at least 2, got 1"),
        (["--total-timesteps", "0"], "total_timesteps must be at least 1, got 0"),
        ([], "--total-timesteps"),
    ]:
        code, _, err = run(capsys, *start, *more)
        assert code == 2
        assert words in err
        assert "Traceback" not in err
    assert "reward" in one_error(capsys, *start, *TINY, "--env.reward", "nothing")
    assert "NAME=WEIGHT" in one_error(capsys, *start, *TINY, "--env.reward", "length=x")
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="unknown command"):
        main.main(["--debug", "trian"])


@pytest.mark.parametrize("args", [["--help"], ["envs"], ["train", "ppo", "CopyText-v0", "--help"]], ids=" ".join)
def test_a_reader_that_leaves_is_no_error(args: list[str]) -> None:
    command = [sys.executable, "-m", "textrl_gym", *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode != 0


def test_words_of_an_exit_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(main.COMMANDS, "envs", lambda args: sys.exit("no key in the environment"))
    assert "no key in the environment" in one_error(capsys, "envs")


# -- TOML -------------------------------------------------------------------------------------------------------------


def test_toml_and_the_command_line_wins(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        """
        [train]
        total_timesteps = 100
        seed = 7
        eval_episodes = 8
        [agent]
        rollout_episodes = 12  # no multiple of the default group_size 8: the file is not checked alone
        learning_rate = 1
        scale_by_std = false
        [env]
        stop = ["--", "x"]
        [env.reward]
        exact_match = 1
        length = -0.01
        """
    )
    out = tmp_path / "run"
    args = ["--config", file, "--group-size", "4", "--learning-rate", "0.01", "--out", out]
    code, printed, _ = run(capsys, "train", "grpo", "CopyText-v0", *args)
    assert code == 0
    assert str(out) in printed
    state = files.read_state(out)
    assert state["seed"] == 7
    assert state["total_timesteps"] == 100
    config = {k: state["config"][k] for k in ("rollout_episodes", "group_size", "learning_rate", "scale_by_std")}
    assert config == {"rollout_episodes": 12, "group_size": 4, "learning_rate": 0.01, "scale_by_std": False}
    assert state["env"]["reward"] == {"exact_match": 1.0, "length": -0.01}
    assert state["env"]["stop"] == ["--", "x"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[agent]\nlearning_rat = 1", "[agent]: unknown key 'learning_rat' (did you mean 'learning_rate'?); allowed: "),
        ("[agent]\nlearning_rate = 'x'", "[agent]: learning_rate must be a number, got 'x'"),
        ("[agent]\nscale_by_std = 1", "[agent]: scale_by_std must be true or false, got 1"),
        ("[agent]\nepochs = 1.5", "[agent]: epochs must be an integer, got 1.5"),
        ("[agent]\nepochs = true", "[agent]: epochs must be an integer, got True"),
        ("[agent]\nkl_in = 'x'", "[agent]: kl_in must be one of 'loss', 'reward', got 'x'"),
        ("[env]\nstop = 'x'", "[env]: stop must be a list, each item a string, got 'x'"),
        ("[env.reward]\nlength = 'x'", "the weight of reward 'length' must be a finite number"),
        ("[train]\nconfig = 'x'", "[train]: unknown key 'config'"),
        (
            "[agents]\nepochs = 1",
            "unknown table 'agents' (did you mean 'agent'?); allowed: agent, annotate, bench, collect",
        ),
        ("seed = 1", "unknown table 'seed'"),
        ("[agent", "Expected ']'"),
    ],
)
def test_toml_errors(text: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    line = one_error(capsys, "train", "grpo", "CopyText-v0", *TINY, "--config", file)
    assert words in line
    assert str(file) in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rouge", "rouge"),
        ("rouge=1.0,length=-0.01", {"rouge": 1.0, "length": -0.01}),
        ("length=-0.01", {"length": -0.01}),
        # An argument may hold "=" and ",".
        ("regex:the=1", "regex:the=1"),
        ("regex:answer=42", "regex:answer=42"),
        ("regex:a,b=1", "regex:a,b=1"),
        (r"regex:x{1,3}=\d+", r"regex:x{1,3}=\d+"),
        ("regex:x=1,y=2", "regex:x=1,y=2"),  # y is no reward
        ("regex:x=1,length=-0.1", {"regex:x": 1.0, "length": -0.1}),
        ("reward_model:rm=0.1", "reward_model:rm=0.1"),
        ("my_rewards:chars=0.5", {"my_rewards:chars": 0.5}),  # no name in Python holds "="
        ("my_rewards:chars=0.5,length=1", {"my_rewards:chars": 0.5, "length": 1.0}),
        # A folder by what is there; one that is not there is named as it was typed.
        ("runs/lr=0.001", "runs/lr=0.001"),
        ("runs/lr=0.001=0.5", {"runs/lr=0.001": 0.5}),
        ("lr=0.1,x=2", "lr=0.1,x=2"),
        ("runs/none=0.001", "runs/none=0.001"),
        ("reward_model:runs/lr=0.001=2,length=1", {"reward_model:runs/lr=0.001": 2.0, "length": 1.0}),
        ('{"regex:the=1": 0.5, "length": -1}', {"regex:the=1": 0.5, "length": -1.0}),
    ],
)
def test_a_reward_with_an_equals_sign_is_what_it_says(
    text: str, expected: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "lr=0.001").mkdir(parents=True)
    (tmp_path / "lr=0.1,x=2").mkdir()
    assert parse_reward(text) == expected


def test_a_toml_table_of_weights_keeps_names_with_equals_signs(tmp_path: Path) -> None:
    file = tmp_path / "mix.toml"
    file.write_text('[env.reward]\n"regex:the=1" = 0.5\n')
    table = read_toml(file, {"env": (EnvSettings,)})["env"]
    assert EnvSettings(**table).keywords()["reward"] == {"regex:the=1": 0.5}


@pytest.mark.parametrize(
    "text", ["length=x", "length=1,length=2", "=1", "length=inf", '{"a": true}', "{a: 1}", "[1=2,"]
)
def test_a_mixture_with_a_bad_weight_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="reward"):
        parse_reward(text)


def test_toml_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    line = one_error(capsys, "train", "grpo", "CopyText-v0", *TINY, "--config", "no.toml")
    assert "cannot read --config 'no.toml': No such file" in line


# -- what the commands do ---------------------------------------------------------------------------------------------


def test_train_writes_a_run(trained: Path) -> None:
    state = files.read_state(trained)
    assert (state["agent"], state["seed"], state["total_timesteps"]) == ("grpo", 3, 400)
    assert load_agent(trained, device="cpu").num_timesteps >= 400
    assert {"evaluations.jsonl", "samples.jsonl", "progress.json", "run.json"} <= {p.name for p in trained.iterdir()}


def test_a_used_folder_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = one_error(capsys, "train", "grpo", "CopyText-v0", *TINY, "--out", trained)
    assert "holds a run already" in line
    assert f"--resume {trained}" in line


def test_evaluate(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = sorted(p.name for p in trained.iterdir())
    code, out, _ = run(capsys, "evaluate", trained, "--episodes", 16, "--json", tmp_path / "numbers.json")
    assert code == 0
    assert "nats per sequence" in out
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert 0.0 <= numbers["score"] <= 1.0
    assert sorted(p.name for p in trained.iterdir()) == before
    code, out, _ = run(capsys, "evaluate", trained, "--episodes", 16, "--env", "CopyText-v0")
    assert code == 0
    assert f"{numbers['score']:.3f}" in out  # the same prompts and the same random numbers
    assert "holds no agent.json" in one_error(capsys, "evaluate", tmp_path)
    assert run(capsys, "evaluate", trained, "--split", "x")[0] == 2


def test_report(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "report", trained)
    assert (code, out.strip()) == (0, str(trained / "report.html"))
    assert (trained / "report.html").is_file()
    assert "holds no run" in one_error(capsys, "report", tmp_path)


def test_envs(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "envs")
    assert code == 0
    assert all(env_id in out for env_id in text_envs())


def test_resume_of_a_finished_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "ppo"
    assert run(capsys, "train", "ppo", "CopyText-v0", *TINY, "--eval-every", 3, "--out", out)[0] == 0
    done = load_agent(out, device="cpu").num_timesteps
    assert f"has {done} of 400 tokens" in one_error(capsys, "train", "--resume", out)
    code, _, _ = run(capsys, "train", "--resume", out, "--total-timesteps", 200)
    assert code == 0
    assert files.read_state(out)["total_timesteps"] == done + 200
    now = load_agent(out, device="cpu").num_timesteps
    assert now >= done + 200
    rows = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert any(done < row["timesteps"] < now for row in rows)  # eval_every 3 is remembered
    assert "is no saved agent" in one_error(capsys, "train", "--resume", tmp_path)


def test_a_folder_of_another_run_names_the_agent_first_and_how_to_train_for_longer(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "foreign_modules", set())  # of other tests, which --trust-code would be told for
    line = one_error(capsys, "train", "ppo", "CopyText-v0", *TINY, "--seed", 3, "--out", trained)
    assert "holds a run already, with agent='grpo', not 'ppo': go on with --resume" in line
    line = one_error(capsys, "train", "grpo", "MathWords-v0", *TINY, "--seed", 3, "--out", trained)
    assert "with environment='CopyText-v0', not 'MathWords-v0'" in line
    again = ["train", "grpo", "CopyText-v0", *TINY, "--seed", 3]
    longer = ["--total-timesteps", 700]
    # Another setting differs too: it is another run.
    assert "with seed=3, not 4" in one_error(capsys, *again, *longer, "--seed", 4, "--out", trained)
    out = tmp_path / "longer"
    shutil.copytree(trained, out)
    done = load_agent(out, device="cpu").num_timesteps
    line = one_error(capsys, *again, *longer, "--out", out)
    assert f"with total_timesteps=400, not 700: it has {done} tokens, and with --resume the number counts" in line
    command = line.partition("go on with textrl-gym ")[2].partition(",")[0].split()
    assert command == ["train", "--resume", str(out), "--total-timesteps", str(700 - done)]
    assert run(capsys, *command)[0] == 0
    assert files.read_state(out)["total_timesteps"] == 700
    # Fewer tokens than there are: nothing goes on to them.
    line = one_error(capsys, *again, "--total-timesteps", 300, "--out", trained)
    assert "with total_timesteps=400, not 300: go on with --resume" in line


def test_resume_goes_on_to_the_runs_own_total(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    shutil.copytree(trained, out)
    state = files.read_state(out)
    files.write_state(out, state | {"total_timesteps": 700})  # as if it had been stopped on the way there
    assert main.main(["train", "--resume", str(out)]) == 0
    assert load_agent(out, device="cpu").num_timesteps >= 700
    assert files.read_state(out)["total_timesteps"] == 700


def test_ctrl_c_leaves_a_checkpoint(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    args = ["train", "grpo", "CopyText-v0", "--total-timesteps", "100000000", "--rollout-episodes", "16"]
    more = ["--out", str(out), "--eval-episodes", "8", "--eval-every", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "textrl_gym", *args, *more],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (out / "progress.json").is_file() or (out / "progress.json").stat().st_size == 0:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"textrl-gym train --resume {out}" in err
    agent = load_agent(out, device="cpu")
    assert agent.num_updates >= 1
    assert files.read_state(out)["total_timesteps"] == 100_000_000


# -- the shape of help, and what is beside the commands ----------------------------------------------------------------


def test_help_has_panels_and_an_example(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    _, out, _ = run(capsys, "train", "grpo", "CopyText-v0", "--help")
    panels = [line.strip("╭─╮ ") for line in out.splitlines() if line.startswith("╭")]
    assert panels == ["options", "Agent: GRPO", "Run", "Training", "Every agent", "Environment"]
    own, _, rest = out.partition("─ Run ─")
    assert "--scale-by-std" in own and "--group-size" in own  # GRPO has a default of its own
    assert "--adam-eps" in rest and "--adam-eps" not in own
    assert "Example: textrl-gym train grpo TLDRSummarize-v0 --total-timesteps" in out
    assert "usage: textrl-gym train grpo CopyText-v0 " in out
    _, out, _ = run(capsys, "train", "--help")
    assert "usage: textrl-gym train AGENT ENV " in out


def test_help_of_the_split_is_true_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "evaluate", "--help")
    words = " ".join(out.replace("│", " ").split())
    # Not "the prompts of training", beside a default that is none of these.
    assert (
        "Which prompts: train are those of training, validation and test are held out. (default: validation)" in words
    )


@pytest.mark.parametrize("command", sorted(main.COMMANDS))
def test_help_is_narrow_and_says_no_type_twice(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    _, out, _ = run(capsys, *(["labels", "report"] if command == "labels" else [command]), "--help")
    boxes = [line for line in out.splitlines() if line.startswith(("╭", "│", "╰"))]
    assert boxes and max(map(len, boxes)) <= 100
    assert {len(line) for line in boxes} == {max(map(len, boxes))}, "a title or a default has moved a border"
    assert "{None}" not in out and "(default: )" not in out
    assert os.environ["COLUMNS"] == "150"


def test_whole_numbers_may_be_written_with_an_exponent(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "run"
    code, _, err = run(
        capsys, "train", "grpo", "CopyText-v0", *TINY[2:], "--total-timesteps", "2e2", "--kl-coef", "None", "--out", out
    )
    assert code == 0, err
    assert files.read_json(out / "run.json")["settings"]["total_timesteps"] == 200
    for bad in ("1.5", "1e-3", "inf", "nan", "many"):
        code, _, err = run(capsys, "train", "grpo", "CopyText-v0", "--total-timesteps", bad, "--out", tmp_path / "no")
        text = " ".join(err.replace("│", " ").split())
        assert code == 2 and f"expected a whole number, such as 100000, 100_000 or 1e5, got '{bad}'" in text


@pytest.mark.parametrize(
    ("flags", "here"),
    [
        (["--beta", "0.1"], "unknown setting --beta: here it is --kl-coef"),
        (["--num-generations=4"], "unknown setting --num-generations: here it is --group-size"),
        (["--max-completion-length", "9"], "here it is --env.max-new-tokens"),
        (["--epsilon", "0.1"], "here it is --clip-low"),
    ],
)
def test_names_of_other_libraries_are_told(
    flags: list[str], here: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert here in one_error(capsys, "train", "grpo", "CopyText-v0", *TINY, *flags, "--out", tmp_path / "no")


def test_names_of_other_libraries_are_told_in_python_too() -> None:
    with pytest.raises(ValueError, match=r"GRPO has no setting 'beta' \(here kl_coef\), 'nothing'; allowed"):
        GRPO("CopyText-v0", beta=0.1, nothing=1)
    with pytest.raises(
        ValueError, match=r"GRPO has no setting 'learning_rat' \(did you mean 'learning_rate'\?\); allowed"
    ):
        GRPO("CopyText-v0", learning_rat=0.1)
    with pytest.raises(ValueError, match=r"GRPO has no setting 'max_tokens' \(here env\.max_new_tokens\); allowed"):
        GRPO("CopyText-v0", max_tokens=3)
    with pytest.raises(ValueError, match=r"'cliprange' \(here clip_range\)"):
        PPO("CopyText-v0", cliprange=0.1)


def test_every_name_of_elsewhere_leads_to_a_setting() -> None:
    settings = {field.name for field in dataclasses.fields(EnvSettings)}
    ours = {f"env.{name}" for name in settings} | set(AROUND)
    for agent in registry.names("agents"):
        ours |= {field.name for field in dataclasses.fields(registry.load_agent_class(agent).Config)}
    for name, here in ELSEWHERE.items():
        assert set(here) <= ours, name


def test_version_agents_and_env_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(capsys, "--version")[1].startswith(f"textrl-gym {textrl_gym.__version__} (Python 3.")
    code, out, _ = run(capsys, "agents")
    assert code == 0 and all(f" {name} " in out for name in registry.names("agents"))
    assert "group relative policy optimization" in out
    code, out, _ = run(capsys, "env-info", "--json")
    facts = json.loads(out)
    assert facts["torch"].startswith(torch.__version__.partition("+")[0])
    assert facts["threads"].startswith(str(torch.get_num_threads()))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("textrl-gym tra", ["train"]),
        ("textrl-gym train dr", ["dr_grpo"]),
        ("textrl-gym train grpo KnownO", ["KnownOptimum-v0"]),
        ("textrl-gym lesson Math", ["MathWords-v0"]),
        ("textrl-gym compare CopyText-v0 --agents ppo rl", ["rloo"]),
        ("textrl-gym bench --prompt", ["--prompt-tokens", "--prompts"]),
        ("textrl-gym bench 'open", []),
    ],
)
def test_completion(
    line: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMP_LINE", line + " never read")
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    assert run(capsys, "completion", "words")[1].split() == words


def test_bash_completes(tmp_path: Path) -> None:
    """A shell evaluates what the command prints."""
    code = 'eval "$(textrl-gym completion bash)"; complete -p textrl-gym'
    bin_folder = Path(sys.executable).parent
    env = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "textrl-gym completion words" in done.stdout, done.stderr
