"""Best-of-n: n samples of each prompt, of which the reward's favourite is the answer (Stiennon et al. 2020,
arXiv:2009.01325). Nothing is trained; n completions are generated and scored for each one given.

With F(s) = P(score <= s) and F(s-) = P(score < s) under pi, and ties broken uniformly, the answer's distribution is

    pi_n(y) = pi(y) (F(s_y)^n - F(s_y-)^n) / P(score = s_y)                  (Beirami et al. 2024, arXiv:2401.01879)
    KL(pi_n || pi) <= log n - (n - 1) / n

The right side was long taken for the KL itself. It is only a bound, equal to it where no two completions have the same
score (each of which is then improbable); with ties, or few possible completions, the KL is smaller: at most
-log P(score = best).

What a rollout says of it: F is unknown for texts, so that logp_BT is log pi plus the bound, spread evenly over the
tokens. Then the mean of sum(logp - ref_logp) is the bound plus E[log pi - log pi_ref], no less than KL(pi_n || pi_ref);
and where pi is its own reference it is the bound.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from textrl_gym.core import Rollout, Row
from textrl_gym.mdp.text_env import TextVectorEnv, vector_env
from textrl_gym.rollouts.collect import complete, rollout_of
from textrl_gym.stats.overoptimization import best_of_n_kl_bound
from textrl_gym.training.agent import Agent, EnvLike, Indices
from textrl_gym.training.config import AgentConfig


@dataclasses.dataclass(frozen=True)
class BestOfNConfig(AgentConfig):
    """Settings of best-of-n."""

    n: Annotated[int, Ge(1)] = 16
    """Completions generated and scored for each prompt."""
    rows_at_once: Annotated[int, Ge(1)] = 1_024
    """Completions generated side by side: memory, not result. All of one prompt always are."""


def best_of_n_logprobs(logp_Y: Tensor, score_Y: Tensor, n: int) -> Tensor:
    """log pi_n of every possible completion, as at the head of this file; float64 [Y].

    Args:
        logp_Y: log pi of all there are; their probabilities sum to 1.
        score_Y: their scores.
    """
    assert logp_Y.shape == score_Y.shape and logp_Y.ndim == 1, (logp_Y.shape, score_Y.shape)
    # Differences of F(s)^n are tiny for rare completions: in float32 they would cancel to 0, and their log to -inf.
    logp_Y = logp_Y.double()
    if not abs(float(logp_Y.logsumexp(0))) < 1e-3:
        raise ValueError(f"the probabilities of all completions must sum to 1, got {float(logp_Y.exp().sum()):.6g}")
    _, level_Y = score_Y.unique(return_inverse=True)  # rising
    # Completions of one score share their chance to be taken in proportion to pi.
    at_S = torch.zeros(int(level_Y.max()) + 1, dtype=torch.float64).index_add_(0, level_Y, logp_Y.exp())
    up_to_S = at_S.cumsum(0)
    chosen_S = up_to_S**n - (up_to_S - at_S) ** n
    return logp_Y + (chosen_S.log() - at_S.log())[level_Y]


def best_of_n_kl_exact(logp_Y: Tensor, score_Y: Tensor, n: int) -> float:
    """KL(pi_n || pi) in nats where every completion can be written down; arguments as best_of_n_logprobs."""
    chosen_Y = best_of_n_logprobs(logp_Y, score_Y, n)
    return float((chosen_Y.exp() * (chosen_Y - logp_Y.double())).nansum())  # 0 log 0 is 0


def best_rows(score_B: Tensor, n: int) -> Tensor:
    """The first row with the best score of each n neighbours, which samples in any order make a uniform choice of ties.

    int64 [B / n].
    """
    assert score_B.ndim == 1 and len(score_B) % n == 0, (score_B.shape, n)
    return score_B.view(-1, n).argmax(1) + torch.arange(0, len(score_B), n, device=score_B.device)


class BestOfN(Agent):
    """The best of n samples by the environment's reward; see the head of this file. Greedy, all n are the same one."""

    Config = BestOfNConfig
    config: BestOfNConfig
    trains = False

    def play(
        self,
        env: EnvLike,
        *,
        greedy: bool = False,
        generator: torch.Generator | None = None,
        prompt_indices: Indices = None,
    ) -> Rollout:
        if greedy:
            return super().play(env, greedy=True, prompt_indices=prompt_indices)
        mdp, n = vector_env(env), self.config.n
        rows, prompt_ids = mdp.draw(prompt_indices)
        # As many numbers as rows, drawn at once: with n = 1 those of plain sampling.
        uniform_XT = torch.rand((len(rows) * n, mdp.max_new_tokens), generator=generator, device=self.device)
        size = max(1, self.config.rows_at_once // n)
        parts = []
        for first in range(0, len(rows), size):
            some = slice(first, first + size)
            parts.append(self._best(mdp, rows[some], prompt_ids[some], uniform_XT[first * n : (first + size) * n]))
        group_B = torch.arange(len(rows), device=self.device) // mdp.group_size
        return dataclasses.replace(Rollout.cat(parts), group_B=group_B)

    def _best(self, mdp: TextVectorEnv, rows: list[Row], prompt_ids: list[list[int]], uniform_XT: Tensor) -> Rollout:
        """n samples of each prompt, and the best of them with the cost of all."""
        n = self.config.n
        all_rows, all_ids = [row for row in rows for _ in range(n)], [ids for ids in prompt_ids for _ in range(n)]
        out = complete(mdp, self.policy, all_rows, all_ids, uniform_XT)
        rollout = rollout_of(mdp, self.policy, all_rows, all_ids, out)
        model_calls_B = rollout.mask_BT.sum(1).float().view(-1, n).sum(1)
        # By the reward with its missing-EOS penalty, which is what the agents that train are trained on.
        best = rollout.select(best_rows(rollout.reward_BT.sum(1), n))
        length_B1 = best.mask_BT.sum(1, keepdim=True)
        logp_BT = best.logp_BT + best_of_n_kl_bound(n) / length_B1 * best.mask_BT
        return dataclasses.replace(best, logp_BT=logp_BT, model_calls_B=model_calls_B)

    def extra_metrics(self, rollouts: list[Rollout]) -> dict[str, float]:
        generated = sum(float(r.mask_BT.sum() if r.model_calls_B is None else r.model_calls_B.sum()) for r in rollouts)
        return {
            "kl_bound": best_of_n_kl_bound(self.config.n),
            "scored_completions": float(self.config.n),
            "generated_tokens": generated / sum(len(r) for r in rollouts),
        }
