"""Value-guided decoding: the policy's tokens weighed by what PPO's critic says of the text that they lead to.

    q(a | s) is proportional to pi(a | s) exp(weight V(s, a)),   a among the top_k of pi(. | s)

V(s, a) is the critic's value of the state after a: the score that it expects, less the KL penalties still to come. This
is the token-wise form of controlled decoding (Mudgal et al. 2023, arXiv:2310.17022), with the critic that PPO leaves
behind (Liu et al. 2023, arXiv:2309.15028) for their prefix scorer. weight 0 and all tokens as candidates is sampling
from the policy.

Departures:

- Their prefix scorer learns the score alone; PPO's critic has the KL penalty in it. The penalty of a itself is not:
  pi is where q starts, and `weight` says how far it may go.
- Candidates are the top_k tokens, each of which costs one evaluation of the critic; theirs are all of them.
- V after the end of a text means nothing to a critic that was never asked there: see `end_value`.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from textrl_gym.core import StopReason
from textrl_gym.training.guided_decoding import CriticAgent, CriticConfig, Endings, States


@dataclasses.dataclass(frozen=True)
class ValueGuidedConfig(CriticConfig):
    """Settings of value-guided decoding."""

    weight: Annotated[float, Ge(0)] = 2.0
    """Of the critic's value against the policy's log-probability, in nats for each unit of the score."""


def guided_logprobs(logp_BK: Tensor, value_BK: Tensor, weight: float) -> Tensor:
    """log q of the candidates, which sum to 1. [B, K]"""
    assert logp_BK.shape == value_BK.shape and logp_BK.ndim == 2, (logp_BK.shape, value_BK.shape)
    return (logp_BK + weight * value_BK).log_softmax(1)


class ValueGuided(CriticAgent):
    """Samples tokens by policy and critic; greedy, takes the most likely one. See the head of this file."""

    Config = ValueGuidedConfig
    config: ValueGuidedConfig

    def next_token(
        self, states: States, endings: Endings, row_b: list[int], texts: list[list[int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        now = states.now
        token_bK = self.candidates(now.logp_BV)
        values, calls_b = [], torch.zeros_like(now.value_B)
        # A candidate at a time for all rows: side by side, K candidates would need K copies of the rows' caches.
        for token_b in token_bK.unbind(1):
            # 1. What is over has no state after it.
            longer = [[*ids, token] for ids, token in zip(texts, token_b.tolist(), strict=True)]
            stops = endings.stops(longer)
            runs_b = torch.tensor(stops, device=self.device) == StopReason.RUNNING
            # 2. The critic's word on all else.
            value_b = endings.values(row_b, longer, stops, now.value_B)
            values.append(torch.where(runs_b, states.values(token_b), value_b) if runs_b.any() else value_b)
            calls_b += runs_b
        return (
            token_bK,
            guided_logprobs(now.logp_BV.gather(1, token_bK), torch.stack(values, 1), self.config.weight),
            calls_b,
        )
