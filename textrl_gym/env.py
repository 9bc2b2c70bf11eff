"""The token MDP as Gymnasium environments: a native vector environment, and the single one as its case B = 1.

Shape legend: B rows, P prompt places, T response places, L = P + T, V vocabulary. The prompt is left-padded into the
first P places, so that generated token t always stands at place P + t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
import torch
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from textrl_gym import kl, models, plugins
from textrl_gym.core import RewardSpec, Row, StopReason
from textrl_gym.mdp import State, append, initial_state, select, shape_reward
from textrl_gym.policy import Policy
from textrl_gym.render import RENDER_MODES, Renderer
from textrl_gym.rewards import RewardFunction, load_reward

# -- the vector environment -------------------------------------------------------------------------------------------


class TextVectorEnv(VectorEnv):
    """B token MDPs side by side, on one device. See the environment's card in textrl_gym/envs for a task's own text.

    Args:
        num_envs: B, the number of rows.
        task: a Task, a Task subclass, "package.module:Class", or a module with one Task subclass.
        split: "train", "validation" or "test".
        dataset: None for the task's embedded prompts; else a Hub id, or a local file or folder in a published schema.
        tokenizer: a Hub id, a folder or a loaded tokenizer; None for the task's own.
        reward: a name, "name:argument", "package.module:name", a folder with a saved reward model, a callable with
            TRL's signature, or a weighted mapping of such strings; None for the task's own.
        max_prompt_tokens, max_new_tokens: the budgets P and T; None for the task's own.
        stop: strings that end an episode; the text given to the reward ends before them.
        group_size: so many neighbouring rows get the same prompt.
        kl_coef: coefficient of the per-token KL penalty; 0 turns it off.
        kl_estimator: "k1", "k2", "k3" or "full".
        reference: a causal LM, a Policy, a Hub id or a folder that the KL is measured to; None for the task's model.
        policy_logprob: fn(observation, action) -> log pi(action | observation), [B] (for "full": the whole
            distribution, [B, V]). None with kl_coef > 0: the log-probability comes with the action, as
            {"token": a, "logprob": log pi}.
        missing_eos_penalty: taken off the score of an episode whose budget ran out.
        device: where the tensors live: "cpu", "cuda", "auto".
        array: "numpy", or "torch" to keep tensors on the device.
        render_mode: "ansi", "human" or None.
        autoreset_mode: Gymnasium's NEXT_STEP, SAME_STEP or DISABLED.

    Raises:
        ValueError: naming the bad value and what is allowed.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        task: Any,
        split: str = "train",
        dataset: str | None = None,
        tokenizer: Any = None,
        reward: RewardSpec | None = None,
        max_prompt_tokens: int | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        group_size: int = 1,
        kl_coef: float = 0.0,
        kl_estimator: str = "k1",
        reference: Any = None,
        policy_logprob: Callable[[Any, Any], Any] | None = None,
        missing_eos_penalty: float = 0.0,
        device: str = "cpu",
        array: str = "numpy",
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    ) -> None:
        self.settings = {k: v for k, v in locals().items() if k not in ("self", "num_envs", "__class__")}
        """The keyword arguments, from which `remake` makes more of the same."""
        self.task = plugins.load_task(task)
        self.num_envs, self.group_size = num_envs, group_size
        self.max_prompt_tokens = self.task.max_prompt_tokens if max_prompt_tokens is None else max_prompt_tokens
        self.max_new_tokens = self.task.max_new_tokens if max_new_tokens is None else max_new_tokens
        self.stop = tuple([stop] if isinstance(stop, str) else self.task.stop if stop is None else stop)
        self.kl_coef, self.kl_estimator, self.policy_logprob = float(kl_coef), kl_estimator, policy_logprob
        self.missing_eos_penalty, self.array, self.render_mode = float(missing_eos_penalty), array, render_mode
        self._check_settings()
        mode = AutoresetMode(autoreset_mode) if isinstance(autoreset_mode, str) else autoreset_mode
        self.metadata = {"render_modes": RENDER_MODES, "autoreset_mode": mode, "render_fps": 30}
        self._mode = mode
        self.device = models.resolve_device(device)
        self.tokenizer = self.task.load_tokenizer(tokenizer)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer {tokenizer or self.task.model!r} has no EOS token: no episode could end")
        self.eos_id = int(self.tokenizer.eos_token_id)
        self.source = self.task.rows(split, dataset)
        if len(self.source) == 0:
            raise ValueError(f"dataset {dataset!r} has no rows in split {split!r}")
        self.reward_model = load_reward(
            self.task.reward if reward is None else reward,
            task=self.task,
            device=self.device,
            tokenizer=self.tokenizer,
        )
        self._reference_spec = reference
        self._reference: Policy | None = None
        self._rngs: list[np.random.Generator] | None = None
        self._rows: list[Row] = []
        self._prompt_ids: list[list[int]] = []
        self._indices = np.zeros(num_envs, dtype=np.int64)
        self._state: State | None = None
        self._renderer = Renderer(self.tokenizer) if render_mode else None
        self._make_spaces()

    def remake(self, num_envs: int, **changes: Any) -> TextVectorEnv:
        """A vector environment with this one's settings but for `changes`; what is loaded already is shared."""
        loaded = {"task": self.task, "tokenizer": self.tokenizer, "reference": self._reference or self._reference_spec}
        return TextVectorEnv(num_envs, **(self.settings | loaded | changes))

    def _check_settings(self) -> None:
        for name in ("num_envs", "group_size", "max_prompt_tokens", "max_new_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.num_envs % self.group_size:
            raise ValueError(f"num_envs={self.num_envs} is no multiple of group_size={self.group_size}")
        if self.kl_coef < 0:
            raise ValueError(f"kl_coef must be >= 0, got {self.kl_coef}")
        kl.check_estimator(self.kl_estimator)
        if self.array not in ("numpy", "torch"):
            raise ValueError(f"array must be 'numpy' or 'torch', got {self.array!r}")
        if self.render_mode is not None and self.render_mode not in RENDER_MODES:
            raise ValueError(f"render_mode must be None or one of {RENDER_MODES}, got {self.render_mode!r}")
        if any(not s for s in self.stop):
            raise ValueError(f"stop strings must not be empty, got {self.stop!r}")

    def _make_spaces(self) -> None:
        places, vocab = self.max_prompt_tokens + self.max_new_tokens, len(self.tokenizer)
        self.single_observation_space = gym.spaces.Dict(
            {
                "input_ids": gym.spaces.Box(0, vocab - 1, (places,), np.int64),
                "attention_mask": gym.spaces.Box(0, 1, (places,), np.int8),
            }
        )
        token = gym.spaces.Discrete(vocab)
        self.single_action_space: gym.Space = token
        if self.kl_coef > 0 and self.policy_logprob is None:
            shape = (vocab,) if self.kl_estimator == "full" else ()
            logprob = gym.spaces.Box(-np.inf, 0.0, shape, np.float32)
            self.single_action_space = gym.spaces.Dict({"token": token, "logprob": logprob})
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    @property
    def reference(self) -> Policy | None:
        """The frozen policy that the KL penalty is measured to; loaded when it is first needed, None with no penalty."""
        if self._reference is None and (self._reference_spec is not None or self.kl_coef > 0):
            spec = self._reference_spec
            if not isinstance(spec, Policy):
                model = spec if isinstance(spec, torch.nn.Module) else self.task.load_model(spec)
                models.check_vocab(self.tokenizer, model)
                spec = Policy(model.to(self.device).requires_grad_(False), vocab_size=len(self.tokenizer))
            self._reference = spec
        return self._reference

    # -- reset --------------------------------------------------------------------------------------------------------

    def reset(  # type: ignore[override]
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in every row.

        Args:
            seed: s seeds row i with s + i, or a list of B seeds. Rows of a group use their first row's seed.
            options: {"prompt_indices": B indices into the split} fixes the prompts; {"reset_mask": bool [B]} resets
                only those rows.
        """
        options = dict(options or {})
        indices = options.pop("prompt_indices", None)
        mask_B = options.pop("reset_mask", None)
        if options:
            raise ValueError(f"unknown reset options {sorted(options)}; allowed: prompt_indices, reset_mask")
        self._seed(seed)
        mask_B = np.ones(self.num_envs, bool) if mask_B is None else np.asarray(mask_B, bool)
        if mask_B.shape != (self.num_envs,) or not mask_B.any():
            raise ValueError(f"reset_mask must be {self.num_envs} booleans with at least one True, got {mask_B}")
        self._begin(mask_B, indices)
        return self._observation(), self._reset_infos(mask_B)

    def _seed(self, seed: int | Sequence[int | None] | None) -> None:
        if seed is None and self._rngs is not None:
            return
        seeds = (
            list(seed)
            if isinstance(seed, Sequence)
            else [None if seed is None else seed + i for i in range(self.num_envs)]
        )
        if len(seeds) != self.num_envs:
            raise ValueError(f"a list of seeds needs num_envs={self.num_envs} entries, got {len(seeds)}")
        rngs = self._rngs or [np.random.default_rng()] * self.num_envs
        for first in range(0, self.num_envs, self.group_size):
            if seeds[first] is None and self._rngs is not None:
                continue
            _, used = seeding.np_random(seeds[first])  # draws entropy where the seed is None
            for row in range(first, first + self.group_size):
                # Each row of a group steps through the same stream, so its j-th episode has the group's j-th prompt.
                rngs[row] = seeding.np_random(used)[0]
        self._rngs = rngs

    def streams(self) -> list[Any]:
        """The state of every row's random stream, as JSON can hold it."""
        return [rng.bit_generator.state for rng in self._rngs or []]

    def restore_streams(self, streams: Sequence[Any]) -> None:
        """Go on drawing prompts from where `streams()` was taken."""
        self._seed(0)
        assert self._rngs is not None
        for rng, state in zip(self._rngs, streams, strict=True):
            rng.bit_generator.state = state

    def _begin(self, mask_B: np.ndarray, indices: Sequence[int] | None = None) -> None:
        """New prompts for the rows of mask_B."""
        self.draw(mask_B, indices)
        fresh = initial_state(self._prompt_ids, self.max_prompt_tokens, self.max_new_tokens, self.device)
        if self._state is None or mask_B.all():
            self._state = fresh
        else:
            # The rows of other episodes keep what they have.
            self._state = select(torch.as_tensor(mask_B, device=self.device), fresh, self._state)
        if self._renderer is not None and self.render_mode == "human" and mask_B[0]:
            self._renderer.begin(self._prompt_ids[0])

    def draw(
        self, mask_B: np.ndarray | None = None, indices: Sequence[int] | None = None
    ) -> tuple[list[Row], list[list[int]]]:
        """Draw the next prompt of each row of mask_B (all rows where None). Both drivers begin episodes by this.

        Returns:
            the B current rows and their prompts' token ids.
        """
        mask_B = np.ones(self.num_envs, bool) if mask_B is None else mask_B
        if indices is not None:
            wanted = np.atleast_1d(np.asarray(indices))
            if wanted.shape != (self.num_envs,) or not np.issubdtype(wanted.dtype, np.integer):
                raise ValueError(f"prompt_indices must be {self.num_envs} integers, got {indices!r}")
            if wanted.min() < 0 or wanted.max() >= len(self.source):
                raise ValueError(f"prompt_indices must lie in [0, {len(self.source)}), got {indices!r}")
        if self._rngs is None:
            self._seed(None)
        assert self._rngs is not None
        if not self._rows:
            self._rows, self._prompt_ids = [{}] * self.num_envs, [[]] * self.num_envs
        for b in np.flatnonzero(mask_B):
            leader = b - b % self.group_size
            if indices is not None:
                self._indices[b] = indices[b]
            else:
                self._indices[b] = self._rngs[b].integers(len(self.source))
            if b != leader and mask_B[leader] and self._indices[b] == self._indices[leader]:
                self._rows[b], self._prompt_ids[b] = self._rows[leader], self._prompt_ids[leader]
                continue
            self._rows[b] = self.source[int(self._indices[b])]
            self._prompt_ids[b] = self.task.encode(self._rows[b], self.tokenizer, self.max_prompt_tokens)
        return list(self._rows), list(self._prompt_ids)

    def _reset_infos(self, mask_B: np.ndarray) -> dict[str, Any]:
        return {"prompt_index": np.where(mask_B, self._indices, 0), "_prompt_index": mask_B.copy()}

    # -- step ---------------------------------------------------------------------------------------------------------

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Append one token to every row. See Gymnasium's VectorEnv.step for the returned values."""
        if self._state is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        active_B = self._state.stop_B == StopReason.RUNNING
        if self._mode is not AutoresetMode.NEXT_STEP and not active_B.all():
            raise ValueError(
                f"rows {(~active_B).nonzero().flatten().tolist()} have ended; reset them with "
                "reset(options={'reset_mask': ...}) before the next step"
            )
        action_B, logprob = self._parse(actions)
        # 1. What the KL penalty needs is a matter of the state before the action.
        kl_B, ref_logp_B = self._kl(actions, action_B, logprob)
        # 2. The transition.
        self._state = append(self._state, action_B, active_B, self.max_new_tokens, self.eos_id)
        if self.stop:
            self._apply_stop_strings(active_B)
        # 3. Rows that ended now are scored together.
        ended = ((self._state.stop_B != StopReason.RUNNING) & active_B).cpu().numpy()
        score_B, finals = self._score_ended(np.flatnonzero(ended))
        kl_B = torch.where(active_B, kl_B, 0.0)
        stop_B = torch.where(active_B, self._state.stop_B, StopReason.RUNNING.value)
        reward_B = shape_reward(score_B, stop_B, kl_B, self.kl_coef, self.missing_eos_penalty)
        infos = self._step_infos(active_B.cpu().numpy(), kl_B, ref_logp_B)
        terminated_B = (stop_B == StopReason.EOS) | (stop_B == StopReason.STOP_STRING)
        truncated_B = stop_B == StopReason.BUDGET
        if self.max_new_tokens == 1:  # Gymnasium's checker refuses truncation at the first step
            terminated_B, truncated_B = terminated_B | truncated_B, torch.zeros_like(truncated_B)
        # 4. Infos of ended rows, and the next episodes.
        infos = self._end_infos(infos, ended, finals)
        starting = (~active_B).cpu().numpy() if self._mode is AutoresetMode.NEXT_STEP else ended
        if self.render_mode == "human":
            self._render_human(bool(active_B[0]), action_B, kl_B, finals)
        if self._mode is not AutoresetMode.DISABLED and starting.any():
            self._begin(starting)
            infos |= self._reset_infos(starting)
        out = self._array
        return (
            self._observation(),
            out(reward_B, np.float64),
            out(terminated_B, np.bool_),
            out(truncated_B, np.bool_),
            infos,
        )

    def _parse(self, actions: Any) -> tuple[Tensor, Tensor | None]:
        """Tokens [B] int64, and the log-probabilities that came with them."""
        wants_logprob = self.kl_coef > 0 and self.policy_logprob is None
        logprob = None
        if isinstance(actions, Mapping):
            if "token" not in actions or (wants_logprob and "logprob" not in actions):
                raise ValueError(f"an action needs the keys 'token' and 'logprob', got {sorted(actions)}")
            if wants_logprob:
                logprob = torch.as_tensor(actions["logprob"], dtype=torch.float32, device=self.device)
                shape = (self.num_envs, len(self.tokenizer)) if self.kl_estimator == "full" else (self.num_envs,)
                if tuple(logprob.shape) != shape or not bool(torch.isfinite(logprob).all()):
                    raise ValueError(f"logprob must be finite numbers of shape {shape}, got {tuple(logprob.shape)}")
            actions = actions["token"]
        elif wants_logprob:
            raise ValueError(
                f"kl_coef={self.kl_coef} needs the policy's log-probability: send actions as "
                "{'token': a, 'logprob': log pi(a|s)}, or make the environment with policy_logprob=fn"
            )
        action_B = torch.as_tensor(actions, device=self.device)
        if action_B.shape != (self.num_envs,) or action_B.is_floating_point():
            raise ValueError(f"actions must be {self.num_envs} integers, got {actions!r}")
        if bool(((action_B < 0) | (action_B >= len(self.tokenizer))).any()):
            raise ValueError(f"actions must lie in [0, {len(self.tokenizer)}), got {action_B.tolist()}")
        return action_B.long(), logprob

    def _kl(self, actions: Any, action_B: Tensor, logprob: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Per-token KL estimate [B] and the reference's log-probability of the action [B]; zeros with no penalty."""
        if self.kl_coef == 0:
            return torch.zeros(self.num_envs, device=self.device), None
        assert self._state is not None and self.reference is not None
        if logprob is None:
            assert self.policy_logprob is not None
            token = actions["token"] if isinstance(actions, Mapping) else actions
            logprob = torch.as_tensor(self.policy_logprob(self._observation(), token), device=self.device).float()
        ref_logp_BV = self.reference.next_logprobs(self._state.token_BL, self._state.mask_BL)
        ref_logp_B = ref_logp_BV.gather(1, action_B[:, None]).squeeze(1)
        ref = ref_logp_BV if self.kl_estimator == "full" else ref_logp_B
        if logprob.shape != ref.shape:
            raise ValueError(f"policy_logprob must return shape {tuple(ref.shape)}, got {tuple(logprob.shape)}")
        return kl.estimate(self.kl_estimator, logprob, ref), ref_logp_B

    # -- the end of an episode ----------------------------------------------------------------------------------------

    def stopped(self, completions: list[list[int]]) -> list[bool]:
        """Whether each list of generated ids completes a stop string."""
        return [any(s in self.decode(ids) for s in self.stop) for ids in completions]

    def _apply_stop_strings(self, active_B: Tensor) -> None:
        assert self._state is not None
        hit_B = torch.tensor(self.stopped(self._completion_ids(range(self.num_envs))), device=self.device)
        open_B = active_B & (self._state.stop_B != StopReason.EOS)
        self._state.stop_B = torch.where(hit_B & open_B, StopReason.STOP_STRING.value, self._state.stop_B)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _completion_ids(self, rows: Any) -> list[list[int]]:
        assert self._state is not None
        counts = self._state.count_B.tolist()
        tokens = self._state.token_BL[:, self.max_prompt_tokens :].tolist()
        return [tokens[b][: counts[b]] for b in rows]

    def score(
        self,
        rows: Sequence[Row],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        reward: RewardFunction | None = None,
    ) -> tuple[Tensor, list[str]]:
        """Raw scores of finished completions, float32 [len(rows)] on the device, and their texts.

        Both drivers score by this, and evaluation, with the judge for `reward` (None: the environment's own). The text
        ends before EOS and before a stop string; the ids are as generated.
        """
        texts = []
        for ids in completion_ids:
            text = self.decode(ids)
            cuts = [text.index(s) for s in self.stop if s in text]
            texts.append(text[: min(cuts)] if cuts else text)
        names = {name for row in rows for name in row} - {"prompt", "prompt_ids", "completion_ids"}
        columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in sorted(names)}
        columns |= {"prompt_ids": prompt_ids, "completion_ids": completion_ids}
        score = (reward or self.reward_model)([row["prompt"] for row in rows], texts, **columns)
        return torch.as_tensor(score, dtype=torch.float32, device=self.device), texts

    def _score_ended(self, ended: np.ndarray) -> tuple[Tensor, list[dict[str, Any]]]:
        """Scores at the rows that ended (0 elsewhere), and the info of each of them."""
        score_B = torch.zeros(self.num_envs, device=self.device)
        if len(ended) == 0:
            return score_B, []
        assert self._state is not None
        rows = [self._rows[b] for b in ended]
        score, texts = self.score(rows, [self._prompt_ids[b] for b in ended], self._completion_ids(ended))
        score_B[torch.as_tensor(ended, device=self.device)] = score
        stops = self._state.stop_B.tolist()
        finals = []
        for b, row, value, text in zip(ended, rows, score.tolist(), texts, strict=True):
            final = {"score": value, "prompt": row["prompt"], "completion": text, "stop_reason": StopReason(stops[b])}
            if row.get("completion") is not None:
                final["reference"] = row["completion"]
            finals.append(final)
        return score_B, finals

    # -- what is returned ---------------------------------------------------------------------------------------------

    def _step_infos(self, active: np.ndarray, kl_B: Tensor, ref_logp_B: Tensor | None) -> dict[str, Any]:
        if ref_logp_B is None:
            return {}
        ref_logp_B = torch.where(torch.as_tensor(active, device=self.device), ref_logp_B, 0.0)
        return {
            "kl": self._array(kl_B, np.float64),
            "_kl": active.copy(),
            "ref_logprob": self._array(ref_logp_B, np.float64),
            "_ref_logprob": active.copy(),
        }

    def _end_infos(self, infos: dict[str, Any], ended: np.ndarray, finals: list[dict[str, Any]]) -> dict[str, Any]:
        if not finals:
            return infos
        if self._mode is not AutoresetMode.SAME_STEP:
            for b, final in zip(np.flatnonzero(ended), finals, strict=True):
                infos = self._add_info(infos, final, int(b))
            return infos
        observation = self._observation()
        ongoing: dict[str, Any] = {}
        for key in [k for k in infos if not k.startswith("_")]:
            # An ended row's last kl belongs to its final_info; its place in `infos` is of the new episode.
            value, mask = infos[key], infos["_" + key] & ~ended
            ongoing[key] = (
                torch.where(torch.as_tensor(mask, device=self.device), value, 0.0)
                if isinstance(value, Tensor)
                else np.where(mask, value, 0.0)
            )
            ongoing["_" + key] = mask
        for b, final in zip(np.flatnonzero(ended), finals, strict=True):
            step_info = {k: float(infos[k][b]) for k in infos if not k.startswith("_")}
            last = {"final_obs": {k: v[b] for k, v in observation.items()}, "final_info": step_info | final}
            ongoing = self._add_info(ongoing, last, int(b))
        return ongoing

    def _array(self, tensor: Tensor, dtype: Any) -> Any:
        return tensor if self.array == "torch" else tensor.cpu().numpy().astype(dtype)

    def _observation(self) -> dict[str, Any]:
        assert self._state is not None
        tensors = {"input_ids": self._state.token_BL, "attention_mask": self._state.mask_BL}
        # Every step makes new tensors, so what was handed out before never changes.
        return {k: v.clone() if self.array == "torch" else v.cpu().numpy().copy() for k, v in tensors.items()}

    # -- rendering ----------------------------------------------------------------------------------------------------

    def render(self) -> tuple[str, ...] | None:  # type: ignore[override]
        """In mode "ansi", the text of every row; "human" prints the first row by itself."""
        if self._renderer is None:
            gym.logger.warn('render() does nothing without a render_mode: make the environment with render_mode="ansi"')
            return None
        if self._state is None:
            raise gym.error.ResetNeeded("call reset() before render()")
        if self.render_mode == "human":
            return None
        ids = self._completion_ids(range(self.num_envs))
        stops = [StopReason(s) for s in self._state.stop_B.tolist()]
        return tuple(self._renderer.text(p, c, s) for p, c, s in zip(self._prompt_ids, ids, stops, strict=True))

    def _render_human(self, active: bool, action_B: Tensor, kl_B: Tensor, finals: list[dict[str, Any]]) -> None:
        assert self._state is not None and self._renderer is not None
        if not active:
            return
        self._renderer.token(int(action_B[0]), float(kl_B[0]))
        if int(self._state.stop_B[0]) != StopReason.RUNNING:
            self._renderer.end(finals[0]["score"], finals[0]["stop_reason"])  # row 0 is the first of those that ended


# -- the single environment -------------------------------------------------------------------------------------------


class TextEnv(gym.Env):
    """One token MDP: TextVectorEnv with one row, without the batch dimension. Takes the same keyword arguments."""

    metadata = {"render_modes": RENDER_MODES, "render_fps": 30}

    def __init__(self, **kwargs: Any) -> None:
        for name in ("num_envs", "autoreset_mode"):
            if name in kwargs:
                raise ValueError(f"{name} is a setting of vector environments: use gymnasium.make_vec")
        if kwargs.get("group_size", 1) != 1:
            raise ValueError(f"group_size={kwargs['group_size']} needs a vector environment: use gymnasium.make_vec")
        logprob = kwargs.get("policy_logprob")
        if logprob is not None:
            kwargs["policy_logprob"] = lambda obs, action: torch.as_tensor(
                logprob({k: v[0] for k, v in obs.items()}, action[0])
            )[None]
        self.vector = TextVectorEnv(1, autoreset_mode=AutoresetMode.DISABLED, **kwargs)
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        self.render_mode = self.vector.render_mode

    def __getattr__(self, name: str) -> Any:
        # tokenizer, task, reward_model, reference, ...: what the row's MDP carries
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.vector, name)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode. options={"prompt_indices": [i]} fixes the prompt."""
        super().reset(seed=seed)
        self.vector._rngs = [self.np_random]
        observation, infos = self.vector.reset(options=options)
        return self._first(observation), self._first_info(infos)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Append one token; action is an int, or {"token": a, "logprob": log pi} where the KL penalty asks for it."""
        batched = {k: np.asarray(v)[None] for k, v in action.items()} if isinstance(action, Mapping) else None
        if batched is None:
            batched = action.reshape(1) if isinstance(action, Tensor) else np.asarray(action).reshape(1)
        observation, reward, terminated, truncated, infos = self.vector.step(batched)
        return (
            self._first(observation),
            float(reward[0]),
            bool(terminated[0]),
            bool(truncated[0]),
            self._first_info(infos),
        )

    @staticmethod
    def _first(observation: dict[str, Any]) -> dict[str, Any]:
        return {k: v[0] for k, v in observation.items()}

    @staticmethod
    def _first_info(infos: dict[str, Any]) -> dict[str, Any]:
        first = {}
        for key, value in infos.items():
            if not key.startswith("_") and infos["_" + key][0]:
                first[key] = value[0].item() if hasattr(value[0], "item") else value[0]
        return first

    def render(self) -> str | None:  # type: ignore[override]
        """The text of the episode in mode "ansi"; mode "human" prints as the episode goes."""
        frames = self.vector.render()
        return frames[0] if frames else None
