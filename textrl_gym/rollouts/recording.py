"""Record episodes of a policy or an agent as trajectories."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from textrl_gym.core import Rollout
from textrl_gym.data.trajectories import Trajectory, trajectories_of
from textrl_gym.mdp.text_env import TextVectorEnv


def record(
    mdp: TextVectorEnv, play: Callable[..., Rollout], episodes: int, seed: int, device: torch.device
) -> Iterator[list[Trajectory]]:
    """Batches of so many trajectories in all: a function of the seed, in passes over the prompts in random orders.

    Args:
        mdp: the environment; its own streams of prompts are not touched.
        play: plays an episode in each row of an environment, as `Agent.play` does: without a KL penalty in the rewards.
        device: of the policy, whose random numbers are drawn there.
    """
    mdp = mdp.remake(min(mdp.num_envs, episodes), group_size=1)
    rng = np.random.default_rng(seed)
    generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
    size, rows = len(mdp.source), mdp.num_envs
    waiting = np.zeros(0, np.int64)
    for left in range(episodes, 0, -rows):
        while len(waiting) < rows:
            waiting = np.concatenate([waiting, rng.permutation(size)])
        indices, waiting = waiting[:rows], waiting[rows:]
        yield trajectories_of(play(mdp, generator=generator, prompt_indices=indices))[:left]
