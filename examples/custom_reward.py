"""Your own reward: a function of TRL's signature, given by itself or mixed with others by weight.

From a shell, in this folder:
    textrl-gym train grpo TLDRSummarize-v0 --total-timesteps 100000 --env.reward custom_reward:calm=1.0,length=-0.01
"""

import sys
from typing import Any

import gymnasium as gym
import numpy as np

import textrl_gym  # noqa: F401 - registers the environments


def calm(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """1 for a text in lower case without exclamation marks. `columns` has the task's other columns, and token ids."""
    loud = [sum(c.isupper() or c == "!" for c in text) / max(len(text), 1) for text in completions]
    return [1.0 - share for share in loud]


def main(env_id: str = "TLDRSummarize-v0") -> None:
    for reward in (calm, {"custom_reward:calm": 1.0, "length": -0.01}):
        envs = gym.make_vec(env_id, num_envs=4, reward=reward)
        envs.reset(seed=0)
        envs.action_space.seed(0)
        ended = np.zeros(4, dtype=bool)
        while not ended.all():
            _, rewards, terminated, truncated, infos = envs.step(envs.action_space.sample())
            for row in np.flatnonzero((terminated | truncated) & ~ended):
                print(f"{envs.unwrapped.reward_model.name}: {rewards[row]:+.3f} {infos['completion'][row]!r}")  # type: ignore[attr-defined]
            ended |= terminated | truncated
        envs.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
