"""Simulated annotators: pairwise choices from gold scores, with the noise and the taste for length of people.

    P(a over b) = (1 - noise) * sigmoid(beta * (gold_a - gold_b) + length_preference * (len_a - len_b)) + noise / 2

The sigmoid is the model of Bradley and Terry (1952), "Rank analysis of incomplete block designs". `noise` is the share
of labels given without looking: AlpacaFarm (Dubois et al. 2023, arXiv:2305.14387) found that simulated annotators must
vary, a quarter of their labels being flipped, for reward over-optimisation to show as it does with people. Departure:
AlpacaFarm flips 25% of the labels whatever the pair. Here close pairs are mistaken more often than clear ones, and the
defaults bring the disagreement with gold to 25% over pairs of `worlds.tldr.mediocre_summary` of one post, where
their gold differs.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import ArrayLike, NDArray

from textrl_gym.bounds import check_settings


@dataclass(frozen=True)
class Annotators:
    """A pool of annotators.

    Raises:
        ValueError: for a setting outside the range given in its description.
    """

    beta: Annotated[float, Ge(0)] = 6.0
    """Logits per unit of gold: the larger, the sharper the eye. At least 0."""
    # 0.12 and not 0.1: with the bundled reward model agreement with held-out choices was 0.753, above the 65 to 75% of
    # people that the world is meant to have; with 0.12 it is 0.743.
    noise: Annotated[float, Ge(0), Le(1)] = 0.12
    """Share of labels that are a coin flip. 0 to 1."""
    length_preference: float = 0.02
    """Logits per word of difference in length: above 0 the longer text is preferred, which an agent can hack."""

    bias: Annotated[float, Ge(0)] = 1.0
    """Multiplies what the task's annotators overvalue (`Task.appeal`), such as certainty; 0: they are fair."""

    def __post_init__(self) -> None:
        check_settings(self)

    def probability(
        self, score_a: ArrayLike, score_b: ArrayLike, len_a: ArrayLike, len_b: ArrayLike
    ) -> NDArray[np.float64]:
        """P(a preferred), of the broadcast shape of gold scores and lengths in words."""
        gap = np.subtract(score_a, score_b, dtype=np.float64)
        words = np.subtract(len_a, len_b, dtype=np.float64)
        logit = self.beta * gap + self.length_preference * words
        # tanh does not overflow where exp(-logit) would.
        return np.asarray((1 - self.noise) * 0.5 * (1 + np.tanh(logit / 2)) + self.noise / 2)

    def prefer(
        self,
        score_a: ArrayLike,
        score_b: ArrayLike,
        len_a: ArrayLike,
        len_b: ArrayLike,
        rng: np.random.Generator,
    ) -> NDArray[np.bool_]:
        """True where a is chosen; one draw of `rng` a pair. The shape is that of `probability`, () for numbers."""
        chance = self.probability(score_a, score_b, len_a, len_b)
        return np.asarray(rng.random(chance.shape) < chance)
