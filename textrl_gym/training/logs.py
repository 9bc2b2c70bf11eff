"""What a run logs: numbers of each update and of each evaluation, to JSON lines, TensorBoard and an experiment tracker.

Numbers go through Stable-Baselines3's Logger and its writers; a tracker (Weights & Biases, trackio, MLflow) is one more
writer. Keys: `rollout/` of the episodes collected, `reward/` and `reward_std/` of a mixed reward's parts, `train/` of
the update, `eval/` of an evaluation, `seconds/` of the phases of one update, `time/` of the run so far. docs/logs.md
says what each is, and what TRL calls it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat

from textrl_gym import files
from textrl_gym.core import Rollout, StopReason
from textrl_gym.evaluation.evaluator import mean_components
from textrl_gym.evaluation.health import share_without_spread
from textrl_gym.evaluation.metrics import COUNTERS
from textrl_gym.rollouts.phases import Phase
from textrl_gym.training.config import Tracker, require_tracker

PROJECT = "textrl-gym"
"""Under which a tracker has the runs, unless its own environment variable names another."""
ID_FILE = "tracker.json"
TIMESTEPS = "time/total_timesteps"


# -- numbers ----------------------------------------------------------------------------------------------------------


def rollout_metrics(rollout: Rollout, sampled: bool = True, importance_cap: float | None = None) -> dict[str, float]:
    """What a rollout says of the policy that played it. Raw score and shaped return are both there.

    Of a reward that is a mixture reward/NAME and reward_std/NAME are mean and spread of each part's unweighted scores.

    Args:
        sampled: whether the policy has sampled the tokens, so that -log pi of them estimates its entropy.
        importance_cap: of the weights of tokens that a server has sampled.
    """
    kl_B = ((rollout.logp_BT - rollout.ref_logp_BT) * rollout.mask_BT).sum(1)
    length_B = rollout.mask_BT.sum(1)
    logprob = float(rollout.logp_BT.sum()) / max(rollout.num_tokens, 1)
    cut_B = (rollout.stop_B == StopReason.LENGTH) | (rollout.stop_B == StopReason.MAX_TURNS)
    metrics = {
        "rollout/score": float(rollout.score_B.mean()),
        "rollout/score_std": float(rollout.score_B.std()) if len(rollout) > 1 else 0.0,
        "rollout/return": float(rollout.reward_BT.sum(1).mean()),
        "rollout/kl_sequence": float(kl_B.mean()),
        "rollout/kl_token": float(kl_B.sum()) / max(rollout.num_tokens, 1),
        "rollout/completion_tokens": rollout.num_tokens / len(rollout),
        "rollout/completion_tokens_max": float(length_B.max()),
        "rollout/eos_share": float((rollout.stop_B == StopReason.EOS).float().mean()),
        "rollout/ended_share": float(1 - cut_B.float().mean()),
        "rollout/logprob_token": logprob,
    }
    if sampled:
        metrics["rollout/entropy_token"] = -logprob
    if rollout.turn_BT is not None and rollout.turn_reward_BT is not None:
        metrics["rollout/turns"] = float(((rollout.turn_BT * rollout.mask_BT).amax(1) + 1).float().mean())
        metrics["rollout/turn_rewards"] = float(rollout.turn_reward_BT.sum(1).mean())
    if rollout.sampler_logp_BT is not None:
        log_ratio_N = (rollout.logp_BT - rollout.sampler_logp_BT)[rollout.mask_BT]
        metrics["rollout/mismatch_mean"] = float(log_ratio_N.abs().mean())
        metrics["rollout/mismatch_max"] = float(log_ratio_N.abs().max())
        if importance_cap is not None:
            metrics["rollout/importance_clipped"] = float((log_ratio_N > math.log(importance_cap)).float().mean())
    flat = share_without_spread(rollout.outcome_B, rollout.group_B)
    if flat is not None:
        metrics["rollout/flat_groups"] = flat
    for name, part_B in rollout.components.items():
        known_b = part_B[~part_B.isnan()]  # of the completions that the part applies to
        if len(known_b):
            metrics[f"reward_std/{name}"] = float(known_b.std()) if len(known_b) > 1 else 0.0
    return metrics | mean_components([rollout])


class PhaseSeconds:
    """Seconds of each phase since they were last taken; a listener of rollouts.phases.

    On a GPU these are the host's: a phase may be charged with what the one before has started.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        """The seconds by phase; then they count from 0 again."""
        taken, self._seconds = self._seconds, {}
        return taken


def speed_metrics(seconds: Mapping[str, float], tokens: int) -> dict[str, float]:
    """Seconds of each phase of one update, and the tokens a second of collecting and learning together.

    Args:
        tokens: generated for the update.
    """
    of_phases = {f"seconds/{name}": spent for name, spent in seconds.items() if name != "evaluate"}
    busy = seconds.get("collect", 0.0) + seconds.get("update", 0.0)
    return of_phases | ({"time/tokens_per_second": tokens / busy} if busy > 0 else {})


def log_evaluation(logger: Logger, row: Mapping[str, Any]) -> None:
    """Write an evaluation's numbers as eval/NAME, at its timesteps, to TensorBoard and the tracker.

    JSON lines have their own file of evaluations; a row in that of updates would be none of an update.
    """
    numbers = {f"eval/{name}": float(value) for name, value in row.items() if name not in COUNTERS}
    for writer in logger.output_formats:
        if isinstance(writer, TensorBoardOutputFormat | TrackerWriter):
            # Stable-Baselines3 asks of each number which writers leave it out: none.
            writer.write(numbers, dict.fromkeys(numbers, ()), row["timesteps"])


# -- experiment trackers ----------------------------------------------------------------------------------------------


class TrackerWriter(KVWriter):
    """A writer of Stable-Baselines3's Logger that hands all numbers to an experiment tracker.

    Args:
        log: called with numbers and timesteps.
        end: called once, when the run is over.
    """

    def __init__(self, log: Callable[[dict[str, float], int], object], end: Callable[[], object]) -> None:
        self._log, self._end = log, end

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Hand over what is a number."""
        numbers = {name: float(value) for name, value in key_values.items() if isinstance(value, Real)}
        self._log(numbers, step)

    def close(self) -> None:
        """End the tracker's run."""
        self._end()


def open_tracker(name: Tracker, folder: Path, settings: Mapping[str, Any], goes_on: bool) -> TrackerWriter:
    """Begin a run in a tracker, or go on with the one of this folder.

    Args:
        name: which; not "none".
        folder: of the run, whose name the tracker's run gets.
        settings: what it was trained with.
        goes_on: whether the folder's run is gone on with.
    """
    require_tracker(name)
    file = folder / ID_FILE
    known = files.read_json(file) if goes_on and file.is_file() else {}
    library: Any = importlib.import_module(name)
    run_name = folder.resolve().name
    if name == "mlflow":
        run_id, writer = _open_mlflow(library, run_name, settings, known.get(name))
    elif name == "trackio":
        run_id = run_name  # trackio knows runs by their names
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        run = library.init(project=project, name=run_name, config=dict(settings), resume="allow" if known else "never")
        writer = TrackerWriter(lambda numbers, step: run.log(numbers, step=step), run.finish)
    else:
        run_id = known.get(name) or uuid.uuid4().hex
        run = library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=dict(settings),
        )
        # By a metric and not by W&B's own steps, which only rise: a run that goes on logs some updates again.
        run.define_metric("*", step_metric=TIMESTEPS)
        writer = TrackerWriter(lambda numbers, step: run.log({**numbers, TIMESTEPS: step}), run.finish)
    files.write_text(file, json.dumps({name: run_id}) + "\n")
    return writer


def _open_mlflow(
    mlflow: Any, run_name: str, settings: Mapping[str, Any], run_id: str | None
) -> tuple[str, TrackerWriter]:
    # A client and not mlflow.start_run(), whose run is one for the whole process.
    client = mlflow.MlflowClient()
    if run_id is None:
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(project)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(project)
        run_id = client.create_run(experiment_id, run_name=run_name).info.run_id
        for key, value in settings.items():
            client.log_param(run_id, key, value)
    assert run_id is not None
    own_id: str = run_id

    def log(numbers: dict[str, float], step: int) -> None:
        now = int(1000 * time.time())
        client.log_batch(own_id, metrics=[mlflow.entities.Metric(k, v, now, step) for k, v in numbers.items()])

    return own_id, TrackerWriter(log, lambda: client.set_terminated(own_id))
