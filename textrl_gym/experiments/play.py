"""Play: people, and models behind an endpoint, on the prompts of an evaluation. What they played is a run of `compare`.

play.json         what was asked for
answers.jsonl     each answer, on the disk before the next is asked for: a conversation goes on in its middle
episodes.jsonl    each episode that has ended

An episode is its answers: said again they give the same tokens and rewards, as replies are functions of what was said.
So a comparison scores them by its own reward, and a conversation that was stopped is gone on with.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

from annotated_types import Ge

from textrl_gym import files
from textrl_gym.core import Message, StopReason
from textrl_gym.data.encoding import Unknown
from textrl_gym.data.trajectories import Trajectory
from textrl_gym.evaluation.evaluator import Evaluator
from textrl_gym.experiments.results import EPISODES
from textrl_gym.llm.asking import ENDPOINT
from textrl_gym.llm.endpoint import Client, ClientConfig, ask_together
from textrl_gym.mdp.text_env import TextEnv, TextVectorEnv
from textrl_gym.persistence.run_lock import alone
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts.text_actions import TextActions

SETTINGS = "play.json"
"""What was asked for; a folder that holds it was played."""
ANSWERS = "answers.jsonl"


@dataclasses.dataclass(frozen=True)
class PlayerConfig(ClientConfig):
    """Which model plays, and how it is asked."""

    temperature: Annotated[float, Ge(0)] = 1.0
    """Of its sampling; 0: its most likely answer."""
    system_prompt: str | None = None
    """Stands before each conversation."""


class Player(Protocol):
    """Who answers."""

    at_once: int
    """Conversations that it can have side by side."""
    unknown: Unknown
    """What becomes of words that the environment's tokenizer has no token for."""

    def answer(self, seats: Sequence[Seat], keep: Callable[[Seat, str], None]) -> None:
        """Answer each conversation, and keep each answer as soon as it is there."""
        ...


class EndpointPlayer:
    """A model behind an OpenAI-compatible endpoint. Words that have no token are left out of its answers."""

    unknown: Unknown = "skip"

    def __init__(self, config: PlayerConfig) -> None:
        self.config, self.at_once = config, config.concurrency
        self.client = Client(config, f"player {ENDPOINT!r}")

    def answer(self, seats: Sequence[Seat], keep: Callable[[Seat, str], None]) -> None:
        """See Player. Raises EndpointError where the endpoint fails for good; what it has said is kept."""
        before = [{"role": "system", "content": self.config.system_prompt}] if self.config.system_prompt else []

        def ask(seat: Seat, stop: threading.Event) -> None:
            keep(seat, self.client.ask([*before, *seat.messages], self.config.temperature, stop).text)

        ask_together([functools.partial(ask, seat) for seat in seats], self.at_once, lambda: None)


class Seat:
    """An episode that is being played.

    Args:
        env: a text environment of its own.
        index: of the prompt.
    """

    def __init__(self, env: TextActions, index: int) -> None:
        self.env, self.index = env, index
        self.messages: Sequence[Message]
        self.messages, _ = env.reset(options={"prompt_indices": [index]})
        self.answers: list[str] = []
        self.over = False
        self._info: dict[str, Any] = {}
        self._prompt_ids = list(env.context)
        self._rewards: list[float] = []
        self._replies: list[bool] = []
        self._turn: list[int] = []

    def say(self, text: str) -> None:
        """Say a turn."""
        before, turn = len(self.env.context), len(self.answers)
        self.messages, reward, terminated, truncated, self._info = self.env.step(text)
        own, new = len(self._info["turn_ids"]), len(self.env.context) - before
        self._rewards += [0.0] * (own - 1) + [float(reward)] + [0.0] * (new - own)
        self._replies += [False] * own + [True] * (new - own)
        self._turn += [turn] * new
        self.answers.append(text)
        self.over = terminated or truncated

    def trajectory(self) -> Trajectory:
        """The episode, when it is over."""
        assert self.over
        info, spoken = self._info, self.env.mdp.turns is not None
        return Trajectory(
            prompt_ids=self._prompt_ids,
            token_ids=self.env.context[len(self._prompt_ids) :],
            rewards=self._rewards,
            stop=StopReason(info["stop_reason"]),
            score=float(info["score"]),
            prompt=info["prompt"],
            completion=info["completion"],
            replies=self._replies if spoken else [],
            turn=self._turn if spoken else [],
            turns=info["turns"] if spoken else [],
        )


def seats_of(mdp: TextVectorEnv, count: int, unknown: Unknown) -> list[TextActions]:
    """So many environments for text actions with mdp's settings, which share what it has loaded."""
    changes = {"group_size": 1, "array": "numpy", "render_mode": None, "kl_coef": 0.0, "policy_logprob": None}
    keywords = {name: value for name, value in mdp.keywords(**changes).items() if name != "autoreset_mode"}
    return [TextActions(TextEnv(**keywords), unknown=unknown) for _ in range(count)]


# -- playing ----------------------------------------------------------------------------------------------------------


def play(
    evaluator: Evaluator, player: Player, out: Path, settings: dict[str, Any], tell: Callable[[dict[str, Any]], object]
) -> list[dict[str, Any]]:
    """Play what is left of an evaluation's prompts.

    Args:
        out: the folder; the same one goes on.
        settings: what was asked for, as JSON can hold it.
        tell: is given each episode that ends.

    Returns:
        all episodes that the folder holds.

    Raises:
        ValueError: the folder holds something that was played with other settings.
    """
    with alone(out):
        _check_same(out, json.loads(json.dumps(settings)))
        done = {row["index"] for row in read_played(out)}
        # A prompt that an evaluation has twice is played once.
        waiting = [i for i in dict.fromkeys(evaluator.indices.tolist()) if i not in done]
        earlier: dict[int, list[str]] = {}
        for row in files.read_json_lines(out / ANSWERS):
            earlier.setdefault(row["index"], []).append(row["text"])
        free = seats_of(evaluator.mdp, min(player.at_once, max(1, len(waiting))), player.unknown)
        seats: list[Seat] = []
        keep = _Keeper(out / ANSWERS)
        while waiting or seats:
            while waiting and free:
                seats.append(_begin(free.pop(), waiting.pop(0), earlier))
            for seat in [seat for seat in seats if seat.over]:
                row = _row(seat, evaluator)
                files.append_json_lines(out / EPISODES, [row], sync=True)
                tell(row)
                seats.remove(seat)
                free.append(seat.env)
            if seats and not (free and waiting):
                try:
                    player.answer(seats, keep)
                finally:
                    keep.say()
        return read_played(out)


class _Keeper:
    """Writes answers down, from any thread, and has them said later, by one."""

    def __init__(self, file: Path) -> None:
        self.file, self._lock = file, threading.Lock()
        self._new: list[tuple[Seat, str]] = []

    def __call__(self, seat: Seat, text: str) -> None:
        # The tokenizer inside too: those of the tokenizers library may not be called from two threads at once.
        with self._lock:
            seat.env.encode(text)  # a text that cannot be said is an error here, and not in each later run
            row = {"index": seat.index, "turn": len(seat.answers), "text": text}
            files.append_json_lines(self.file, [row], sync=True)
            self._new.append((seat, text))

    def say(self) -> None:
        """Say what was kept."""
        while self._new:
            seat, text = self._new.pop(0)
            seat.say(text)


def _begin(env: TextActions, index: int, earlier: dict[int, list[str]]) -> Seat:
    """A conversation, as far as it was played."""
    seat = Seat(env, index)
    for text in earlier.get(index, []):
        seat.say(text)
    return seat


def _row(seat: Seat, evaluator: Evaluator) -> dict[str, Any]:
    """What is written of an episode."""
    one, mdp = seat.trajectory(), evaluator.mdp
    source = mdp.source[seat.index]
    row = {"index": seat.index, "prompt": one.prompt, "completion": one.completion, "tokens": one.num_actions}
    row |= {"score": one.score, "stop_reason": one.stop.name, "reference": source.get("completion")}
    row |= {"return": one.total, "answers": seat.answers}
    turns = [one.turns] if one.turns else []
    if evaluator.gold is not None:
        own = [[not reply for reply in one.replies]] if turns else []
        scores = mdp.scorer.score(
            [source], [one.prompt_ids], [one.token_ids], evaluator.gold, turns=turns, action_masks=own
        )
        row["gold"] = float(scores.score_N[0])
    return row | ({"turns": one.turns} if turns else {})


def _check_same(out: Path, settings: dict[str, Any]) -> None:
    """Hold that a folder goes on with what it was begun with, or write that down."""
    file = out / SETTINGS
    if not file.is_file():
        files.write_text(file, json.dumps(settings, indent=1) + "\n")
        return
    before = files.read_json(file)
    for name in dict.fromkeys([*before, *settings]):
        if before.get(name) != settings.get(name):
            raise ValueError(
                f"{str(out)!r} was played with {name}={before.get(name)!r}, not {settings.get(name)!r}: go on with "
                "that, or name another --out"
            )


# -- in a comparison --------------------------------------------------------------------------------------------------


def is_played(folder: str | Path) -> bool:
    """Whether somebody has played in a folder."""
    return (Path(folder) / SETTINGS).is_file()


def read_played(folder: Path) -> list[dict[str, Any]]:
    """The episodes of a folder.

    Raises:
        ValueError: a line does not hold what `play` writes.
    """
    rows = files.read_json_lines(folder / EPISODES)
    for number, row in enumerate(rows, start=1):
        kinds: files.Kinds = {"index": (int,), "prompt": (str,), "answers": (list,), "score": files.NUMBER}
        files.check_fields(row, f"{folder / EPISODES}, row {number}", kinds)
    return rows


def evaluate_played(
    folder: Path, evaluator: Evaluator, reference: Policy | None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics and samples of what was played, on those of an evaluation's prompts that were.

    The evaluator is narrowed to these; `unplayed_prompts` counts the others.

    Args:
        reference: whose completions the win rate is against.

    Raises:
        ValueError: none of them was played, or an episode does not end in this environment as it did there.
    """
    rows = {row["index"]: row for row in read_played(folder)}
    mdp, indices = evaluator.mdp, evaluator.indices.tolist()
    there = [i for i in indices if i in rows and rows[i]["prompt"] == mdp.source[i]["prompt"]]
    if not there:
        raise ValueError(
            f"none of the {len(indices)} prompts was played in {str(folder)!r}: an evaluation of N prompts with seed S "
            "is played by `textrl-gym play ENV --episodes N --seed S`"
        )
    evaluator.narrow(there)
    (env,) = seats_of(mdp, 1, "skip")
    trajectories = [_again(env, rows[i], folder) for i in there]
    metrics, samples = evaluator.of_texts(trajectories, reference)
    missing = len(indices) - len(there)
    return metrics | ({"unplayed_prompts": float(missing)} if missing else {}), samples


def _again(env: TextActions, row: dict[str, Any], folder: Path) -> Trajectory:
    """An episode, said again."""
    seat = Seat(env, row["index"])
    for text in row["answers"]:
        if not seat.over:
            seat.say(text)
    if not seat.over:
        raise ValueError(f"{str(folder)!r}: the episode of prompt {row['index']} does not end here as it did there")
    return seat.trajectory()


def played_trajectories(folder: Path, mdp: TextVectorEnv) -> Iterable[Trajectory]:
    """All episodes of a folder as trajectories in an environment, for offline RL."""
    (env,) = seats_of(mdp, 1, "skip")
    for row in read_played(folder):
        yield _again(env, row, folder)
