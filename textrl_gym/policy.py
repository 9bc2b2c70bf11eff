"""Policy: a causal LM of transformers as a token policy, its value head and its frozen reference.

Shape legend: B rows, P prompt places, T response places, L = P + T, V vocabulary, D hidden width.

One temperature everywhere: sampling, log-probabilities, the reference and the update all divide the logits by it. No
top-k or top-p: what is sampled from is what is trained. Dropout is off (eval mode) in training too, so that the ratio
of the first minibatch is 1. Position ids count real tokens only, so left padding changes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from textrl_gym import functional
from textrl_gym.core import Rollout


def position_ids(mask_BL: Tensor) -> Tensor:
    """0, 1, 2, ... over the real tokens of each row; 0 on left padding. int64 [B, L]."""
    return (mask_BL.long().cumsum(-1) - 1).clamp(min=0)


class Policy(nn.Module):
    """A causal LM as pi(token | prompt, prefix).

    Args:
        model: any causal LM of transformers; it is put in eval mode.
        reference: None, a causal LM, a Policy, or "copy" for a frozen copy of the model as it is now.
        value_head: True puts a zero-initialised scalar head on the model's last hidden state (a shared trunk).
        value_model: a separate causal LM whose trunk carries the value head instead.
        temperature: divides every logit, in sampling, scoring and training alike.
        vocab_size: use only the first so many logits (a model's rows are often padded beyond its tokenizer).
        dtype: of the forward passes: torch.float32, or torch.bfloat16 by autocast over float32 weights, so that small
            updates are not rounded away. Log-probabilities are float32 in both.
    """

    def __init__(
        self,
        model: Any,
        reference: Any = None,
        value_head: bool = False,
        *,
        value_model: Any = None,
        temperature: float = 1.0,
        vocab_size: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.model: Any = model.eval()
        self.temperature, self.dtype = temperature, dtype
        rows = self.model.get_output_embeddings().weight.shape[0]
        if vocab_size is not None and vocab_size > rows:
            raise ValueError(f"the tokenizer has {vocab_size} tokens, the model only {rows}")
        self.vocab_size = vocab_size or rows
        self.value_model: Any = value_model.eval() if value_model is not None else None
        self.value_head: nn.Linear | None = None
        if value_head or value_model is not None:
            trunk: Any = self.model if value_model is None else self.value_model
            width = trunk.get_output_embeddings().weight.shape[1]
            self.value_head = nn.Linear(width, 1, device=self.device)  # float32 whatever the trunk's dtype
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        # Outside nn.Module's registry: the reference is no part of what is trained or saved.
        self._reference = (self._as_reference(reference),)

    def _as_reference(self, reference: Any) -> Policy | None:
        if reference is None or isinstance(reference, Policy):
            return reference
        model = copy.deepcopy(self.model) if isinstance(reference, str) and reference == "copy" else reference
        model.requires_grad_(False)
        return Policy(model.to(self.device), temperature=self.temperature, vocab_size=self.vocab_size, dtype=self.dtype)

    @property
    def reference(self) -> Policy | None:
        """The frozen policy that KL is measured to."""
        return self._reference[0]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def train(self, mode: bool = True) -> Policy:
        """Stay in eval mode: dropout must be off wherever log-probabilities are compared."""
        return super().train(False)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    # -- forward passes -----------------------------------------------------------------------------------------------

    def forward(self, input_BL: Tensor, mask_BL: Tensor, keep: int, cache: Any = None) -> tuple[Tensor, Tensor, Any]:
        """Logits at the last `keep` places of input_BL, divided by the temperature, with the hidden states below them.

        Args:
            input_BL: int64 tokens; with a cache only the new ones.
            mask_BL: bool over all places, cached ones included.
            keep: how many places at the end get logits.
            cache: a transformers Cache to read and extend.

        Returns:
            logits [B, keep, V] float32, hidden [B, keep, D] (what the language-model head reads), the cache.
        """
        caught: list[Tensor] = []
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        try:
            with self._autocast():
                out = self.model(
                    input_ids=input_BL,
                    attention_mask=mask_BL.long(),
                    position_ids=position_ids(mask_BL)[:, -input_BL.shape[1] :],
                    past_key_values=cache,
                    use_cache=cache is not None,
                    logits_to_keep=keep,
                )
        finally:
            hook.remove()
        logits = out.logits[:, -keep:, : self.vocab_size].float() / self.temperature
        return logits, caught[0][:, -keep:], out.past_key_values

    def response(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """One teacher-forced pass over prompts and completions, each unique prompt once; gradients flow through both.

        Returns:
            logits_BTV float32, the distribution that each action was taken from, and value_BT float32, V before each
            action (0 without a value head).
        """
        # The last action is never an input: nothing comes after it.
        action_BT, action_mask_BT = rollout.token_BT[:, :-1], rollout.mask_BT[:, :-1]
        prompts_B2P = torch.stack([rollout.prompt_BP, rollout.prompt_mask_BP.long()], 1)
        unique_U2P, source_B = prompts_B2P.unique(dim=0, return_inverse=True)
        if len(unique_U2P) == len(rollout) or action_BT.shape[1] == 0:
            input_BL = torch.cat([rollout.prompt_BP, action_BT], 1)
            mask_BL = torch.cat([rollout.prompt_mask_BP, action_mask_BT], 1)
            logits_BTV, hidden_BTD, _ = self(input_BL, mask_BL, keep=rollout.token_BT.shape[1])
        else:
            cache = DynamicCache(config=self.model.config)
            prompt_UP, mask_UP = unique_U2P[:, 0], unique_U2P[:, 1].bool()
            first_U1V, first_U1D, cache = self(prompt_UP, mask_UP, keep=1, cache=cache)
            cache.batch_select_indices(source_B)
            mask_BL = torch.cat([mask_UP[source_B], action_mask_BT], 1)
            rest_BTV, rest_BTD, _ = self(action_BT, mask_BL, keep=action_BT.shape[1], cache=cache)
            logits_BTV = torch.cat([first_U1V[source_B], rest_BTV], 1)
            hidden_BTD = torch.cat([first_U1D[source_B], rest_BTD], 1)
        return logits_BTV, self._values(hidden_BTD, rollout)

    def _values(self, hidden_BTD: Tensor, rollout: Rollout) -> Tensor:
        if self.value_head is None:
            return hidden_BTD.new_zeros(hidden_BTD.shape[:2], dtype=torch.float32)
        if self.value_model is not None:
            input_BL = torch.cat([rollout.prompt_BP, rollout.token_BT[:, :-1]], 1)
            mask_BL = torch.cat([rollout.prompt_mask_BP, rollout.mask_BT[:, :-1]], 1)
            with self._autocast():
                trunk = self.value_model.base_model(
                    input_ids=input_BL,
                    attention_mask=mask_BL.long(),
                    position_ids=position_ids(mask_BL),
                    use_cache=False,
                )
            hidden_BTD = trunk.last_hidden_state[:, -hidden_BTD.shape[1] :]
        return self.value_head(hidden_BTD.float()).squeeze(-1)

    # -- what rollouts need -------------------------------------------------------------------------------------------

    def logprobs(self, rollout: Rollout) -> Tensor:
        """log pi of the rollout's actions, differentiable. float32 [B, T], 0 outside the mask."""
        logits_BTV, _ = self.response(rollout)
        return self.token_logprobs(logits_BTV, rollout)

    @staticmethod
    def token_logprobs(logits_BTV: Tensor, rollout: Rollout) -> Tensor:
        """log-probabilities of the rollout's actions from the logits of `response`. [B, T], 0 outside the mask."""
        return functional.token_logprobs(logits_BTV, rollout.token_BT) * rollout.mask_BT

    def values(self, rollout: Rollout) -> Tensor:
        """V before each action, differentiable. float32 [B, T], 0 outside the mask and without a value head."""
        if self.value_head is None:
            return torch.zeros_like(rollout.logp_BT)
        return self.response(rollout)[1] * rollout.mask_BT

    # -- what stepping needs ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def next_logprobs(self, input_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """log pi(. | s) of observations whose prefixes may differ in length. float32 [B, V].

        Each row's real tokens are one unbroken run; rows are moved to end at the same place, since a left-padded row
        means the same wherever it stands.
        """
        mask_BL = mask_BL.bool()
        length_B = mask_BL.long().sum(1)
        width = int(length_B.max())
        end_B = mask_BL.shape[1] - mask_BL.long().flip(1).argmax(1)  # one past the last real token
        place_BW = end_B[:, None] - width + torch.arange(width, device=input_BL.device)
        moved_mask_BW = torch.arange(width, device=input_BL.device) >= (width - length_B)[:, None]
        moved_BW = input_BL.gather(1, place_BW.clamp(min=0)) * moved_mask_BW
        logits_B1V, _, _ = self(moved_BW, moved_mask_BW, keep=1)
        return logits_B1V[:, 0].log_softmax(-1)

    @torch.no_grad()
    def act(
        self,
        observation: Mapping[str, Any],
        deterministic: bool = False,
        uniform_B: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One action for a batched observation of a text environment (numpy or torch).

        Args:
            deterministic: take the most likely token.
            uniform_B: the random numbers to sample with, in [0, 1); drawn from `generator` where None.

        Returns:
            action_B int64 and its log-probability logp_B float32.
        """
        input_BL = torch.as_tensor(observation["input_ids"], device=self.device)
        mask_BL = torch.as_tensor(observation["attention_mask"], device=self.device)
        logp_BV = self.next_logprobs(input_BL, mask_BL)
        if deterministic:
            action_B = logp_BV.argmax(-1)
        else:
            if uniform_B is None:
                uniform_B = torch.rand(len(logp_BV), generator=generator, device=self.device)
            action_B = functional.inverse_cdf(logp_BV, uniform_B)
        return action_B, logp_BV.gather(1, action_B[:, None]).squeeze(1)
