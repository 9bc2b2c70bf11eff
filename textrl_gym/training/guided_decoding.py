"""Decoding with a trained critic: what value-guided sampling and tree search share.

An agent of these kinds trains nothing. It takes policy, critic and reference of a saved agent, looks at what may follow
the text so far, and samples each token from a distribution that it made of that: logp_BT is of this distribution.

Shape legend: B rows, K candidate tokens or places of a path, V vocabulary, T response places, P prompt places.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from textrl_gym import files, functional, registry
from textrl_gym.core import Rollout, Row, StopReason
from textrl_gym.functional import unique_ids
from textrl_gym.kl import KLPenalty
from textrl_gym.mdp.text_env import TextVectorEnv, vector_env
from textrl_gym.mdp.transition import stop_reasons
from textrl_gym.policy import decoders
from textrl_gym.policy.policy import Policy
from textrl_gym.registry import load_agent
from textrl_gym.rollouts.collect import rollout_of
from textrl_gym.rollouts.sampler import Completions
from textrl_gym.training.agent import Agent, EnvLike, Indices, ModelLike
from textrl_gym.training.config import AgentConfig


@dataclass(frozen=True)
class CriticConfig(AgentConfig):
    """Settings of agents that decode with a critic."""

    ppo: str = ""
    """The folder of a saved PPO, or of another agent with a critic. Policy, reference and temperature are its own, and
    so is the KL coefficient where kl_coef is None."""
    top_k: Annotated[int, Ge(1)] = 10
    """Candidates: so many of the policy's most likely tokens are looked at."""
    end_value: Literal["critic", "score"] = "critic"
    """What a finished text is worth in the search: the critic's value of the text before its last token, since a critic
    says nothing of what is over; or its score by the environment's reward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ppo:
            raise ValueError("ppo must name the folder of a saved agent with a critic, got ''")


@dataclass(frozen=True)
class Opinion:
    """What the models say of a state of each row."""

    logp_BV: Tensor
    """log pi of each next token."""
    ref_logp_BV: Tensor | None
    """The same of the reference, where it was asked for."""
    value_B: Tensor


class States:
    """Rows in lockstep on all models that are asked: the text so far of each, and what may follow it.

    Args:
        reference: whether the reference is asked too.
        places: at most so many tokens are appended to a row, or looked at.
    """

    def __init__(self, policy: Policy, prompt_ids: list[list[int]], places: int, reference: bool) -> None:
        prompts = unique_ids(prompt_ids, policy.device)
        self.policy, self.reference = policy, policy.reference if reference else None
        others = (None if self.reference is None else self.reference.trunk, policy.value_trunk)
        self.trunk = policy.trunk.lookahead(*prompts, places)
        self.reference_trunk, self.value_trunk = (
            None if trunk is None else trunk.lookahead(*prompts, places) for trunk in others
        )
        self.now = self._opinion([None if trunk is None else trunk.first_BD for trunk in self._trunks])

    @property
    def _trunks(self) -> tuple[decoders.Lookahead, decoders.Lookahead | None, decoders.Lookahead | None]:
        return self.trunk, self.reference_trunk, self.value_trunk

    @property
    def models(self) -> int:
        """How many models say something of a state."""
        return sum(trunk is not None for trunk in self._trunks)

    def _opinion(self, hiddens: list[Any]) -> Opinion:
        hidden_BD, reference_BD, value_BD = hiddens
        return Opinion(
            self.policy.logits(hidden_BD).log_softmax(-1).float(),
            None if self.reference is None else self.reference.logits(reference_BD).log_softmax(-1).float(),
            self.policy.value_of(hidden_BD if value_BD is None else value_BD),
        )

    def look(self, path_BK: Tensor, length_B: Tensor) -> Opinion:
        """Of the states after the first length_B tokens of a path; nothing of them is kept."""
        rows = torch.arange(len(path_BK), device=path_BK.device)
        return self._opinion(
            [None if trunk is None else trunk.peek(path_BK)[rows, length_B - 1] for trunk in self._trunks]
        )

    def values(self, token_B: Tensor) -> Tensor:
        """The critic's alone, after one more token of each row. [B]"""
        trunk = self.trunk if self.value_trunk is None else self.value_trunk
        return self.policy.value_of(trunk.peek(token_B[:, None])[:, 0])

    def step(self, token_B: Tensor) -> None:
        """Append a token to each row."""
        self.now = self._opinion([None if trunk is None else trunk.step(token_B) for trunk in self._trunks])

    def keep(self, keep_k: Tensor) -> None:
        """Go on with these rows only; a step must follow."""
        for trunk in self._trunks:
            if trunk is not None:
                trunk.keep(keep_k)


class Endings:
    """Which texts are over, and what they are worth in a search.

    Args:
        rows, prompt_ids: of all rows, as mdp.draw() gave them.
        scored: by the environment's reward; else by the critic's value before the last token.
    """

    def __init__(self, mdp: TextVectorEnv, rows: list[Row], prompt_ids: list[list[int]], scored: bool) -> None:
        self.mdp, self.rows, self.prompt_ids, self.scored = mdp, rows, prompt_ids, scored

    def stops(self, texts: list[list[int]]) -> list[int]:
        """Why each text is over, as StopReason; RUNNING if it is not."""
        mdp = self.mdp
        # Only where there are stop strings: decoding the texts of every step is slow.
        hit_b = np.array(mdp.scorer.completes_stop(texts)) if mdp.stop else None
        last_b, length_b = np.array([ids[-1] for ids in texts]), np.array([len(ids) for ids in texts])
        return stop_reasons(last_b, length_b, hit_b, mdp.max_new_tokens, mdp.end_ids).tolist()

    def values(self, row_b: list[int], texts: list[list[int]], stops: list[int], before_b: Tensor) -> Tensor:
        """The worth of each text that is over; of the others, before_b, the critic's value before the last token."""
        over = [i for i, stop in enumerate(stops) if stop != StopReason.RUNNING]
        if not self.scored or not over:
            return before_b
        rows = [row_b[i] for i in over]
        prompts = [self.rows[b] for b in rows]
        score = self.mdp.scorer.score(prompts, [self.prompt_ids[b] for b in rows], [texts[i] for i in over]).score_N
        penalty = [self.mdp.missing_eos_penalty * (stops[i] == StopReason.LENGTH) for i in over]
        value_b = before_b.clone()
        value_b[over] = score.to(value_b) - torch.tensor(penalty).to(value_b)
        return value_b


class CriticAgent(Agent, abc.ABC):
    """Decodes with the critic of a saved agent. A subclass says from which distribution the next token is drawn.

    `predict` is the policy's own; what is searched is play(), which evaluation uses.
    """

    Config: ClassVar[type[CriticConfig]] = CriticConfig
    config: Any
    trains = False
    uses_value = True
    single_turn = True  # a search would have to ask the environment what it replies to turns that are never taken
    asks_reference: bool = False
    """Whether the distribution is made with the reference's log-probabilities."""

    @abc.abstractmethod
    def next_token(
        self, states: States, endings: Endings, row_b: list[int], texts: list[list[int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The distribution of the next token of each running row.

        Args:
            row_b: which of all rows these are.
            texts: the token ids of each so far.

        Returns:
            token_bK: candidates, the policy's most likely first.
            logp_bK: their log-probabilities, which sum to 1.
            calls_b: states that a model was asked about, those of the text so far left out.
        """

    # -- made of a saved agent ----------------------------------------------------------------------------------------

    def _saved(self) -> dict[str, Any]:
        folder = Path(self.config.ppo)
        state = files.read_state(folder)
        if not (folder / "value_head.safetensors").is_file():
            raise ValueError(
                f"{str(folder)!r} holds the agent {state['agent']!r}, which has no critic: ppo must name a saved PPO"
            )
        return state

    def _make_kl(self, mdp: TextVectorEnv) -> KLPenalty:
        coef = self._agreed("kl_coef", mdp.kl_coef, 0.0)
        saved = self._saved()["kl_coef"]
        return KLPenalty(saved if self.config.kl_coef is None and coef == 0 else coef, mdp.kl_estimator)

    def _make_policy(self, mdp: TextVectorEnv, model: ModelLike, reference: ModelLike) -> Policy:
        if model is not None and self._saved()["agent"] == registry.path_of(type(self), "agents"):
            return super()._make_policy(mdp, model, reference)  # load(): `ppo` is this agent's own checkpoint
        if model is not None or reference is not None:
            raise ValueError(f"model and reference are those of ppo={self.config.ppo!r}: leave them out")
        # One row is enough: the environment is needed for the tokenizer and the budget only.
        saved = load_agent(self.config.ppo, mdp.remake(1, group_size=1), device=str(self.device))
        self.config = dataclasses.replace(self.config, temperature=saved.config.temperature, dtype=saved.config.dtype)
        self.model_spec, self.reference_spec = saved.model_spec, saved.reference_spec
        self.rebuilds_model, self.rebuilds_reference = saved.rebuilds_model, saved.rebuilds_reference
        return saved.policy

    def _make_value_model(self, mdp: TextVectorEnv, model: torch.nn.Module) -> torch.nn.Module | None:
        saved = Path(self.config.ppo) / "value_model"  # its weights are read by load()
        return mdp.task.load_model(str(saved)).to(self.device) if saved.is_dir() else None

    @classmethod
    def load(
        cls,
        path: str | Path,
        env: EnvLike | None = None,
        *,
        device: str = "auto",
        out: str | Path | None = None,
        trust_code: bool = False,
        base_model: str | None = None,
        env_settings: Mapping[str, Any] | None = None,
        **settings: object,
    ) -> Self:
        """The agent that `save` wrote. Its folder holds policy and critic: the first `ppo` is not needed any more."""
        settings |= {"ppo": str(path)}
        return super().load(
            path,
            env,
            device=device,
            out=out,
            trust_code=trust_code,
            base_model=base_model,
            env_settings=env_settings,
            **settings,
        )

    # -- decoding -----------------------------------------------------------------------------------------------------

    def play(
        self,
        env: EnvLike,
        *,
        greedy: bool = False,
        generator: torch.Generator | None = None,
        prompt_indices: Indices = None,
    ) -> Rollout:
        mdp = vector_env(env)
        self.check_turns(mdp)
        rows, prompt_ids = mdp.draw(prompt_indices)
        shape = (len(rows), mdp.max_new_tokens)
        # All random numbers before any token: row b then gets the same ones however long the other rows go on.
        uniform_BT = None if greedy else torch.rand(shape, generator=generator, device=self.device)
        endings = Endings(mdp, rows, prompt_ids, scored=self.config.end_value == "score")
        out, model_calls_B = self._decode(endings, uniform_BT)
        rollout = rollout_of(mdp, self.policy, rows, prompt_ids, out, guided=True)
        return dataclasses.replace(rollout, model_calls_B=model_calls_B)

    @torch.no_grad()
    def _decode(self, endings: Endings, uniform_BT: Tensor | None) -> tuple[Completions, Tensor]:
        """A completion of every row, token by token; uniform_BT None: the most likely candidate."""
        rows, places = len(endings.rows), endings.mdp.max_new_tokens
        states = States(self.policy, endings.prompt_ids, places, self.asks_reference)
        token_BT = torch.zeros((rows, places), dtype=torch.long, device=self.device)
        logp_BT, value_BT = (torch.zeros((rows, places), device=self.device) for _ in range(2))
        model_calls_B, stop_B, length_B = (torch.zeros(rows, device=self.device) for _ in range(3))
        row_b = torch.arange(rows, device=self.device)
        for t in range(places):
            texts = token_BT[row_b, :t].tolist()
            # 1. The distribution, and a token of it.
            token_bK, logp_bK, calls_b = self.next_token(states, endings, row_b.tolist(), texts)
            if uniform_BT is None:
                token_b = token_bK.gather(1, logp_bK.argmax(1, keepdim=True)).squeeze(1)
            else:  # in the vocabulary's order, as sampling from the policy itself does
                token_b = functional.inverse_cdf(self._spread(token_bK, logp_bK), uniform_BT[row_b, t])
            token_BT[row_b, t] = token_b
            logp_BT[row_b, t] = logp_bK.masked_fill(token_bK != token_b[:, None], -torch.inf).amax(1)
            value_BT[row_b, t] = states.now.value_B
            model_calls_B[row_b] += calls_b + states.models

            # 2. Rows that ended leave; the others go on.
            stops = endings.stops([[*ids, int(token)] for ids, token in zip(texts, token_b, strict=True)])
            stop_B[row_b] = torch.tensor(stops, device=self.device).float()
            length_B[row_b] = t + 1
            going_k = (stop_B[row_b] == StopReason.RUNNING).nonzero().squeeze(1)
            if len(going_k) == 0:
                break
            if len(going_k) < len(row_b):
                # Compacted at once: a search looks at K tokens of each row, so a finished row costs K times as much as
                # in sampling.
                states.keep(going_k)
                row_b, token_b = row_b[going_k], token_b[going_k]
            states.step(token_b)
        mask_BT = torch.arange(places, device=self.device) < length_B[:, None]
        return Completions(token_BT, mask_BT, logp_BT, value_BT, stop_B.long()), model_calls_B

    def _spread(self, token_bK: Tensor, logp_bK: Tensor) -> Tensor:
        """Log-probabilities over the vocabulary, [b, V]; none outside the candidates."""
        nothing_bV = logp_bK.new_full((len(token_bK), self.policy.vocab_size), -torch.inf)
        return nothing_bV.scatter(1, token_bK, logp_bK)

    def candidates(self, logp_BV: Tensor) -> Tensor:
        """The policy's top_k tokens, the most likely first. int64 [B, K]."""
        return logp_BV.topk(min(self.config.top_k, logp_BV.shape[1])).indices
