"""Policy: a language model of transformers as a token policy, its value head and its frozen reference.

Shape legend: B rows, U unique prompts, P prompt positions, T response positions, L = P + T, N positions in any order, V
vocabulary, D hidden width.

One temperature everywhere: sampling, log-probabilities, the reference and the update all divide the logits by it. No
top-k or top-p: what is sampled from is what is trained. Dropout is off (eval mode) in training too, so that the ratio
of the first minibatch is 1. Position ids count real tokens only, so left padding changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from textrl_gym import functional
from textrl_gym.core import Rollout
from textrl_gym.models import lora
from textrl_gym.policy.architectures import Backbone, Steps, backbone
from textrl_gym.policy.compiling import Compile, of_decode
from textrl_gym.policy.decoders import Decoder

CHUNK_NUMBERS = 2**23
"""Logits that are held at a time, as numbers: 32 MiB of float32."""


@dataclass(frozen=True)
class Response:
    """What one teacher-forced pass says of a rollout's actions; [B, T], at least float32, 0 outside the mask."""

    logp_BT: Tensor
    """log pi of the action."""
    entropy_BT: Tensor | None
    """Entropy of the distribution that it was taken from, in nats, where it was asked for."""
    value_BT: Tensor
    """V before the action; 0 without a value head."""


def _inputs(rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a teacher-forced pass reads. The last action is never an input: nothing comes after it."""
    return rollout.prompt_BP, rollout.prompt_mask_BP, rollout.token_BT[:, :-1], rollout.present_BT[:, :-1]


class Policy(nn.Module):
    """A language model as pi(token | prompt, prefix).

    Args:
        model: any causal LM of transformers, or an encoder-decoder with a language-model head (textrl_gym.policy
            .seq2seq); it is put in eval mode.
        reference: None, a causal LM, a Policy, or "copy" for the model as it is now: a frozen copy of what is trained,
            or, where the model has a new LoRA, the model with it switched off.
        value_head: True puts a zero-initialised scalar head on the model's last hidden state (a shared trunk).
        value_model: a separate causal LM whose trunk carries the value head instead.
        temperature: divides every logit, in sampling, scoring and training alike.
        vocab_size: use only the first so many logits (a model's rows are often padded beyond its tokenizer).
        dtype: of the forward passes: torch.float32, or torch.bfloat16 by autocast over float32 weights, so that small
            updates are not rounded away. Log-probabilities are float32 in both.
        cuda_graphs: decode at fixed shapes, on a GPU as CUDA graphs.
        compile: what of it torch.compile compiles: "update" the teacher-forced passes of model and value model,
            "decode" the decode step, which is then one of fixed shapes, "all" both. The reference is never compiled.
        adapter: False leaves the adapter of a model of peft out.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module | Literal["copy"] | None = None,
        value_head: bool = False,
        *,
        value_model: nn.Module | None = None,
        temperature: float = 1.0,
        vocab_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        cuda_graphs: bool = False,
        compile: Compile = "none",
        adapter: bool = True,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        static = cuda_graphs or of_decode(compile)
        # Any: the ways of a decoder alone (shares_prompts, ...) are asked for by their names, as by tests.
        self.trunk: Any = backbone(model, dtype, static=static, adapter=adapter, compile=compile)
        """A Backbone."""
        self.model: Any = model.eval()
        self.temperature, self.dtype = temperature, dtype
        rows = self.trunk.model.get_output_embeddings().weight.shape[0]
        if vocab_size is not None and vocab_size > rows:
            raise ValueError(f"the tokenizer has {vocab_size} tokens, the model only {rows}")
        self.vocab_size, self.rows = vocab_size or rows, rows
        """Tokens that have probability, and rows of the model's head, which may be more."""
        self.value_model: Any = value_model.eval() if value_model is not None else None
        self.value_trunk: Backbone | None = None
        if value_model is not None:
            self.value_trunk = backbone(value_model, dtype, compile=compile)
        self.steps: Steps | None = None
        """Where set, `next_logprobs` and `act` go on from the observations of the call before."""
        self.value_head: nn.Linear | None = None
        if value_head or value_model is not None:
            trunk: Any = self.model if value_model is None else self.value_model
            width = trunk.get_output_embeddings().weight.shape[1]
            self.value_head = nn.Linear(width, 1, device=self.device)  # float32 whatever the trunk's dtype
            # V = 0 at first: advantages begin as the returns, without the noise of a random head.
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        # Outside nn.Module's registry: the reference is no part of what is trained or saved.
        self._reference = (self._as_reference(reference),)

    def _as_reference(self, reference: nn.Module | Literal["copy"] | None) -> Policy | None:
        if reference is None or isinstance(reference, Policy):
            return reference
        alike: dict[str, Any] = {"temperature": self.temperature, "vocab_size": self.vocab_size, "dtype": self.dtype}
        # The adapter switched off is the model before training, unless it was trained already: no copy of the weights.
        if reference == "copy" and lora.is_lora(self.model) and lora.changes_nothing(self.model):
            return Policy(self.model, adapter=False, **alike)
        model: Any = lora.frozen_copy(self.model) if reference == "copy" else reference.requires_grad_(False)
        return Policy(model.to(self.device), **alike)

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

    def try_out(self, max_prompt_tokens: int, max_new_tokens: int, turns: bool = False) -> None:
        """Find out how the models may be run on texts of these lengths, rather than at the first sample.

        Args:
            turns: completions are conversations, in which the environment speaks too.

        Raises:
            ValueError: a model has fewer positions, no way of running it gives the numbers of its own forward, or it
                cannot hold conversations.
        """
        if turns:
            self.require_one_text("hold a conversation (turns)")
        own = self.trunk
        for trunk in (own, self.value_trunk):
            if trunk is not None:
                if trunk is not own:
                    trunk.take_over(own)
                trunk.prepare(max_prompt_tokens, max_new_tokens)
        own.check_head()
        if self.reference is not None:
            self.reference.trunk.take_over(own)
            self.reference.try_out(max_prompt_tokens, max_new_tokens, turns)

    def require_one_text(self, purpose: str) -> None:
        """Hold that prompt and completion are one text to the model, as they are to a decoder alone.

        Args:
            purpose: what needs it, in the words of the error.

        Raises:
            ValueError: it is an encoder-decoder.
        """
        if not self.trunk.one_text:
            kind = type(self.trunk.model).__name__
            raise ValueError(f"{kind} is an encoder-decoder, which cannot {purpose} here yet: take a decoder alone")

    # -- teacher-forced passes ----------------------------------------------------------------------------------------

    def hidden(self, rollout: Rollout) -> Tensor:
        """The hidden states below the logits that each action was taken from, [B, T, D]; each unique prompt once."""
        return self.trunk.hidden(*_inputs(rollout))

    def logits(self, hidden_ND: Tensor, token_N: Tensor | None = None) -> Tensor:
        """Logits divided by the temperature, [N, V], in at least float32.

        Args:
            token_N: what was taken there, where it is known; a policy that forbids tokens must then allow it.
        """
        # Rows beyond the tokenizer would get probability, and could be sampled.
        logits_NV = functional.at_least_float32(self.trunk.logits(hidden_ND)[:, : self.vocab_size])
        return logits_NV if self.temperature == 1.0 else logits_NV / self.temperature

    def response(self, rollout: Rollout, entropy: bool = False, hidden_BTD: Tensor | None = None) -> Response:
        """One teacher-forced pass over prompts and completions; gradients flow through both.

        The head is applied to the actions' positions only and to few of them at a time, so that logits of the whole
        rollout are never held, nor kept for the backward pass, which computes them again.

        Args:
            entropy: whether to compute it.
            hidden_BTD: what `hidden` gives, where it is known.
        """
        hidden_BTD = self.hidden(rollout) if hidden_BTD is None else hidden_BTD
        mask_BT, token_N = rollout.mask_BT, rollout.token_BT[rollout.mask_BT]
        logp_N, entropy_N = self._statistics(hidden_BTD[mask_BT], token_N, entropy)
        value_BT = self._values(rollout, hidden_BTD) * mask_BT

        def placed(flat_N: Tensor) -> Tensor:
            return flat_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, flat_N)

        return Response(placed(logp_N), placed(entropy_N) if entropy else None, value_BT)

    def _statistics(self, hidden_ND: Tensor, token_N: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
        """log pi of tokens and, where asked for, the entropy (else an empty tensor), a chunk of positions at a time."""

        def of_chunk(hidden_nD: Tensor, token_n: Tensor) -> tuple[Tensor, Tensor]:
            logits_nV = self.logits(hidden_nD, token_n)
            empty_n = logits_nV.new_empty(0)
            return functional.token_logprobs(logits_nV, token_n), functional.entropy(logits_nV) if entropy else empty_n

        size = max(1, CHUNK_NUMBERS // self.vocab_size)
        if len(token_N) <= size:
            return of_chunk(hidden_ND, token_N)
        chunks = zip(hidden_ND.split(size), token_N.split(size), strict=True)
        parts = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat([logp_n for logp_n, _ in parts]), torch.cat([entropy_n for _, entropy_n in parts])

    def _values(self, rollout: Rollout, hidden_BTD: Tensor | None = None) -> Tensor:
        """V at every position; hidden_BTD: what `hidden` gives, where it is known."""
        if self.value_head is None:
            return torch.zeros_like(rollout.logp_BT)
        if self.value_trunk is not None:
            return self.value_of(self.value_trunk.hidden(*_inputs(rollout)))
        return self.value_of(self.hidden(rollout) if hidden_BTD is None else hidden_BTD)

    def value_of(self, hidden_ND: Tensor) -> Tensor:
        """The value head on hidden states of its trunk, float32 [N]."""
        assert self.value_head is not None
        return self.value_head(hidden_ND.to(self.value_head.weight.dtype)).squeeze(-1)

    def logprobs(self, rollout: Rollout) -> Tensor:
        """log pi of the rollout's actions, differentiable. float32 [B, T], 0 outside the mask."""
        return self.response(rollout).logp_BT

    def values(self, rollout: Rollout) -> Tensor:
        """V before each action, differentiable. float32 [B, T], 0 outside the mask and without a value head."""
        return self._values(rollout) * rollout.mask_BT

    @property
    def samples_exactly(self) -> bool:
        """Whether the sampler's log-probabilities are the training forward's but for float32's rounding."""
        return self.dtype == torch.float32

    @property
    def shares_trunk(self) -> bool:
        """Whether the value head reads the hidden states that the logits come from."""
        return self.value_head is not None and self.value_trunk is None

    # -- decoding -----------------------------------------------------------------------------------------------------

    def decoder(self, prompt_UP: Tensor, mask_UP: Tensor, source_B: Tensor, length: int) -> Decoder:
        """Make a decoder, which computes each prompt once for its rows; arguments as of `decoders.decoder`."""
        return self.trunk.decoder(prompt_UP, mask_UP, source_B, length)

    # -- what stepping needs ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def next_logprobs(self, input_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """log pi(. | s) of observations whose prefixes may differ in length. float32 [B, V]."""
        return self.logits(self.last_hidden(input_BL, mask_BL)).log_softmax(-1)

    @torch.no_grad()
    def last_hidden(self, input_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """The hidden states below the next token's logits of such observations, [B, D]."""
        if self.steps is not None:
            return self.steps(input_BL, mask_BL)
        return self.trunk.next_hidden(input_BL, mask_BL)

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
