"""evaluate(): how good a policy is on prompts that it was not trained on, and how far from its reference it went."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textrl_gym.core import RewardSpec, Rollout, Row, StopReason
from textrl_gym.evaluation.text_metrics import text_metrics
from textrl_gym.judges.judge import Answer, load_scorer, reward_of
from textrl_gym.mdp.text_env import TextVectorEnv, vector_env
from textrl_gym.policy.policy import Policy
from textrl_gym.registry import load_agent
from textrl_gym.rollouts.collect import collect
from textrl_gym.rollouts.scoring import token_entropy
from textrl_gym.stats.estimates import outcomes

ROWS = 64


class Evaluator:
    """Plays the same held-out prompts with the same random numbers for every policy or agent that it is given.

    Args:
        env: the text environment to evaluate on; its settings are kept but for the split.
        episodes: how many prompts, one completion of each.
        seed: of the prompts and of sampling.
        split: of the dataset.
        judge: a reward that judges, or "gold", the task's own; None: the task's own on its embedded prompts, and
            else the reward that is trained on.
    """

    def __init__(
        self,
        env: Any,
        episodes: int = 256,
        seed: int = 0,
        split: str = "validation",
        judge: RewardSpec | None = None,
    ) -> None:
        if episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {episodes}")
        self.mdp: TextVectorEnv = vector_env(env).remake(
            min(ROWS, episodes), split=split, group_size=1, array="torch", render_mode=None
        )
        self.episodes, self.seed = episodes, seed
        rng = np.random.default_rng(seed)
        size = len(self.mdp.source)
        self.indices = rng.choice(size, episodes, replace=episodes > size)
        mdp = self.mdp
        if judge is None and mdp.settings["dataset"] is None:  # a task's judge may need columns that others lack
            judge = mdp.task.judge
        given = {"task": mdp.task, "device": mdp.device, "tokenizer": mdp.tokenizer}
        self.judge = None if judge is None else load_scorer(judge, **given)
        self._start: tuple[Policy, list[Rollout], Tensor] | None = None
        self._human: Tensor | None = None

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
        """The judge's score of every completion (the training reward's, where there is no judge). [episodes]"""
        if self.judge is None:
            return torch.cat([rollout.score_B.cpu() for rollout in rollouts])
        scores = []
        for rows, prompt_ids, rollout in self._batches(rollouts):
            completion_ids = [ids[mask].tolist() for ids, mask in zip(rollout.token_BT, rollout.mask_BT, strict=True)]
            scores.append(self.mdp.scorer.score(rows, prompt_ids, completion_ids, self.judge).score_N.cpu())
        return torch.cat(scores)

    def human(self, rollouts: list[Rollout]) -> Tensor:
        """The same scores of the rows' reference texts, computed once; nan where there is none to score. [episodes]

        A text that does not fit behind its prompt into the environment's places is none: no reward need take it.
        """
        if self._human is None:
            reward, scores = self.judge or self.mdp.reward_model, []
            for rows, prompt_ids, _ in self._batches(rollouts):
                score_B = torch.full((len(rows),), math.nan)
                texts = [self._reference(row, ids) for row, ids in zip(rows, prompt_ids, strict=True)]
                there = [b for b, text in enumerate(texts) if text is not None]
                if there:
                    columns = [{**rows[b], "prompt_ids": prompt_ids[b]} for b in there]
                    score_B[there] = reward_of(reward, columns, [text for text in texts if text is not None])
                scores.append(score_B)
            self._human = torch.cat(scores)
        return self._human

    def _reference(self, row: Row, prompt_ids: list[int]) -> Answer | None:
        text, places = row.get("completion"), self.mdp.max_prompt_tokens + self.mdp.max_new_tokens
        if not text:
            return None
        ids = (*self.mdp.tokenizer(text, add_special_tokens=False)["input_ids"], self.mdp.eos_id)
        return Answer(text, ids) if len(prompt_ids) + len(ids) <= places else None

    def _batches(self, rollouts: list[Rollout]) -> Iterator[tuple[list[Row], list[list[int]], Rollout]]:
        """Each rollout with its prompts' rows and tokens."""
        for number, rollout in enumerate(rollouts):
            first = number * self.mdp.num_envs
            rows = [self.mdp.source[int(i)] for i in self.indices[first : first + len(rollout)]]
            masks = zip(rollout.prompt_BP, rollout.prompt_mask_BP, strict=True)
            yield rows, [ids[mask].tolist() for ids, mask in masks], rollout

    def run(self, player: Any, greedy: bool = True) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics of a Policy or an Agent, and its completions with their scores.

        Returns:
            metrics: score (mean raw reward), reward/NAME (of a reward that is a mixture, the mean unweighted score of
                each part), judge (mean judge score, where the task has a judge), win_rate (share of prompts on which
                the judge prefers the policy's completion to the reference's, ties counting half), win_rate_human (the
                same against the row's reference text, over the rows that have one), kl_sequence (nats, k1 summed over
                each sequence), kl_token, entropy_token (nats; see `entropy`), completion_tokens, eos_share,
                forward_passes (states that a model was asked about, for each token of the completions; 1 is plain
                sampling), those of evaluation.text_metrics, and what an agent's own extra_metrics adds; with `greedy`
                also score_greedy and judge_greedy, of the most likely tokens.
            samples: a dict for each prompt.
        """
        policy = player if isinstance(player, Policy) else player.policy
        rollouts = self.play(player)
        judged = self.judged(rollouts)
        samples = self._samples(rollouts, judged)
        metrics = _means(rollouts) | {"entropy_token": entropy(policy, rollouts)}
        metrics |= text_metrics([s["completion"] for s in samples], [s["reference"] for s in samples])
        if not isinstance(player, Policy):
            metrics |= player.extra_metrics(rollouts)
        if self.judge is not None:
            metrics["judge"] = float(judged.mean())
        if policy.reference is not None:
            metrics["win_rate"] = float(outcomes(judged, self._played_start(policy.reference)[1]).mean())
        human = self.human(rollouts)
        if bool((there := ~human.isnan()).any()):
            metrics["win_rate_human"] = float(outcomes(judged[there], human[there]).mean())
        if greedy:
            argmax = self.play(player, greedy=True)
            metrics["score_greedy"] = float(torch.cat([r.score_B for r in argmax]).mean())
            if self.judge is not None:
                metrics["judge_greedy"] = float(self.judged(argmax).mean())
        return metrics, samples

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


def entropy(policy: Policy, rollouts: list[Rollout]) -> float:
    """Mean entropy, in nats, of the distributions that a policy gives where the tokens of rollouts stand.

    That is what was sampled from, at the temperature of training, unless an agent's play samples from something else:
    best_of_n picks among whole samples, value_guided and mcts search. There it is the policy's, at the places where
    they went.
    """
    total = sum(float(token_entropy(rollout, policy).sum()) for rollout in rollouts)
    return total / max(sum(rollout.num_tokens for rollout in rollouts), 1)


def _means(rollouts: list[Rollout]) -> dict[str, float]:
    episodes = sum(len(r) for r in rollouts)
    tokens = sum(r.num_tokens for r in rollouts)
    kl = sum(float(((r.logp_BT - r.ref_logp_BT) * r.mask_BT).sum()) for r in rollouts)
    passes = sum(r.num_tokens if r.model_calls_B is None else float(r.model_calls_B.sum()) for r in rollouts)
    ended = sum(int((r.stop_B == StopReason.EOS).sum()) for r in rollouts)
    return {
        "score": sum(float(r.score_B.sum()) for r in rollouts) / episodes,
        "kl_sequence": kl / episodes,
        "kl_token": kl / max(tokens, 1),
        "completion_tokens": tokens / episodes,
        "eos_share": ended / episodes,
        "forward_passes": passes / max(tokens, 1),
    } | {
        f"reward/{name}": sum(float(r.components[name].sum()) for r in rollouts) / episodes
        for name in rollouts[0].components
    }


def evaluate(
    agent_or_dir: Any, env: Any = None, episodes: int = 256, seed: int = 0, split: str = "validation"
) -> dict[str, float]:
    """Metrics of an agent on held-out prompts; see Evaluator.run.

    Args:
        agent_or_dir: an agent, or a folder that one was saved to.
        env: an id or a text environment; None for the agent's own. Of an id the environment has the agent's tokenizer
            and device.
        episodes: prompts, one completion of each.
        seed: of prompts and sampling.
        split: of the dataset.
    """
    of_agent = None if isinstance(env, str) else env  # an id is made for the agent, so the agent is loaded first
    agent = load_agent(agent_or_dir, of_agent) if isinstance(agent_or_dir, str | Path) else agent_or_dir
    if isinstance(env, str):
        env = vector_env(env, tokenizer=agent.env.tokenizer, device=str(agent.device), array="torch")
    metrics, _ = Evaluator(agent.env if env is None else env, episodes, seed, split).run(agent)
    return metrics
