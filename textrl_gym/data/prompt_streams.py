"""Which prompt each episode gets: a seeded random stream for each row, and groups of rows that share their prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge
from gymnasium.utils import seeding
from numpy.typing import ArrayLike

from textrl_gym.bounds import check, shown
from textrl_gym.core import PromptSource, Row


@dataclass(frozen=True)
class Prompt:
    """One drawn prompt."""

    index: int
    """Its place in the source."""
    row: Row
    ids: list[int]
    """Its tokens, as many as the budget allows."""


class PromptStreams:
    """B seeded streams of prompts.

    The rows of a group step through the same stream, so that the j-th episode of each has the group's j-th prompt.
    Autoresets may leave some rows of a group more episodes ahead than others; `rejoin` ends that.

    Args:
        source: the rows to draw from.
        encode: a row's prompt as token ids.
        num_envs: B.
        group_size: so many neighbouring rows are a group; divides B.
    """

    def __init__(
        self, source: PromptSource, encode: Callable[[Row], list[int]], num_envs: int, group_size: int
    ) -> None:
        self.source, self.encode = source, encode
        self.num_envs, self.group_size = num_envs, group_size
        self.rngs: list[np.random.Generator] = []
        """One generator a row; empty until the first seed() or draw()."""

    def seed(self, seed: int | Sequence[int | None] | None, chosen_B: np.ndarray | None = None) -> None:
        """Start the streams of the chosen rows anew (None: of all).

        Args:
            seed: s seeds row i with s + i; or a list of B seeds, None for a row that goes on as it was; None lets all
                rows go on. Rows of a group use their first row's seed. Rows never seeded get one from the system.

        Raises:
            ValueError: a list of another length.
        """
        if not isinstance(seed, tuple | list):
            check("seed", seed, Annotated[int | None, Ge(0)])
        seeds: list[int | None] = [None] * self.num_envs
        if isinstance(seed, Sequence):
            seeds = list(seed)
        elif seed is not None:
            seeds = [int(seed) + i for i in range(self.num_envs)]
        if len(seeds) != self.num_envs:
            raise ValueError(
                f"a list of seeds needs num_envs={self.num_envs} entries, got {len(seeds)}: {shown(seeds)}"
            )
        for one in seeds:
            check("seed", one, Annotated[int | None, Ge(0)])
        if not self.rngs:
            # Rows of a group get generators of their own with one seed, not one generator: each draws at its own pace.
            for _ in range(self.num_envs // self.group_size):
                _, entropy = seeding.np_random(None)
                self.rngs += [seeding.np_random(entropy)[0] for _ in range(self.group_size)]
        for row in range(self.num_envs):
            start = seeds[row - row % self.group_size]
            if start is not None and (chosen_B is None or chosen_B[row]):
                self.rngs[row] = seeding.np_random(int(start))[0]  # Gymnasium takes no integers of numpy

    def states(self) -> list[Any]:
        """The state of every row's stream, as JSON can hold it."""
        return [rng.bit_generator.state for rng in self.rngs]

    def restore(self, states: Sequence[Any]) -> None:
        """Go on from where states() was taken."""
        self.seed(0)  # the generators must be there; their seed does not matter, as each state is overwritten
        for rng, state in zip(self.rngs, states, strict=True):
            rng.bit_generator.state = state

    def draw(self, rows: Sequence[int], indices: ArrayLike | None = None) -> list[Prompt]:
        """The next prompt of each of the given rows.

        Args:
            rows: in rising order.
            indices: B integers that fix the prompts instead, leaving the streams where they are.

        Raises:
            ValueError: indices that are not B integers, or outside the source.
        """
        if not self.rngs:
            self.seed(None)
        if indices is None:
            # One draw for one episode whatever came before, so that a row's prompts do not depend on its neighbours.
            prompt_indices = [int(self.rngs[b].integers(len(self.source))) for b in rows]
        else:
            try:
                fixed_B = np.asarray(indices)
            except (TypeError, ValueError, RuntimeError) as error:  # lists of several lengths
                raise ValueError(f"prompt_indices must be {self.num_envs} integers, got {shown(indices)}") from error
            if fixed_B.shape != (self.num_envs,) or not np.issubdtype(fixed_B.dtype, np.integer):
                raise ValueError(f"prompt_indices must be {self.num_envs} integers, got {shown(indices)}")
            if fixed_B.min() < 0 or fixed_B.max() >= len(self.source):
                raise ValueError(f"prompt_indices must lie in [0, {len(self.source)}), got {shown(indices)}")
            prompt_indices = [int(fixed_B[b]) for b in rows]
        prompts: dict[int, Prompt] = {}  # rows of a group are read and encoded once
        for index in prompt_indices:
            if index not in prompts:
                row = self.source[index]
                prompts[index] = Prompt(index, row, self.encode(row))
        return [prompts[index] for index in prompt_indices]

    def rejoin(self, chosen_B: np.ndarray) -> None:
        """Let the rows of every group that is chosen as a whole go on from its first row's place in the stream."""
        if self.group_size == 1 or not self.rngs:
            return
        for first in range(0, self.num_envs, self.group_size):
            # A group of which only some rows begin anew keeps its places: its other rows are in the middle of episodes.
            if chosen_B[first : first + self.group_size].all():
                state = self.rngs[first].bit_generator.state
                for b in range(first + 1, first + self.group_size):
                    self.rngs[b].bit_generator.state = state
