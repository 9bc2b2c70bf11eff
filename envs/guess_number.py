"""GuessNumber-v0: find a hidden number, told after each guess whether it is higher or lower."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from textrl_gym.core import Message, Reply, Row
from textrl_gym.data import sources
from textrl_gym.mdp.task import Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

ID = "GuessNumber-v0"

N = 16
"""The hidden number is one of 1 to N."""
NUMBERS = tuple(str(number) for number in range(1, N + 1))
SYMBOLS = ("guess", "higher", "lower", "what", *NUMBERS)
MAX_TURNS = 8
COST = 0.1
"""Of each guess that is not right."""
GAMES, STEPS, CARELESS = 64, 200, 0.3
"""The policy's teacher: games of a step, steps, and the share of guesses that it takes from anywhere."""


def fewest_guesses(n: int = N) -> float:
    """The mean number of guesses of the best strategy, bisection, over all hidden numbers."""
    # A guess splits what is left in two halves; a half of one number is found by the next guess.
    if n <= 1:
        return float(n)
    below, above = (n - 1) // 2, n - 1 - (n - 1) // 2
    return 1 + (below * fewest_guesses(below) + above * fewest_guesses(above)) / n


def careless_games(rng: np.random.Generator, token: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Games of a player who guesses any number that is still possible, and at times any at all.

    Returns:
        input_BL int64, and guess_BL bool: the positions of the guesses.
    """
    hidden_B = rng.integers(1, N + 1, GAMES)
    low_B, high_B, live_B = np.ones(GAMES, int), np.full(GAMES, N), np.ones(GAMES, bool)
    input_BL, guess_BL = np.zeros((GAMES, 2 * MAX_TURNS), np.int64), np.zeros((GAMES, 2 * MAX_TURNS), bool)
    input_BL[:, 0] = token["guess"]
    number = np.array([token[symbol] for symbol in NUMBERS])
    for turn in range(MAX_TURNS):
        guess_B = np.where(rng.random(GAMES) < CARELESS, rng.integers(1, N + 1, GAMES), rng.integers(low_B, high_B + 1))
        at = 2 * turn + 1
        input_BL[:, at], guess_BL[:, at] = number[guess_B - 1] * live_B, live_B
        live_B &= guess_B != hidden_B
        if turn + 1 < MAX_TURNS:
            input_BL[:, at + 1] = np.where(hidden_B > guess_B, token["higher"], token["lower"]) * live_B
        low_B = np.where(hidden_B > guess_B, np.maximum(low_B, guess_B + 1), low_B)
        high_B = np.where(hidden_B < guess_B, np.minimum(high_B, guess_B - 1), high_B)
        low_B, high_B = np.where(live_B, low_B, 1), np.where(live_B, high_B, N)
    return input_BL, guess_BL


@functools.lru_cache(maxsize=1)
def _taught() -> dict[str, Tensor]:
    """The weights of a GPT-2 after behaviour cloning of careless games: three seconds of a core."""
    import torch

    from textrl_gym.models import tiny

    token = tiny.symbol_tokenizer(SYMBOLS).get_vocab()
    model, rng = _model(), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(STEPS):
        input_BL, guess_BL = map(torch.from_numpy, careless_games(rng, token))
        logits_NV = model(input_BL[:, :-1]).logits[guess_BL[:, 1:]]
        torch.nn.functional.cross_entropy(logits_NV, input_BL[guess_BL]).backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / STEPS)
        optimizer.step()
        optimizer.zero_grad()
    return {name: weight.detach() for name, weight in model.state_dict().items()}


def _model() -> Any:
    from textrl_gym.models import tiny

    return tiny.gpt2(len(SYMBOLS) + 1, 2 * MAX_TURNS + 1, width=64)


def quickness(prompts: list[str], completions: list[str], number: list[int], **columns: list[Any]) -> list[float]:
    """The return of a game: 1 for a number found at once, less 0.1 for each guess before it; 0 if it is not found.

    Args:
        completions: the agent's turns, a line each; guesses behind the right one count for nothing.
    """
    scores = []
    for hidden, text in zip(number, completions, strict=True):
        guesses = text.split("\n")
        scores.append(1 - COST * guesses.index(str(hidden)) if str(hidden) in guesses[:MAX_TURNS] else 0.0)
    return scores


class GuessNumber(Task):
    """Find a number from 1 to 16 by as few guesses as possible, as in the game "higher or lower".

    ## Description
    The environment has a number in mind. Each turn of the agent is one token, its guess; the environment replies
    "higher" or "lower", and the game is over when the guess is right, or after eight turns. What is not a number is
    answered by "what". Bisection needs 3.4 guesses in the mean, and log2(16) = 4 questions are enough to know any
    number. The task's own model is a small GPT-2 that has been taught by behaviour cloning, in seconds when it is first
    loaded, from games of a careless player: it guesses any number that is still possible, and at times any at all.

    ## Observation Space
    `Dict(input_ids: Box int64 [17], attention_mask: Box int8 [17])`: one prompt place, and 16 of guesses and replies.

    ## Action Space
    `Discrete(21)`: EOS, the words "guess", "higher", "lower", "what", and the numbers.

    ## Reward
    At each turn -0.1 for a guess that is not right, and 1 for the one that is; the score at the end is 0. With kl_coef
    > 0 each step costs kl_coef * KL of the policy to the reference.

    ## Episode End
    Terminated by the right guess (`StopReason.DONE`), truncated after eight turns (`MAX_TURNS`).

    ## Information
    At each step `turn`, `turn_reward` and `reply`; at the end `score`, `prompt`, `completion` (the guesses, a line
    each), `turns`, `stop_reason`. The gold score is the return of the game: at best 0.7625 in the mean, by bisection.
    Evaluations report `turns`, the mean number of guesses.

    ## Arguments
    Those of every text environment: see textrl_gym.mdp.text_env.TextVectorEnv, with `max_turns` and `max_turn_tokens`.

    ## References
    Knuth, The Art of Computer Programming, volume 3, section 6.2.1: binary search.

    ## Version History
    * v0: first version
    """

    max_prompt_tokens = 1
    max_new_tokens = 2 * MAX_TURNS
    max_turns = MAX_TURNS
    max_turn_tokens = 1
    turn_markers = ("", "")
    model = "a GPT-2 made in code and taught by games"
    reward = "zero"
    gold = "textrl_gym.envs.guess_number:quickness"
    gold_scale = (0.0, 1.0)
    best_gold = 1 - COST * (fewest_guesses() - 1)
    kl_coef = 0.0

    def rows(self, split: str, dataset: str | None = None) -> Sequence[Row]:
        """A row for each hidden number, in every split."""
        sources.check_split(split)
        if dataset is not None:
            raise ValueError(f"GuessNumber-v0 has only its own prompts; dataset must be None, got {dataset!r}")
        return [{"prompt": "guess", "number": number} for number in range(1, N + 1)]

    def reply(self, row: Row, turns: Sequence[Message]) -> Reply:
        """Higher, lower, or the end."""
        guess = turns[-1]["content"]
        if guess not in NUMBERS:
            return Reply("what", -COST)
        if int(guess) == row["number"]:
            return Reply("", 1.0, done=True)
        return Reply("higher" if row["number"] > int(guess) else "lower", -COST)

    def load_tokenizer(self, name: str | None = None) -> PreTrainedTokenizerBase:
        if name is not None:
            return super().load_tokenizer(name)
        from textrl_gym.models import tiny

        return tiny.symbol_tokenizer(SYMBOLS)

    def load_model(
        self, name: str | None = None, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> nn.Module:
        if name is not None:
            return super().load_model(name, device=device, dtype=dtype)
        model = _model()
        model.load_state_dict(_taught())
        return model.to(device=device, dtype=dtype)
