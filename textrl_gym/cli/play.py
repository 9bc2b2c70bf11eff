"""`textrl-gym play`: a person at the terminal, or a model behind an endpoint, plays the prompts of an evaluation."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from textrl_gym import registry
from textrl_gym.bounds import Seed, check_settings
from textrl_gym.cli.options import Part, env_flags, environment, flat, parse_command
from textrl_gym.cli.terminal import print_rows
from textrl_gym.console import plain
from textrl_gym.data.encoding import Unknown
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.registry import find_env

if TYPE_CHECKING:
    from rich.console import Console

    from textrl_gym.experiments.play import Seat

EMPTY = "\\"
"""A line that stands for an empty one, which would end the answer."""


@dataclasses.dataclass(frozen=True)
class PlayFlags:
    """Who plays, and what."""

    player: Literal["person", "endpoint"] = "person"
    """person: whoever is at the terminal; endpoint: a model, by the settings of --endpoint."""
    episodes: Annotated[int, Ge(1)] = 10
    """Prompts, those of an evaluation of so many: `compare --eval-episodes` with the same number meets them all."""
    seed: Seed = 0
    """Of which prompts: `compare --eval-seed`."""
    out: Path | None = None
    """The folder, where the same command goes on; None: runs/play-PLAYER-ENV."""
    model: str | None = None
    """Whose tokenizer cuts prompts and counts the budget: a Hub id or a folder; None: the environment's own."""

    def __post_init__(self) -> None:
        check_settings(self)


class Person:
    """Whoever is at the terminal."""

    at_once = 1
    unknown: Unknown = "raise"

    def __init__(self, console: Console) -> None:
        self.console = console
        self._shown: tuple[int, int] = (-1, 0)

    def answer(self, seats: Sequence[Seat], keep: Callable[[Seat, str], None]) -> None:
        """See textrl_gym.experiments.play.Player. Raises EOFError at the end of the input."""
        (seat,) = seats
        index, count = self._shown
        # Of a conversation only what is new; all of it where it begins, or is gone on with.
        for message in seat.messages[count if index == seat.index else 0 :]:
            self.console.print(plain(f"{message['role']}:", style="bold"), highlight=False)
            self.console.print(plain(message["content"]), highlight=False)
        self._shown = (seat.index, len(seat.messages) + 1)  # one's own answer needs not be shown
        while True:
            self.console.print(plain("your answer (an empty line ends it):", style="bold cyan"), highlight=False)
            text = read_text(sys.stdin.readline)
            try:
                keep(seat, text)
                return
            except ValueError as error:
                self.console.print(plain(f"{error}. Once more, please.", style="yellow"), highlight=False)


def read_text(read_line: Callable[[], str]) -> str:
    """Lines up to an empty one; a line that is a backslash alone is an empty line of the text.

    Raises:
        EOFError: the input ends before.
    """
    lines: list[str] = []
    while True:
        line = read_line()
        if not line:
            raise EOFError
        line = line.rstrip("\r\n")
        if line == "" and lines:
            return "\n".join("" if one == EMPTY else one for one in lines)
        if line:  # an empty line alone is a slip of the finger
            lines.append(line)


def play_command(args: Sequence[str]) -> int:
    """Play an environment at the terminal, or let a model behind an endpoint play it: a player for `compare`."""
    from textrl_gym.experiments.play import PlayerConfig

    parts: list[Part] = [
        environment(),
        ("settings", flat(PlayFlags)),
        ("endpoint", PlayerConfig, PlayerConfig()),
        env_flags(EnvSettings(split="validation")),
    ]
    tables = {"settings": "play", "env": "env"}
    parsed = parse_command("play", play_command.__doc__, parts, tables, args)
    flags, env_id = parsed.settings, find_env(parsed.environment)
    if flags.player == "person" and parsed.endpoint != PlayerConfig():
        raise ValueError("--endpoint. settings are of --player endpoint")
    from rich.console import Console

    from textrl_gym.evaluation.evaluator import Evaluator
    from textrl_gym.experiments import play
    from textrl_gym.mdp.env_settings import make_env

    console = Console()
    player: play.Player = Person(console) if flags.player == "person" else play.EndpointPlayer(parsed.endpoint)
    env = make_env(env_id, parsed.env, flags.model, "cpu", {"rollout_episodes": 1, "group_size": 1})
    evaluator = Evaluator(env, flags.episodes, flags.seed, parsed.env.split)
    out = flags.out or Path("runs") / f"play-{flags.player}-{env_id}"
    settings = {"environment": env_id, "registered": registry.registration(env_id), "model": flags.model}
    settings |= {"env": dataclasses.asdict(parsed.env), "episodes": flags.episodes, "seed": flags.seed}
    # Not the url: a server may come back at another address.
    asked = {"model", "temperature", "system_prompt", "max_answer_tokens"}
    endpoint = {name: value for name, value in dataclasses.asdict(parsed.endpoint).items() if name in asked}
    settings |= {"player": flags.player, "endpoint": endpoint if flags.player == "endpoint" else None}
    try:
        rows = play.play(evaluator, player, out, settings, lambda row: _tell(console, row))
    except (KeyboardInterrupt, EOFError) as stopped:
        done = len(play.read_played(out))
        print(f"{done} episodes are saved in {out}, from where the same command goes on", file=sys.stderr)
        if isinstance(stopped, KeyboardInterrupt):
            raise
        return 0
    print_rows(str(out), summary(rows))
    return 0


def _tell(console: Console, row: dict[str, Any]) -> None:
    """An episode that has ended."""
    numbers = [f"score {row['score']:.3f}"] + ([f"gold {row['gold']:.3f}"] if "gold" in row else [])
    words = f"{', '.join(numbers)} ({row['stop_reason']})"
    if row["reference"]:
        words += f"; the reference text: {row['reference'].strip()}"
    console.print(plain(words, style="green"), highlight=False)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Means over episodes."""
    means = {"episodes": str(len(rows))}
    for name in ("score", "gold", "tokens"):
        values = [row[name] for row in rows if name in row]
        if values:
            means[f"mean {name}"] = f"{sum(values) / len(values):.3f}"
    return means
