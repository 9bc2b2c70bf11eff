"""collect(): prompts -> tokens -> score -> KL-shaped reward, B complete episodes at once.

The fast driver of the MDP that TextVectorEnv.step() defines: given the same uniform random numbers, both give the same
tokens, rewards, ends and infos (a test). Shape legend: U unique prompts, B rows, P prompt places, T response places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from textrl_gym import functional, processes
from textrl_gym.bounds import shown
from textrl_gym.core import Rollout, Row
from textrl_gym.mdp.text_env import TextVectorEnv, vector_env
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts import sampler
from textrl_gym.rollouts.dialogues import Dialogues
from textrl_gym.rollouts.phases import phase
from textrl_gym.rollouts.sampler import Sampler
from textrl_gym.rollouts.scoring import token_rewards, with_passes


def collect(
    env: object,
    policy: Policy,
    *,
    kl_coef: float | None = None,
    greedy: bool = False,
    uniform_BT: Tensor | None = None,
    generator: torch.Generator | None = None,
    prompt_indices: ArrayLike | None = None,
    sample: Sampler = sampler.generate,
) -> Rollout:
    """Play one complete episode in each row of an environment.

    Args:
        env: a text environment (TextVectorEnv or TextEnv, wrapped or not). Its rows' random streams give the prompts,
            as reset() would; the episodes that it is stepping through are not touched otherwise.
        policy: whose completions. The KL is measured to the policy's reference, or else to the environment's.
        kl_coef: the penalty's coefficient; None for the environment's own.
        greedy: take the most likely tokens.
        uniform_BT: the random numbers in [0, 1) to sample with, T >= max_new_tokens; drawn where None.
        generator: on the policy's device, to draw them from.
        prompt_indices: fixes the prompts, as reset(options={"prompt_indices": ...}) does.
        sample: completes the prompts; a rollout server's method (textrl_gym.rollouts.vllm) in place of the policy's own
            forward passes.

    Of several processes each plays a block of whole groups, with the prompts and random numbers that these rows have in
    one process, and all get the whole rollout.

    Returns:
        a Rollout on the policy's device, cut to its longest prompt and completion.

    Raises:
        ValueError: kl_coef > 0 and neither the policy nor the environment has a reference; or a model cannot be run on
            texts of the environment's budgets.
    """
    mdp = vector_env(env)
    _require_policy(policy)
    kl_coef = mdp.kl_coef if kl_coef is None else kl_coef
    if kl_coef > 0 and policy.reference is None and mdp.reference is None:
        raise ValueError(f"kl_coef={kl_coef} needs a reference: Policy(model, reference=...) or the environment's")

    policy.try_out(mdp.max_prompt_tokens, mdp.max_new_tokens, mdp.turns is not None)
    settings: dict[str, Any] = {"greedy": greedy, "uniform_BT": uniform_BT, "generator": generator}
    return Collection(mdp, policy, prompt_indices=prompt_indices, sample=sample, **settings).rollout(kl_coef)


def _require_policy(policy: object) -> None:
    """Raise ValueError where an agent or a bare model stands in a policy's place."""
    if isinstance(policy, Policy):
        return
    hint = "give agent.policy" if isinstance(getattr(policy, "policy", None), Policy) else "make one by Policy(model)"
    # A model's repr has hundreds of lines.
    what = type(policy).__name__ if isinstance(policy, torch.nn.Module) else shown(policy)
    raise ValueError(f"policy must be a Policy, got {what}: {hint}")


class Collection:
    """One rollout on its way: drawn when this is made, sampled by `finish` or before that by a thread of `begin`.

    Arguments as of `collect`.
    """

    def __init__(
        self,
        mdp: TextVectorEnv,
        policy: Policy,
        *,
        greedy: bool = False,
        uniform_BT: Tensor | None = None,
        generator: torch.Generator | None = None,
        prompt_indices: ArrayLike | None = None,
        sample: Sampler = sampler.generate,
    ) -> None:
        # 1. Prompts and random numbers of all rows, whichever of them this process plays.
        rows, prompt_ids = mdp.draw(indices=prompt_indices)
        if uniform_BT is None and not greedy:
            # All numbers at once, before any token: how many a row uses then changes nothing for the others.
            shape = (len(rows), mdp.max_new_tokens)
            uniform_BT = torch.rand(shape, generator=generator, device=policy.device)
        block = _own_rows(len(rows), mdp.group_size)
        self.mdp, self.policy, self._sampler = mdp, policy, sample
        self.rows, self.prompt_ids = rows[block], prompt_ids[block]
        self._uniform_bT = None if greedy or uniform_BT is None else uniform_BT[block]
        self._sampling: Future[sampler.Completions] | None = None
        self._completions: sampler.Completions | None = None

    def begin(self, pool: Executor) -> Collection:
        """Sample in a thread; only a server can, which asks nothing of the policy's weights."""
        if self.rows:
            self._sampling = pool.submit(self._complete)
        return self

    def finish(self) -> None:
        """2. A completion of each prompt: those of the thread, when they are there, or sampled now."""
        if self._completions is not None or not self.rows:
            return
        if self._sampling is None:
            self._completions = self._complete()
            return
        with phase("rollout"):  # of which the thread tells nobody
            self._completions = self._sampling.result()

    def _complete(self) -> sampler.Completions:
        return complete(self.mdp, self.policy, self.rows, self.prompt_ids, self._uniform_bT, self._sampler)

    def rollout(self, kl_coef: float) -> Rollout:
        """3. Scores, reference and rewards, by the policy as it is now; the rollout of all processes."""
        if not self.rows:  # fewer groups than processes
            return _joined(None, self.policy.device)
        self.finish()
        assert self._completions is not None
        part = rollout_of(self.mdp, self.policy, self.rows, self.prompt_ids, self._completions, kl_coef=kl_coef)
        return _joined(part, self.policy.device)


def _own_rows(rows: int, group_size: int) -> slice:
    """The rows of the groups that this process plays; all of them where there is one process."""
    groups = processes.share(rows // group_size)
    return slice(groups.start * group_size, groups.stop * group_size)


def _joined(part: Rollout | None, device: torch.device) -> Rollout:
    """The rollouts of all processes below each other; None: this process has played no row."""
    if processes.size() == 1:
        assert part is not None
        return part
    # By way of the CPU: a tensor keeps the number of its GPU, which is another process's.
    parts = processes.gather(None if part is None else part.to(torch.device("cpu")))
    return Rollout.cat([part for part in parts if part is not None]).to(device)


def complete(
    mdp: TextVectorEnv,
    policy: Policy,
    rows: Sequence[Row],
    prompt_ids: list[list[int]],
    uniform_BT: Tensor | None,
    sample: Sampler = sampler.generate,
) -> sampler.Completions:
    """A completion of each prompt within mdp's budget and stop strings; equal prompts are computed once.

    Args:
        rows, prompt_ids: what mdp.draw() gave.
        uniform_BT: the random numbers in [0, 1) to sample with; None: the most likely tokens.
    """
    unique = functional.unique_ids(prompt_ids, policy.device)
    with phase("rollout"):
        return sample(
            policy,
            *unique,
            None if uniform_BT is None else uniform_BT.to(policy.device),
            max_new_tokens=mdp.max_new_tokens,
            end_ids=mdp.end_ids,
            stopped=mdp.scorer.completes_stop if mdp.stop else None,
            dialogues=None if mdp.turns is None else Dialogues(mdp.turns, rows, mdp.max_new_tokens, policy.device),
        )


def rollout_of(
    mdp: TextVectorEnv,
    policy: Policy,
    rows: Sequence[Row],
    prompt_ids: list[list[int]],
    out: sampler.Completions,
    *,
    kl_coef: float = 0.0,
    guided: bool = False,
) -> Rollout:
    """Completions with their scores, reference log-probabilities and rewards; neighbours in mdp's groups.

    Args:
        mdp: whose reward scores them.
        policy: whose reference, or else mdp's, the KL is measured to.
        rows, prompt_ids: what mdp.draw() gave.
        kl_coef: the penalty's coefficient.
        guided: out.logp_BT is of another distribution than the policy's: it is kept as it is, and so is out.value_BT.
    """
    prompt_UP, prompt_mask_UP, source_B = functional.unique_ids(prompt_ids, policy.device)
    # 1. Scores, by the same function as step().
    present_BT = out.mask_BT if out.reply_BT is None else out.mask_BT | out.reply_BT
    lengths = present_BT.sum(1).tolist()
    completion_ids = [ids[:n] for ids, n in zip(out.token_BT.tolist(), lengths, strict=True)]
    masks = [mask[:n] for mask, n in zip(out.mask_BT.tolist(), lengths, strict=True)] if out.turns else []
    with phase("scoring"):
        scores = mdp.scorer.score(rows, prompt_ids, completion_ids, turns=out.turns, action_masks=masks)
    rollout = Rollout(
        prompt_BP=prompt_UP[source_B],
        prompt_mask_BP=prompt_mask_UP[source_B],
        ref_logp_BT=out.logp_BT,
        kl_BT=torch.zeros_like(out.logp_BT),
        score_B=scores.score_N.to(policy.device),
        reward_BT=torch.zeros_like(out.logp_BT),
        group_B=torch.arange(len(rows), device=policy.device) // mdp.group_size,
        prompts=[row["prompt"] for row in rows],
        completions=scores.texts,
        components={name: part_B.to(policy.device) for name, part_B in scores.components.items()},
        logged=scores.logged,
        **vars(out),
    ).trim()

    # 2. One teacher-forced pass each for the policy (where something of it is missing) and the reference.
    # What the sampler gave is the training forward's to 1e-5 in float32; in bf16 ratios would spread by 5%, and a
    # rollout server has kernels of its own.
    exact = (policy.samples_exactly and out.sampler_logp_BT is None) or guided
    rollout = with_passes(rollout, policy, policy.reference or mdp.reference, mdp.kl_estimator, exact, guided)
    return dataclasses.replace(rollout, reward_BT=token_rewards(rollout, kl_coef, mdp.missing_eos_penalty))
