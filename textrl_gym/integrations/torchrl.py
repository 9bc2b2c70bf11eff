"""TorchRLEnv: a text vector environment as TorchRL's EnvBase, its rows one batch of tensors.

Shape legend: B rows, L places of an observation, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from gymnasium.vector import AutoresetMode
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from textrl_gym.mdp.text_env import vector_env

LEAST_LOGPROB = -100.0
"""Of random actions, which TorchRL's checker draws; a policy's own may be less."""


class TorchRLEnv(EnvBase):
    """The rows of a text vector environment as TorchRL steps them. Batch size [B].

    Entries of the tensordict: `input_ids` int64 [B, L] and `attention_mask` int8 [B, L]; `action` int64 [B], a token;
    `reward` float32 [B, 1]; `done`, `terminated` and `truncated` bool [B, 1]; and `score` float32 [B, 1], the raw score
    where an episode has ended, else 0. With a KL penalty `action_log_prob` float32 [B], which TorchRL's
    ProbabilisticActor writes with return_log_prob=True, goes with the action, and `kl` float32 [B, 1] is the step's
    estimate.

    An episode that a budget ends is `terminated` and `truncated`: the budget is part of the task, so that the value
    behind it is 0, and TorchRL's estimators take a value from states that are truncated alone.

    Args:
        env: a text vector environment or an id. It is made again without its own resets.
        num_envs: B, of an id.
        settings: of an id, those of the environment.

    Raises:
        ValueError: no text environment; or the estimator "full", for which TorchRL's actors send too little.
    """

    def __init__(self, env: object, num_envs: int | None = None, **settings: Any) -> None:
        if isinstance(env, str):
            env = vector_env(env, num_envs=1 if num_envs is None else num_envs, **settings)
        elif num_envs is not None or settings:
            raise ValueError(
                f"{', '.join(['num_envs', *settings])} are settings of an environment that is named by its id"
            )
        given = vector_env(env)
        if given.wants_logprob and given.kl_estimator == "full":
            raise ValueError('kl_estimator="full" needs whole distributions; TorchRL\'s actors send log-probabilities')
        self.mdp = given.remake(given.num_envs, autoreset_mode=AutoresetMode.DISABLED, array="torch")
        super().__init__(device=self.mdp.device, batch_size=[self.mdp.num_envs])
        self._seeds: int | None = None
        self._make_specs()

    def _make_specs(self) -> None:
        rows, device = self.mdp.num_envs, self.mdp.device
        places, vocab = self.mdp.max_prompt_tokens + self.mdp.max_new_tokens, self.mdp.vocab_size
        observation = {
            "input_ids": Bounded(0, vocab - 1, (rows, places), device, torch.int64),
            "attention_mask": Bounded(0, 1, (rows, places), device, torch.int8),
            "score": Unbounded((rows, 1), device, torch.float32),
        }
        action = {"action": Categorical(vocab, (rows,), device, torch.int64)}
        if self.mdp.kl_coef:
            observation["kl"] = Unbounded((rows, 1), device, torch.float32)
        if self.mdp.wants_logprob:
            action["action_log_prob"] = Bounded(LEAST_LOGPROB, 0.0, (rows,), device, torch.float32)
        flag = Categorical(2, (rows, 1), device, torch.bool)
        self.observation_spec = Composite(observation, shape=(rows,))
        self.action_spec = Composite(action, shape=(rows,))
        self.reward_spec = Unbounded((rows, 1), device, torch.float32)
        done = {name: flag.clone() for name in ("done", "terminated", "truncated")}
        self.done_spec = Composite(done, shape=(rows,))

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: Any) -> TensorDict:
        options, seeds = None, self._seeds
        if tensordict is not None and "_reset" in tensordict:
            options = {"reset_mask": tensordict["_reset"].reshape(-1)}
        self._seeds = None
        observation, _ = self.mdp.reset(seed=seeds, options=options)
        return self._tensors(observation, self._column(0.0), self._column(0.0))

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action: Any = tensordict["action"]
        if self.mdp.wants_logprob:
            if "action_log_prob" not in tensordict:
                raise ValueError(
                    f"kl_coef={self.mdp.kl_coef} needs the policy's log-probability in 'action_log_prob': make the "
                    "actor with return_log_prob=True"
                )
            action = {"token": action, "logprob": tensordict["action_log_prob"].detach()}
        observation, reward, terminated, truncated, infos = self.mdp.step(action)
        score, done = self._column(0.0), (terminated | truncated)[:, None]
        for row, final in enumerate(infos["score"].tolist() if "score" in infos else ()):
            score[row] = final if infos["_score"][row] else 0.0
        kl = infos["kl"][:, None].float() if "kl" in infos else self._column(0.0)
        tensors = self._tensors(observation, score, kl)
        tensors["reward"] = reward[:, None].float()
        tensors["done"], tensors["terminated"], tensors["truncated"] = done, done.clone(), truncated[:, None]
        return tensors

    def _set_seed(self, seed: int | None) -> None:
        self._seeds = seed

    def _column(self, value: float) -> Tensor:
        return torch.full((self.mdp.num_envs, 1), value, device=self.mdp.device)

    def _tensors(self, observation: dict[str, Tensor], score: Tensor, kl: Tensor) -> TensorDict:
        entries: dict[str, Any] = {**observation, "score": score}
        if self.mdp.kl_coef:
            entries["kl"] = kl
        return TensorDict(entries, batch_size=self.batch_size, device=self.mdp.device)
