"""How the runs of a comparison are started: as processes of this machine, or as jobs of a cluster by submitit.

Either way a run is `python -m textrl_gym.experiments.worker FOLDER`, its state is its folder, and what is finished is
never run again. Several processes may train a run together, a GPU each (docs/distributed.md): the worker starts them.
On a cluster every node must see the comparison's folder and the same Python.

submitit (https://github.com/facebookincubator/submitit) makes a Slurm array of the runs. A job that is preempted, or
whose time is up, saves its run and is put into the queue again by submitit; the run goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

from textrl_gym import files
from textrl_gym.bounds import check_settings
from textrl_gym.experiments.results import ERROR, LOG, RESULT

if TYPE_CHECKING:
    import submitit

JOBS = "jobs"
"""What submitit writes, in the comparison's folder: scripts, logs and pickles of its own."""
FORK = "--fork"
"""In place of a run's folder: the worker reads folders from its input, and forks a run for each."""
STOPPED = 130
"""Exit code of a run that was stopped and has saved: it is unfinished and has not failed."""
POLL_SECONDS = 0.2
"""Several processes cannot be waited for at once by a portable call; runs take minutes."""
SUBMITIT = "the launcher submitit needs the package submitit: pip install submitit"

Show = Callable[[set[str]], None]
"""Is told again and again which runs are going on."""


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Where runs are started."""

    launcher: Literal["local", "submitit"] = "local"
    """local: processes of this machine, as many at a time as workers says; submitit: jobs of a cluster, which decides
    where workers is 0."""
    cluster: Literal["slurm", "local"] = "slurm"
    """Of submitit; local tries it on this machine."""
    partition: str | None = None
    """Slurm's partition; None: the cluster's default."""
    processes_per_run: Annotated[int, Ge(1)] = 1
    """Processes that train a run together, on a GPU each where there are GPUs. Their numbers are those of one process
    but for rounding; see docs/distributed.md."""
    shard: bool = False
    """Of several processes of a run: each holds a part of what is trained, as with train --shard."""
    gpus_per_run: Annotated[int, Ge(0)] = 0
    """GPUs of a job. Each process of its run uses one."""
    cpus_per_run: Annotated[int, Ge(1)] = 1
    """Cores of a job, which are also a run's threads; its processes share them evenly."""
    memory_gb: Annotated[float | None, Gt(0)] = None
    """Memory of a job; None: the cluster's default."""
    timeout_hours: Annotated[float, Gt(0)] = 4.0
    """The time limit of a job, after which its run goes on in a new one."""
    requeues: Annotated[int, Ge(0)] = 10
    """Times that a run may be put into the queue again because its time was up."""
    slurm: tuple[str, ...] = ()
    """Other parameters of submitit's executor as name=value: slurm_account=me."""

    def __post_init__(self) -> None:
        check_settings(self)
        of_a_cluster = [field for field in dataclasses.fields(self) if field.name not in ("processes_per_run", "shard")]
        changed = any(getattr(self, field.name) != field.default for field in of_a_cluster)
        if self.launcher == "local" and changed:
            raise ValueError("settings of a cluster (partition, gpus_per_run and so on) need the launcher submitit")
        if self.shard and self.processes_per_run == 1:
            raise ValueError("shard: a run of one process has nobody to share with; give processes_per_run too")
        if 0 < self.gpus_per_run < self.processes_per_run:
            raise ValueError(
                f"gpus_per_run={self.gpus_per_run}: {self.processes_per_run} processes of a run need a GPU each"
            )
        for text in self.slurm:
            if not all(text.partition("=")):
                raise ValueError(f"slurm: {text!r} is not name=value")


@dataclasses.dataclass(frozen=True)
class RunProcesses:
    """How the processes of a run are started."""

    threads: int | None = None
    """Of each process, which decide the order of its float sums; None: as many as it takes."""
    count: int = 1
    shard: bool = False
    trust_code: bool = False

    def command(self, what: str) -> list[str]:
        """The command line of a run's folder, or of launching.FORK."""
        line = [sys.executable, "-W", "ignore", "-m", "textrl_gym.experiments.worker", what]
        line += ["--processes", str(self.count)] if self.count > 1 else []
        line += ["--shard"] if self.shard else []
        return line + (["--trust-code"] if self.trust_code else [])

    def environment(self) -> dict[str, str]:
        """The environment variables."""
        # Passive waiting: threads that spin slow down severely beside other busy processes (docs/performance.md).
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        # An agent named module:Class may lie in the working directory, which `python -m` would not look into.
        environment["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
        return environment

    @classmethod
    def of(cls, launch: LaunchConfig, cores: int, trust_code: bool) -> RunProcesses:
        """Of a run that has so many cores."""
        count = launch.processes_per_run
        return cls(max(1, cores // count), count, launch.shard, trust_code)


def waiting(folders: Mapping[str, Path]) -> list[str]:
    """The runs that are not finished; the errors of earlier tries are forgotten."""
    # The results' files are the state: nothing else has to be kept in step with them.
    names = [name for name, folder in folders.items() if not (folder / RESULT).is_file()]
    for name in names:
        (folders[name] / ERROR).unlink(missing_ok=True)
    return names


def errors(folders: Mapping[str, Path]) -> dict[str, str]:
    """Name -> error of each run that failed."""
    noted = {name: folder / ERROR for name, folder in folders.items()}
    return {name: file.read_text(encoding="utf-8").strip() for name, file in noted.items() if file.is_file()}


# -- this machine -----------------------------------------------------------------------------------------------------


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    # A number of torch's counts those that are visible, and is no name of a GPU where some are hidden.
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    count = torch.cuda.device_count()
    return names[:count] if names else [str(number) for number in range(count)]


def gpus_of_slots(gpus: Sequence[str], workers: int, each: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each of the runs that go on at a time: blocks of GPUs, in turn.

    Raises:
        ValueError: there are fewer GPUs than processes of a run.
    """
    if len(gpus) < each:
        raise ValueError(f"processes_per_run={each}: a GPU for each process, and this machine has {len(gpus)}")
    blocks = len(gpus) // each
    return [",".join(gpus[each * (slot % blocks) :][:each]) for slot in range(workers)]


def run_local(
    folders: Mapping[str, Path], workers: int, launch: LaunchConfig, gpus: Sequence[str], show: Show, trust_code: bool
) -> None:
    """Run what is not done, so many at a time.

    Ctrl-C reaches the runs too: each finishes its update, saves and ends, and then it is raised here.

    Args:
        gpus: that runs may use, as CUDA_VISIBLE_DEVICES names them.
    """
    names = waiting(folders)
    slots: dict[int, tuple[str, subprocess.Popen[bytes] | Fork]] = {}
    # The cores that this process may use, and not all of the machine's: containers and taskset give fewer.
    how = RunProcesses.of(launch, len(os.sched_getaffinity(0)) // workers, trust_code)
    devices = gpus_of_slots(gpus, workers, launch.processes_per_run) if gpus else []
    # CUDA does not work in a process that was forked after a library has asked for devices, and other systems'
    # libraries start threads on import. A single run gains nothing.
    forks = Forks(how) if sys.platform == "linux" and not gpus and len(names) > 1 else None
    try:
        while names or slots:
            for slot in range(workers):
                if slot in slots and slots[slot][1].poll() is not None:
                    name, process = slots.pop(slot)
                    note_death(folders[name], process.wait())
                if slot not in slots and names:
                    name = names.pop(0)
                    visible = devices[slot] if devices else None
                    slots[slot] = (name, forks.start(folders[name]) if forks else start(folders[name], how, visible))
            show({name for name, _ in slots.values()})
            time.sleep(POLL_SECONDS)
    except BaseException:
        for _, process in slots.values():
            # Ctrl-C went to the whole process group: each run is saving its checkpoint now.
            process.wait()
        raise
    finally:
        if forks:
            forks.close()
    show(set())


def start(folder: Path, how: RunProcesses, gpus: str | None = None) -> subprocess.Popen[bytes]:
    """The process of a run, which starts the others where it has several.

    Args:
        gpus: those that it may use, as CUDA_VISIBLE_DEVICES names them; None: those of this process.
    """
    environment = how.environment()
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpus
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(how.command(str(folder)), stdout=log, stderr=log, env=environment)


class Forks:
    """Starts runs as forks of one process, so that torch and transformers are imported once and not by each run.

    That is five seconds of CPU less for each of many short runs.
    """

    def __init__(self, how: RunProcesses) -> None:
        line, pipe = how.command(FORK), subprocess.PIPE
        self.process = subprocess.Popen(line, stdin=pipe, stdout=pipe, env=how.environment())
        self.codes: dict[str, int] = {}
        """Folder of a run -> its exit code."""
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            folder, code = json.loads(line)
            self.codes[folder] = code

    def start(self, folder: Path) -> Fork:
        """The process of a run."""
        assert self.process.stdin is not None
        path = str(folder.resolve())
        self.codes.pop(path, None)
        (folder / LOG).touch()  # which is read for an error, also where no run could be forked
        with contextlib.suppress(BrokenPipeError):  # its process has died, which is the run's exit code then
            self.process.stdin.write(json.dumps(path).encode() + b"\n")
            self.process.stdin.flush()
        return Fork(self, path)

    def close(self) -> None:
        """Wait for what is still running, and end the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.listener.join()
        self.process.stdout.close()


@dataclasses.dataclass(frozen=True)
class Fork:
    """The process of a run that was forked."""

    forks: Forks
    path: str

    def poll(self) -> int | None:
        """The run's exit code; None: it goes on."""
        # Asked in this order: the last exit codes are read after the process that wrote them has ended.
        alive = self.forks.listener.is_alive()
        code = self.forks.codes.get(self.path)
        return self.forks.process.wait() if code is None and not alive else code

    def wait(self) -> int:
        """The run's exit code, when it has ended."""
        while (code := self.poll()) is None:
            time.sleep(POLL_SECONDS)
        return code


def note_death(folder: Path, code: int) -> None:
    """The error of a run that failed: the last line that it said, which is an exception's where there was one."""
    # Of several processes the one that failed has noted why itself: the others end by other errors after it.
    if code in (0, STOPPED) or (folder / ERROR).is_file():
        return
    log_lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = log_lines[-1] if code == 1 and log_lines else f"the process ended with exit code {code}; see {LOG}"
    files.write_text(folder / ERROR, last + "\n")


# -- a cluster --------------------------------------------------------------------------------------------------------


class Job:
    """A run as a job; submitit pickles it, and calls `checkpoint` before it puts the job into the queue again."""

    def __init__(self, folder: Path, how: RunProcesses) -> None:
        self.folder, self.how = folder, how
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped = False

    def __call__(self) -> int:
        """Run it; returns the exit code of its process."""
        # A process of its own: submitit's handlers of signals and those of a training would be in each other's way.
        self.process = start(self.folder, self.how)
        with self._stopping(signal.SIGINT):
            code = self.process.wait()
        # Stopped while it was still importing, a run has no handler yet and dies of the signal: no failure of its own.
        if not self.stopped:
            note_death(self.folder, code)
        return code

    @contextlib.contextmanager
    def _stopping(self, number: signal.Signals) -> Iterator[None]:
        """Inside, a signal to the job goes on to its run, which saves and ends."""
        before = signal.signal(number, lambda *_: self.stop())
        try:
            yield
        finally:
            signal.signal(number, before)

    def stop(self) -> None:
        """Let the run finish its update, save and end."""
        self.stopped = True
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGINT)

    def checkpoint(self) -> Any:
        """What is to be run when the job starts again: the same run, which has saved by then."""
        import submitit

        self.stop()
        if self.process is not None:
            # Not Popen.wait: this runs in a signal's handler, while `__call__` waits there and holds its lock.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Job(self.folder, self.how))


def executor(config: LaunchConfig, folder: Path, workers: int) -> submitit.AutoExecutor:
    """submitit's executor with a comparison's settings.

    Args:
        folder: where it writes.
        workers: jobs at a time; 0: as many as the cluster gives.

    Raises:
        ValueError: submitit is not installed, there is no Slurm here, or it does not know a parameter.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError(SUBMITIT) from None
    try:
        cluster = submitit.AutoExecutor(folder, cluster=config.cluster, slurm_max_num_timeout=config.requeues)
    except RuntimeError as error:  # no srun
        raise ValueError(f"cluster={config.cluster!r}: {error}; this machine must be able to submit jobs") from error
    # 256 is what submitit itself takes where nothing is said.
    settings: dict[str, Any] = {
        "timeout_min": max(1, round(60 * config.timeout_hours)),
        "cpus_per_task": config.cpus_per_run,
        "gpus_per_node": config.gpus_per_run,
        "name": "textrl-gym",
        "slurm_array_parallelism": workers or 256,
    }
    if config.memory_gb is not None:
        settings["mem_gb"] = config.memory_gb
    if config.partition is not None:
        settings["slurm_partition"] = config.partition
    for text in config.slurm:
        name, _, value = text.partition("=")
        settings[name] = int(value) if value.isdigit() else value
    try:
        cluster.update_parameters(**settings)
    except (NameError, ValueError) as error:  # submitit's for a parameter that it does not have
        raise ValueError(f"slurm: {error}") from error
    return cluster


def run_jobs(
    folders: Mapping[str, Path], config: LaunchConfig, jobs: Path, workers: int, show: Show, trust_code: bool = False
) -> None:
    """Run what is not done as jobs of a cluster, and wait for them.

    Ctrl-C cancels the jobs, whose runs save; the same comparison goes on. A launcher that is killed leaves its jobs to
    themselves: the next one waits for a run that is still going on, since a run's folder has a lock.
    """
    names = waiting(folders)
    if not names:
        return
    cluster = executor(config, jobs, workers)
    how = RunProcesses.of(config, config.cpus_per_run, trust_code)
    calls = {name: Job(folders[name].resolve(), how) for name in names}
    going: dict[str, submitit.Job[int]] = {}
    try:
        if config.cluster == "slurm":
            # One array for all: Slurm keeps to the number of jobs at a time.
            with cluster.batch():
                submitted = [cluster.submit(call) for call in calls.values()]
            going, names = dict(zip(calls, submitted, strict=True)), []
        while names or going:
            # submitit's local executor starts at once what it is given.
            while names and len(going) < (workers or 1):
                name = names.pop(0)
                going[name] = cluster.submit(calls[name])
            for name in [name for name, job in going.items() if job.done()]:
                note_job(folders[name], going.pop(name))
            show(set(going))
            time.sleep(POLL_SECONDS)
    except BaseException:
        for job in going.values():
            job.cancel()
        if config.cluster == "local":  # its jobs are children of this process, and Slurm's are not
            for job in going.values():
                job.wait()
        raise
    show(set())


def note_job(folder: Path, job: submitit.Job[int]) -> None:
    """The error of a job that ended without a finished run, and without an error of the run's own."""
    # A run that failed has said why itself, and more than the cluster knows.
    if (folder / RESULT).is_file() or (folder / ERROR).is_file():
        return
    # A job that was cancelled leaves its run unfinished, and has failed nowhere.
    if job.state.startswith("CANCELLED"):
        return
    files.write_text(folder / ERROR, f"job {job.job_id} ended as {job.state}; see {job.paths.stderr}\n")
