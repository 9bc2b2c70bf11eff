"""Step a text environment by hand, as any Gymnasium environment: one action is one token."""

import sys

import gymnasium as gym

import textrl_gym  # noqa: F401 - registers the environments
from textrl_gym.policy.policy import Policy


def main(env_id: str = "TLDRSummarize-v0") -> None:
    env = gym.make(env_id)
    policy = Policy(env.unwrapped.task.load_model())  # type: ignore[attr-defined]  # or env.action_space.sample()
    observation, info = env.reset(seed=0)
    episode_over = False
    while not episode_over:
        batch = {name: value[None] for name, value in observation.items()}
        action, _ = policy.act(batch)
        observation, reward, terminated, truncated, info = env.step(int(action))
        episode_over = terminated or truncated
    print(info["prompt"], info["completion"], f"score {info['score']:.3f}, reward {reward:.3f}", sep="\n")
    env.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
