"""Supervised training in a folder: phases of updates, logged, saved as they go, and taken up where they were stopped.

run.json                how the run was started
progress*.json, events  a row for each update, as JSON lines and for TensorBoard
checkpoint/             where it stands: model, optimizer, place in the data; removed when the run has ended
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
import math
import random
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from rich.progress import Progress
from safetensors import SafetensorError
from torch import Tensor, nn

from textrl_gym import files, processes
from textrl_gym.mdp.env_settings import EnvSettings, by_flag
from textrl_gym.persistence import signals, update_log
from textrl_gym.persistence.optimizer_state import load_optimizer, optimizer_tensors, save_tensors, with_moments
from textrl_gym.persistence.save_schedule import SaveOptions, SaveSchedule, rescue
from textrl_gym.pipeline.optim import RunningMean, TunedModel, adamw, descend, progress_bar

CHECKPOINT = "checkpoint"
"""Folder of the newest checkpoint, in the run's folder; the one before it is inside."""
STATE_FILE = "training.json"
"""The JSON part of a checkpoint."""
TENSORS = "training.safetensors"
"""The optimizer's moments."""
MODEL = "model"
"""Folder of the model in a checkpoint."""
ConfigT = TypeVar("ConfigT")
Reader = Callable[[Path], dict[str, Any]]
"""Reads a record from its file."""


class Phase(abc.ABC):
    """Updates of one kind. A subclass gives the loss of an update, and says where its data stand."""

    name = "training"
    """In the progress bar; its first word begins the names of the log's numbers."""
    smoothing = 0.05
    """The weight of a new loss in the running mean."""
    tuned: TunedModel | None = None
    """The model by which it computes, where that may be sharded."""

    def __init__(self, steps: int, max_grad_norm: float = 1.0, weight_decay: float = 0.0) -> None:
        """steps: updates, at most."""
        self.steps, self.max_grad_norm, self.weight_decay = steps, max_grad_norm, weight_decay

    @abc.abstractmethod
    def losses(self, step: int) -> Iterable[Tensor]:
        """The parts of update `step`'s loss, which add up to it; none where there is nothing to learn from."""

    @abc.abstractmethod
    def learning_rate(self, step: int) -> float:
        """The learning rate of update `step`."""

    def ends(self, mean_loss: float) -> bool:
        """Whether it is over before its last step, by the running mean of the loss after an update."""
        return False

    def state(self) -> dict[str, Any]:
        """Where its data stand, as JSON can hold it."""
        return {}

    @abc.abstractmethod
    def go_to(self, step: int, state: Mapping[str, Any]) -> None:
        """Begin with update `step`, where `state()` was taken; it is empty before the first update."""

    def measured(self, steps: int, mean_loss: float) -> dict[str, float]:
        """What the run's record says of this phase."""
        return {}

    def heldout(self, updates: int) -> dict[str, float]:
        """Measurements on held-out data after so many updates of the phase, by their names in the log; none by then."""
        return {}


@dataclasses.dataclass
class Place:
    """Where a run stands."""

    phase: int = 0
    step: int = 0
    """Updates done in this phase."""
    updates: int = 0
    """Those of all phases."""
    mean_loss: float = math.nan
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of the phase, after its last update."""
    measured: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of the phases before."""


KINDS: files.Kinds = {
    "settings": (dict,),
    "phase": (int,),
    "step": (int,),
    "updates": (int,),
    "mean_loss": (*files.NUMBER, type(None)),
    "data": (dict,),
    "measured": (dict,),
}
"""What a checkpoint's JSON holds."""


class Trainer:
    """One run of supervised training in its folder, as a context. The caller holds the folder's lock.

    Args:
        folder: of the run.
        settings: what the run is known by, as JSON holds it; other ones do not go on with it.
        options: when it is saved.

    Raises:
        ValueError: the folder holds a checkpoint of other settings, or a damaged one.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], options: SaveOptions | None = None) -> None:
        self.folder, self.settings = folder, settings
        self.schedule = SaveSchedule(options or SaveOptions())
        self.place = Place()
        self.source: Path | None = None
        """The checkpoint that the run goes on from; None: it begins."""
        self._optimizer: torch.optim.Optimizer | None = None
        self._save_model: Callable[[Path], object] = lambda folder: None
        self._tuned: TunedModel | None = None
        self._stop = signals.Stop()
        self._saved_at = 0
        self._is_whole = True
        self._read()
        processes.wait()  # the first will soon write there

    def __enter__(self) -> Self:
        if self.source is None:
            update_log.clear(self.folder)
            remove_checkpoint(self.folder)
        else:
            update_log.cut(self.folder, self.place.updates)
        self.logger = update_log.new_logger(self.folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.logger.close()

    # -- the checkpoint -----------------------------------------------------------------------------------------------

    def _read(self) -> None:
        folder = self.folder / CHECKPOINT
        if not folder.is_dir():
            return
        source = files.whole_checkpoint(folder)
        if not files.checkpoint_parts(source):  # killed before the first was whole
            return
        file = source / STATE_FILE
        state = files.read_json(file)
        files.check_fields(state, file, KINDS)
        if state["updates"] == 0:  # nothing was trained: the folder is free
            return
        check_same_settings(self.folder, state["settings"], self.settings)
        mean_loss = math.nan if state["mean_loss"] is None else state["mean_loss"]
        fields = {name: state[name] for name in ("phase", "step", "updates", "data", "measured")}
        self.place, self.source = Place(**fields, mean_loss=mean_loss), source
        self._saved_at = self.place.updates

    def save(self) -> None:
        """Write a checkpoint; the one before it is kept."""
        optimizer = self._optimizer if self.place.step else None
        # Before the first process alone goes on to write: of what is sharded each process has a part.
        if self._tuned is not None:
            self._tuned.gather()
        moments = None if optimizer is None else optimizer_tensors(optimizer)
        files.write_folder(self.folder / CHECKPOINT, functools.partial(self._fill, moments), keep_previous=True)
        self._saved_at = self.place.updates
        self.schedule.saved()

    def _fill(self, moments: dict[str, Tensor] | None, folder: Path) -> None:
        self._save_model(folder)
        if moments is not None:
            save_tensors(folder / TENSORS, moments, {})
        state = dataclasses.asdict(self.place) | {"settings": self.settings}
        if math.isnan(self.place.mean_loss):  # JSON has no such number
            state["mean_loss"] = None
        (folder / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")

    def finish(self) -> None:
        """Remove the checkpoint: what it was for has been written."""
        remove_checkpoint(self.folder)

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self, model: nn.Module, phases: Sequence[Phase], save: Callable[[Path], object]) -> dict[str, float]:
        """Do what is left of the phases, and save a checkpoint at their end; what was measured of all of them.

        Args:
            save: writes the model, and what belongs to it, into a checkpoint's folder.

        Raises:
            NonFiniteError: the loss, the gradient norm or the weights are NaN or infinite.
            signals.Terminated: SIGTERM or SIGHUP came.
        """
        self._save_model = save
        if self.place.updates == 0:
            self.save()  # what cannot be saved is found out now, and not after hours
        try:
            with signals.hearing_signals() as stop, progress_bar() as bar:
                self._stop = stop
                for number, phase in enumerate(phases):
                    if number == self.place.phase:
                        self._train_phase(model, phase, stop, bar)
                if self._saved_at != self.place.updates:
                    self.save()  # before anything is measured
        except BaseException as error:
            self._rescue(error)
            raise
        return self.place.measured

    def _train_phase(self, model: nn.Module, phase: Phase, stop: signals.Stop, bar: Progress) -> None:
        place, tuned = self.place, phase.tuned
        trained, optimizer = self._begin(model, phase)
        phase.go_to(place.step, place.data)
        mean_loss = RunningMean(phase.smoothing, place.mean_loss)
        row = bar.add_task(phase.name, total=phase.steps, completed=place.step, note="")
        ended = place.step >= phase.steps
        while not ended:
            stop.check()
            losses = phase.losses(place.step)
            rate = phase.learning_rate(place.step)
            number = place.updates + 1
            loss, norm = descend(trained, optimizer, losses, rate, phase.max_grad_norm, number, self._stepping)
            place.step, place.updates = place.step + 1, place.updates + 1
            if loss is not None:
                place.mean_loss = mean_loss.update(loss)
            ended = phase.ends(place.mean_loss) or place.step >= phase.steps
            place.data = phase.state()
            self._is_whole = True
            if loss is not None:
                heldout = phase.heldout(place.step)
                self._log(phase, {"loss": loss, "gradient_norm": norm, "learning_rate": rate, **heldout})
            bar.update(row, completed=place.step, note=f"loss {place.mean_loss:.3f}")
            if processes.of_first(not ended and self.schedule.due(place.updates)):
                self.save()
        place.measured |= phase.measured(place.step, place.mean_loss)
        place.phase, place.step, place.mean_loss, place.data = place.phase + 1, 0, math.nan, {}
        self._optimizer = None
        if tuned is not None:
            tuned.gather()
            tuned.twin = None
        if self.schedule.due(place.updates):
            self.save()

    def _begin(self, model: nn.Module, phase: Phase) -> tuple[nn.Module, torch.optim.Optimizer]:
        """What a phase trains, and its optimizer, with the moments of the checkpoint that the run goes on from."""
        rate, decay = phase.learning_rate(0), phase.weight_decay
        optimizer: torch.optim.Optimizer = adamw(model, rate, decay)
        if self.place.step:
            assert self.source is not None
            try:
                load_optimizer(self.source / TENSORS, optimizer)
            except (SafetensorError, OSError, KeyError, ValueError, IndexError) as error:
                raise ValueError(f"the checkpoint in {str(self.source)!r} does not fit its model: {error}") from error
        trained = model if phase.tuned is None else phase.tuned.shard()
        if trained is not model:
            optimizer = with_moments(adamw(trained, rate, decay), optimizer)
        self._optimizer, self._tuned = optimizer, phase.tuned
        return trained, optimizer

    def _stepping(self) -> None:
        # From here to the end of the bookkeeping the weights are neither those before the update nor known as after it.
        self._is_whole = False

    def _log(self, phase: Phase, numbers: Mapping[str, float]) -> None:
        kind = phase.name.partition(" ")[0]
        for name, value in numbers.items():
            self.logger.record(f"{kind}/{name}", value)
        self.logger.record(update_log.UPDATES, self.place.updates)
        self.logger.dump(self.place.updates)

    def _rescue(self, error: BaseException) -> None:
        """Save the last whole update before the run ends by an error or a signal. Raises nothing."""
        updates = self.place.updates
        if updates == 0:
            return  # nothing was trained, and the folder stays free
        # Moments that are sharded are gathered by all processes, or by none: one that failed alone is not there.
        moments = [] if self._optimizer is None else self._optimizer.param_groups[0]["params"]
        whole = self._is_whole and (self._stop.together or not any(map(processes.is_sharded, moments)))
        words = rescue(error, self.folder, updates, self._saved_at, whole, self.save)
        if processes.is_first():
            print("\n" + words, file=sys.stderr)


def remove_checkpoint(folder: Path) -> None:
    """Remove the checkpoint of a run that has ended, or begins anew."""
    if processes.is_first():
        shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)


def restore_random(rng: random.Random, state: Sequence[Any]) -> None:
    """Set a generator to what its getstate() gave, after it was written as JSON, which has no tuples."""
    version, numbers, gauss = state
    rng.setstate((version, tuple(numbers), gauss))


# -- what a run is known by -------------------------------------------------------------------------------------------


def settings_of(env_id: str, env: EnvSettings, config: Any) -> dict[str, Any]:
    """The settings of a run, as JSON holds them: of the environment by the names of their flags."""
    of_env = by_flag(dataclasses.asdict(env))
    settings: dict[str, Any] = {"environment": env_id, **of_env, **dataclasses.asdict(config)}
    return json.loads(json.dumps(settings))


MAY_CHANGE = ("device", "micro_batch_tokens", "gradient_checkpointing", "shard")
"""Settings that say where and in what memory, and not what is trained: a run may go on with others."""


def check_same_settings(folder: Path, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Hold that what a folder holds was made with these settings.

    Raises:
        ValueError: naming the first that differs.
    """
    # Of the environment a version before this one may not have known all: they had their defaults.
    defaults = by_flag(dataclasses.asdict(EnvSettings()))
    for name, value in settings.items():
        if name not in MAY_CHANGE and before.get(name, defaults.get(name)) != value:
            raise ValueError(
                f"{str(folder)!r} holds a training with {name}={before.get(name)!r}, not {value!r}: go on with that, "
                "or name another --out"
            )


def finished_record(
    folder: Path, name: str, env_id: str, env: EnvSettings, config: Any, read: Reader = files.read_json
) -> dict[str, Any] | None:
    """The record of a training of these settings that has ended in a folder; None where none has ended.

    Args:
        name: of the record's file.

    Raises:
        ValueError: it was of other settings, naming the first that differs.
    """
    files.finish_folder(folder)
    file = folder / name
    if not file.is_file():
        return None
    record = read(file)
    files.check_fields(record, file, {"environment": (str,), "config": (dict,)}, {"env": (dict,)})
    # What a version before this one did not write had its default's value.
    before = settings_of("", EnvSettings(), type(config)()) | by_flag(record.get("env", {})) | record["config"]
    before = json.loads(json.dumps(before | {"environment": record["environment"]}))
    check_same_settings(folder, before, settings_of(env_id, env, config))
    remove_checkpoint(folder)  # of a run that was stopped between its last two steps
    return record


def write_run(folder: Path, command: str, settings: Mapping[str, Any], options: SaveOptions) -> None:
    """Write down how a run was started."""
    record = {"pipeline": command, "settings": dict(settings), "save": dataclasses.asdict(options)}
    files.write_text(folder / files.RUN_FILE, json.dumps(record, indent=1) + "\n")


def read_run(folder: Path, command: str, config: type[ConfigT]) -> tuple[str, EnvSettings, ConfigT, SaveOptions]:
    """How a run was started: the environment and its settings, those of the training, and when it is saved.

    Raises:
        ValueError: no such run was started in the folder, or its record is damaged.
    """
    file = folder / files.RUN_FILE
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} holds no run to go on with: it has no {files.RUN_FILE}")
    record = files.read_json(file)
    if record.get("pipeline") != command:
        raise ValueError(
            f"{str(folder)!r} holds another kind of run: its {files.RUN_FILE} is not of textrl-gym {command}"
        )
    files.check_fields(record, file, {"settings": (dict,), "save": (dict,)})
    settings = record["settings"]
    files.check_fields(settings, file, {"environment": (str,)})
    env = {name.removeprefix("env."): value for name, value in settings.items() if name.startswith("env.")}
    own = {name: value for name, value in settings.items() if name != "environment" and not name.startswith("env.")}
    try:
        of_env = EnvSettings(**_as_fields(env))
        return settings["environment"], of_env, config(**_as_fields(own)), SaveOptions(**record["save"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}") from error


def _as_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
