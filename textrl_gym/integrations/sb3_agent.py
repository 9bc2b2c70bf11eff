"""SB3Agent: Stable-Baselines3's algorithms as agents here, with its rollouts and its losses.

`collect` is SB3's collect_rollouts() and `update` its train(); what is around them (evaluations, logs, checkpoints,
Ctrl-C) is ours, by training.loop, so that curves can be laid beside those of the other agents. Running SB3's own
learn() with the same seeds gives the same weights (a test).

Departures from SB3's habits: the optimizer is this project's AdamW for all of its algorithms, gamma and lambda are 1,
and n_steps is the environment's token budget, in which each row ends at least one text.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Self

import numpy as np
import torch
from annotated_types import Ge, Le
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback
from torch import Tensor

from textrl_gym import functional
from textrl_gym.core import Rollout
from textrl_gym.integrations.sb3_env import TextVecEnv
from textrl_gym.integrations.sb3_policy import CausalLMPolicy, PolicyLogprob
from textrl_gym.mdp.text_env import TextVectorEnv
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts.scoring import rollout_logprobs
from textrl_gym.training.agent import Agent, EnvLike
from textrl_gym.training.config import AgentConfig


@dataclasses.dataclass(frozen=True)
class SB3Config(AgentConfig):
    """Settings of all SB3 algorithms."""

    rollout_episodes: int = 64
    """Rows of the vector environment (SB3's n_envs); a rollout is n_steps tokens of each."""
    group_size: int = 8
    """Rows that go through the same prompts, whose cost they share in the losses."""
    micro_batch_tokens: int = 65_536
    """Prompt and response places in one forward and backward pass: memory, not result. Beyond it, passes are computed
    a second time."""
    n_steps: Annotated[int | None, Ge(1)] = None
    """Tokens of each row in a rollout; None: the environment's token budget, which is the least."""
    gamma: Annotated[float, Ge(0), Le(1)] = 1.0
    """Discount of a token step."""
    gae_lambda: Annotated[float, Ge(0), Le(1)] = 1.0
    """Bias against variance in the advantage; 1 is return minus value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype != "float32":
            raise ValueError(
                f"dtype must be float32, got {self.dtype!r}: SB3 takes its ratios to the log-probabilities that the "
                "sampler gave, which are rounded otherwise below float32"
            )


class SB3Agent(Agent):
    """An algorithm of Stable-Baselines3; a subclass makes it in `make_algorithm`.

    SB3's rows are in the middle of texts when a rollout ends: a checkpoint holds them, with what is known of each of
    their tokens, so that a run that goes on is the one that was never stopped.
    """

    Config = SB3Config
    config: Any
    uses_value = True
    by_server = False  # SB3 asks the policy for each token itself
    one_process = True  # SB3 cuts its minibatches itself
    single_turn = True  # a checkpoint holds texts that were begun, and conversations cannot be put down half-way
    _algorithm: OnPolicyAlgorithm | None = None
    _texts: list[dict[str, Any]] | None = None
    """The texts that the rows of the next algorithm are in the middle of; None: it begins new ones."""

    def make_algorithm(self, **common: Any) -> OnPolicyAlgorithm:
        """SB3's algorithm from the arguments that all of them take."""
        raise TypeError(f"{type(self).__name__} must define make_algorithm(**common)")

    @property
    def batch_steps(self) -> int:
        """Tokens of a rollout: those of all rows."""
        return self.n_steps * self.env.num_envs

    @property
    def n_steps(self) -> int:
        """Tokens of each row in a rollout."""
        return self.env.max_new_tokens if self.config.n_steps is None else self.config.n_steps

    @property
    def algorithm(self) -> OnPolicyAlgorithm:
        """SB3's algorithm; it is made, and its rows begin, when it is first needed."""
        if self._algorithm is None:
            self._algorithm = self._begin()
        return self._algorithm

    def _begin(self) -> OnPolicyAlgorithm:
        # SB3 sends tokens alone, so that the environment asks the policy for its log-probabilities itself.
        logprob = PolicyLogprob(whole=self.env.kl_estimator == "full")
        mdp = self.env.remake(
            self.env.num_envs,
            array="numpy",
            autoreset_mode=AutoresetMode.DISABLED,
            reference=self.policy.reference,
            policy_logprob=logprob,
        )
        mdp.streams_of_prompts = self.env.streams_of_prompts  # so that a checkpoint holds them
        algorithm = self.make_algorithm(
            policy=CausalLMPolicy,
            env=TextVecEnv(mdp),
            learning_rate=lambda _: self.learning_rate,
            n_steps=self.n_steps,
            gamma=self.config.gamma,
            gae_lambda=self.config.gae_lambda,
            policy_kwargs={"model": self.policy, "micro_batch_tokens": self.config.micro_batch_tokens},
            device=self.device,
        )
        assert isinstance(algorithm.policy, CausalLMPolicy)
        logprob.policy = algorithm.policy
        algorithm.policy.optimizer = self.optimizer  # this agent's, which its checkpoints hold
        algorithm.set_logger(Logger(None, []))  # its numbers become our metrics
        self._episodes = _Episodes()
        self._episodes.init_callback(algorithm)
        streams = self.env.streams()
        # What SB3's learn() does before its loop: it resets the rows and makes the buffers of episodes' infos.
        algorithm._setup_learn(self.batch_steps)
        if self._texts is not None:
            self.env.restore_streams(streams)
            self._go_on(algorithm, self._texts)
        return algorithm

    def _go_on(self, algorithm: OnPolicyAlgorithm, texts: list[dict[str, Any]]) -> None:
        """Put texts that were begun into the rows."""
        envs = algorithm.env
        assert isinstance(envs, TextVecEnv)
        self._episodes.running = [[(logp, value, reward) for logp, value, reward in text["steps"]] for text in texts]
        algorithm._last_obs = envs.restore(texts, [sum(reward for *_, reward in text["steps"]) for text in texts])
        algorithm._last_episode_starts = np.array([not text["tokens"] for text in texts])

    def set_env(self, env: EnvLike) -> None:
        super().set_env(env)
        self._algorithm = None
        self._texts = None
        if self.n_steps < self.env.max_new_tokens:
            raise ValueError(
                f"n_steps={self.n_steps} must be at least max_new_tokens={self.env.max_new_tokens}, so that every "
                "row ends a text in every rollout"
            )
        if self.batch_steps % self.config.minibatches:
            raise ValueError(
                f"minibatches={self.config.minibatches} must divide the {self.batch_steps} tokens of a rollout"
            )

    def rng_state(self) -> tuple[dict[str, Any], Tensor]:
        numbers, generator = super().rng_state()
        texts = self._texts
        if self._algorithm is not None:
            envs = self._algorithm.env
            assert isinstance(envs, TextVecEnv)
            both = zip(envs.mdp.episodes(), self._episodes.running, strict=True)
            texts = [episode | {"steps": list(steps)} for episode, steps in both]
        return numbers | {"texts": texts}, generator

    def load_rng_state(self, numbers: dict[str, Any], generator: Tensor, env: bool = True) -> None:
        super().load_rng_state(numbers, generator, env)
        # Texts of another environment are none of this one's; versions before 0.2 saved none.
        self._algorithm, self._texts = None, numbers.get("texts") if env else None

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = True,
        **options: object,
    ) -> Self:
        """As of every agent. A call that counts anew begins new texts in every row, as SB3's own learn() does."""
        if reset_num_timesteps:
            self._algorithm = self._texts = None
        return super().learn(
            total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar, **options
        )

    def collect(self) -> Rollout:
        """SB3's rollout. Returned are the texts that ended in it; what SB3 trains on stays in its own buffer."""
        algorithm = self.algorithm
        envs = algorithm.env
        assert isinstance(envs, TextVecEnv)  # SB3 wraps images and single environments only
        envs.mdp.kl_coef = self.kl.coef  # an adaptive penalty has moved it since the last rollout
        reference = envs.mdp.reference
        if reference is not None and reference.steps is not None:
            # Its numbers for texts that were begun before would differ in their last digits from those of a run that
            # goes on, which has to compute these texts whole.
            reference.steps.forget()
        with self._seeded():
            algorithm.collect_rollouts(envs, self._episodes, algorithm.rollout_buffer, self.n_steps)
        rollout = self._episodes.take(envs.mdp, self.policy)
        self.dropped_tokens = self.batch_steps - rollout.num_tokens
        return rollout

    def advantages(self, rollout: Rollout) -> Tensor:
        """Those of SB3's buffer, for whole texts. SB3 scales them within each minibatch; here over the rollout."""
        mask_BT, config = rollout.mask_BT, self.config
        advantage_BT, _ = functional.gae(rollout.reward_BT, rollout.value_BT, mask_BT, config.gamma, config.gae_lambda)
        if getattr(config, "whiten_advantages", False):
            flat_N = advantage_BT[mask_BT]
            advantage_BT = (advantage_BT - flat_N.mean()) / (flat_N.std() + 1e-8) * mask_BT
        return advantage_BT

    def update(self, rollout: Rollout) -> dict[str, float]:
        """SB3's update from the rollout that the last collect() left in its buffer."""
        logger = self.algorithm.logger
        with self._seeded():
            self.algorithm.train()
        numbers = {name.removeprefix("train/"): float(value) for name, value in logger.name_to_value.items()}
        logger.dump()
        return {name: number for name, number in numbers.items() if name not in ("learning_rate", "n_updates")}

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        """SB3 draws from the global generators: inside they are seeded by this agent's, afterwards as before."""
        seed = int(torch.randint(2**31, (), generator=self.generator, device=self.device))
        numpy_state = np.random.get_state()  # noqa: NPY002 - SB3's buffers shuffle by it
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            try:
                torch.manual_seed(seed)
                np.random.seed(seed)  # noqa: NPY002
                yield
            finally:
                np.random.set_state(numpy_state)  # noqa: NPY002


class _Episodes(BaseCallback):
    """Puts texts together again from SB3's steps."""

    def _init_callback(self) -> None:
        self.running: list[list[tuple[float, float, float]]] = [[] for _ in range(self.training_env.num_envs)]
        self.ended: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        now = self.locals
        facts = (now["log_probs"].tolist(), now["values"].flatten().tolist(), now["rewards"].tolist())
        for steps, fact, done, info in zip(
            self.running, zip(*facts, strict=True), now["dones"], now["infos"], strict=True
        ):
            # A text may have begun in the rollout before: its first tokens were sampled by the policy of then.
            steps.append(fact)
            if done:
                self.ended.append(info | {"steps": list(steps)})
                steps.clear()
        return True

    def take(self, mdp: TextVectorEnv, policy: Policy) -> Rollout:
        """The texts that ended since the last call, with the reference's log-probabilities."""
        ended, self.ended = self.ended, []
        device, places = policy.device, mdp.max_prompt_tokens
        input_BL, mask_BL = (
            torch.as_tensor(np.stack([info["terminal_observation"][name] for info in ended]), device=device)
            for name in ("input_ids", "attention_mask")
        )
        facts_BTX = torch.zeros(len(ended), mdp.max_new_tokens, 3, device=device)
        for b, info in enumerate(ended):
            facts_BTX[b, : len(info["steps"])] = torch.tensor(info["steps"])
        logp_BT, value_BT, reward_BT = facts_BTX.unbind(-1)
        rollout = Rollout(
            prompt_BP=input_BL[:, :places],
            prompt_mask_BP=mask_BL[:, :places].bool(),
            token_BT=input_BL[:, places:],
            mask_BT=mask_BL[:, places:].bool(),
            logp_BT=logp_BT,
            ref_logp_BT=logp_BT,  # until the pass below, which needs a rollout
            kl_BT=torch.zeros_like(logp_BT),
            value_BT=value_BT,
            score_B=torch.tensor([info["score"] for info in ended], device=device),
            reward_BT=reward_BT,
            stop_B=torch.tensor([int(info["stop_reason"]) for info in ended], device=device),
            group_B=torch.arange(len(ended), device=device),
            prompts=[info["prompt"] for info in ended],
            completions=[info["completion"] for info in ended],
            components={
                name: torch.tensor([info["components"][name] for info in ended], device=device)
                for name in ended[0].get("components", ())
            },
            logged={
                name: [info.get("logged", {}).get(name) for info in ended]
                for name in sorted({name for info in ended for name in info.get("logged", ())})
            },
        ).trim()
        assert policy.reference is not None
        ref_logp_BT = rollout_logprobs(rollout, policy.reference)
        kl_BT = (rollout.logp_BT - ref_logp_BT) * rollout.mask_BT
        return dataclasses.replace(rollout, ref_logp_BT=ref_logp_BT, kl_BT=kl_BT)
