"""MaskedPolicy: a policy that samples only from the top-p tokens of an older copy of itself.

    pi(a | s)  is proportional to  pi_theta(a | s) [a in top_p(pi_psi(. | s))]

pi_psi, the mask policy, is theta as it was at the last refresh(). Sampling, log-probabilities, entropy and KL are all
of pi, so that what is trained is what was sampled from. The two models' hidden states go side by side through
everything that is done with hidden states, the mask policy's after the policy's own; only `logits` tells them apart.

Shape legend: N positions in any order, V vocabulary, D the width of one model, 2D of both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from textrl_gym.core import Rollout
from textrl_gym.models import lora
from textrl_gym.policy.decoders import Decoder
from textrl_gym.policy.policy import Policy

FORBIDDEN = -1e30
"""Logit of a token that is not allowed: finite, so that nothing becomes NaN; its probability is 0."""


def top_p_set(logits_NV: Tensor, top_p: float) -> Tensor:
    """The fewest most likely tokens with a probability of at least top_p together. bool [N, V]; 1 allows all."""
    if top_p >= 1:
        return torch.ones_like(logits_NV, dtype=torch.bool)
    prob_NV, order_NV = logits_NV.softmax(-1).sort(-1, descending=True)
    before_NV = prob_NV.cumsum(-1) - prob_NV  # of the first token 0, so that one is always there
    return torch.zeros_like(order_NV, dtype=torch.bool).scatter(1, order_NV, before_NV < top_p)


class MaskedPolicy(Policy):
    """A policy masked by the top-p set of an older one; see the head of this file.

    Args:
        model, settings: as of Policy.
        top_p: in (0, 1].
    """

    def __init__(self, model: nn.Module, *, top_p: float, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.top_p = top_p
        mask = Policy(
            lora.frozen_copy(self.model),
            temperature=self.temperature,
            vocab_size=self.vocab_size,
            dtype=self.dtype,
        )
        self._mask = (mask,)  # outside nn.Module's registry, as the reference is

    @property
    def mask(self) -> Policy:
        """The mask policy."""
        return self._mask[0]

    def try_out(self, max_prompt_tokens: int, max_new_tokens: int, turns: bool = False) -> None:
        super().try_out(max_prompt_tokens, max_new_tokens, turns)
        self.mask.try_out(max_prompt_tokens, max_new_tokens, turns)

    @torch.no_grad()
    def refresh(self) -> None:
        """Let the mask policy become the policy as it is now."""
        for old, now in zip(self.mask.model.parameters(), self.model.parameters(), strict=True):
            old.copy_(now)

    @property
    def samples_exactly(self) -> bool:
        # Rounding may put a token at the edge of the set on its other side: ratios start from the training forward's.
        return super().samples_exactly and self.top_p >= 1

    def logits(self, hidden_ND: Tensor, token_N: Tensor | None = None) -> Tensor:
        own_ND, mask_ND = hidden_ND.chunk(2, -1)
        with torch.no_grad():
            allowed_NV = top_p_set(self.mask.logits(mask_ND), self.top_p)
            if token_N is not None:
                # An action of before the last refresh may be outside the set now: log 0 would be no ratio.
                allowed_NV = allowed_NV.scatter(1, token_N[:, None], True)
        return super().logits(own_ND).masked_fill(~allowed_NV, FORBIDDEN)

    def value_of(self, hidden_ND: Tensor) -> Tensor:
        assert self.value_head is not None
        return super().value_of(hidden_ND[..., : self.value_head.in_features])

    def hidden(self, rollout: Rollout) -> Tensor:
        with torch.no_grad():
            mask_BTD = self.mask.hidden(rollout)
        return torch.cat([super().hidden(rollout), mask_BTD], -1)

    def last_hidden(self, input_BL: Tensor, mask_BL: Tensor) -> Tensor:
        return torch.cat([super().last_hidden(input_BL, mask_BL), self.mask.last_hidden(input_BL, mask_BL)], -1)

    def decoder(self, prompt_UP: Tensor, mask_UP: Tensor, source_B: Tensor, length: int) -> Decoder:
        inputs = (prompt_UP, mask_UP, source_B, length)
        return _Pair(super().decoder(*inputs), self.mask.decoder(*inputs))


class _Pair:
    """Two decoders of the same rows; hidden states side by side."""

    def __init__(self, own: Decoder, mask: Decoder) -> None:
        self.own, self.mask, self.compaction_threshold = own, mask, own.compaction_threshold
        self.first_BD = torch.cat([own.first_BD, mask.first_BD], -1)

    def step(self, token_B: Tensor) -> Tensor:
        return torch.cat([self.own.step(token_B), self.mask.step(token_B)], -1)

    def keep(self, keep_k: Tensor) -> None:
        self.own.keep(keep_k)
        self.mask.keep(keep_k)
