"""GuessNumber-v0: its replies, its teacher and its known optimum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from textrl_gym.agents import PPO
from textrl_gym.core import StopReason
from textrl_gym.envs import guess_number
from textrl_gym.envs.guess_number import MAX_TURNS, NUMBERS, SYMBOLS, N, careless_games, fewest_guesses
from textrl_gym.evaluation.evaluator import Evaluator

TOKEN = {symbol: number for number, symbol in enumerate(("<eos>", *SYMBOLS))}


def bisect(env: gym.Env[Any, Any], number: int) -> tuple[int, float]:
    """Play by bisection: the guesses, and the return."""
    env.reset(options={"prompt_indices": [number - 1]})
    low, high, total, over, turns = 1, N, 0.0, False, 0
    while not over:
        guess = (low + high) // 2
        _, reward, terminated, truncated, info = env.step(TOKEN[str(guess)])
        total, turns, over = total + float(reward), turns + 1, terminated or truncated
        assert info["turn"] == turns - 1
        if info["reply"] == "higher":
            low = guess + 1
        elif info["reply"] == "lower":
            high = guess - 1
    assert terminated and info["stop_reason"] is StopReason.DONE and info["turns"][-2]["content"] == str(number)
    return turns, total


def test_gold_is_the_return_of_a_game() -> None:
    games = ["7", "8\n4\n6\n7", "1\n2\n3\n4\n5\n6\n8\n9\n7", "", "what\n7", "7\n7", "17\n8"]
    golds = guess_number.quickness(["guess"] * len(games), games, number=[7] * len(games))
    # Found at once, after three, with a ninth guess that nobody has, not at all, after a word, at once, not at all.
    assert golds == pytest.approx([1.0, 0.7, 0.0, 0.0, 0.9, 1.0, 0.0], abs=1e-12)
    returns = [bisect(gym.make("GuessNumber-v0"), number)[1] for number in range(1, N + 1)]
    assert np.mean(returns) == pytest.approx(guess_number.GuessNumber.best_gold, abs=1e-6)  # float32


def test_bisection_is_the_optimum() -> None:
    env = gym.make("GuessNumber-v0")
    played = [bisect(env, number) for number in range(1, N + 1)]
    assert np.mean([turns for turns, _ in played]) == fewest_guesses() == 54 / 16  # 1 + 2*2 + 4*3 + 8*4 + 5 guesses
    for turns, total in played:
        assert total == pytest.approx(1 - 0.1 * (turns - 1), abs=1e-6)


def test_words_that_are_no_numbers() -> None:
    env = gym.make("GuessNumber-v0")
    env.reset(seed=0)
    for turn in range(MAX_TURNS):
        _, reward, terminated, truncated, info = env.step(TOKEN["higher"])
        assert float(reward) == pytest.approx(-0.1, abs=1e-6) and info["reply"] == "what"
        assert not terminated and truncated == (turn + 1 == MAX_TURNS)
    assert info["stop_reason"] is StopReason.MAX_TURNS


def test_the_teacher_plays_by_the_rules() -> None:
    input_BL, guess_BL = careless_games(np.random.default_rng(0), TOKEN)
    symbol = {token: name for name, token in TOKEN.items()}
    task = guess_number.GuessNumber()
    lengths = []
    for ids, guesses in zip(input_BL.tolist(), guess_BL.tolist(), strict=True):
        words = [symbol[i] for i in ids]
        said = [word for word, own in zip(words, guesses, strict=True) if own]
        assert words[0] == "guess" and set(said) <= set(NUMBERS)
        possible = range(1, N + 1)
        # Some hidden number explains all that was replied.
        for number in possible:
            replies = [task.reply({"number": number}, [{"role": "assistant", "content": word}]).text for word in said]
            game = ["guess", *(word for pair in zip(said, replies, strict=True) for word in pair)]
            if game[: 2 * len(said)] == words[: 2 * len(said)] and (said[-1] == str(number) or len(said) == MAX_TURNS):
                break
        else:
            raise AssertionError(words)
        lengths.append(len(said))
    assert fewest_guesses() < np.mean(lengths) < MAX_TURNS


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_ppo_comes_within_a_tenth_of_the_questions_that_are_needed(seed: int, tmp_path: Path) -> None:
    # log2(16) = 4, and a tenth more.
    settings: dict[str, Any] = {"learning_rate": 1e-3, "rollout_episodes": 128, "group_size": 1, "vf_coef": 0.5}
    agent = PPO("GuessNumber-v0", seed=seed, device="cpu", out=tmp_path, **settings)
    before, _ = Evaluator(agent.env).run(agent)
    agent.learn(60_000, progress_bar=False, eval_every=0, show_samples=0)
    after, _ = Evaluator(agent.env).run(agent)
    assert after["turns"] <= 4.4 < before["turns"]
    assert torch.isfinite(torch.tensor(after["turn_rewards"]))
