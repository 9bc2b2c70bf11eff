"""Quark: quantized reward conditioning (Lu et al. 2022, arXiv:2205.13636, section 2 and algorithm 1).

Completions are scored, the pool of all of them is parted into K quantiles of score, and each is learnt behind a token
r_k of its quantile; then the policy is asked for the best one. beta = kl_coef holds it near the reference p_0:

    L = E_k E_{(x, y) in D^k} [ - log pi(y | x, r_k) + beta sum_t KL(p_0(. | x, y_<t) || pi(. | x, y_<t, r_k)) ]   (2)

The KL is exact over the vocabulary, and the reference is its first argument. One round of the algorithm is an update:
1. Exploration: completions behind r_K, the best quantile's token; in the first round the initial policy's, without one.
2. Quantization: their scores are ranked among the pool's.
3. Learning: episodes of the pool, of each quantile as many, are learnt with their tokens.

Evaluation and `predict` condition on r_K too; before the first update they are the initial policy. The tokens are rows
of the model's embedding (policy.quantile_policy), so that a saved model has them. A timestep is a token of exploration.

Departures: equal scores are of one quantile, the highest that any of them reaches, where the authors' ranks part them
at random: scores of 0 and 1 would else teach the same under several tokens. The pool holds the newest `pool_size`
episodes. Losses are means over the tokens of a minibatch instead of sums over sequences. There is no entropy bonus.

Shape legend: B rows, T response places, N episodes of the pool, n positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Unpack

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from textrl_gym import functional, kl
from textrl_gym.core import Rollout
from textrl_gym.data.trajectories import (
    Trajectory,
    as_rollout,
    read_trajectories,
    trajectories_of,
    write_trajectories,
)
from textrl_gym.policy.policy import CHUNK_NUMBERS, Policy
from textrl_gym.policy.quantile_policy import QuantilePolicy
from textrl_gym.training.agent import Agent, PolicySettings
from textrl_gym.training.config import AgentConfig
from textrl_gym.training.minibatch import Minibatch, sum_of

FILE = "pool.jsonl"


@dataclasses.dataclass(frozen=True)
class QuarkConfig(AgentConfig):
    """Settings of Quark."""

    quantiles: Annotated[int, Ge(2)] = 5
    """K, the number of quantiles and of tokens for them."""
    pool_size: Annotated[int, Ge(1)] = 2_048
    """Episodes of the pool; the oldest leave it. Much older ones make the best quantile an easy one."""
    replay: Annotated[int, Ge(1)] = 4
    """Episodes learnt in an update, as a multiple of those sampled for it."""
    minibatches: Annotated[int, Ge(1)] = 4
    """Optimizer steps in each pass over the learnt episodes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Both freeze the embedding, and with it the new tokens: the best quantile could not be asked for.
        for name in ("lora_rank", "frozen_layers"):
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} freezes the quantile tokens' embeddings: leave it out")


def quantile_of(score_N: Tensor, quantiles: int) -> Tensor:
    """ceil(K F(s)) - 1 with F(s) the share of scores up to s: from 0, the worst, to K - 1. int64 [N]."""
    assert score_N.ndim == 1, score_N.shape
    ranked_N = score_N.sort().values
    # In whole numbers: K F(s) just above an integer by rounding would be the next quantile.
    up_to_N = torch.searchsorted(ranked_N, score_N, right=True)
    return (up_to_N * quantiles + len(score_N) - 1) // len(score_N) - 1


def draw_evenly(quantile_N: Tensor, size: int, rng: np.random.Generator) -> list[int]:
    """Places of so many episodes: a quantile at random of those that there are, and one of its episodes; repeatedly."""
    members = [(quantile_N == k).nonzero().squeeze(1).tolist() for k in quantile_N.unique().tolist()]
    chosen = rng.integers(len(members), size=size)
    return [members[k][rng.integers(len(members[k]))] for k in chosen]


def quark_loss(logp_BT: Tensor, kl_BT: Tensor, part: Minibatch, kl_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Means over tokens of -log pi and of kl_coef times the KL of the reference to the policy."""
    assert logp_BT.shape == kl_BT.shape == part.mask_BT.shape, (logp_BT.shape, kl_BT.shape, part.mask_BT.shape)
    nll, divergence = -part.mean(logp_BT), part.mean(kl_BT)
    loss = nll + kl_coef * divergence
    return loss, {"loss": loss.detach(), "nll": nll.detach(), "forward_kl": divergence.detach()}


def logp_and_forward_kl(policy: Policy, reference: Policy, part: Rollout) -> tuple[Tensor, Tensor]:
    """log pi of the actions, and KL(p_0 || pi) of the distributions that they were taken from; both [B, T]."""
    mask_BT, token_N = part.mask_BT, part.token_BT[part.mask_BT]
    own_ND = policy.hidden(part)[mask_BT]
    with torch.no_grad():
        ref_ND = reference.hidden(part)[mask_BT]

    def of_chunk(own_nD: Tensor, ref_nD: Tensor, token_n: Tensor) -> tuple[Tensor, Tensor]:
        own_nV, ref_nV = policy.logits(own_nD).log_softmax(-1), reference.logits(ref_nD).log_softmax(-1)
        return own_nV.gather(1, token_n[:, None]).squeeze(1), kl.estimate("full", ref_nV, own_nV)

    # Two distributions a place: with a large vocabulary those of a micro-batch would be gigabytes.
    size = max(1, CHUNK_NUMBERS // policy.vocab_size)
    if len(token_N) <= size:
        flat = of_chunk(own_ND, ref_ND, token_N)
    else:
        chunks = zip(own_ND.split(size), ref_ND.split(size), token_N.split(size), strict=True)
        parts = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
        flat = torch.cat([logp_n for logp_n, _ in parts]), torch.cat([kl_n for _, kl_n in parts])
    logp_BT, kl_BT = (x_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, x_N) for x_N in flat)
    return logp_BT, kl_BT


class Quark(Agent):
    """Quantized reward conditioning; see the head of this file."""

    Config = QuarkConfig
    config: QuarkConfig
    policy: QuantilePolicy
    kl_where = "loss"
    by_server = False  # the token before the prompt that asks for a quantile has no number that a server knows
    shardable = False  # its loss reads the policy's hidden states
    pool: list[Trajectory]

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.pool = []
        """The newest episodes, the newest last."""

    def _new_policy(self, model: torch.nn.Module, **settings: Unpack[PolicySettings]) -> Policy:
        return QuantilePolicy(model, quantiles=self.config.quantiles, **settings)

    def update(self, rollout: Rollout) -> dict[str, float]:
        # 1. The pool with the new episodes, and the quantile of each.
        self.pool = [*self.pool, *_without_logp(trajectories_of(rollout))][-self.config.pool_size :]
        # float64, in which equal sums of rewards are equal.
        return_N = torch.tensor([one.total for one in self.pool], dtype=torch.float64)
        quantile_N = quantile_of(return_N, self.config.quantiles)

        # 2. Of each quantile as many.
        places = draw_evenly(quantile_N, self.config.replay * len(rollout), self.shuffler)
        learnt = as_rollout([self.pool[i] for i in places], self.device)
        batch = learnt.with_(quantile_B=quantile_N[places].to(self.device))

        # 3. Supervised steps behind the tokens, near the reference.
        reference = self.policy.reference
        assert reference is not None
        steps = []
        for minibatch in self.minibatches(batch):
            parts = []
            for part in minibatch.micro_batches():
                logp_BT, kl_BT = logp_and_forward_kl(self.policy, reference, part)
                loss, metrics = quark_loss(logp_BT, kl_BT, part, self.kl.coef_in_loss)
                loss.backward()
                parts.append(metrics)
            steps.append(sum_of(parts) | {"grad_norm": self.step()})

        # 4. From now on the best is asked for.
        self._ask_for_the_best()
        best_n = return_N[quantile_N == self.config.quantiles - 1]
        return functional.mean_of(steps) | {"pool": float(len(self.pool)), "best_quantile": float(best_n.mean())}

    def _ask_for_the_best(self) -> None:
        self.policy.quantile = self.config.quantiles - 1

    # -- save and load ------------------------------------------------------------------------------------------------

    def save_extra(self, folder: Path) -> None:
        if self.pool:
            write_trajectories(folder / FILE, self.pool, self.env.tokenizer)

    def load_extra(self, folder: Path) -> None:
        if (folder / FILE).is_file():
            self.pool = read_trajectories(folder / FILE, self.env.tokenizer).trajectories
            self._ask_for_the_best()


def _without_logp(trajectories: list[Trajectory]) -> list[Trajectory]:
    """What the loss does not read need not be in every checkpoint."""
    return [dataclasses.replace(one, logp=[]) for one in trajectories]
