"""QuantilePolicy: a policy that is told by a token in front of the prompt how good its completion is to be.

    pi(a | s, k) = pi_theta(a | r_k, s),    r_1 ... r_K new tokens, and pi(a | s) = pi_theta(a | s) without one

The tokens are K new rows of the model's embedding, so that saving, loading and training the model does so with them.
They are inputs and never actions: the logits are cut to the tokenizer's vocabulary, where padded rows are cut already,
and observations, rollouts and the environment know nothing of them. They are put in where a model's inputs are: in
teacher-forced passes, in a decoder's prompts and in single steps.

Shape legend: B rows, U unique prompts, P prompt positions, L positions of an observation, D hidden width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from textrl_gym.core import Rollout
from textrl_gym.models import lora
from textrl_gym.policy.decoders import Decoder
from textrl_gym.policy.policy import Policy

COUNT = "quantile_tokens"
"""Field of a model's configuration: how many rows of its embedding, its last ones, are quantile tokens."""
PLAIN = -1
"""The quantile of a row that has no token in front."""


def add_tokens(model: Any, count: int) -> None:
    """Give a causal LM of transformers embeddings of so many quantile tokens, where it has none.

    Raises:
        ValueError: it has another number of them.
    """
    known = getattr(model.config, COUNT, 0)
    if known not in (0, count):
        raise ValueError(f"the model has {known} quantile tokens: give quantiles={known}, or another model")
    if known:
        return
    old = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(len(old) + count, mean_resizing=False)
    with torch.no_grad():
        # Near the embeddings that there are: a model has no use for an input of another scale.
        noise = torch.randn(count, old.shape[1]).to(old)
        model.get_input_embeddings().weight[-count:] = old.mean(0) + noise * old.std(0)
    setattr(model.config, COUNT, count)


class QuantilePolicy(Policy):
    """A policy with a quantile token in front of its prompts; see the head of this file.

    Args:
        model, reference, settings: as of Policy. The reference has no token in front.
        quantiles: K.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module | Literal["copy"] | None = None,
        *,
        quantiles: int,
        **settings: Any,
    ) -> None:
        # Before the rows are added: a loaded checkpoint has the task's own model as its reference, and products of
        # matrices of another shape are rounded otherwise.
        frozen = lora.frozen_copy(model) if reference == "copy" else reference
        add_tokens(model, quantiles)
        super().__init__(model, frozen, **settings)
        # Where an encoder's prompt ends is known by the places of observations, which have one more with a token.
        self.require_one_text("take quantile tokens")
        self.quantiles = quantiles
        self.first_id = self.model.get_input_embeddings().weight.shape[0] - quantiles
        self.quantile = PLAIN
        """Of all that is sampled and of rollouts that say nothing else: 0, the worst, to K - 1, or PLAIN."""

    def try_out(self, max_prompt_tokens: int, max_new_tokens: int, turns: bool = False) -> None:
        # The last action is never an input, so that the token in front needs no position more than texts have.
        super().try_out(max_prompt_tokens + 1, max_new_tokens - 1, turns)

    # -- a token in front ---------------------------------------------------------------------------------------------

    def _in_front(self, input_BL: Tensor, mask_BL: Tensor, quantile_B: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and their mask with each row's quantile token before its first one, [B, L + 1]."""
        pad_B1 = torch.zeros_like(input_BL[:, :1])
        wide_BL, wide_mask_BL = torch.cat([pad_B1, input_BL], 1), torch.cat([pad_B1.bool(), mask_BL.bool()], 1)
        # The place before the first real token: all that is before it is padding on the left.
        place_B1 = mask_BL.long().argmax(1, keepdim=True)
        asked_B1 = quantile_B[:, None] != PLAIN
        id_B1 = torch.where(asked_B1, self.first_id + quantile_B[:, None], 0)
        return wide_BL.scatter(1, place_B1, id_B1), wide_mask_BL.scatter(1, place_B1, asked_B1)

    def _own(self, like_BL: Tensor) -> Tensor:
        return torch.full(like_BL.shape[:1], self.quantile, device=like_BL.device)

    def hidden(self, rollout: Rollout) -> Tensor:
        """As of Policy; a rollout may say by `quantile_B` which quantile each of its rows is of."""
        quantile_B = rollout.extra.get("quantile_B", self._own(rollout.prompt_BP))
        if not bool((quantile_B != PLAIN).any()):
            return super().hidden(rollout)
        prompt_BP, mask_BP = self._in_front(rollout.prompt_BP, rollout.prompt_mask_BP, quantile_B)
        return super().hidden(dataclasses.replace(rollout, prompt_BP=prompt_BP, prompt_mask_BP=mask_BP))

    def last_hidden(self, input_BL: Tensor, mask_BL: Tensor) -> Tensor:
        if self.quantile == PLAIN:
            return super().last_hidden(input_BL, mask_BL)
        return super().last_hidden(*self._in_front(input_BL, mask_BL, self._own(input_BL)))

    def decoder(self, prompt_UP: Tensor, mask_UP: Tensor, source_B: Tensor, length: int) -> Decoder:
        if self.quantile == PLAIN:
            return super().decoder(prompt_UP, mask_UP, source_B, length)
        return super().decoder(*self._in_front(prompt_UP, mask_UP, self._own(prompt_UP)), source_B, length)
