"""Agent: the base of every algorithm. A subclass has a config and `update(rollout) -> metrics`; the rest is here.

`learn`, `predict`, `save`, `load`, `set_env`, `get_env` and `logger` mean what they mean in Stable-Baselines3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypedDict, TypeVar, Unpack

import gymnasium as gym
import numpy as np
import torch
from annotated_types import Ge
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import MaybeCallback
from torch import Tensor

from textrl_gym import functional, processes
from textrl_gym.bounds import Seed, check, shown
from textrl_gym.core import Rollout
from textrl_gym.kl import KLPenalty
from textrl_gym.mdp.spaces import batched
from textrl_gym.mdp.text_env import TextVectorEnv, vector_env
from textrl_gym.models import loading, lora
from textrl_gym.policy.compiling import Compile, require_compiler
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts.collect import collect
from textrl_gym.rollouts.vllm import ServedRollouts
from textrl_gym.training import checkpoint, dependencies, loop, run_folder
from textrl_gym.training.config import AgentConfig, Clock, TrainOptions, make_config
from textrl_gym.training.dependencies import Fingerprints
from textrl_gym.training.distributed import Shards
from textrl_gym.training.minibatch import Minibatch, checked_adamw

T = TypeVar("T", str, float)
EnvLike = str | gym.Env[Any, Any] | VectorEnv[Any, Any, Any]
"""An environment id, or a text environment, wrapped or not."""
ModelLike = str | torch.nn.Module | None
"""A Hub id or folder, or a loaded causal LM; None: the task's own."""
Indices = Sequence[int] | np.ndarray | None
"""Which prompts, one for each row; None: the environment draws them."""
Observation = Mapping[str, Tensor | np.ndarray]
PredictState = tuple[np.ndarray, ...] | None
"""Of Stable-Baselines3's recurrent policies; handed through."""


class PolicySettings(TypedDict):
    """Keyword arguments of a Policy, as every agent gives them."""

    reference: Policy | torch.nn.Module | Literal["copy"] | None
    value_head: bool
    value_model: torch.nn.Module | None
    temperature: float
    vocab_size: int
    dtype: torch.dtype
    cuda_graphs: bool
    compile: Compile


RENAMED_METHODS = {"memory": "extra_state", "remember": "load_extra_state"}
"""Methods of 0.1 that a subclass could override, and their names since."""


class Agent:
    """A policy that learns on a text environment.

    Args:
        env: an id, a text environment, or a text vector environment (its rows are then the rollout's episodes). The
            agent steps a copy of its own, so the given one is not changed.
        model: a Hub id, a folder (of a LoRA adapter or of a saved agent, too), or a loaded causal LM to start from;
            None: the task's own.
        reference: the model that KL is measured to; None: a frozen copy of the initial policy.
        seed: of prompts, sampling and shuffling.
        device: "auto", "cpu", "cuda".
        out: folder for logs, samples and checkpoints; None: a new one under runs/, made by learn().
        settings: fields of the config.

    Raises:
        ValueError: an unknown setting, with the allowed ones; a setting that the environment was made with otherwise;
            a vocabulary that does not match the model.
    """

    Config: ClassVar[type[AgentConfig]] = AgentConfig
    uses_value: ClassVar[bool] = False
    """Whether the policy gets a value head."""
    trains: ClassVar[bool] = True
    """Whether there is anything to update; learn() only evaluates where there is not."""
    resumes: ClassVar[bool] = True
    """Whether a loaded checkpoint goes on as if it had never been stopped; where not, `compare` begins a run anew."""
    needs_groups: ClassVar[bool] = False
    """Whether the completions of a prompt are compared, so that an environment without groups is refused."""
    starts_at_reference: bool = True
    """Whether the fresh policy is its reference, so that the health card wants a KL of 0."""
    kl_where: Literal["reward", "loss"] = "reward"
    """Whether the KL penalty is in the rollout's rewards or in the loss."""
    kl_coef_of_none: ClassVar[float] = 0.0
    """The KL coefficient where neither a setting nor the task has one."""
    one_process: ClassVar[bool] = False
    """Whether it is refused in a run of several processes."""
    shardable: ClassVar[bool] = True
    """Whether its update reads the policy by `logprobs`, `response` and `values` alone, as learn(shard=True) needs."""
    single_turn: ClassVar[bool] = False
    """Whether environments whose tasks are conversations are refused."""
    by_server: ClassVar[bool] = True
    """Whether its rollouts are samples of the policy's whole distribution, which a rollout server can take."""
    is_offline: ClassVar[bool] = False
    """Whether rollouts are made of given texts, which the policy has not sampled."""
    bar_metrics: ClassVar[Mapping[str, str]] = {
        "rollout/score": "score {:.3f}",
        "rollout/kl_sequence": "KL {:.2f} nats/seq",
    }
    """What the progress bar shows: keys of the log and how each is written; of an evaluation the last one's."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        # Methods of 0.1 that nothing would call: the state of such an agent would be lost in silence.
        for old, new in RENAMED_METHODS.items():
            if old in vars(cls) and new not in vars(cls):
                raise TypeError(f"{cls.__name__}.{old}() is called {new}() since 0.2: rename the method")

    def __init__(
        self,
        env: EnvLike,
        model: ModelLike = None,
        reference: ModelLike = None,
        *,
        seed: int = 0,
        device: str = "auto",
        out: str | Path | None = None,
        **settings: object,
    ) -> None:
        self.config: Any = make_config(self.Config, settings, type(self).__name__)
        check("seed", seed, Seed)
        check("out", out, Path | None)
        _check_models(model=model, reference=reference)
        self.seed, self.out = seed, None if out is None else Path(out)
        self.device = loading.resolve_device(device)
        self.model_spec = model if isinstance(model, str) else None
        self.reference_spec = reference if isinstance(reference, str) else None
        self.rebuilds_model = model is None or isinstance(model, str)
        self.rebuilds_reference = isinstance(reference, str) or (reference is None and self.rebuilds_model)
        self._fingerprints: Fingerprints | None = None
        # What was typed, and not what a default says: only that can contradict the environment.
        self._given = frozenset(settings)
        self.set_env(env)
        self.kl = self._make_kl(self.env)
        self.policy = self._make_policy(self.env, model, reference)
        self.env.end_as(self.policy.model)
        self.policy.try_out(self.env.max_prompt_tokens, self.env.max_new_tokens, self.env.turns is not None)
        # By its settings a loaded agent's environment would take the model of its tokenizer: the trained policy.
        self.env.use_reference(self.policy.reference)
        self.optimizer: torch.optim.Optimizer = self.new_optimizer(self.policy)
        self.served: ServedRollouts | None = None
        """Rollouts by a vLLM server, where learn() was given one."""
        self.shards: Shards | None = None
        """What is trained in the policy's place while learn(shard=True) updates it."""
        # torch.rand takes a generator of the device that it fills.
        self.generator = torch.Generator(self.device).manual_seed(seed)
        # A stream apart from the sampler's, so that another number of epochs does not change what is sampled.
        self.shuffler = np.random.default_rng(seed)
        self.home: Path | None = None
        """The folder whose run this is: where learn() has trained it, or where it was loaded from to go on there."""
        self.finished = False
        """Whether the last learn() came to its end, the last evaluation included."""
        self.num_timesteps = 0
        self.num_updates = 0
        self.clock = Clock()
        self.dropped_tokens = 0
        """Tokens that the last collect() generated beside those of its rollout; learn() counts them too."""
        self.total_timesteps = 0
        """Those of the last learn(), over which the learning rate falls."""
        self.seconds = {"collect": 0.0, "update": 0.0, "evaluate": 0.0}
        """Wall-clock seconds spent so far in each phase of learn()."""
        self._logger: Logger | None = None

    # -- what it is made of -------------------------------------------------------------------------------------------

    def _own_env(self, env: EnvLike) -> TextVectorEnv:
        """A vector environment of the agent's own: made from an id, or with the given one's settings and prompts."""
        config = self.config
        batch: dict[str, Any] = {
            "group_size": config.group_size,
            "array": "torch",
            "device": str(self.device),
            "autoreset_mode": AutoresetMode.DISABLED,
        }
        if isinstance(env, str):
            # set_env() with an id keeps the tokenizer that the policy was made for.
            tokenizer = self.env.tokenizer if hasattr(self, "env") else self.model_spec
            named = batch if tokenizer is None else batch | {"tokenizer": tokenizer}
            env = vector_env(env, num_envs=config.rollout_episodes, **named)
        given = vector_env(env)
        rows = config.rollout_episodes
        if isinstance(env.unwrapped, TextVectorEnv):
            batch, rows = {}, given.num_envs
            self._check_size("rollout_episodes", given.num_envs)
            self._check_size("group_size", given.group_size)
        own = given.remake(
            rows,
            **batch,
            kl_estimator=self._agreed("kl_estimator", given.kl_estimator, "k1"),
            missing_eos_penalty=self._agreed("missing_eos_penalty", given.missing_eos_penalty, 0.0),
        )
        if given.streams() and given.num_envs == rows:  # each row has a stream of prompts, which the copy goes on with
            own.restore_streams(given.streams())
        else:
            own.reset(seed=self.seed)
        return own

    def _check_size(self, name: str, size: int) -> None:
        """Refuse a setting that a given vector environment contradicts."""
        if name in self._given and getattr(self.config, name) != size:
            field = {"rollout_episodes": "num_envs"}.get(name, name)
            raise ValueError(
                f"{name}={getattr(self.config, name)} does not fit the given vector environment, which has "
                f"{field}={size}: leave {name} out, or make the environment so"
            )

    def _agreed(self, name: str, of_env: T, default: T) -> T:
        """A setting that the config and the environment both have: whichever was given; both, and equal, is fine."""
        own = getattr(self.config, name)
        if own is None:
            return of_env
        if of_env not in (default, own):
            raise ValueError(
                f"{name}={own!r} of {type(self).__name__} and {name}={of_env!r} of the environment differ: "
                "give one of them, or the same"
            )
        return own

    def _make_kl(self, mdp: TextVectorEnv) -> KLPenalty:
        config = self.config
        coef = self._agreed("kl_coef", mdp.kl_coef, 0.0)
        # 0 is the environment's default and no wish: the task knows how much its reward can be trusted.
        if config.kl_coef is None and coef == 0:
            coef = mdp.task.kl_coef or self.kl_coef_of_none
        return KLPenalty(coef, mdp.kl_estimator, self.kl_where, config.kl_target, config.kl_horizon)

    def _make_policy(self, mdp: TextVectorEnv, model: ModelLike, reference: ModelLike) -> Policy:
        if self.config.compile != "none":
            require_compiler(self.device.type)
        loaded = model if isinstance(model, torch.nn.Module) else mdp.task.load_model(model)
        loading.check_vocab(mdp.tokenizer, loaded)
        loaded_reference: torch.nn.Module | Literal["copy"] = "copy"
        if isinstance(reference, str):
            loaded_reference = mdp.task.load_model(reference)
            loading.check_vocab(mdp.tokenizer, loaded_reference)
        elif reference is not None:
            loaded_reference = reference
        # float32 whatever the file holds: at a learning rate of 1e-6 a bfloat16 weight would not move.
        loaded = self._make_trained(loaded.to(self.device).float())
        # A value head starts at random: the same for a seed, whatever drew from the global generator before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self._new_policy(
                loaded,
                reference=loaded_reference,
                value_head=self.uses_value,
                value_model=self._make_value_model(mdp, loaded),
                temperature=self.config.temperature,
                vocab_size=mdp.vocab_size,
                dtype=loading.resolve_dtype(self.config.dtype),
                cuda_graphs=self.config.cuda_graphs,
                compile=self.config.compile,
            )

    def _new_policy(self, model: torch.nn.Module, **settings: Unpack[PolicySettings]) -> Policy:
        """The policy of a loaded model; an agent with another kind of policy overrides this."""
        return Policy(model, **settings)

    def _make_trained(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model with a LoRA, or its lower layers frozen, as the config says."""
        config = self.config
        if config.lora_rank and lora.is_lora(model) and not lora.changes_nothing(model):
            raise ValueError(
                f"lora_rank={config.lora_rank} and a model with a trained adapter: leave lora_rank out to train that "
                "adapter on, or give model.merge_and_unload() for a new one on top of it"
            )
        if config.lora_rank and not lora.is_lora(model):
            return lora.add_lora(model, config.lora_rank, config.lora_alpha, self.seed)
        return lora.freeze_lower(model, config.frozen_layers) if config.frozen_layers else model

    def _make_value_model(self, mdp: TextVectorEnv, model: torch.nn.Module) -> torch.nn.Module | None:
        """A separate model for the critic; none unless a subclass says so."""
        return None

    def new_optimizer(self, policy: Policy) -> torch.optim.Optimizer:
        """AdamW over what is trained of a policy, which refuses steps from or to numbers that are not finite."""
        return checked_adamw(policy, self.config, self.device)

    @property
    def fingerprints(self) -> Fingerprints:
        """The hashes of the folders that this run depends on; see textrl_gym.training.dependencies."""
        if self._fingerprints is None:
            model = self.model_spec or self.env.task.model
            # A model that was given loaded is in the checkpoint itself.
            initial = model if self.rebuilds_model else None
            self._fingerprints = dependencies.fingerprints(initial, self.reference_spec, self.env.settings["reward"])
        return self._fingerprints

    @fingerprints.setter
    def fingerprints(self, fingerprints: Fingerprints) -> None:
        self._fingerprints = fingerprints

    # -- Stable-Baselines3's names ------------------------------------------------------------------------------------

    @property
    def logger(self) -> Logger:
        """Stable-Baselines3's Logger."""
        if self._logger is None:
            raise AttributeError("the logger is made by learn(), or given by set_logger()")
        return self._logger

    def set_logger(self, logger: Logger | None) -> None:
        """Use this Logger of Stable-Baselines3 from now on; None: learn() makes one."""
        self._logger = logger

    def get_env(self) -> TextVectorEnv:
        """The vector environment that rollouts are collected from."""
        return self.env

    def get_vec_normalize_env(self) -> None:
        """None: observations are tokens, which nothing normalises. SB3's EvalCallback asks for it."""

    def set_env(self, env: EnvLike) -> None:
        """Collect from another environment from now on: an id, a text environment, or a text vector environment.

        The agent makes one like it for itself, which goes on with its prompts; the given one is not changed.

        Raises:
            ValueError: the environment contradicts the agent's settings, or has no groups where completions of a prompt
                are compared.
        """
        mdp = self._own_env(env)
        if self.needs_groups and mdp.group_size == 1:
            raise ValueError(
                f"{type(self).__name__} compares completions of a prompt: make the environment with group_size > 1"
            )
        self.check_turns(mdp)
        if hasattr(self, "kl") and self.kl.target is None and mdp.kl_coef not in (0, self.kl.coef):
            raise ValueError(
                f"kl_coef={self.kl.coef} of {type(self).__name__} and kl_coef={mdp.kl_coef} of the environment differ"
            )
        if hasattr(self, "policy"):
            self.policy.try_out(mdp.max_prompt_tokens, mdp.max_new_tokens, mdp.turns is not None)
            mdp.use_reference(self.policy.reference)
            mdp.end_as(self.policy.model)
        # What is saved is what was used.
        self.config = dataclasses.replace(self.config, rollout_episodes=mdp.num_envs, group_size=mdp.group_size)
        self.env: TextVectorEnv = mdp

    def check_turns(self, mdp: TextVectorEnv) -> None:
        """Raise ValueError where this agent completes a single turn and the environment is a conversation."""
        if self.single_turn and mdp.turns is not None:
            raise ValueError(
                f"{type(self).__name__} completes a single turn, and {type(mdp.task).__name__} is a conversation: take "
                "an agent that learns from rollouts, such as ppo or grpo"
            )

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
        """Train for at least total_timesteps generated tokens. One timestep is one token; the last rollout is whole.

        Args:
            callback: Stable-Baselines3's callbacks; on_step is called once a rollout.
            log_interval: updates between two rows of the log.
            tb_log_name: subfolder for TensorBoard's files under `out`.
            reset_num_timesteps: False goes on counting (and with the learning-rate schedule) from before.
            options: of textrl_gym.training.config.TrainOptions (evaluations, health card).
        """
        check("total_timesteps", total_timesteps, Annotated[int, Ge(0)])
        check("log_interval", log_interval, Annotated[int, Ge(1)])
        if reset_num_timesteps:
            self.num_timesteps = 0
            self.total_timesteps = total_timesteps
        elif total_timesteps:
            self.total_timesteps = self.num_timesteps + total_timesteps
        else:  # only what a stop left out behind the last update; its own total stays what it was
            self.total_timesteps = min(self.total_timesteps, self.num_timesteps)
        loop.train(
            self,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            progress_bar=progress_bar,
            options=make_config(TrainOptions, options, "learn()"),
        )
        return self

    def dump_logs(self) -> None:
        """Nothing, in Stable-Baselines3's name: `learn` writes a row for each update, and half of one is none."""

    def predict(
        self,
        observation: Observation,
        state: PredictState = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, PredictState]:
        """Action of a single or batched observation; deterministic takes the most likely token.

        Raises:
            ValueError: it is no observation of a text environment.
        """
        # Both kinds, as Stable-Baselines3's predict takes them: its evaluate_policy relies on it.
        batch, single = batched(observation)
        action_B, _ = self.policy.act(batch, deterministic, generator=self.generator)
        actions = action_B.cpu().numpy()
        return (actions[0] if single else actions), state

    def play(
        self,
        env: EnvLike,
        *,
        greedy: bool = False,
        generator: torch.Generator | None = None,
        prompt_indices: Indices = None,
    ) -> Rollout:
        """A completion of each row's prompt, as evaluation scores it; an agent that decodes its own way overrides this.

        In the rollout logp_BT is the log-probability under what was really sampled from, so that logp_BT - ref_logp_BT
        adds up to the KL of this agent to its reference.

        Args:
            env: a text vector environment.
            greedy: take the most likely tokens.
            generator: on the policy's device, of random numbers.
            prompt_indices: which prompts.
        """
        return collect(env, self.policy, kl_coef=0.0, greedy=greedy, generator=generator, prompt_indices=prompt_indices)

    def extra_metrics(self, rollouts: list[Rollout]) -> dict[str, float]:
        """What an agent adds to the numbers of an evaluation, from the rollouts that it played there (not greedily)."""
        return {}

    # -- learning -----------------------------------------------------------------------------------------------------

    def collect(self) -> Rollout:
        """One rollout: a complete episode in every row of the environment."""
        if self.served is not None:
            return self.served.collect(self, self.kl.coef_in_reward)
        return collect(self.env, self.policy, kl_coef=self.kl.coef_in_reward, generator=self.generator)

    def shaped(self, rollout: Rollout) -> Rollout:
        """A rollout with the rewards that this algorithm learns from, where it changes the environment's."""
        return rollout

    def advantages(self, rollout: Rollout) -> Tensor | None:
        """What the loss weighs each action of a rollout by, [B, T], 0 outside the mask; None where it does not.

        It changes nothing, so that what an update learns from can be looked at (textrl_gym.evaluation.token_credit).
        """
        return None

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One update from one rollout; returns metrics to log. This is what a subclass writes."""
        raise TypeError(f"{type(self).__name__} must define update(rollout) -> metrics")

    def minibatches(self, rollout: Rollout) -> Iterator[Minibatch]:
        """The minibatches of each epoch, shuffled; groups stay together, since they share a prompt's cost."""
        self.optimizer.zero_grad(set_to_none=True)  # an update that was interrupted leaves some
        processes.forget_parts()
        groups = rollout.group_B.unique()
        for _ in range(self.config.epochs):
            order = groups[torch.as_tensor(self.shuffler.permutation(len(groups)), device=self.device)]
            # Never more minibatches than groups: an empty one would still take an optimizer step, with momentum.
            for chosen in order.tensor_split(min(self.config.minibatches, len(groups))):
                rows = torch.isin(rollout.group_B, chosen).nonzero().squeeze(1)
                yield Minibatch.of(rollout.select(rows), self.config.micro_batch_tokens, self.config.importance_cap)

    def step(self) -> float:
        """Take an optimizer step on the gradients so far at the current learning rate; returns their norm unclipped.

        Raises:
            NonFiniteError: the norm is NaN or infinite; no step is taken.
        """
        # The learning rate is set here and not by a scheduler of PyTorch, whose count of steps would have to be saved,
        # and would stand still where an agent skips a step.
        processes.add_gradients(self.policy.parameters())  # before they are clipped: the norm is that of the sum
        norm = processes.whole(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm))
        # Before the hook's check: clipping by an infinite norm has made all gradients 0.
        functional.require_finite("the gradient norm", norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the current update, by the schedule and the clock."""
        if self.config.lr_schedule == "constant":
            return self.config.learning_rate
        return self.config.learning_rate * max(0.0, 1.0 - self.clock.progress)

    # -- save and load ------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a checkpoint folder (safetensors and JSON) that `load` goes on from as if never stopped.

        The logs of the run go with it, so that `textrl-gym report` shows the folder as it shows the run's own.
        """
        checkpoint.save(self, path)
        if self.out is not None:
            run_folder.copy_logs(self.out, Path(path))

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
        """The agent that `save` wrote, ready to predict or to go on learning; see textrl_gym.training.checkpoint.load.

        Args:
            env: another environment; None makes the saved one again.
            trust_code: import the agent, task and reward that the folder names, though they are not part of textrl_gym
                and have not been imported. Set it for folders whose origin you know.
            base_model: where the model stands now that the run started from.
            env_settings: keywords of the saved environment to change: {"dataset": ..., "reward": ...} where they moved.
            settings: config fields to change.

        Raises:
            ValueError: the folder holds no agent, another class's, or one of a version that is not read; the
                environment had settings that cannot be written down, and no env was given; or another model stands
                where one stood that the run depends on.
        """
        return checkpoint.load(
            cls,
            path,
            env,
            device=device,
            out=out,
            trust_code=trust_code,
            base_model=base_model,
            env_settings=env_settings,
            **settings,
        )

    def extra_state(self) -> dict[str, Any]:
        """What a subclass keeps from update to update beside the policy, as JSON can hold it; it is saved."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from what `extra_state` gave."""

    def save_extra(self, folder: Path) -> None:
        """Write files of a subclass's own into a checkpoint's folder."""

    def load_extra(self, folder: Path) -> None:
        """Read what `save_extra` wrote; all else is restored before."""

    def rng_state(self) -> tuple[dict[str, Any], Tensor]:
        """Where prompts, shuffling and sampling stand, and the timesteps done: JSON, and the generator's state."""
        streams, generator = self.env.streams(), self.generator.get_state()
        # Before what is drawn ahead, and not learnt from yet.
        if self.served is not None and self.served.streams is not None:
            streams, generator = self.served.streams
        shuffler = self.shuffler.bit_generator.state
        return {"num_timesteps": self.num_timesteps, "shuffler": shuffler, "env": streams}, generator

    def load_rng_state(self, numbers: dict[str, Any], generator: Tensor, env: bool = True) -> None:
        """Go back to where `rng_state` was taken (with env=False, not the environment's prompts)."""
        if self.served is not None:
            self.served.forget()
        self.num_timesteps = numbers["num_timesteps"]
        self.shuffler.bit_generator.state = numbers["shuffler"]
        if generator.shape == self.generator.get_state().shape:
            self.generator.set_state(generator)
        else:
            # Saved on another kind of device, whose generator is another: no state of this one gives its numbers.
            self.generator.manual_seed(self.seed + self.num_timesteps)
        if env:
            self.env.restore_streams(numbers["env"])


def _check_models(**models: object) -> None:
    for name, model in models.items():
        if not isinstance(model, str | Path | torch.nn.Module | None) or model == "":
            raise ValueError(f"{name} must be a Hub id, a folder, a loaded model or None, got {shown(model)}")
