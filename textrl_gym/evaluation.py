"""evaluate(): how good a policy is on prompts that it was not trained on, and how far from its reference it went."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textrl_gym import checkpoint, plugins
from textrl_gym.core import Rollout, StopReason
from textrl_gym.env import TextVectorEnv
from textrl_gym.policy import Policy
from textrl_gym.rewards import load_reward
from textrl_gym.rollout import collect, vector_env

ROWS = 64


class Evaluator:
    """Plays the same held-out prompts with the same random numbers for every policy or agent that it is given.

    Args:
        env: the text environment to evaluate on; its settings are kept but for the split.
        episodes: how many prompts, one completion of each.
        seed: of the prompts and of sampling.
        split: of the dataset.
    """

    def __init__(self, env: Any, episodes: int = 256, seed: int = 0, split: str = "validation") -> None:
        if episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {episodes}")
        self.mdp: TextVectorEnv = vector_env(env).remake(
            min(ROWS, episodes), split=split, group_size=1, array="torch", render_mode=None
        )
        self.episodes, self.seed = episodes, seed
        rng = np.random.default_rng(seed)
        size = len(self.mdp.source)
        self.indices = rng.choice(size, episodes, replace=episodes > size)
        embedded = self.mdp.settings["dataset"] is None  # a judge may need columns that other datasets lack
        judge = self.mdp.task.judge if embedded else None
        self.judge = None if judge is None else load_reward(judge, task=self.mdp.task, tokenizer=self.mdp.tokenizer)
        self._start: tuple[Policy, list[Rollout], Tensor] | None = None

    def play(self, player: Any, greedy: bool = False) -> list[Rollout]:
        """Rollouts of every prompt, in order, by a Policy or by an Agent's own `play`."""
        if isinstance(player, Policy):
            plays = functools.partial(collect, policy=player, kl_coef=0.0)
        else:
            plays = player.play
        generator = torch.Generator(player.device).manual_seed(self.seed)
        rollouts = []
        for first in range(0, self.episodes, self.mdp.num_envs):
            indices = self.indices[first : first + self.mdp.num_envs]
            wanted = np.resize(indices, self.mdp.num_envs)  # the last batch is filled up, and cut again
            rollout = plays(self.mdp, greedy=greedy, generator=generator, prompt_indices=wanted)
            rollouts.append(rollout.select(torch.arange(len(indices), device=player.device)))
        return rollouts

    def judged(self, rollouts: list[Rollout]) -> Tensor:
        """The judge's score of every completion (the training reward's, where the task has no judge). [episodes]"""
        scores = []
        for number, rollout in enumerate(rollouts):
            if self.judge is None:
                scores.append(rollout.score_B.cpu())
                continue
            first = number * self.mdp.num_envs
            rows = [self.mdp.source[int(i)] for i in self.indices[first : first + len(rollout)]]
            prompt_ids = [
                ids[mask].tolist() for ids, mask in zip(rollout.prompt_BP, rollout.prompt_mask_BP, strict=True)
            ]
            completion_ids = [ids[mask].tolist() for ids, mask in zip(rollout.token_BT, rollout.mask_BT, strict=True)]
            scores.append(self.mdp.score(rows, prompt_ids, completion_ids, self.judge)[0].cpu())
        return torch.cat(scores)

    def run(self, player: Any, greedy: bool = True) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics of a Policy or an Agent, and its completions with their scores.

        Returns:
            metrics: score (mean raw reward), judge (mean judge score, where the task has a judge), win_rate (share of
                prompts on which the judge prefers the policy's completion to the reference's, ties counting half),
                kl_sequence (nats, k1 summed over each sequence), kl_token, completion_tokens, eos_share, forward_passes
                (states that a model was asked about, for each token of the completions; 1 is plain sampling), and what
                an agent's own extra_metrics adds; with `greedy` also score_greedy and judge_greedy, of the most likely
                tokens.
            samples: a dict for each prompt.
        """
        reference = player.reference if isinstance(player, Policy) else player.policy.reference
        rollouts = self.play(player)
        judged = self.judged(rollouts)
        metrics = _means(rollouts)
        if not isinstance(player, Policy):
            metrics |= player.extra_metrics(rollouts)
        if self.judge is not None:
            metrics["judge"] = float(judged.mean())
        if reference is not None:
            _, start = self._played_start(reference)
            metrics["win_rate"] = float(((judged > start) + 0.5 * (judged == start)).mean())
        if greedy:
            argmax = self.play(player, greedy=True)
            metrics["score_greedy"] = float(torch.cat([r.score_B for r in argmax]).mean())
            if self.judge is not None:
                metrics["judge_greedy"] = float(self.judged(argmax).mean())
        return metrics, self._samples(rollouts, judged)

    def start(self, reference: Policy) -> list[dict[str, Any]]:
        """What the reference answered to each prompt, which the win rate is against: samples as those of `run`."""
        return self._samples(*self._played_start(reference))

    def _played_start(self, reference: Policy) -> tuple[list[Rollout], Tensor]:
        if self._start is None or self._start[0] is not reference:
            rollouts = self.play(reference)
            self._start = (reference, rollouts, self.judged(rollouts))
        return self._start[1:]

    def _samples(self, rollouts: list[Rollout], judged: Tensor) -> list[dict[str, Any]]:
        samples: list[dict[str, Any]] = []
        for rollout in rollouts:
            scores, stops, lengths = rollout.score_B.tolist(), rollout.stop_B.tolist(), rollout.mask_BT.sum(1).tolist()
            for prompt, completion, tokens, score, stop in zip(
                rollout.prompts, rollout.completions, lengths, scores, stops, strict=True
            ):
                index = int(self.indices[len(samples)])
                sample = {"index": index, "prompt": prompt, "completion": completion, "tokens": tokens, "score": score}
                sample |= {"stop_reason": StopReason(stop).name, "reference": self.mdp.source[index].get("completion")}
                if self.judge is not None:
                    sample["judge"] = float(judged[len(samples)])
                samples.append(sample)
        return samples


def _means(rollouts: list[Rollout]) -> dict[str, float]:
    episodes = sum(len(r) for r in rollouts)
    tokens = sum(r.num_tokens for r in rollouts)
    kl = sum(float(((r.logp_BT - r.ref_logp_BT) * r.mask_BT).sum()) for r in rollouts)
    passes = sum(r.num_tokens if r.passes_B is None else float(r.passes_B.sum()) for r in rollouts)
    ended = sum(int((r.stop_B == StopReason.EOS).sum()) for r in rollouts)
    return {
        "score": sum(float(r.score_B.sum()) for r in rollouts) / episodes,
        "kl_sequence": kl / episodes,
        "kl_token": kl / max(tokens, 1),
        "completion_tokens": tokens / episodes,
        "eos_share": ended / episodes,
        "forward_passes": passes / max(tokens, 1),
    }


def evaluate(
    agent_or_dir: Any, env: Any = None, episodes: int = 256, seed: int = 0, split: str = "validation"
) -> dict[str, float]:
    """Metrics of an agent on held-out prompts; see Evaluator.run.

    Args:
        agent_or_dir: an agent, or a folder that one was saved to.
        env: a text environment; None for the agent's own.
        episodes: prompts, one completion of each.
        seed: of prompts and sampling.
        split: of the dataset.
    """
    agent = load_agent(agent_or_dir, env) if isinstance(agent_or_dir, str | Path) else agent_or_dir
    metrics, _ = Evaluator(agent.env if env is None else env, episodes, seed, split).run(agent)
    return metrics


def load_agent(folder: str | Path, env: Any = None, **settings: Any) -> Any:
    """The agent saved in a folder, whatever its class."""
    return plugins.load_agent_class(checkpoint.read_state(folder)["agent"]).load(folder, env, **settings)
