"""Runs as jobs of a cluster: the same numbers as on this machine, also where jobs are preempted."""

import contextlib
import dataclasses
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pandas.testing import assert_frame_equal

from textrl_gym.cli.main import main
from textrl_gym.experiments import launching
from textrl_gym.experiments.compare import CompareConfig, compare, prepare
from textrl_gym.experiments.launching import LaunchConfig
from textrl_gym.experiments.results import ERROR, LOG

submitit: Any = pytest.importorskip("submitit")

HERE = LaunchConfig(launcher="submitit", cluster="local", timeout_hours=0.5)
CONFIG = CompareConfig(agents=("reinforce",), seeds=2, total_timesteps=200, eval_episodes=8, workers=1)


def last(table: Any) -> Any:
    """The last evaluations, without what a clock says."""
    frame = table[table["final"]]
    return frame.drop(columns=[name for name in frame if "second" in name]).reset_index(drop=True)


@pytest.mark.slow
def test_jobs_give_the_numbers_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two runs with a thread each, one after the other, as the jobs are.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    here = last(compare("CopyText-v0", CONFIG, tmp_path / "here", progress_bar=False))
    there = last(compare("CopyText-v0", CONFIG, tmp_path / "there", progress_bar=False, launch=HERE))
    assert list(here["run"]) == ["reinforce-0", "reinforce-1"]
    assert_frame_equal(here, there, check_exact=True)  # the same machine, threads and path

    def none(*args: object) -> Any:
        raise AssertionError("nothing was left to run")

    monkeypatch.setattr(launching, "executor", none)
    again = last(compare("CopyText-v0", CONFIG, tmp_path / "there", progress_bar=False, launch=HERE))
    assert len(again) == 2


@pytest.mark.slow
def test_a_job_that_is_preempted_goes_on(tmp_path: Path) -> None:
    config = CompareConfig(agents=("reinforce",), seeds=1, total_timesteps=1500, eval_episodes=8, save_every=1)
    jobs: list[Any] = []

    def preempt(going: set[str]) -> None:
        """Slurm's signal, once, when the run has learnt something."""
        run = tmp_path / "out" / "runs" / "reinforce-0"
        if going and not jobs and (run / "checkpoint.json").is_file():
            (job,) = (tmp_path / "out" / launching.JOBS).glob("*_submitted.pkl")
            jobs.append(int(job.name.split("_")[0]))
            children = Path(f"/proc/{jobs[0]}/task/{jobs[0]}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGUSR2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("textrl_gym.experiments.compare.LiveTable", lambda *_: contextlib.nullcontext(preempt))
        stopped = last(compare("CopyText-v0", config, tmp_path / "out", progress_bar=False, launch=HERE))
    assert jobs
    log = "".join(file.read_text() for file in (tmp_path / "out" / launching.JOBS).glob("*_log.*"))
    assert "Requeued job" in log
    # As many workers as cores: a thread each, as a job has.
    alone = dataclasses.replace(config, workers=len(os.sched_getaffinity(0)))
    whole = last(compare("CopyText-v0", alone, tmp_path / "whole", progress_bar=False))
    assert_frame_equal(stopped, whole, check_exact=True)


@pytest.mark.slow
def test_a_job_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_agents.py").write_text(
        "from textrl_gym.agents import REINFORCE\n\n\nclass Broken(REINFORCE):\n"
        "    def update(self, rollout):\n        raise ValueError('no update')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = CompareConfig(agents=("broken_agents:Broken",), seeds=1, total_timesteps=100, eval_episodes=8)
    with pytest.warns(UserWarning, match="1 of 1 runs failed: broken_agents.Broken-0: ValueError: no update"):
        compare("CopyText-v0", config, tmp_path / "out", progress_bar=False, launch=HERE)


RUN = """
import signal, sys, time
def stop(*_):
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
print("ready", flush=True)
time.sleep({seconds})
"""


def a_run(seconds: float) -> Any:
    """What starts a run that does nothing for a while, and ends by Ctrl-C as runs do."""

    def start(folder: Path, how: launching.RunProcesses) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", RUN.format(seconds=seconds)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        return process

    return start


def test_a_job_saves_before_it_goes_back_into_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit calls `checkpoint` in the handler of a signal, while the job waits for its run."""
    monkeypatch.setattr(launching, "start", a_run(60))
    how = launching.RunProcesses(2)
    job, again = launching.Job(tmp_path, how), []
    before = signal.signal(signal.SIGALRM, lambda *_: again.append(job.checkpoint()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        assert job() == launching.STOPPED
    finally:
        signal.signal(signal.SIGALRM, before)
    (next_job,) = again
    assert isinstance(next_job.function, launching.Job)
    assert (next_job.function.folder, next_job.function.how, next_job.function.process) == (tmp_path, how, None)
    assert not (tmp_path / ERROR).exists()


def test_ctrl_c_of_a_job_reaches_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "start", a_run(60))
    before = signal.getsignal(signal.SIGINT)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert launching.Job(tmp_path, launching.RunProcesses(1))() == launching.STOPPED
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("state", "words"), [("NODE_FAIL", "job 7 ended as NODE_FAIL; see jobs/7.err\n"), ("CANCELLED by 0", "")]
)
def test_a_job_that_dies_without_a_word_is_named(state: str, words: str, tmp_path: Path) -> None:
    job = SimpleNamespace(job_id="7", state=state, paths=SimpleNamespace(stderr=Path("jobs/7.err")))
    launching.note_job(tmp_path, job)  # type: ignore[arg-type]
    assert ((tmp_path / ERROR).read_text() if (tmp_path / ERROR).exists() else "") == words


SBATCH = """#!{python}
import pathlib, sys
pathlib.Path({folder!r}, "script").write_text(pathlib.Path(sys.argv[-1]).read_text())
print("Submitted batch job 41")
"""


def test_slurm_is_asked_for_an_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What sbatch is given, by an sbatch that writes it down."""
    for name, text in (("sbatch", SBATCH), ("srun", "#!{python}\n"), ("scancel", "#!{python}\n")):
        file = tmp_path / name
        file.write_text(text.format(python=sys.executable, folder=str(tmp_path)))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "sacct").write_text("#!/bin/sh\necho 'JobID|State'\necho '41_0|FAILED'\necho '41_1|FAILED'\n")
    (tmp_path / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    # submitit asks sacct after a while only.
    monkeypatch.setattr(submitit.SlurmJob, "done", lambda self, force_check=False: True)
    config = LaunchConfig(
        launcher="submitit", partition="gpu", gpus_per_run=1, cpus_per_run=4, memory_gb=16, timeout_hours=1.5,
        requeues=2, slurm=("slurm_account=me",),
    )  # fmt: skip
    folders = {name: tmp_path / "runs" / name for name in ("a-0", "a-1")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    launching.run_jobs(folders, config, tmp_path / "jobs", 8, lambda _: None)
    script = (tmp_path / "script").read_text()
    for line in (
        "--array=0-1%2", "--partition=gpu", "--gpus-per-node=1", "--cpus-per-task=4", "--mem=16GB", "--time=90",
        "--account=me", "--signal=USR2@90",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script, script
    ends = {name: error.partition(";")[0] for name, error in launching.errors(folders).items()}
    assert ends == {"a-0": "job 41_0 ended as FAILED", "a-1": "job 41_1 ended as FAILED"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--partition", "gpu"],
            "settings of a cluster (partition, gpus_per_run and so on) need the launcher submitit",
        ),
        (["--launcher", "submitit"], "cluster='slurm': "),
        (["--shard"], "shard: a run of one process has nobody to share with; give processes_per_run too"),
        (["--processes-per-run", "0"], "processes_per_run"),
        (
            ["--launcher", "submitit", "--gpus-per-run", "2", "--processes-per-run", "4"],
            "gpus_per_run=2: 4 processes of a run need a GPU each",
        ),
        (
            ["--processes-per-run", "2", "--agents", "reinforce", "sb3_ppo"],
            "processes_per_run=2: sb3_ppo trains in one process; compare it without",
        ),
        (["--processes-per-run", "2", "--shard", "--agents", "nlpo"], "shard: nlpo cannot be sharded; compare it"),
        (["--launcher", "submitit", "--cluster", "local", "--slurm", "account"], "slurm: 'account' is not name=value"),
        (["--launcher", "submitit", "--cluster", "local", "--slurm", "colour=1"], "slurm: "),
    ],
)
def test_wrong_settings_are_said(
    flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no srun, wherever the tests run
    assert main(["compare", "CopyText-v0", "--agents", "reinforce", "--out", str(tmp_path / "out"), *flags]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_without_submitit_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match="needs the package submitit"):
        launching.executor(HERE, tmp_path, 1)


@pytest.mark.slow
def test_ctrl_c_cancels_the_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs end with the launcher, and the same comparison goes on."""
    config = CompareConfig(agents=("reinforce",), seeds=1, total_timesteps=100_000, eval_episodes=8)

    def interrupt(going: set[str]) -> None:
        if going and (tmp_path / "out" / "runs" / "reinforce-0" / "log.txt").is_file():
            raise KeyboardInterrupt

    monkeypatch.setattr("textrl_gym.experiments.compare.LiveTable", lambda *_: contextlib.nullcontext(interrupt))
    with pytest.raises(KeyboardInterrupt):
        compare("CopyText-v0", config, tmp_path / "out", progress_bar=False, launch=HERE)
    deadline = time.monotonic() + 60
    lock = tmp_path / "out" / "runs" / "reinforce-0"
    while _worker_of(lock) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _worker_of(lock) and not (lock / ERROR).exists()


def _worker_of(folder: Path) -> bool:
    """Whether a process works in a run's folder."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in file.read_bytes() and b"experiments.worker" in file.read_bytes():
                return True
        except OSError:
            continue
    return False


# -- runs of several processes ----------------------------------------------------------------------------------------


def test_a_run_has_a_block_of_gpus() -> None:
    assert launching.gpus_of_slots(["2", "5", "6", "7"], 3, 2) == ["2,5", "6,7", "2,5"]
    assert launching.gpus_of_slots(["0", "1"], 3, 1) == ["0", "1", "0"]
    with pytest.raises(ValueError, match="processes_per_run=4: a GPU for each process, and this machine has 2"):
        launching.gpus_of_slots(["0", "1"], 1, 4)


@pytest.mark.parametrize(
    ("variable", "names"), [(None, ["0", "1"]), ("3, 1", ["3", "1"]), ("GPU-a,GPU-b,-1", ["GPU-a", "GPU-b"])]
)
def test_gpus_are_named_as_the_user_has_chosen_them(
    variable: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert launching.visible_gpus() == names


def test_fewer_gpus_than_processes_are_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "visible_gpus", lambda: ["0"])
    with pytest.raises(ValueError, match="processes_per_run=2: a GPU for each process, and this machine has 1"):
        compare("CopyText-v0", CONFIG, tmp_path / "out", launch=LaunchConfig(processes_per_run=2))
    assert not (tmp_path / "out").exists()


def test_processes_of_a_run_share_its_cores() -> None:
    how = launching.RunProcesses.of(LaunchConfig(processes_per_run=2, shard=True), 5, trust_code=True)
    assert (how.threads, how.environment()["OMP_NUM_THREADS"]) == (2, "2")
    assert how.command("FOLDER")[-5:] == ["FOLDER", "--processes", "2", "--shard", "--trust-code"]
    assert launching.RunProcesses.of(LaunchConfig(processes_per_run=4), 2, trust_code=False).threads == 1
    assert launching.RunProcesses().command("FOLDER")[-1] == "FOLDER"


TOGETHER = LaunchConfig(processes_per_run=2)


def learns(agents: tuple[str, ...] = ("grpo",), **settings: Any) -> CompareConfig:
    """A comparison of agents with few rows."""
    rows = tuple(f"{agent}.rollout_episodes=16" for agent in agents)
    small: dict[str, Any] = {"seeds": 1, "total_timesteps": 120, "eval_episodes": 8, "save_every": 1, "workers": 1}
    return CompareConfig(agents=agents, set=rows, **(small | settings))


@pytest.mark.slow
def test_a_run_of_two_processes_gives_the_numbers_of_one(tmp_path: Path) -> None:
    config = learns()
    together, alone = (
        last(compare("CopyText-v0", config, tmp_path / name, progress_bar=False, launch=launch))
        for name, launch in (("two", TOGETHER), ("one", None))
    )
    assert_frame_equal(together, alone, rtol=1e-4, atol=1e-6)
    machine = json.loads((tmp_path / "two" / "runs" / "grpo-0" / "machine.json").read_text())
    assert machine["processes"] == 2
    rows = [json.loads((tmp_path / name / "runs" / "grpo-0" / "flops.json").read_text()) for name in ("one", "two")]
    assert rows[0]["tokens"] == rows[1]["tokens"] and rows[1]["flop"] == pytest.approx(rows[0]["flop"], rel=0.1)


@pytest.mark.slow
def test_sharded_runs_and_saved_agents_by_two_processes(tmp_path: Path) -> None:
    config = learns(("ppo", "reference"))
    sharded = dataclasses.replace(TOGETHER, shard=True)
    together, alone = (
        last(compare("CopyText-v0", config, tmp_path / name, progress_bar=False, launch=launch))
        for name, launch in (("two", sharded), ("one", None))
    )
    assert list(together["run"]) == list(alone["run"]) and len(alone) == 2
    assert_frame_equal(together, alone, rtol=1e-4, atol=1e-6)
    saved = CompareConfig(agents=(str(tmp_path / "one" / "runs" / "ppo-0"),), eval_episodes=8)
    again = last(compare("CopyText-v0", saved, tmp_path / "saved", progress_bar=False, launch=TOGETHER))
    assert again["score"][0] == pytest.approx(float(alone.loc[alone["agent"] == "ppo", "score"].iloc[0]))


def ranks_of(worker: int) -> list[int]:
    """The processes that a run's own has started; the resource tracker of multiprocessing is none."""
    children = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@contextlib.contextmanager
def long_run(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A run by two processes after its first update; its own process, and its folder."""
    config = learns(total_timesteps=20_000)
    (folder,) = prepare(tmp_path / "out", "CopyText-v0", config).values()
    process = launching.start(folder, launching.RunProcesses.of(TOGETHER, 2, trust_code=False))
    try:
        deadline = time.monotonic() + 240
        log = folder / "progress.json"
        while not (log.is_file() and log.read_text()) and time.monotonic() < deadline:
            assert process.poll() is None, (folder / LOG).read_text()
            time.sleep(0.05)
        yield process, folder
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_ctrl_c_of_a_run_of_two_processes_saves(tmp_path: Path) -> None:
    with long_run(tmp_path) as (process, folder):
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == launching.STOPPED
    launching.note_death(folder, process.returncode)
    assert not (folder / ERROR).exists()
    updates = json.loads((folder / "agent.json").read_text())["num_updates"]
    assert updates >= 1 and len((folder / "progress.json").read_text().splitlines()) == updates


@pytest.mark.slow
def test_a_stopped_run_of_two_processes_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    config = learns(total_timesteps=600)
    whole = last(compare("CopyText-v0", config, tmp_path / "whole", progress_bar=False))
    (folder,) = prepare(tmp_path / "out", "CopyText-v0", config).values()
    process, log = launching.start(folder, launching.RunProcesses(1, 2)), folder / "progress.json"
    deadline = time.monotonic() + 240
    while not (log.is_file() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == launching.STOPPED and not (folder / "evaluation.json").exists()
    again = last(compare("CopyText-v0", config, tmp_path / "out", progress_bar=False, launch=TOGETHER))
    assert_frame_equal(again, whole, rtol=1e-4, atol=1e-6)
    assert (folder / "progress_1.json").is_file()  # it went on, and did not begin anew


@pytest.mark.slow
def test_a_killed_process_ends_its_run_and_is_named(tmp_path: Path) -> None:
    with long_run(tmp_path) as (process, folder):
        ranks = ranks_of(process.pid)
        os.kill(ranks[1], signal.SIGKILL)
        assert process.wait(120) == 1
    launching.note_death(folder, process.returncode)
    assert (folder / ERROR).read_text() == "RuntimeError: process 1 terminated with signal SIGKILL\n"
    assert len(ranks) == 2 and not any(Path(f"/proc/{rank}").exists() for rank in ranks)


@pytest.mark.slow
def test_the_processes_of_a_run_end_with_their_starter(tmp_path: Path) -> None:
    with long_run(tmp_path) as (process, _):
        ranks = ranks_of(process.pid)
        process.kill()
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(ranks) == 2 and not any(Path(f"/proc/{rank}").exists() for rank in ranks)


@pytest.mark.slow
def test_the_process_that_fails_first_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_agents.py").write_text(
        "from textrl_gym import processes\nfrom textrl_gym.agents import REINFORCE\n\n\nclass Broken(REINFORCE):\n"
        "    def update(self, rollout):\n        if processes.rank() == 1:\n            raise ValueError('no update')\n"
        "        return super().update(rollout)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = learns(("broken_agents:Broken",))
    with pytest.warns(UserWarning, match="1 of 1 runs failed: .*: ValueError: no update .process 1 of 2"):
        compare("CopyText-v0", config, tmp_path / "out", progress_bar=False, launch=TOGETHER)
    assert "no update" in (tmp_path / "out" / "runs" / "broken_agents.Broken-0" / LOG).read_text()


# -- runs that are forked ---------------------------------------------------------------------------------------------


FORKER = """
import os, signal, sys, time
from pathlib import Path
from textrl_gym.experiments import worker

def run(folder, count, shard):
    print("run", os.environ.get("OMP_NUM_THREADS"), flush=True)
    if folder.name == "fails":
        raise ValueError("no such run")
    if folder.name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if folder.name == "waits":
        worker._end_with_parent()
        (folder / "new").write_text(str(os.getpid()))
        (folder / "new").rename(folder / "pid")
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            return 130
    return 0

worker.main, worker.import_all = run, lambda: None
sys.exit(worker.fork_runs())
"""


@pytest.fixture
def forks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[launching.Forks]:
    """A forker whose runs do what the names of their folders say."""
    monkeypatch.setattr(launching.RunProcesses, "command", lambda *_: [sys.executable, "-c", FORKER])
    for name in ("ends", "fails", "killed", "waits"):
        (tmp_path / name).mkdir()
    forks = launching.Forks(launching.RunProcesses(3))
    yield forks
    forks.process.kill()
    forks.close()


def test_forked_runs_end_with_their_own_exit_codes(forks: launching.Forks, tmp_path: Path) -> None:
    ends = {name: forks.start(tmp_path / name) for name in ("ends", "fails", "killed")}
    assert {name: run.wait() for name, run in ends.items()} == {"ends": 0, "fails": 1, "killed": -signal.SIGKILL}
    assert (tmp_path / "ends" / LOG).read_text() == "run 3\n"
    for name in ends:
        launching.note_death(tmp_path / name, ends[name].wait())
    assert launching.errors({name: tmp_path / name for name in ends}) == {
        "fails": "ValueError: no such run",
        "killed": f"the process ended with exit code -9; see {LOG}",
    }
    # The same run again, after one that failed.
    assert forks.start(tmp_path / "ends").wait() == 0


def _waits(forks: launching.Forks, folder: Path) -> tuple[launching.Fork, int]:
    run, deadline = forks.start(folder), time.monotonic() + 120
    while not (folder / "pid").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    return run, int((folder / "pid").read_text())


def test_ctrl_c_is_for_the_forked_runs_and_not_for_their_forker(forks: launching.Forks, tmp_path: Path) -> None:
    run, process = _waits(forks, tmp_path / "waits")
    for one in (forks.process.pid, process):  # as a terminal sends it to all
        os.kill(one, signal.SIGINT)
    assert run.wait() == launching.STOPPED
    assert forks.start(tmp_path / "ends").wait() == 0


def test_forked_runs_end_with_their_forker(forks: launching.Forks, tmp_path: Path) -> None:
    run, process = _waits(forks, tmp_path / "waits")
    forks.process.kill()
    assert run.wait() == -signal.SIGKILL
    late = tmp_path / "late"
    late.mkdir()
    assert forks.start(late).wait() == -signal.SIGKILL  # nothing starts any more, and that is an error
    launching.note_death(late, -signal.SIGKILL)
    assert "the process ended with exit code -9" in (late / ERROR).read_text()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{process}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{process}").exists()
