"""ensemble: the scores of several reward models as one. "ensemble:FOLDER", "ensemble:worst:FOLDER".

Of the members' normalised scores r_1 ... r_M (Coste et al. 2023, arXiv:2310.02743, equations 3 to 5):

    mean          m = 1/M sum_i r_i
    worst         min_i r_i
    uncertainty   m - c 1/M sum_i (r_i - m)^2      "ensemble:uncertainty:0.1:FOLDER" for another c

Their c is 0.5 for best-of-n and 0.1 for PPO. What members agree on is not corrected: models that share a pretraining
share errors too, and those that differ in it make the better ensemble (Eisenstein et al. 2023, arXiv:2312.09244).

The folder holds ensemble.json, {"members": [folder, ...], "combine": ..., "coefficient": c}, and the members, reward
models each with a normalisation of its own; `textrl-gym reward-model --ensemble M` writes it, and a list of other
folders may be written by hand.

Shape legend: M members, B rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from textrl_gym.rewards import reward_model
from textrl_gym.rewards.reward_model import RewardModel, TokenizerOwner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENSEMBLE_FILE = "ensemble.json"
COEFFICIENT = 0.5  # of Coste et al. for best-of-n; they take 0.1 for PPO
Combination = Literal["mean", "worst", "uncertainty"]


def check_combination(how: str, coefficient: float) -> None:
    """Raise ValueError for a name that is none, or a coefficient that is no number of at least 0."""
    if how not in get_args(Combination):
        raise ValueError(f"unknown combination of an ensemble {how!r}; allowed: {', '.join(get_args(Combination))}")
    known = isinstance(coefficient, int | float) and not isinstance(coefficient, bool)
    if not (known and math.isfinite(coefficient) and coefficient >= 0):
        raise ValueError(f"the coefficient of an ensemble must be a finite number >= 0, got {coefficient!r}")


def combine(score_MB: Tensor, how: str, coefficient: float = COEFFICIENT) -> Tensor:
    """One score a row, float32 [B]; see the head of this file."""
    assert score_MB.ndim == 2 and len(score_MB) > 0, score_MB.shape
    if how == "worst":
        return score_MB.amin(0)
    mean_B = score_MB.mean(0)
    # The biased variance, 1/M, as in their equation 5.
    return mean_B - coefficient * score_MB.var(0, unbiased=False) if how == "uncertainty" else mean_B


class Ensemble:
    """Several reward models; a callable of TRL's signature."""

    def __init__(self, members: Sequence[RewardModel], how: str = "mean", coefficient: float = COEFFICIENT) -> None:
        """Raises ValueError without members, and for a combination that does not exist."""
        if not members:
            raise ValueError("an ensemble needs at least one reward model")
        check_combination(how, coefficient)
        self.members, self.how, self.coefficient = list(members), how, coefficient

    def scoring_models(self) -> list[nn.Module]:
        """The models of all members."""
        return [model for member in self.members for model in member.scoring_models()]

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> Tensor:
        """Combined scores, float32 [B] on the CPU."""
        score_MB = torch.stack([member(prompts, completions, **columns) for member in self.members])
        return combine(score_MB, self.how, self.coefficient)


def make(
    argument: str | None,
    *,
    task: TokenizerOwner | None,
    device: str | torch.device,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Ensemble:
    """The ensemble of a folder.

    Raises:
        ValueError: no folder of an ensemble, an unknown combination, or a member that is no reward model.
    """
    how, coefficient, folder = parse_argument(argument)
    settings = read(folder)
    if tokenizer is None and task is not None:
        tokenizer = task.load_tokenizer()
    # Each member has its own normalisation, so that scores of equal scale are combined: an unnormalised member of
    # large scale would decide alone.
    keep = getattr(task, "keep_suffix", "")
    members = [
        reward_model.load_reward_model(str(folder / name), device=device, env_tokenizer=tokenizer, keep_suffix=keep)
        for name in settings["members"]
    ]
    return Ensemble(
        members, how or settings["combine"], settings["coefficient"] if coefficient is None else coefficient
    )


def parse_argument(argument: str | None) -> tuple[str | None, float | None, Path]:
    """COMBINATION:FOLDER, uncertainty:COEFFICIENT:FOLDER or FOLDER alone; None for what is not said."""
    if not argument:
        raise ValueError("reward 'ensemble' needs a folder: ensemble:FOLDER, or ensemble:worst:FOLDER")
    # At each colon the whole rest is tried as a folder first, so that a folder's name may hold colons.
    how, colon, folder = argument.partition(":")
    if not colon or Path(argument).expanduser().is_dir():
        return None, None, Path(argument).expanduser()
    coefficient, colon, rest = folder.partition(":")
    if not colon or Path(folder).expanduser().is_dir():
        check_combination(how, COEFFICIENT)
        return how, None, Path(folder).expanduser()
    try:
        number = float(coefficient)
    except ValueError:
        raise ValueError(f"reward 'ensemble:{argument}': {coefficient!r} is no coefficient") from None
    check_combination(how, number)
    if how != "uncertainty":
        raise ValueError(f"reward 'ensemble:{argument}': only uncertainty takes a coefficient")
    return how, number, Path(rest).expanduser()


def read(folder: Path) -> dict[str, Any]:
    """What ensemble.json says.

    Raises:
        ValueError: there is none, or it does not hold the three keys.
    """
    file = folder / ENSEMBLE_FILE
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} is no ensemble of reward models: it holds no {ENSEMBLE_FILE}")
    settings = json.loads(file.read_text(encoding="utf-8"))
    if (
        not isinstance(settings, dict)
        or set(settings) != {"members", "combine", "coefficient"}
        or not settings["members"]
    ):
        form = '{"members": [folder, ...], "combine": name, "coefficient": number}'
        raise ValueError(f"{str(file)!r} must hold {form}, it holds {settings}")
    check_combination(settings["combine"], settings["coefficient"])
    return settings
