"""Active selection: which questions to ask, out of more than can be answered.

    uncertainty    the pairs on whose order the reward model is least sure: the smallest |mean over members of the gap|
    disagreement   those on whose gap the members of an ensemble differ most: the largest standard deviation

of the gap, the difference of a reward model's normalised scores of the two completions. With the Bradley-Terry model
the first are those whose label has the most entropy; the second leave out pairs that are close to a tie in truth, on
which all members agree that they are (Gleave and Irving 2022, arXiv:2203.07472, found little gained by ensembles that
share their pretraining).

Shape legend: M members, N questions of two completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from textrl_gym import files
from textrl_gym.data.labels import Item
from textrl_gym.rewards import load_reward
from textrl_gym.rewards.ensemble import ENSEMBLE_FILE

if TYPE_CHECKING:
    from textrl_gym.mdp.task import Task

Selection = Literal["random", "uncertainty", "disagreement"]


def members_of(folder: Path) -> list[Path]:
    """The reward models of a folder: an ensemble's, or the one that it holds."""
    file = folder / ENSEMBLE_FILE
    return [folder / name for name in files.read_json(file)["members"]] if file.is_file() else [folder]


def gaps(items: Sequence[Item], folder: Path, task: Task, device: str = "cpu") -> NDArray[np.float64]:
    """Normalised score of the first completion minus that of the second, by each reward model of a folder. [M, N]

    Raises:
        ValueError: a question has other than two completions, or a conversation as its prompt.
    """
    for item in items:
        if len(item.completions) != 2 or not isinstance(item.prompt, str):
            raise ValueError(f"questions are chosen among pairs with texts as prompts; {item.id!r} is another")
    prompts = [item.prompt for item in items for _ in range(2)]
    texts = [text for item in items for text in item.completions]
    gap_MN = []
    for member in members_of(folder):
        reward = load_reward(f"reward_model:{member}", task=task, device=device)
        score_N2 = reward.score([str(prompt) for prompt in prompts], texts, {}).total_B.double().numpy().reshape(-1, 2)
        gap_MN.append(score_N2[:, 0] - score_N2[:, 1])
    return np.stack(gap_MN)


def most_useful(gap_MN: NDArray[np.float64], how: Selection, count: int, seed: int = 0) -> list[int]:
    """The places of the questions to ask, the most useful first.

    Args:
        gap_MN: of the pool.
        how: "random" takes `count` of them by the seed.

    Raises:
        ValueError: fewer questions than `count`, or one reward model, which cannot disagree.
    """
    members, pool = gap_MN.shape
    if pool < count:
        raise ValueError(f"count must be at most the {pool} questions that there are, got {count}")
    if how == "random":
        return np.random.default_rng(seed).permutation(pool)[:count].tolist()
    if how == "disagreement" and members < 2:
        raise ValueError("selection by disagreement needs an ensemble of reward models: ensemble=2 or more")
    use_N = -np.abs(gap_MN.mean(0)) if how == "uncertainty" else gap_MN.std(0, ddof=1)
    return np.argsort(-use_N, kind="stable")[:count].tolist()
