"""The token MDP as a native Gymnasium vector environment: B rows on one device.

Shape legend: B rows, P prompt places, T response places, L = P + T, V vocabulary. The prompt is left-padded into the
first P places, so that generated token t always stands at place P + t.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from textrl_gym import registry
from textrl_gym.bounds import check, shown
from textrl_gym.core import PromptSource, RewardSpec, Row, StopReason
from textrl_gym.data import encoding
from textrl_gym.data.chat import ChatSettings, Template, read_few_shot
from textrl_gym.data.prompt_streams import Prompt, PromptStreams
from textrl_gym.data.ranked import RankedCompletions, read_preferences
from textrl_gym.data.rows import OnBadRows
from textrl_gym.data.turn_markers import TurnTemplate
from textrl_gym.mdp.actions import Actions, parse_actions, penalty
from textrl_gym.mdp.infos import final_info, reset_infos, turn_infos, with_finals
from textrl_gym.mdp.render import RENDER_FPS, RENDER_MODES, Renderer, Spoken
from textrl_gym.mdp.scorer import Scorer
from textrl_gym.mdp.spaces import Arrays, check_settings, given_settings, reset_mask, spaces, stop_strings
from textrl_gym.mdp.task import PromptReader, Task, checked_rows, load_task
from textrl_gym.mdp.transition import (
    BatchArray,
    State,
    append_,
    begun_state,
    end_,
    initial_state,
    reply_,
    shape_reward,
    terminated_and_truncated,
    turns_over,
)
from textrl_gym.mdp.turns import Answer, Conversation, Turns
from textrl_gym.models import loading
from textrl_gym.models.tokenizer import vocab_size
from textrl_gym.rewards import RewardFunction, load_reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from textrl_gym.policy.policy import Policy


class TextVectorEnv(VectorEnv[Any, Any, Any]):
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
        stop: strings that end an episode, the name of a special token for one; the text given to the reward ends before
            them. None for the task's own.
        eos_token_id: ids of special or added tokens that end an episode; None for the tokenizer's EOS and those that
            the model declares in its generation_config.json.
        skip_special_tokens: False shows special tokens to the reward by their names ("<think>"), but for those that end
            an episode and padding.
        max_turns: of a task with replies, the budget of the agent's turns. max_new_tokens then counts all turns and
            replies, and stop strings and end tokens end a turn. None for the task's own.
        max_turn_tokens: the token budget of a turn; None for the task's own.
        turn_template: "exact" refuses a chat template that rewrites earlier turns, "raw" leaves them as generated.
        group_size: so many neighbouring rows get the same prompt.
        kl_coef: coefficient of the per-token KL penalty; 0 turns it off.
        kl_estimator: "k1", "k2", "k3" or "full".
        reference: a causal LM, a Policy, a Hub id or a folder that the KL is measured to; None for the model that
            `tokenizer` names, or else the task's.
        policy_logprob: fn(observation, action) -> log pi(action | observation), [B] (for "full": the whole
            distribution, [B, V]). None with kl_coef > 0: the log-probability comes with the action, as
            {"token": a, "logprob": log pi}.
        missing_eos_penalty: taken off the score of an episode whose budget ran out.
        bad_rows: what to do with rows that cannot be prompts (no text, or one that cannot be cut to the budget): "stop"
            or "skip". All of them are looked at here.
        template: "auto": conversations are written by the tokenizer's chat template, texts letter for letter; "chat": a
            text is what a user says; "none": no chat template.
        system_prompt: stands before every conversation that has no system message of its own; with it, or with
            few_shot, a text is what a user says.
        few_shot: messages, {"role", "content"}, before every conversation, behind its system message; or a JSON file
            of them.
        device: where the tensors live: "cpu", "cuda", "auto".
        array: "numpy", or "torch" to keep tensors on the device.
        render_mode: "ansi", "human", "rgb_array" (needs Pillow) or None.
        autoreset_mode: Gymnasium's NEXT_STEP, SAME_STEP or DISABLED.

    Raises:
        ValueError: naming the bad value and what is allowed.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        task: Task | type[Task] | str,
        split: str = "train",
        dataset: str | None = None,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        reward: RewardSpec | RewardFunction | None = None,
        max_prompt_tokens: int | None = None,
        max_new_tokens: int | None = None,
        max_turns: int | None = None,
        max_turn_tokens: int | None = None,
        turn_template: TurnTemplate = "exact",
        stop: str | Sequence[str] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        skip_special_tokens: bool = True,
        group_size: int = 1,
        kl_coef: float = 0.0,
        kl_estimator: str = "k1",
        reference: torch.nn.Module | str | Path | None = None,
        policy_logprob: Callable[[Any, Any], Any] | None = None,
        missing_eos_penalty: float = 0.0,
        bad_rows: OnBadRows = "stop",
        template: Template = "auto",
        system_prompt: str | None = None,
        few_shot: str | Path | Sequence[Mapping[str, Any]] | None = None,
        device: str = "cpu",
        array: str = "numpy",
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        **other: Never,
    ) -> None:
        # First of all, while locals() holds nothing but the arguments.
        self.settings = given_settings(locals())
        """The keyword arguments as they were given, from which `remake` makes more of the same."""
        self.task, self.num_envs, self.group_size = load_task(task), num_envs, group_size
        self._set_budgets()
        self.kl_coef, self.kl_estimator, self.policy_logprob = kl_coef, kl_estimator, policy_logprob
        self.missing_eos_penalty, self.array, self.render_mode = missing_eos_penalty, array, render_mode
        self.skip_special_tokens, self.bad_rows = skip_special_tokens, bad_rows
        self._mode = check_settings(self, autoreset_mode)
        self.chat_settings = ChatSettings(template, system_prompt, read_few_shot(few_shot))
        self.metadata = {"render_modes": RENDER_MODES, "autoreset_mode": self._mode, "render_fps": RENDER_FPS}
        self.device = loading.resolve_device(device)
        self.tokenizer = self._load_tokenizer(tokenizer)
        self.vocab_size = vocab_size(self.tokenizer)
        self.end_ids = self._find_ends(tokenizer, eos_token_id)
        """The tokens that end an episode, the usual one first."""
        self.source = self._read_rows(split, dataset)
        self.streams_of_prompts = PromptStreams(self.source, self._encode, num_envs, group_size)
        self.reward_model = self._load_reward(reward)
        self.scorer = self._make_scorer()
        self.turns = self._make_turns()
        """The environment's side of a conversation; None where the task has a single turn."""
        # Who names another model's tokenizer starts from that model; the task's own could not score its ids.
        self._reference_spec = tokenizer if reference is None and isinstance(tokenizer, str) else reference
        self._reference = self._loaded_reference()
        self._forget_episodes()
        self._make_spaces()

    def _forget_episodes(self) -> None:
        self._arrays = Arrays(self.num_envs, self.device, self.array)
        self._prompts: list[Prompt] = []
        self._state: State | None = None
        self._conversations: list[Conversation] = []
        self._answers: dict[int, Answer] = {}  # of the last step, by row
        self.over_B = np.zeros(self.num_envs, bool)  # what state.stop_B says, on the host
        self._renderer = Renderer(self.tokenizer) if self.render_mode else None

    def _set_budgets(self) -> None:
        """Where the settings are silent, the task's own."""
        given, task = self.settings, self.task

        def setting(name: str) -> Any:
            return getattr(task, name) if given[name] is None else given[name]

        self.max_prompt_tokens: int = setting("max_prompt_tokens")
        self.max_new_tokens: int = setting("max_new_tokens")
        self.max_turns: int = setting("max_turns")
        self.max_turn_tokens: int | None = setting("max_turn_tokens")
        self.stop = stop_strings(given["stop"], task.stop)

    def _read_rows(self, split: str, dataset: str | None) -> PromptSource:
        # The messages and not their file, so that a checkpoint needs none.
        self.settings["few_shot"] = list(self.chat_settings.few_shot) or None
        reader = PromptReader(self.task, self.tokenizer, self.max_prompt_tokens, self.chat_settings)
        return checked_rows(self.task, split, dataset, self.bad_rows, reader)

    def _make_spaces(self) -> None:
        self.single_observation_space, self.single_action_space = spaces(self)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def _load_tokenizer(self, tokenizer: PreTrainedTokenizerBase | str | Path | None) -> PreTrainedTokenizerBase:
        if tokenizer is None or isinstance(tokenizer, str | Path):
            # By the task: one that makes its tokenizer in code has no folder that it could be loaded from.
            loaded = self.task.load_tokenizer(None if tokenizer is None else str(tokenizer))
        else:
            loaded = loading.load_tokenizer(tokenizer)
        if loaded.eos_token_id is None:
            raise ValueError(f"the tokenizer {tokenizer or self.task.model!r} has no EOS token: no episode could end")
        return loaded

    def _load_reward(self, reward: RewardSpec | RewardFunction | None) -> RewardFunction:
        spec = self.task.reward if reward is None else reward
        # What the task's own code names is trusted as that code is, in a checkpoint that names the task, too.
        with registry.named_by(type(self.task).__module__, trust=True) if reward is None else contextlib.nullcontext():
            return load_reward(spec, task=self.task, device=self.device, tokenizer=self.tokenizer)

    def _find_ends(
        self, spec: PreTrainedTokenizerBase | str | Path | None, chosen: int | Sequence[int] | None
    ) -> tuple[int, ...]:
        if chosen is not None:
            return encoding.check_end_ids(self.tokenizer, chosen)
        # A tokenizer knows where it came from; of one that was given loaded nothing is fetched.
        declared = loading.declared_ends(self.tokenizer.name_or_path, cached=not isinstance(spec, str))
        return encoding.end_ids(self.tokenizer, declared)

    def _make_scorer(self) -> Scorer:
        shown = frozenset[int]()
        if not self.skip_special_tokens:
            shown = encoding.special_ids(self.tokenizer) - {*self.end_ids, self.tokenizer.pad_token_id}
        return Scorer(self.tokenizer, self.stop, self.reward_model, self.device, shown)

    def _make_turns(self) -> Turns | None:
        if not self.task.replies_to_turns:
            return None
        return Turns(
            self.task,
            self.tokenizer,
            self.scorer,
            end_ids=self.end_ids,
            chats=isinstance(self.source[0].get("chat"), encoding.Chat),
            turn_template=self.settings["turn_template"],
            max_turns=self.max_turns,
            max_turn_tokens=self.max_turn_tokens,
            max_new_tokens=self.max_new_tokens,
        )

    @property
    def eos_id(self) -> int:
        """The usual one of the tokens that end an episode."""
        return self.end_ids[0]

    def end_as(self, model: torch.nn.Module) -> None:
        """End episodes by the tokens that this model declares, too, unless the settings name the tokens."""
        if self.settings["eos_token_id"] is None:
            declared = [*self.end_ids, *loading.declared_ends(model)]
            self.end_ids = encoding.end_ids(self.tokenizer, declared)
            self.scorer = self._make_scorer()
            self.turns = self._make_turns()

    def remake(self, num_envs: int, **changes: Any) -> TextVectorEnv:
        """A vector environment with this one's settings but for `changes`; what is loaded already is shared."""
        env = type(self)(num_envs, **self.keywords(**changes))
        env.settings = self.settings | changes  # the names, which can be written down, not what they named
        return env

    def keywords(self, **changes: Any) -> dict[str, Any]:
        """The keyword arguments of an environment like this one but for `changes`, with what is loaded already."""
        loaded: dict[str, Any] = {"task": self.task, "tokenizer": self.tokenizer}
        # A reference and a reward model belong to a vocabulary and stand on a device: with another one they load anew.
        if "task" not in changes and "tokenizer" not in changes:
            loaded |= {"reference": self._reference_spec, "eos_token_id": self.end_ids}
            if loading.resolve_device(changes.get("device", self.device)) == self.device:
                loaded |= {"reference": self._reference or self._reference_spec, "reward": self.reward_model}
        return self.settings | loaded | changes

    def _encode(self, row: Row) -> list[int]:
        return self.task.encode(row, self.tokenizer, self.max_prompt_tokens)

    @property
    def wants_logprob(self) -> bool:
        """Whether the policy's log-probability must come with the action."""
        return self.kl_coef > 0 and self.policy_logprob is None

    @property
    def reference(self) -> Policy | None:
        """The frozen policy that the KL penalty is measured to; loaded when first needed, None with no penalty.

        Raises:
            ValueError: nothing can be loaded, or the model cannot be run on texts of these budgets.
        """
        if self._reference is None and (self.settings["reference"] is not None or self.kl_coef > 0):
            spec = self._reference_spec
            if not isinstance(spec, torch.nn.Module):
                spec = self.task.load_model(None if spec is None else str(spec))
            self._reference = self._as_policy(spec)
        return self._reference

    def _loaded_reference(self) -> Policy | None:
        """The reference where it is given loaded and used: tried now, and not at the first step."""
        given = self._reference_spec
        return self._as_policy(given) if self.kl_coef > 0 and isinstance(given, torch.nn.Module) else None

    def _as_policy(self, model: torch.nn.Module) -> Policy:
        # Here: a policy's imports take two seconds, and most environments are stepped without a reference.
        from textrl_gym.policy.policy import Policy

        if not isinstance(model, Policy):
            loading.check_vocab(self.tokenizer, model)
            model = Policy(model.to(self.device).requires_grad_(False), vocab_size=self.vocab_size)
        model.try_out(self.max_prompt_tokens, self.max_new_tokens, self.turns is not None)
        return model

    def use_reference(self, reference: Policy | None) -> None:
        """Measure the KL to this policy from now on, in place of what the settings name."""
        self._reference = self._reference_spec = reference

    # -- reset --------------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in every row.

        Args:
            seed: s seeds row i with s + i, or a list of B seeds. Rows of a group use their first row's seed.
            options: {"prompt_indices": B indices into the split} fixes the prompts; {"reset_mask": bool [B]} resets
                (and seeds) only those rows.

        Raises:
            ValueError: an unknown option, or one of a wrong shape or range.
        """
        check("options", options, dict | None)
        options = dict(options or {})
        indices = options.pop("prompt_indices", None)
        chosen = options.pop("reset_mask", None)
        if options:
            raise ValueError(f"unknown reset options {shown(list(options))}; allowed: prompt_indices, reset_mask")
        chosen_B = reset_mask(chosen, self.num_envs)
        if self._state is None and not chosen_B.all():
            raise gym.error.ResetNeeded("the first reset() must begin an episode in every row, without reset_mask")
        self.streams_of_prompts.seed(seed, chosen_B)
        self.streams_of_prompts.rejoin(chosen_B)
        self._begin(chosen_B, indices)
        return self._observation(), reset_infos(self._prompts, chosen_B)

    def streams(self) -> list[Any]:
        """The state of every row's random stream, as JSON can hold it."""
        return self.streams_of_prompts.states()

    def restore_streams(self, streams: Sequence[Any]) -> None:
        """Go on drawing prompts from where `streams()` was taken."""
        self.streams_of_prompts.restore(streams)

    def episodes(self) -> list[dict[str, Any]]:
        """The episode of every row, as JSON can hold it: its prompt's place in the data, and the tokens so far."""
        if self.turns is not None:
            raise ValueError(f"{type(self.task).__name__} is a conversation, which cannot be put down half-way")
        rows = self._completion_ids(np.arange(self.num_envs))
        return [{"prompt": p.index, "tokens": ids} for p, ids in zip(self._prompts, rows, strict=True)]

    def restore_episodes(self, episodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Go on with the episodes that `episodes()` gave, none of which had ended; returns the observation."""
        prompts = self.streams_of_prompts.draw(range(self.num_envs), [episode["prompt"] for episode in episodes])
        state = initial_state([p.ids for p in prompts], self.max_prompt_tokens, self.max_new_tokens)
        for b, episode in enumerate(episodes):
            places = slice(self.max_prompt_tokens, self.max_prompt_tokens + len(episode["tokens"]))
            state.token_BL[b, places], state.mask_BL[b, places] = episode["tokens"], 1
            state.count_B[b] = len(episode["tokens"])
        self._prompts, self._state = prompts, state if self._arrays.on_host else state.to(self.device)
        self.over_B = np.zeros(self.num_envs, bool)
        return self._observation()

    def read_preferences(self, dataset: str, split: str = "train", most: int | None = None) -> list[RankedCompletions]:
        """The pairs of a split of a user's data set (of at most so many rows), as token ids within the budgets."""
        return read_preferences(
            dataset,
            split,
            self.task,
            self.tokenizer,
            self.max_prompt_tokens,
            self.max_new_tokens,
            end_ids=self.end_ids,
            most=most,
            bad_rows=self.bad_rows,
            chat_settings=self.chat_settings,
        )

    def draw(self, indices: ArrayLike | None = None) -> tuple[list[Row], list[list[int]]]:
        """The next prompt of every row, as reset() would draw it; the episodes being stepped stay as they are.

        Returns:
            B rows and their prompts' token ids.
        """
        # As reset() does: rows of a group that had drifted apart get one prompt again.
        self.streams_of_prompts.rejoin(np.ones(self.num_envs, bool))
        prompts = self.streams_of_prompts.draw(range(self.num_envs), indices)
        return [p.row for p in prompts], [p.ids for p in prompts]

    def _begin(self, chosen_B: np.ndarray, indices: ArrayLike | None = None) -> None:
        """New episodes in the chosen rows."""
        rows = np.flatnonzero(chosen_B)
        prompts = self.streams_of_prompts.draw(rows.tolist(), indices)
        budgets = (self.max_prompt_tokens, self.max_new_tokens)
        fresh = initial_state([p.ids for p in prompts], *budgets, turns=self.turns is not None)
        self._state = begun_state(self._state, chosen_B, self._arrays.state(fresh), self._arrays.places(rows))
        self._prompts = self._prompts or list(prompts)
        for b, prompt in zip(rows, prompts, strict=True):
            self._prompts[b] = prompt
        if self.turns is not None:
            self._conversations = self._conversations or [Conversation(p.row) for p in self._prompts]
            for place in rows.tolist():
                self._conversations[place] = Conversation(self._prompts[place].row)
        self.over_B = self.over_B & ~chosen_B  # not in place: the array may be what the last step returned
        if self._renderer is not None and self.render_mode == "human" and chosen_B[0]:
            self._renderer.begin(prompts[0].ids)

    # -- step ---------------------------------------------------------------------------------------------------------

    def step(self, actions: Actions) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Append one token to every row. See Gymnasium's VectorEnv.step for the returned values.

        Raises:
            ValueError: an action outside the space, a log-probability that is missing, or a row that has ended (in the
                modes other than NEXT_STEP).
        """
        if self._state is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        active_B = ~self.over_B
        if self._mode is not AutoresetMode.NEXT_STEP and not active_B.all():
            raise ValueError(
                f"rows {np.flatnonzero(self.over_B).tolist()} have ended; reset them with "
                "reset(options={'reset_mask': ...}) before the next step"
            )
        # 1. What the KL penalty needs is a matter of the state before the action.
        action_B, logprob = parse_actions(self, actions)
        kl_B, infos = self._penalty(actions, action_B, logprob, active_B)
        # 2. The transition.
        append_(self._state, action_B, self.max_new_tokens)
        turn_reward_B, self._answers = None, {}
        if self.turns is None:
            end_(self._state, action_B, self._stop_hits(active_B), self.max_new_tokens, self.end_ids)
        else:
            turn_reward_B = self._take_turns(self.turns, active_B, action_B, infos)
        stop_B, count_B = self._arrays.host(self._state.stop_B), self._state.count_B
        # With one token, or where the environment ends a conversation, an episode may be over at its first step.
        first_B = self._arrays.host(count_B) <= 1 if self.max_new_tokens == 1 or self.turns is not None else None
        terminated_B, truncated_B = terminated_and_truncated(stop_B, active_B, first_B)
        self.over_B = ended_B = terminated_B | truncated_B
        # 3. Rows that ended now are scored together, as one batch of a reward model.
        reward_B, finals = self._end(ended_B, kl_B)
        reward_B = reward_B if turn_reward_B is None else reward_B + turn_reward_B
        if self._renderer is not None and self.render_mode == "human" and active_B[0]:
            self._renderer.token(int(action_B[0]), 0.0 if kl_B is None else float(kl_B[0]))
            if 0 in self._answers:
                self._renderer.reply(self._answers[0])
            if ended_B[0]:
                self._renderer.end(finals[0]["score"], finals[0]["stop_reason"])
        # 4. Infos of ended rows, and the next episodes.
        if finals:
            same_step = self._mode is AutoresetMode.SAME_STEP
            infos = with_finals(infos, ended_B, finals, self._observation() if same_step else None, self._add_info)
        starting_B = ~active_B if self._mode is AutoresetMode.NEXT_STEP else ended_B
        if self._mode is not AutoresetMode.DISABLED and starting_B.any():
            self._begin(starting_B)
            infos |= reset_infos(self._prompts, starting_B)
        flags = self._arrays.flags(terminated_B), self._arrays.flags(truncated_B)
        return self._observation(), self._arrays.returned(reward_B, np.float64), *flags, infos

    def _take_turns(
        self, turns: Turns, active_B: np.ndarray, action_B: BatchArray, infos: dict[str, Any]
    ) -> BatchArray | None:
        """Let the environment reply in the rows whose turn ends with this action: the rewards of the turns, [B].

        None where no turn ends. What happened goes into the infos.
        """
        state = self._state
        assert state is not None
        budgets = (turns.max_turn_tokens, self.max_new_tokens)
        lengths = (state.count_B - state.start_B, state.count_B)
        over_B = active_B & self._arrays.host(
            turns_over(action_B, *lengths, self._stop_hits(active_B), *budgets, turns.end_ids)
        )
        rows, number_B = np.flatnonzero(over_B), self._arrays.host(state.turn_B).copy()
        length_N = self._arrays.host(state.count_B)[rows].tolist()
        answers = turns.answer([self._conversations[b] for b in rows], self._turn_ids(rows), length_N)
        infos |= turn_infos(number_B, active_B, rows, answers)
        if len(rows) == 0:
            return None
        reward_B = self._arrays.zeros()
        for b, answer in zip(rows.tolist(), answers, strict=True):
            reply_(state, b, answer.ids, self.max_new_tokens)
            state.stop_B[b], reward_B[b] = answer.stop.value, answer.reward
        self._answers = dict(zip(rows.tolist(), answers, strict=True))
        return reward_B

    def _penalty(
        self, actions: Actions, action_B: BatchArray, logprob: Tensor | None, active_B: np.ndarray
    ) -> tuple[BatchArray | None, dict[str, Any]]:
        """Per-token KL estimate [B] (0 in rows that have ended) and the infos that tell it; None with no penalty."""
        if self.kl_coef == 0:
            return None, {}
        if not active_B.any():  # in mode NEXT_STEP every row begins now
            return self._arrays.zeros(), {}
        assert self._state is not None
        kl_B, ref_logp_B = penalty(self, self._observation, self._state, actions, action_B, logprob)
        # A row that has ended is sent an action too, which in mode NEXT_STEP only begins its next episode.
        running_B = torch.as_tensor(active_B, device=self.device)
        infos: dict[str, Any] = {}
        for name, value_B in {"kl": kl_B, "ref_logprob": ref_logp_B}.items():
            shown = self._arrays.returned(torch.where(running_B, value_B, 0.0), np.float64)
            infos |= {name: shown, f"_{name}": active_B.copy()}
        kl_B = torch.where(running_B, kl_B, 0.0)
        return kl_B.numpy() if self._arrays.on_host else kl_B, infos

    # -- the end of an episode ----------------------------------------------------------------------------------------

    def _stop_hits(self, active_B: np.ndarray) -> BatchArray | None:
        """Whether each active row completes a stop string with its last token; None without stop strings. bool [B]."""
        if not self.stop:
            return None
        # Only rows that run: decoding costs more than all else in a step.
        rows = np.flatnonzero(active_B)
        hit_B = np.zeros(self.num_envs, bool)
        hit_B[rows] = self.scorer.completes_stop(self._turn_ids(rows))
        return self._arrays.places(hit_B)

    def _turn_ids(self, rows: np.ndarray) -> list[list[int]]:
        """The tokens of the agent's current turn in the given rows; of a single turn all tokens."""
        ids = self._completion_ids(rows)
        if self.turns is None:
            return ids
        assert self._state is not None
        start_N = self._arrays.host(self._state.start_B)[rows].tolist()
        return [of_row[start:] for of_row, start in zip(ids, start_N, strict=True)]

    def _completion_ids(self, rows: np.ndarray) -> list[list[int]]:
        """All tokens behind the prompts of the given rows."""
        assert self._state is not None
        chosen = self._arrays.places(rows)
        tokens = self._state.token_BL[chosen, self.max_prompt_tokens :].tolist()
        return [ids[:count] for ids, count in zip(tokens, self._state.count_B[chosen].tolist(), strict=True)]

    def _end(self, ended_B: np.ndarray, kl_B: BatchArray | None) -> tuple[BatchArray, list[dict[str, Any]]]:
        """The step's rewards, and the final info of each row that ended."""
        assert self._state is not None
        score_B = self._arrays.zeros()
        finals: list[dict[str, Any]] = []
        if not ended_B.any():
            return (score_B if kl_B is None else -self.kl_coef * kl_B), finals
        ended = np.flatnonzero(ended_B)
        prompts, ids = [self._prompts[b] for b in ended], self._completion_ids(ended)
        talks = [self._conversations[b] for b in ended] if self.turns is not None else []
        turns, masks = [talk.turns for talk in talks], [talk.action_mask for talk in talks]
        scores = self.scorer.score(
            [p.row for p in prompts], [p.ids for p in prompts], ids, turns=turns, action_masks=masks
        )
        values, parts = scores.score_N.tolist(), {name: part.tolist() for name, part in scores.components.items()}
        stop_B = self._arrays.host(self._state.stop_B) * ended_B  # a row that ended before is not paid again
        for i, (b, prompt, text) in enumerate(zip(ended, prompts, scores.texts, strict=True)):
            components = {name: part[i] for name, part in parts.items()}
            logged = {name: items[i] for name, items in scores.logged.items()}
            final = final_info(prompt.row, text, values[i], StopReason(stop_B[b]), components, logged)
            finals.append(final | {"turns": turns[i]} if turns else final)
        score_B[self._arrays.places(ended)] = scores.score_N.numpy() if self._arrays.on_host else scores.score_N
        stop_B = self._arrays.places(stop_B)
        kl_B = self._arrays.zeros() if kl_B is None else kl_B
        return shape_reward(score_B, stop_B, kl_B, self.kl_coef, self.missing_eos_penalty), finals

    # -- what is returned ---------------------------------------------------------------------------------------------

    def _observation(self) -> dict[str, Any]:
        assert self._state is not None
        return self._arrays.observation(self._state)

    def render(self) -> tuple[str | NDArray[np.uint8], ...] | None:
        """Every row's text in mode "ansi", a picture of it in "rgb_array" (uint8 [480, 640, 3], by Pillow).

        Mode "human" prints the first row by itself, as the episode goes.
        """
        if self._renderer is None:
            gym.logger.warn('render() does nothing without a render_mode: make the environment with render_mode="ansi"')
            return None
        if self._state is None:
            raise gym.error.ResetNeeded("call reset() before render()")
        if self.render_mode == "human":
            return None
        every = np.arange(self.num_envs)
        ids, stops = self._completion_ids(every), [StopReason(s) for s in self._state.stop_B.tolist()]
        dialogues: list[Spoken | None] = [None] * self.num_envs
        if self.turns is not None:
            # The last turn is in the conversation already where an episode has ended with it.
            now = [[] if over else ids for ids, over in zip(self._turn_ids(every), stops, strict=True)]
            dialogues = [(c.turns, of_turn) for c, of_turn in zip(self._conversations, now, strict=True)]
        show = self._renderer.picture if self.render_mode == "rgb_array" else self._renderer.text
        rows = zip(self._prompts, ids, stops, dialogues, strict=True)
        return tuple(show(prompt.ids, c, s, spoken) for prompt, c, s, spoken in rows)
