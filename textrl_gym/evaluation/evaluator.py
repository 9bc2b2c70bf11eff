"""evaluate(): how good a policy is on prompts that it was not trained on, and how far from its reference it went."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from annotated_types import Ge
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor

from textrl_gym import files, processes
from textrl_gym.bounds import Seed, check
from textrl_gym.core import RewardSpec, Rollout, Row, StopReason
from textrl_gym.data.encoding import encode_completions, prompt_of
from textrl_gym.data.trajectories import Trajectory, as_rollout
from textrl_gym.evaluation.metrics import measure
from textrl_gym.judges.judge import Answer, load_scorer, reward_of
from textrl_gym.mdp.text_env import TextVectorEnv, vector_env
from textrl_gym.policy.policy import Policy
from textrl_gym.registry import load_agent
from textrl_gym.rewards import RewardFunction
from textrl_gym.rollouts.collect import collect
from textrl_gym.rollouts.scoring import token_entropy
from textrl_gym.stats.estimates import outcomes

PARALLEL_PROMPTS = 64  # played at a time: as many as training's evaluations have, which are one batch then


class Player(Protocol):
    """An agent, as evaluation sees it: a policy, and a way of its own to decode with it."""

    @property
    def env(self) -> TextVectorEnv: ...
    @property
    def policy(self) -> Policy: ...
    @property
    def device(self) -> torch.device: ...

    def play(
        self,
        env: TextVectorEnv,
        *,
        greedy: bool = False,
        generator: torch.Generator | None = None,
        prompt_indices: Sequence[int] | np.ndarray | None = None,
    ) -> Rollout: ...

    def extra_metrics(self, rollouts: list[Rollout]) -> dict[str, float]: ...


class Evaluator:
    """Plays the same held-out prompts with the same random numbers for every policy or agent that it is given.

    Args:
        env: the text environment to evaluate on; its settings are kept but for the split.
        episodes: how many prompts, one completion of each.
        seed: of the prompts and of sampling.
        split: of the dataset.
        gold: the reward that is the gold score, or "gold", the task's own; None: the task's own on its embedded
            prompts, and else `Task.gold_of_dataset` or, without one, the reward that is trained on.
    """

    def __init__(
        self,
        env: str | gym.Env[Any, Any] | VectorEnv[Any, Any, Any],
        episodes: int = 256,
        seed: int = 0,
        split: str = "validation",
        gold: RewardSpec | None = None,
    ) -> None:
        check("episodes", episodes, Annotated[int, Ge(1)])
        check("seed", seed, Seed)
        self.mdp: TextVectorEnv = vector_env(env).remake(
            min(PARALLEL_PROMPTS, episodes), split=split, group_size=1, array="torch", render_mode=None
        )
        self.episodes, self.seed = episodes, seed
        self.indices = evaluation_prompts(len(self.mdp.source), episodes, seed)
        mdp = self.mdp
        if gold is None:  # a task's gold score may need columns that others' rows lack
            gold = mdp.task.gold if mdp.settings["dataset"] is None else mdp.task.gold_of_dataset
        self.gold = None if gold is None else self.scorer_of(gold)
        self._start: tuple[Policy, list[Rollout], Tensor] | None = None
        self._human: Tensor | None = None

    def play(self, player: Policy | Player, greedy: bool = False, sampling_seed: int | None = None) -> list[Rollout]:
        """Rollouts of every prompt, in order, by a Policy or by an Agent's own `play`.

        Args:
            greedy: the most likely tokens.
            sampling_seed: of sampling alone, for another completion of each prompt; None: the evaluator's own.
        """
        plays: Callable[..., Rollout]
        if isinstance(player, Policy):
            plays = functools.partial(collect, policy=player, kl_coef=0.0)
        else:
            plays = player.play
        # The same random numbers for every player: differences of two evaluations are then of the policies, prompt by
        # prompt, and their standard error is that of paired differences.
        seed = self.seed if sampling_seed is None else sampling_seed
        generator = torch.Generator(player.device).manual_seed(seed)
        rollouts = []
        for first in range(0, self.episodes, self.mdp.num_envs):
            indices = self.indices[first : first + self.mdp.num_envs]
            batch_indices = np.resize(indices, self.mdp.num_envs)  # the last batch is filled up, and cut again
            rollout = plays(self.mdp, greedy=greedy, generator=generator, prompt_indices=batch_indices)
            rollouts.append(rollout.select(torch.arange(len(indices), device=player.device)))
        return rollouts

    def scorer_of(self, spec: RewardSpec | None) -> RewardFunction | None:
        """A reward that scores completions of these prompts; None: the gold score."""
        if spec is None:
            return self.gold
        mdp = self.mdp
        return load_scorer(spec, task=mdp.task, device=mdp.device, tokenizer=mdp.tokenizer)

    def gold_scores(self, rollouts: list[Rollout], reward: RewardFunction | None = None) -> Tensor:
        """The gold score of every completion (the training reward's, where there is none). [episodes]

        Args:
            reward: another score instead, of `scorer_of`.
        """
        reward = self.gold if reward is None else reward
        if reward is None:
            return torch.cat([rollout.outcome_B.cpu() for rollout in rollouts])
        scores = []
        for rows, prompt_ids, rollout in self._batches(rollouts):
            scores += processes.gather(self._scores_of(rows, prompt_ids, rollout, reward))
        return torch.cat(scores)

    def _scores_of(
        self, rows: list[Row], prompt_ids: list[list[int]], whole: Rollout, reward: RewardFunction
    ) -> Tensor:
        """A reward's scores of this process's share of a rollout's completions, [b] on the CPU."""
        # A judge behind an endpoint would else be asked by every process.
        block = processes.share(len(rows))
        if block.start == block.stop:
            return torch.zeros(0)
        rollout = whole.select(torch.arange(block.start, block.stop, device=whole.group_B.device))
        both = list(zip(rollout.token_BT, rollout.mask_BT, rollout.present_BT, strict=True))
        completion_ids = [ids[there].tolist() for ids, _, there in both]
        talks: dict[str, Any] = {"turns": rollout.turns}
        if rollout.turns:
            talks["action_masks"] = [own[there].tolist() for _, own, there in both]
        return self.mdp.scorer.score(rows[block], prompt_ids[block], completion_ids, reward, **talks).score_N.cpu()

    def human(self, rollouts: list[Rollout]) -> Tensor:
        """The same scores of the rows' reference texts, computed once; nan where there is none to score. [episodes]

        A text that does not fit behind its prompt into the environment's places is none: no reward need take it.
        """
        if self._human is None:
            self._human = processes.from_first(lambda: self._human_scores(rollouts))
        return self._human

    def _human_scores(self, rollouts: list[Rollout]) -> Tensor:
        reward, scores = self.gold or self.mdp.reward_model, []
        for rows, prompt_ids, _ in self._batches(rollouts):
            score_B = torch.full((len(rows),), math.nan)
            texts = [self._reference(row, ids) for row, ids in zip(rows, prompt_ids, strict=True)]
            there = [b for b, text in enumerate(texts) if text is not None]
            if there:
                columns = [{**rows[b], "prompt_ids": prompt_ids[b]} for b in there]
                score_B[there] = reward_of(reward, columns, [text for text in texts if text is not None])
            scores.append(score_B)
        return torch.cat(scores)

    def _reference(self, row: Row, prompt_ids: list[int]) -> Answer | None:
        text, places = row.get("completion"), self.mdp.max_prompt_tokens + self.mdp.max_new_tokens
        if not text or self.mdp.turns is not None:  # a text is no conversation
            return None
        # With EOS, as a completion that ended: a reward model has seen its texts so.
        ends = self.mdp.end_ids
        (ids,) = encode_completions(prompt_of(row), [text], self.mdp.tokenizer, end_ids=ends, unknown="skip")
        return Answer(text, tuple(ids)) if len(prompt_ids) + len(ids) <= places else None

    def _batches(self, rollouts: list[Rollout]) -> Iterator[tuple[list[Row], list[list[int]], Rollout]]:
        """Each rollout with its prompts' rows and tokens."""
        for number, rollout in enumerate(rollouts):
            first = number * self.mdp.num_envs
            rows = [self.mdp.source[int(i)] for i in self.indices[first : first + len(rollout)]]
            masks = zip(rollout.prompt_BP, rollout.prompt_mask_BP, strict=True)
            yield rows, [ids[mask].tolist() for ids, mask in masks], rollout

    def run(self, player: Policy | Player, greedy: bool = True) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics of a Policy or an Agent, and its completions with their scores.

        Returns:
            metrics: those of textrl_gym.evaluation.metrics. Beside what is computed there: entropy_token (see
                `mean_entropy`), reward/NAME (the mean of each part of a mixed reward), gold (where the task has a gold
                score), win_rate (share of prompts on which the gold score prefers the completion to the reference
                model's, ties counting half), win_rate_human (the same against the row's reference text, over the rows
                that have one), what an agent's extra_metrics adds, and with `greedy` score_greedy and gold_greedy, of
                the most likely tokens.
            samples: a dict for each prompt.
        """
        with self.mdp.reward_model.apart():
            return self._run(player, greedy)

    def _run(self, player: Policy | Player, greedy: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
        policy = player if isinstance(player, Policy) else player.policy
        rollouts = self.play(player)
        logged = self.mdp.reward_model.take_metrics()  # before others play
        metrics, samples = self._scored(rollouts, policy.reference, sampled=True)
        metrics |= {"entropy_token": mean_entropy(policy, rollouts)} | logged
        if not isinstance(player, Policy):
            metrics |= player.extra_metrics(rollouts)
        if greedy:
            argmax = self.play(player, greedy=True)
            metrics["score_greedy"] = float(torch.cat([r.score_B for r in argmax]).mean())
            if self.gold is not None:
                metrics["gold_greedy"] = float(self.gold_scores(argmax).mean())
        return metrics, samples

    def of_texts(
        self, trajectories: Sequence[Trajectory], reference: Policy | None = None
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics of the episodes of a player without a policy, one for each prompt, and its completions.

        As those of `run`, but for what needs log-probabilities, and nothing greedy.

        Args:
            trajectories: of the prompts of this evaluation, in their order; see `narrow`.
            reference: whose completions the win rate is against; None: no win rate.
        """
        assert len(trajectories) == self.episodes, (len(trajectories), self.episodes)
        rows = self.mdp.num_envs
        batches = [trajectories[first : first + rows] for first in range(0, len(trajectories), rows)]
        with self.mdp.reward_model.apart():
            return self._scored([as_rollout(batch, self.mdp.device) for batch in batches], reference, sampled=False)

    def narrow(self, indices: Sequence[int]) -> None:
        """Evaluate on these prompts alone from now on: places in the split."""
        self.indices, self.episodes = np.array(indices, np.int64), len(indices)
        self._start, self._human = None, None

    def _scored(
        self, rollouts: list[Rollout], reference: Policy | None, sampled: bool
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics and samples of completions, whoever has written them; sampled: by a policy that gave its logp_BT."""
        gold_N = self.gold_scores(rollouts)
        samples = self._samples(rollouts, gold_N)
        metrics = measure(rollouts, samples, sampled) | mean_components(rollouts)
        if self.gold is not None:
            metrics["gold"] = float(gold_N.mean())
        metrics |= self._of_task(samples)
        if reference is not None:
            metrics["win_rate"] = float(outcomes(gold_N, self._played_start(reference)[1]).mean())
        human = self.human(rollouts)
        if bool((there := ~human.isnan()).any()):
            metrics["win_rate_human"] = float(outcomes(gold_N[there], human[there]).mean())
        return metrics, samples

    def _of_task(self, samples: list[dict[str, Any]]) -> dict[str, float]:
        """The task's own measures of its embedded prompts, whose rows have the columns that they need."""
        if self.mdp.settings["dataset"] is not None:
            return {}
        rows = [self.mdp.source[sample["index"]] for sample in samples]
        return self.mdp.task.measures(rows, [sample["completion"] for sample in samples])

    def start(self, reference: Policy) -> list[dict[str, Any]]:
        """What the reference answered to each prompt, which the win rate is against: samples as those of `run`."""
        return self._samples(*self._played_start(reference))

    def _played_start(self, reference: Policy) -> tuple[list[Rollout], Tensor]:
        # Kept: the reference is frozen, and its completions are wanted at each evaluation of a run.
        if self._start is None or self._start[0] is not reference:
            rollouts = self.play(reference)
            self._start = (reference, rollouts, self.gold_scores(rollouts))
        return self._start[1:]

    def _samples(self, rollouts: list[Rollout], gold_N: Tensor) -> list[dict[str, Any]]:
        samples: list[dict[str, Any]] = []
        for rollout in rollouts:
            first = len(samples)
            scores, stops, lengths = rollout.score_B.tolist(), rollout.stop_B.tolist(), rollout.mask_BT.sum(1).tolist()
            for prompt, completion, tokens, score, stop in zip(
                rollout.prompts, rollout.completions, lengths, scores, stops, strict=True
            ):
                index = int(self.indices[len(samples)])
                sample = {"index": index, "prompt": prompt, "completion": completion, "tokens": tokens, "score": score}
                sample |= {"stop_reason": StopReason(stop).name, "reference": self.mdp.source[index].get("completion")}
                row = len(samples) - first
                if rollout.turns:
                    sample["turns"] = rollout.turns[row]
                if rollout.logged:
                    sample["logged"] = {name: _as_json(items[row]) for name, items in rollout.logged.items()}
                if self.gold is not None:
                    sample["gold"] = float(gold_N[len(samples)])
                samples.append(sample)
        return samples


def evaluation_prompts(size: int, episodes: int, seed: int) -> NDArray[np.int64]:
    """Which prompts of a split an evaluation has, as places in it; each once, unless there are too few. [episodes]"""
    # A generator of its own, and not reset()'s streams: the prompts must not depend on how many rows there are.
    return np.random.default_rng(seed).choice(size, episodes, replace=episodes > size)


def mean_components(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Mean unweighted score of each part of a mixed reward, of the completions that it applies to: reward/NAME."""
    parts = {name: torch.cat([r.components[name] for r in rollouts]) for name in rollouts[0].components}
    return {f"reward/{name}": float(part_B.nanmean()) for name, part_B in parts.items() if not part_B.isnan().all()}


def _as_json(value: Any) -> Any:
    """A value that a reward logged, as a line of the samples can hold it."""
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        value = value.item()
    return value if files.jsonable(value) else str(value)


def mean_entropy(policy: Policy, rollouts: list[Rollout]) -> float:
    """Mean entropy, in nats, of the distributions that a policy gives where the tokens of rollouts stand.

    That is what was sampled from, at the temperature of training, unless an agent's play samples from something else:
    best_of_n picks among whole samples, value_guided and mcts search. There it is the policy's, at the places where
    they went.
    """
    total = sum(float(token_entropy(rollout, policy).sum()) for rollout in rollouts)
    return total / max(sum(rollout.num_tokens for rollout in rollouts), 1)


def evaluate(
    agent_or_dir: Player | str | Path,
    env: str | gym.Env[Any, Any] | VectorEnv[Any, Any, Any] | None = None,
    episodes: int = 256,
    seed: int = 0,
    split: str = "validation",
    *,
    trust_code: bool = False,
) -> dict[str, float]:
    """Metrics of an agent on held-out prompts; see Evaluator.run.

    Args:
        agent_or_dir: an agent, or a folder that one was saved to.
        env: an id or a text environment; None for the agent's own. Of an id the environment has the agent's tokenizer
            and device.
        episodes: prompts, one completion of each.
        seed: of prompts and sampling.
        split: of the dataset.
        trust_code: import what the agent's folder names, though it is not part of textrl_gym; see Agent.load.
    """
    of_agent = None if isinstance(env, str) else env  # an id is made for the agent, so the agent is loaded first
    agent: Player
    if isinstance(agent_or_dir, str | Path):
        agent = load_agent(agent_or_dir, of_agent, trust_code=trust_code)
    else:
        agent = agent_or_dir
    if isinstance(env, str):
        own = agent.env
        named = {"tokenizer": own.tokenizer, "eos_token_id": own.end_ids, "device": str(agent.device)}
        env = vector_env(env, **named, array="torch")
    metrics, _ = Evaluator(agent.env if env is None else env, episodes, seed, split).run(agent)
    return metrics
