"""A run's folder: the one writer and the one reader of what training logs in it.

progress*.json          a row for each logged update (of a resumed run, one file for each call)
evaluations.jsonl       a row for each evaluation
samples.jsonl           its completions
alarms.jsonl            signs of reward hacking, as they were raised
agent.json, model/, ... the checkpoint (see textrl_gym.training.checkpoint)
best/                   the checkpoint of the best gold score, where a run may be stopped for reward hacking
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from textrl_gym import files
from textrl_gym.evaluation import reward_hacking
from textrl_gym.evaluation.reward_hacking import Alarm, Evaluation
from textrl_gym.persistence import update_log

EVALUATIONS = "evaluations.jsonl"
SAMPLES = "samples.jsonl"
ALARMS = "alarms.jsonl"
BEST = "best"
"""Folder of the checkpoint with the best gold score."""
RENAMED = {"judge": "gold", "judge_greedy": "gold_greedy", "forward_passes": "model_calls"}
"""Keys of version 0.1 -> what they are called now."""


def renamed(row: dict[str, Any]) -> dict[str, Any]:
    """A row that version 0.1 may have written, by today's keys: of an evaluation, a sample, an episode, an option."""
    # A row of today may have a number of its own under an old key: an agent's extra_metrics choose their names.
    names = {old: new for old, new in RENAMED.items() if new not in row}
    row = {names.get(key, key): value for key, value in row.items()}
    if row.get("stop_reason") == "BUDGET":
        row["stop_reason"] = "LENGTH"
    if isinstance(row.get("start"), dict):  # of an episode: the initial policy's completion
        row["start"] = renamed(row["start"])
    return row


def append_evaluation(folder: Path, row: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    """Append an evaluation's metrics (with `timesteps` and `updates`) and its completions to their logs."""
    place = {"timesteps": row["timesteps"], "updates": row["updates"]}
    files.append_json_lines(folder / EVALUATIONS, [row])
    files.append_json_lines(folder / SAMPLES, [place | sample for sample in samples])


def append_alarm(folder: Path, row: dict[str, Any], alarm: Alarm) -> None:
    """Append an alarm that was raised at an evaluation; row: the evaluation's metrics."""
    place = {"timesteps": row["timesteps"], "updates": row["updates"]}
    files.append_json_lines(folder / ALARMS, [place | dataclasses.asdict(alarm)])


# -- whose folder it is -----------------------------------------------------------------------------------------------


def holds_run(folder: Path) -> bool:
    """Whether something was trained, or an agent that does not train evaluated to the end: what is worth keeping."""
    files.finish_folder(folder)
    if not (folder / files.STATE_FILE).is_file():
        return (folder / files.PREVIOUS / files.STATE_FILE).is_file()
    try:
        state = files.read_state(folder)
    except ValueError:  # a damaged checkpoint may still be mended from the one before
        return True
    # 0.1 saved nothing before it had trained.
    return bool(state.get("num_updates", 1)) or bool(state.get("finished", True))


def clear_logs(folder: Path) -> None:
    """Remove the logs of a run that begins anew."""
    update_log.clear(folder, _evaluation_logs(folder))


def cut_logs(folder: Path, updates: int, timesteps: int) -> None:
    """Take out what was logged after the checkpoint that the run goes on from; see persistence.update_log.cut."""
    update_log.cut(folder, updates, timesteps, _evaluation_logs(folder))


def copy_logs(run: Path, folder: Path) -> None:
    """Copy the logs of a run beside a checkpoint that was saved elsewhere; not into a folder of the run's own."""
    # Within a run, OUT/best for one, they would be those of a second run.
    if run.resolve() in (folder.resolve(), *folder.resolve().parents):
        return
    for file in [*_evaluation_logs(run), *run.glob("progress*.json")]:
        if file.is_file():
            files.write_text(folder / file.name, file.read_text(encoding="utf-8"))


def _evaluation_logs(folder: Path) -> list[Path]:
    return [folder / EVALUATIONS, folder / SAMPLES, folder / ALARMS]


# -- reading ----------------------------------------------------------------------------------------------------------


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a log, by today's keys."""
    return [renamed(row) for row in files.read_json_lines(file)]


@dataclasses.dataclass(frozen=True)
class Run:
    """What training wrote into one folder."""

    name: str
    evaluations: list[dict[str, Any]]
    """By timesteps; the first is of the initial policy."""
    rollouts: list[dict[str, Any]]
    """Rows of the log, of training rollouts."""
    samples: list[dict[str, Any]]
    state: dict[str, Any]
    """agent.json, empty where no checkpoint was written."""

    @property
    def start(self) -> dict[str, Any]:
        return self.evaluations[0]

    @property
    def end(self) -> dict[str, Any]:
        return self.evaluations[-1]


COMPLETION: files.Kinds = {"prompt": (str,), "completion": (str,), "score": files.NUMBER}
"""What a completion's line holds."""
COMPLETION_MORE: files.Kinds = {
    "index": (int,),
    "timesteps": (int,),
    "updates": (int,),
    "gold": files.NUMBER,
    "tokens": (int,),
    "stop_reason": (str,),
    "reference": (str, type(None)),
}


def find_runs(folder: Path) -> list[Path]:
    """The folder itself if it holds a run, else its subfolders that do.

    Raises:
        ValueError: there is no run.
    """
    if (folder / EVALUATIONS).is_file():
        return [folder]
    # One level down and no further: a run's best/ and a comparison's runs/NAME lie deeper.
    runs = sorted(path.parent for path in folder.glob(f"*/{EVALUATIONS}"))
    if not runs:
        raise ValueError(f"{str(folder)!r} holds no run, and none of its subfolders does: no {EVALUATIONS}")
    return runs


def read_run(folder: Path) -> Run:
    """Read a run's logs. What was evaluated twice, before and after a resumption, counts once."""
    evaluations = read_evaluations(folder)
    if not evaluations:
        raise ValueError(f"{str(folder)!r} holds no evaluation yet")
    state_file = folder / files.STATE_FILE
    state = files.read_json(state_file) if state_file.is_file() else {}
    samples = [sample for evaluation in evaluations for sample in evaluation.samples]
    return Run(
        folder.resolve().name, [evaluation.row for evaluation in evaluations], read_rollouts(folder), samples, state
    )


def read_rollouts(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's log, of training rollouts. A resumed run has several files."""
    rows = [row for file in sorted(folder.glob("progress*.json")) for row in files.read_json_lines(file)]
    # A logger may be given texts too; what is drawn are numbers.
    return [{key: value for key, value in row.items() if isinstance(value, files.NUMBER)} for row in rows]


def read_evaluations(folder: Path) -> list[Evaluation]:
    """A run's evaluations with their completions, by timesteps, from what training wrote into a folder.

    Raises:
        ValueError: a line does not hold what training writes.
    """
    rows, samples = read_rows(folder / EVALUATIONS), read_rows(folder / SAMPLES)
    for number, row in enumerate(rows):
        where = f"{folder / EVALUATIONS}, row {number + 1}"
        files.check_fields(row, where, {"timesteps": (int,)}, {"updates": (int,)})
        files.check_numbers(row, where)
    for number, sample in enumerate(samples):
        where = f"{folder / SAMPLES}, row {number + 1}"
        files.check_fields(sample, where, COMPLETION | {"index": (int,), "timesteps": (int,)}, COMPLETION_MORE)
    return reward_hacking.evaluations(rows, samples)


def alarms(run: Run) -> list[Alarm]:
    """What is out of bounds at the run's end; see textrl_gym.evaluation.reward_hacking."""
    return reward_hacking.last_alarms(reward_hacking.evaluations(run.evaluations, run.samples))
