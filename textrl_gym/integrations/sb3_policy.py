"""Stable-Baselines3 on text environments: a causal LM as one of its actor-critic policies.

    logprob = PolicyLogprob()
    env = TextVecEnv(gym.make_vec("TLDRSummarize-v0", num_envs=64, kl_coef=0.1, policy_logprob=logprob))
    model = stable_baselines3.PPO(CausalLMPolicy, env)
    logprob.policy = model.policy
    model.learn(100_000)

The actor is the LM's next-token distribution, the critic a linear head on its last hidden state that starts at 0. SB3
shows the policy one state a row and shuffles states into minibatches. Here the states of one text are found again and
its tokens computed once: while stepping by a StepCache, in the losses by `evaluate_actions`. The numbers stay those of
one full forward a state.

Shape legend: B states, U texts, P prompt places, T response places, L = P + T, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from textrl_gym.policy.policy import Policy

if TYPE_CHECKING:
    from textrl_gym.mdp.task import Task


def longest_texts(rows: list[bytes]) -> tuple[list[int], list[int]]:
    """The rows that are the beginning of no other, and for each row one of those that it is the beginning of.

    Sorted, all that begin with a row come right after it; so going backwards each row is the beginning of the last kept
    one, or is kept itself. Of equal rows one is kept.

    Returns:
        indices of the kept rows, and for each row the number of its own among them.
    """
    longest: list[int] = []
    text_of = [0] * len(rows)
    for row in sorted(range(len(rows)), key=rows.__getitem__, reverse=True):
        if not longest or not rows[longest[-1]].startswith(rows[row]):
            longest.append(row)
        text_of[row] = len(longest) - 1
    return longest, text_of


class CausalLMPolicy(ActorCriticPolicy):
    """A causal LM of transformers as a policy for SB3's on-policy algorithms, given as their first argument.

    `policy_kwargs` are the arguments from `model` on. Dropout is off in training too. V is 0 where the token budget has
    run out: the budget is part of the task, so that SB3's bootstrapping from truncated episodes adds nothing.

    sb3_contrib's TRPO tells the critic's parameters by their names; models with "value" in the names of the LM's own
    (GPT-NeoX, Falcon) do not suit it.

    Args:
        observation_space: of a text environment.
        action_space: Discrete; with a KL penalty make the environment with policy_logprob=PolicyLogprob().
        lr_schedule: SB3's.
        use_sde: SB3 passes False.
        model: None for the task's own, a Hub id, a folder, a loaded causal LM, or a textrl_gym Policy with a value
            head; the last two are trained in place.
        temperature: divides every logit; None for 1, or the given Policy's.
        micro_batch_tokens: places of texts in one forward and backward pass; more are computed again in the backward
            pass. Memory, not result.
        optimizer_class: of PyTorch.
        optimizer_kwargs: beside the learning rate.

    Raises:
        ValueError: spaces that are not a text environment's, a vocabulary that does not match the model.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        use_sde: bool = False,
        model: torch.nn.Module | str | None = None,
        temperature: float | None = None,
        micro_batch_tokens: int = 65_536,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if use_sde:
            raise ValueError("use_sde=True explores continuous actions; tokens are discrete: use_sde must be False")
        if not isinstance(action_space, spaces.Discrete):
            raise ValueError(f"actions must be Discrete tokens, got {action_space}: {_HOW_KL}")
        task: Task | None = getattr(observation_space, "task", None)
        if task is None:
            raise ValueError(f"the observation space must be a text environment's own, got {observation_space}")
        if micro_batch_tokens < 1:
            raise ValueError(f"micro_batch_tokens must be at least 1, got {micro_batch_tokens}")
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )
        self.model_spec, self.micro_batch_tokens = model, micro_batch_tokens
        self.lm = _policy(task, int(action_space.n), model, temperature)
        self.lm.steps = self.lm.trunk.steps()
        self.prompt_places: int = observation_space.prompt_places  # type: ignore[attr-defined] # as mdp.spaces sets it
        (places,) = observation_space["input_ids"].shape  # type: ignore[index] # prompt and completion
        self.lm.try_out(self.prompt_places, places - self.prompt_places)
        trained = [p for p in self.lm.parameters() if p.requires_grad]
        # SB3's constructor has made one of the parameters that were there before the LM.
        self.optimizer = optimizer_class(trained, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _build(self, lr_schedule: Schedule) -> None:
        """Called by SB3's constructor, which would build an MLP here."""

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "model": self.model_spec,
            "temperature": self.lm.temperature,
            "micro_batch_tokens": self.micro_batch_tokens,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }

    def train(self, mode: bool = True) -> CausalLMPolicy:
        """SB3 calls it before it steps and before it updates; after an update nothing kept is right any more."""
        assert self.lm.steps is not None
        if mode:
            self.lm.steps.forget()
        return super().train(mode)

    # -- what SB3 asks for --------------------------------------------------------------------------------------------

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions of states, their values and log-probabilities, with the cache of the states before."""
        hidden_BD = self._hidden(obs)
        distribution = self._distribution(hidden_BD)
        action_B = distribution.get_actions(deterministic=deterministic)
        return action_B, self.lm.value_of(hidden_BD)[:, None], distribution.log_prob(action_B)

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values, log-probabilities and entropies, differentiable."""
        hidden_BD = self._teacher_forced(obs)
        distribution = self._distribution(hidden_BD)
        return self.lm.value_of(hidden_BD)[:, None], distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        """The next-token distribution."""
        return self._distribution(self._hidden(obs))

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """V of states, [B, 1]; 0 where the budget has run out."""
        assert isinstance(obs, dict)
        over_B = obs["attention_mask"][:, -1].bool()
        if over_B.all():  # SB3 asks for each truncated row by itself
            return torch.zeros(len(over_B), 1, device=over_B.device)
        return torch.where(over_B, 0.0, self.lm.value_of(self._hidden(obs)))[:, None]

    def _distribution(self, hidden_BD: Tensor) -> Distribution:
        return self.action_dist.proba_distribution(action_logits=self.lm.logits(hidden_BD))

    # -- one state's last hidden state --------------------------------------------------------------------------------

    def _hidden(self, obs: PyTorchObs) -> Tensor:
        if self.training or torch.is_grad_enabled():
            return self._teacher_forced(obs)
        assert self.lm.steps is not None and isinstance(obs, dict)
        return self.lm.steps(obs["input_ids"], obs["attention_mask"])

    def _teacher_forced(self, obs: PyTorchObs) -> Tensor:
        """[B, D], differentiable: the states that are beginnings of one text are read off one pass over it."""
        assert isinstance(obs, dict)  # SB3 gives a space of Dict as one
        mask_BL = obs["attention_mask"].bool()
        written_B = mask_BL[:, self.prompt_places :].sum(1)
        # As bytes on the host: sorting them finds every beginning in one go. int32 halves what is compared.
        host_BL, host_mask_BL = obs["input_ids"].cpu().numpy().astype(np.int32), mask_BL.cpu().numpy()
        prompt_B = host_mask_BL[:, : self.prompt_places].sum(1, dtype=np.int32)
        rows = [
            prompt.tobytes() + ids_L[mask_L].tobytes()  # a text is told from one whose prompt ends elsewhere
            for prompt, ids_L, mask_L in zip(prompt_B, host_BL, host_mask_BL, strict=True)
        ]
        longest, text_of = longest_texts(rows)
        text_B = torch.tensor(text_of, device=mask_BL.device)
        hidden_BD: Tensor | None = None
        parts = self._parts([len(rows[row]) for row in longest])
        for part in parts:
            chosen = torch.tensor([longest[text] for text in part], device=mask_BL.device)
            inputs = (obs["input_ids"][chosen], mask_BL[chosen])
            # Several parts are more than the budget of memory: each is computed again in the backward pass.
            if len(parts) > 1 and torch.is_grad_enabled():
                hidden_UTD = checkpoint(self._texts, *inputs, use_reentrant=False)
            else:
                hidden_UTD = self._texts(*inputs)
            number_of = torch.full((len(longest),), -1, device=mask_BL.device)
            number_of[torch.tensor(part, device=mask_BL.device)] = torch.arange(len(part), device=mask_BL.device)
            # Which states this part's texts answer, and from which text and place each is read.
            state_R = (number_of[text_B] >= 0).nonzero().squeeze(1)
            found_RD = hidden_UTD[number_of[text_B[state_R]], written_B[state_R]]
            if hidden_BD is None:
                hidden_BD = found_RD.new_zeros(len(rows), found_RD.shape[1])
            # Not in place: autograd needs each part's result as it was.
            hidden_BD = hidden_BD.index_copy(0, state_R, found_RD)
        assert hidden_BD is not None
        return hidden_BD

    def _parts(self, lengths: list[int]) -> list[list[int]]:
        """Texts by length, filled up to the budget of places; a single one may pass it."""
        parts: list[list[int]] = []
        for text in sorted(range(len(lengths)), key=lengths.__getitem__):
            places = lengths[text] // np.dtype(np.int32).itemsize
            if parts and (len(parts[-1]) + 1) * places <= self.micro_batch_tokens:
                parts[-1].append(text)
            else:
                parts.append([text])
        return parts

    def _texts(self, input_UL: Tensor, mask_UL: Tensor) -> Tensor:
        """The hidden states below the token after the prompt and after each written one, [U, T + 1, D]."""
        # Columns that are padding in every text are cut off before the pass.
        first = self.prompt_places - int(mask_UL[:, : self.prompt_places].sum(1).max())
        last = self.prompt_places + int(mask_UL[:, self.prompt_places :].sum(1).max())
        prompt, written = slice(first, self.prompt_places), slice(self.prompt_places, last)
        return self.lm.trunk.hidden(input_UL[:, prompt], mask_UL[:, prompt], input_UL[:, written], mask_UL[:, written])

    # -- for the environment's KL penalty -----------------------------------------------------------------------------

    @torch.no_grad()
    def next_logprobs(self, observation: Mapping[str, Any]) -> Tensor:
        """log pi(. | s) of a batched observation of a text environment, [B, V]."""
        input_BL, mask_BL = (
            torch.as_tensor(observation[name], device=self.lm.device) for name in ("input_ids", "attention_mask")
        )
        assert self.lm.steps is not None
        # SB3 has just asked for this observation to choose its actions: its hidden states are still there.
        hidden_BD = self.lm.steps.find(input_BL, mask_BL)
        if hidden_BD is None:
            hidden_BD = self._teacher_forced({"input_ids": input_BL, "attention_mask": mask_BL})
        return self.lm.logits(hidden_BD).log_softmax(-1)


_HOW_KL = "with a KL penalty make the environment with policy_logprob=PolicyLogprob()"


def _policy(task: Task, vocab_size: int, model: torch.nn.Module | str | None, temperature: float | None) -> Policy:
    if isinstance(model, Policy):
        if not model.shares_trunk or model.vocab_size != vocab_size:
            raise ValueError(f"a Policy needs a value head on its trunk and vocab_size={vocab_size}")
        if temperature not in (None, model.temperature):
            raise ValueError(f"temperature must be None or the Policy's {model.temperature}, got {temperature}")
        return model
    loaded: Any = model if isinstance(model, torch.nn.Module) else task.load_model(model)
    rows = loaded.get_input_embeddings().weight.shape[0]
    if rows < vocab_size:
        raise ValueError(f"the environment has {vocab_size} tokens but the model's vocabulary has {rows} rows")
    # float32 whatever it was loaded in: SB3 takes ratios to the sampler's log-probabilities.
    return Policy(
        loaded.float(), value_head=True, temperature=1.0 if temperature is None else temperature, vocab_size=vocab_size
    )


class PolicyLogprob:
    """`policy_logprob=` of a text environment, for a policy that is made after it: set `policy` then.

    Args:
        policy: a CausalLMPolicy.
        whole: give the whole distribution, as kl_estimator="full" asks for.
    """

    def __init__(self, policy: BasePolicy | None = None, whole: bool = False) -> None:
        self.policy, self.whole = policy, whole

    def __call__(self, observation: Mapping[str, Any], action: Tensor | np.ndarray | int) -> Tensor:
        """log pi(action | observation), of one row or of a batch."""
        if self.policy is None:
            raise ValueError("PolicyLogprob has no policy yet: after model = PPO(...), set it to model.policy")
        if not isinstance(self.policy, CausalLMPolicy):
            raise ValueError(f"PolicyLogprob needs a CausalLMPolicy, got a {type(self.policy).__name__}")
        single = np.ndim(observation["input_ids"]) == 1
        if single:
            observation = {name: value[None] for name, value in observation.items()}
        logp_BV = self.policy.next_logprobs(observation)
        if not self.whole:
            action_B = torch.as_tensor(np.atleast_1d(np.asarray(action)), device=logp_BV.device).long()
            logp_BV = logp_BV.gather(1, action_B[:, None]).squeeze(1)
        return logp_BV[0] if single else logp_BV
