"""TextArena: the single-player games of TextArena as conversations, without a network.

Which game is said by the environment's `dataset`: an id of TextArena, such as "Mastermind-v0".

    class Mastermind(TextArena):
        game = "Mastermind-v0"

    textrl_gym.register("Mastermind-v0", "my_module:Mastermind")
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any

from textrl_gym.core import Message, PromptSource, Reply, Row
from textrl_gym.data import chat
from textrl_gym.extras import install
from textrl_gym.mdp.task import Task
from textrl_gym.worlds.world import GlobalRandom

SPLITS = {"train": range(2_000, 1_002_000), "validation": range(1_000), "test": range(1_000, 2_000)}
"""Seeds of the games. Few games differ for every seed: see docs/integrations.md."""
VIEWS = ("-raw", "-train")
"""Ids of the same games with other wrappers, which differ in what is shown again."""
MOST_GAMES = 1_024
"""Games in progress that are remembered. One that is forgotten is played again from its first turn."""
OFFLINE = (
    *("2048", "Bandit", "Blackjack", "Crosswords", "FifteenPuzzle", "FrozenLake", "GuessTheNumber", "LightsOut"),
    *("LogicPuzzle", "Mastermind", "Minesweeper", "PegJump", "RushHour", "Secretary", "Set", "Sokoban", "Sudoku"),
    "TowerOfHanoi",
)
"""The single-player games of TextArena 0.7.4 that need nothing but the package; its ids begin with their names."""
WORDS = "NLTK's word lists (python -m nltk.downloader words averaged_perceptron_tagger_eng)"
ONLINE = "an API key of OpenRouter, for a language model that answers"
EXCHANGED = "a version of TextArena in which the reward and the reason of an invalid move are not exchanged"
NEEDS = {
    "Hangman": WORDS,
    "WordLadder": WORDS,
    "WordSearch": WORDS,
    "Wordle": WORDS,
    "GuessWho": ONLINE,
    "TwentyQuestions": ONLINE,
    "Klondike": "Python 3.12",
    "Countdown": EXCHANGED,
    "Cryptarithm": EXCHANGED,
    "Slitherlink": EXCHANGED,
    "ThreeCardMonte": EXCHANGED,
}
"""What the other single-player games need."""


class TextArena(Task):
    """A single-player game of TextArena: the agent's turns are its actions, and the game's messages the replies.

    The score is the game's outcome, in most games 1 for winning, a share of it for coming near, and -1 or 0 for a
    second invalid move in succession. An episode that a budget ends before the game is over scores 0.
    """

    game = "GuessTheNumber-v0"
    """Which game, where the environment's `dataset` names none."""
    max_prompt_tokens = 1_024
    max_new_tokens = 1_024
    max_turns = 20
    max_turn_tokens = 32
    model = "smollm2-135m"
    keep_suffix = chat.ASSISTANT
    reward = "textrl_gym.integrations.textarena:outcome"
    gold = "textrl_gym.integrations.textarena:outcome"

    def rows(self, split: str, dataset: str | None = None) -> PromptSource:
        """The games of a split, one for each seed."""
        return Games(dataset or self.game, split)

    def reply(self, row: Row, turns: Sequence[Message]) -> Reply:
        """What the game shows after the agent's last turn."""
        played = play(row["game"], row["seed"], turns)
        return Reply(played.text, done=played.done)


class Games:
    """The games of a split as rows: `prompt` (the rules and the first board), `game`, `seed`.

    Raises:
        ValueError: no such game or split, or one that does not run here.
    """

    def __init__(self, game: str, split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
        self.game, self.seeds = game, SPLITS[split]
        play(game, self.seeds[0], [])

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int, /) -> Row:
        """The row at a place."""
        seed = self.seeds[index]
        spoken = chat.user(play(self.game, seed, []).text)
        return {"prompt": chat.as_text(spoken), "chat": spoken, "game": self.game, "seed": seed}

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))


def outcome(
    completions: list[str], game: list[str], seed: list[int], turns: list[list[Message]], **columns: Any
) -> list[float]:
    """What the game gave at its end; 0.0 where it was not over."""
    return [play(name, number, said).reward for name, number, said in zip(game, seed, turns, strict=True)]


@dataclasses.dataclass(frozen=True)
class Played:
    """Where a game stands."""

    text: str
    """What the game showed last."""
    done: bool
    reward: float
    """The outcome where the game is done, else 0.0."""


@dataclasses.dataclass
class Table:
    """A game in progress."""

    env: Any
    """Of TextArena, with the wrapper that puts actions into brackets where they have none."""
    random: GlobalRandom
    played: Played


_tables: collections.OrderedDict[tuple[str, int, tuple[str, ...]], Table] = collections.OrderedDict()
"""Games by their seed and the agent's turns, the one that was used last at the end."""


def play(game: str, seed: int, turns: Sequence[Message]) -> Played:
    """Where a game stands after the agent's turns: a function of these three.

    TextArena seeds and draws from the global generators; each game has a state of them to itself here, and those of the
    process stay as they are.

    Raises:
        ValueError: no such game, or one that does not run here.
    """
    actions = tuple(turn["content"].strip() for turn in turns if turn["role"] == "assistant")
    table = _tables.get((game, seed, actions))
    if table is None:
        # The game goes on from the turn before. It is then no longer there for another row that said the same until
        # then; that one begins anew.
        before = _tables.pop((game, seed, actions[:-1]), None) if actions else None
        table = before or _begin(game, seed)
        for action in actions if before is None else actions[-1:]:
            if not table.played.done:
                _act(table, action)
        _tables[game, seed, actions] = table
    _tables.move_to_end((game, seed, actions))
    if len(_tables) > MOST_GAMES:
        _tables.popitem(last=False)
    return table.played


def forget() -> None:
    """Drop the games in progress; those that go on are played again from their first turns."""
    _tables.clear()


def _begin(game: str, seed: int) -> Table:
    random = GlobalRandom.seeded(seed)
    with random.installed(), contextlib.redirect_stdout(io.StringIO()):  # some games print
        env = _make(game)
        env.reset(num_players=1, seed=seed)
        text = _shown(env)
    return Table(env, random, Played(text, False, 0.0))


def _act(table: Table, action: str) -> None:
    with table.random.installed(), contextlib.redirect_stdout(io.StringIO()):
        done, _ = table.env.step(action=action)
        text = _shown(table.env)
        reward = 0.0
        if done:
            rewards, infos = table.env.close()
            reward = float(rewards[0])
            text = text or str(infos[0].get("reason", ""))
    table.played = Played(text, bool(done), reward)


def _shown(env: Any) -> str:
    """What the game has shown since it was last asked, without the agent's own words."""
    from textarena import ObservationType, Wrapper

    while isinstance(env, Wrapper):  # they would show everything again, and not only what is new
        env = env.env
    _, messages = env.get_observation()
    return "\n".join(text.strip("\n") for _, text, kind in messages if kind is not ObservationType.PLAYER_ACTION)


def _make(game: str) -> Any:
    try:
        import textarena
        from textarena.envs.registration import ENV_REGISTRY
    except ImportError as error:
        raise ValueError(f"{game!r} needs TextArena ({error}): {install('textarena')}") from error
    family = game.partition("-")[0]
    if game not in ENV_REGISTRY or not (family in OFFLINE or family in NEEDS):
        allowed = [name for name in ENV_REGISTRY if name.partition("-")[0] in OFFLINE and not name.endswith(VIEWS)]
        raise ValueError(f"{game!r} is no single-player game of TextArena; allowed: {', '.join(allowed)}")
    try:
        if NEEDS.get(family) == EXCHANGED:
            raise ValueError(f"its outcomes are wrong in TextArena {textarena.__version__}")
        return textarena.make(game)
    except (ImportError, SyntaxError, LookupError, OSError, ValueError) as error:  # NLTK's is a LookupError
        needs = f"; it needs {NEEDS[family]}" if family in NEEDS else ""
        raise ValueError(f"{game!r} does not run here{needs} ({type(error).__name__}: {_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip(" *")), "no words")
