"""Single-player games of TextArena as conversations, with the library itself."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from textrl_gym.core import StopReason
from textrl_gym.mdp.text_env import TextEnv
from textrl_gym.models.tokenizer import train_tokenizer
from textrl_gym.rollouts.text_actions import TextActions

reason = "needs TextArena: pip install '.[textarena]'"
library: Any = pytest.importorskip("textarena", reason=reason)

from textrl_gym.integrations import textarena  # noqa: E402
from textrl_gym.integrations.textarena import Games, TextArena, outcome, play  # noqa: E402

GAME = "GuessTheNumber-v0"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test of this file reaches a network."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("a test has opened a connection")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def said(actions: Sequence[str]) -> list[dict[str, str]]:
    """Turns of the agent, with replies between them that a game does not read."""
    turns = [
        {"role": role, "content": text} for action in actions for role, text in (("assistant", action), ("user", ""))
    ]
    return turns[:-1]


def by_the_library(game: str, seed: int, actions: Sequence[str]) -> tuple[list[str], float | None]:
    """What TextArena itself shows for each action, and the outcome where there is one."""
    env = library.make(game)
    env.reset(num_players=1, seed=seed)
    shown = []
    for action in actions:
        done, _ = env.step(action=action)
        shown.append([text for _, text, kind in env.state.observations[0] if kind.name != "PLAYER_ACTION"][-1])
        if done:
            return shown, float(env.close()[0][0])
    return shown, None


@pytest.mark.parametrize("game", ["GuessTheNumber-v0", "2048-v0-super-easy", "TowerOfHanoi-v0", "FrozenLake-v0-random"])
def test_a_game_is_the_librarys(game: str) -> None:
    actions = {"G": ["[7]", "12", "[3]"], "2": ["[Up]", "[Left]", "[Up]"], "T": ["[A B]", "[A C]"], "F": ["[w]", "[d]"]}
    state = random.getstate()
    shown, result = by_the_library(game, 5, actions[game[0]])
    random.setstate(state)
    for count, text in enumerate(shown, start=1):
        played = play(game, 5, said(actions[game[0]][:count]))
        assert played.text.endswith(text.strip("\n"))
    assert played.done == (result is not None)


def test_the_outcome_is_the_score() -> None:
    random.seed(3)
    env = library.make(GAME)
    env.reset(num_players=1, seed=11)
    secret = env.state.game_state["game_number"]
    turns = said([f"[{secret}]"])
    assert play(GAME, 11, turns) == textarena.Played(play(GAME, 11, turns).text, True, 1.0)
    assert outcome(["", ""], [GAME, GAME], [11, 11], [turns, said([f"[{secret % 20 + 1}]"])]) == [1.0, 0.0]


def test_global_generators_stay_as_they_are_and_change_nothing() -> None:
    game = "2048-v0"  # each move draws the next tile
    moves = ["[Up]", "[Left]", "[Down]", "[Right]", "[Up]"]
    random.seed(1)
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    alone = [play(game, 9, said(moves[:n])).text for n in range(6)]
    assert random.getstate() == python
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy, strict=True))  # noqa: NPY002
    textarena.forget()
    random.seed(2)
    mixed = []
    for n in range(6):  # another game between its turns
        mixed.append(play(game, 9, said(moves[:n])).text)
        play(game, 10, said(moves[:n]))
        random.random()
    assert mixed == alone
    textarena.forget()
    assert play(game, 9, said(moves)).text == alone[-1]  # from the first turn, as after a checkpoint
    assert play(game, 9, said(moves[:3])).text == alone[3]  # and back


def test_rows() -> None:
    rows = Games("Sudoku-v0-very-easy", "train")
    assert rows[0]["prompt"] != rows[1]["prompt"]
    assert rows[0] == Games("Sudoku-v0-very-easy", "train")[0]
    seeds = [Games(GAME, split).seeds for split in ("train", "validation", "test")]
    assert sum(map(len, seeds)) == len(set().union(*seeds))
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        Games(GAME, "dev")


def test_an_environment_of_it() -> None:
    tokenizer = train_tokenizer(["You are playing Guess The Number"], 300)
    env = TextActions(TextEnv(task=TextArena, tokenizer=tokenizer, max_new_tokens=800, max_turn_tokens=8))
    messages, info = env.reset(seed=0)
    assert "number between" in messages[0]["content"]
    low, high, turns = 1, 20, 0
    while True:  # halving: no more than five turns for twenty numbers
        guess, turns = (low + high) // 2, turns + 1
        messages, reward, terminated, truncated, info = env.step(f"[{guess}]")
        if terminated or truncated:
            break
        assert reward == 0
        low, high = (guess + 1, high) if "higher" in messages[-1]["content"] else (low, guess - 1)
    assert (info["stop_reason"], reward, info["score"]) == (StopReason.DONE, 1.0, 1.0)
    assert turns <= 5


@pytest.mark.parametrize(
    ("game", "words"),
    [
        ("Chess-v0", "no single-player game of TextArena; allowed: 2048-v0-ultra-easy, "),
        ("Mine-v0", "no single-player game"),
        ("Hangman-v0", r"needs NLTK's word lists .*words"),
        ("TwentyQuestions-v0", "needs an API key of OpenRouter"),
        ("Countdown-v0", "reward and the reason of an invalid move"),
    ],
)
def test_games_that_do_not_run(game: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=words):
        TextArena().rows("train", game)


def test_every_offline_game_begins() -> None:
    from textarena.envs.registration import ENV_REGISTRY

    families = {game.partition("-")[0]: game for game in reversed(ENV_REGISTRY)}
    slow = {"Sokoban", "RushHour"}  # seconds for each board
    for name in set(textarena.OFFLINE) - slow:
        game = next(g for g in ENV_REGISTRY if g.partition("-")[0] == name)
        assert play(game, 0, []).text and not play(game, 0, []).done, game
    assert set(textarena.OFFLINE) | set(textarena.NEEDS) <= families.keys()
