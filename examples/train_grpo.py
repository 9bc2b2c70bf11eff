"""Train GRPO and compare it with its start."""

import sys

import textrl_gym
from textrl_gym.agents import GRPO


def main(env_id: str = "TLDRSummarize-v0", tokens: str = "200000", out: str = "runs/train_grpo") -> None:
    agent = GRPO(env_id, seed=0, out=out)
    print("before", textrl_gym.evaluate(agent, episodes=64))
    agent.learn(total_timesteps=int(tokens))  # one timestep is one generated token
    print("after", textrl_gym.evaluate(agent, episodes=64))


if __name__ == "__main__":
    main(*sys.argv[1:])
