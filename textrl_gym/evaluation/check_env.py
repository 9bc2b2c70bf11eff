"""check_env(): does a text environment keep the rules of Gymnasium, of Stable-Baselines3 and of the token MDP?

Shape legend: B rows, P prompt places, T response places, L = P + T, V vocabulary.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import env_checker
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from stable_baselines3.common import env_checker as sb3_checker

from textrl_gym import files, functional, kl
from textrl_gym.core import StopReason
from textrl_gym.mdp.text_env import TextEnv, TextVectorEnv, vector_env
from textrl_gym.models import tiny
from textrl_gym.policy.policy import Policy
from textrl_gym.rewards.reward_model import CutTextWarning
from textrl_gym.rollouts.collect import collect

CHECKED_ROWS = 3  # of two rows one ends and one goes on; with a third, rows that are no neighbours may end together too
BUDGET = 6  # tokens of the checked episodes, where the environment allows more: long ones would show nothing else
STEPS = 5 * BUDGET
REWARD_ATOL = 1e-5  # a neural reward sums its floats in another order for another batch size


@dataclass(frozen=True)
class Subject:
    """The environment under test, and copies of it that share what it has loaded."""

    env: gym.Env[Any, Any] | VectorEnv[Any, Any, Any]
    mdp: TextVectorEnv
    seed: int

    def vector(self, rows: int = CHECKED_ROWS, **changes: object) -> TextVectorEnv:
        """A vector environment, without a KL penalty unless `changes` say so."""
        return self.mdp.remake(rows, **(self._plain() | changes))

    def single(self, **changes: object) -> TextEnv:
        """A single environment, of the subject's own class where that is one."""
        env_class = TextEnv
        if isinstance(self.env.unwrapped, TextEnv):
            env_class = type(self.env.unwrapped)
        keywords = self.mdp.keywords(**(self._plain() | changes))
        del keywords["autoreset_mode"]
        return env_class(**keywords)

    def _plain(self) -> dict[str, Any]:
        return {
            "array": "numpy",
            "render_mode": None,
            "group_size": 1,
            "kl_coef": 0.0,
            "policy_logprob": None,
            "autoreset_mode": AutoresetMode.NEXT_STEP,
            # With room for some replies.
            "max_new_tokens": min(BUDGET if self.mdp.turns is None else 4 * BUDGET, self.mdp.max_new_tokens),
        }

    def actions(self, steps: int = STEPS, rows: int = CHECKED_ROWS) -> np.ndarray:
        """Random tokens [steps, rows], EOS among them so often that episodes have different lengths."""
        # Uniform tokens would hit EOS once in the vocabulary's size: hardly ever before the budget is spent.
        rng = np.random.default_rng(self.seed)
        token = rng.integers(self.mdp.vocab_size, size=(steps, rows))
        return np.where(rng.random((steps, rows)) < 1 / BUDGET, self.mdp.eos_id, token)


def check_env(env_or_id: str | gym.Env[Any, Any] | VectorEnv[Any, Any, Any], *, seed: int = 0) -> list[str]:
    """Check a text environment; run it on your own.

    Args:
        env_or_id: an id, or a text environment (TextEnv or TextVectorEnv, wrapped or not). Copies of it are checked,
            with episodes of at most 6 tokens.
        seed: of prompts and actions.

    Returns:
        the properties that were checked and hold.

    Raises:
        AssertionError: naming the property that does not hold, with the row and the step where there are any.
        ValueError: it is no text environment.
    """
    env = gym.make(env_or_id) if isinstance(env_or_id, str) else env_or_id
    subject = Subject(env, vector_env(env), seed)
    for name, check in PROPERTIES.items():
        try:
            with warnings.catch_warnings():
                # Gymnasium's and Stable-Baselines3's checkers only warn of much that breaks an agent later.
                warnings.simplefilter("error")
                warnings.simplefilter("default", CutTextWarning)  # of the user's reward model, and no fault
                check(subject)
        except (AssertionError, ValueError, TypeError, RuntimeError, Warning) as error:
            raise AssertionError(f"{name}: {error}") from error
    return list(PROPERTIES)


def _expect(holds: bool | np.bool_, text: str) -> None:
    # Not the assert statement: python -O would take the checks out.
    if not holds:
        raise AssertionError(text)


def _expect_error(what: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except ValueError:
        return
    raise AssertionError(f"{what} raised no ValueError")


def _expect_same(where: str, one: object, two: object) -> None:
    """Equal values, types, shapes and keys; floats to REWARD_ATOL."""
    if isinstance(one, dict) and isinstance(two, dict):
        _expect(set(one) == set(two), f"{where}: keys {sorted(one)} and {sorted(two)}")
        for key in one:
            _expect_same(f"{where}, {key}", one[key], two[key])
    elif isinstance(one, tuple) and isinstance(two, tuple):
        for a, b in zip(one, two, strict=True):
            _expect_same(where, a, b)
    elif isinstance(one, np.ndarray) and isinstance(two, np.ndarray):
        same_kind = one.dtype == two.dtype and one.shape == two.shape
        _expect(same_kind, f"{where}: {one.dtype} {one.shape} and {two.dtype} {two.shape}")
        if one.dtype != object and np.array_equal(one, two):
            return
        for row, (a, b) in enumerate(zip(one, two, strict=True)):
            _expect_same(f"{where}, row {row}" if "row" not in where else where, a, b)
    elif isinstance(one, float | np.floating) and isinstance(two, float | np.floating):
        _expect(abs(float(one) - float(two)) <= REWARD_ATOL, f"{where}: {one} and {two}")
    else:
        _expect(type(one) is type(two) and one == two, f"{where}: {one!r} and {two!r}")


# -- the rules of Gymnasium and of Stable-Baselines3 ------------------------------------------------------------------


def gymnasium_checker(subject: Subject) -> None:
    """With the environment's spec, where it has one, so that every render mode is made too."""
    env = subject.single()
    env.spec = subject.env.spec if isinstance(subject.env.unwrapped, TextEnv) else None
    with contextlib.redirect_stdout(io.StringIO()):  # render mode "human" prints
        env_checker.check_env(env, skip_render_check=env.spec is None)


def sb3_env_checker(subject: Subject) -> None:
    """Stable-Baselines3's own checker."""
    sb3_checker.check_env(subject.single())


def spec_round_trip(subject: Subject) -> None:
    """The spec as JSON makes the same environment again."""
    spec = subject.env.spec
    if not isinstance(subject.env.unwrapped, TextEnv) or spec is None or not files.jsonable(spec.kwargs):
        return
    again = EnvSpec.from_json(spec.to_json()).make(disable_env_checker=True)
    one, two = spec.make(disable_env_checker=True), again
    _expect_same("reset", one.reset(seed=subject.seed), two.reset(seed=subject.seed))
    _expect(again.observation_space == subject.env.observation_space, "another observation space")
    _expect(again.action_space == subject.env.action_space, "another action space")


# -- the rules of the token MDP ---------------------------------------------------------------------------------------


def vector_is_singles(mode: AutoresetMode) -> Callable[[Subject], None]:
    """N rows seeded s equal N single environments seeded s, s + 1, ..., infos included."""

    def check(subject: Subject) -> None:
        envs = subject.vector(autoreset_mode=mode)
        singles = SyncVectorEnv([subject.single] * CHECKED_ROWS, autoreset_mode=mode)
        _expect_same("reset", envs.reset(seed=subject.seed), singles.reset(seed=subject.seed))
        names = ("observation", "reward", "terminated", "truncated", "infos")
        for t, action_B in enumerate(subject.actions()):
            one, two = envs.step(action_B), singles.step(action_B)
            for name, a, b in zip(names, one, two, strict=True):
                _expect_same(f"step {t}, {name}", a, b)
            ended_B = one[2] | one[3]
            if mode is AutoresetMode.DISABLED and ended_B.any():
                resets = [e.reset(options={"reset_mask": ended_B.copy()}) for e in (envs, singles)]
                _expect_same(f"reset after step {t}", *resets)

    return check


def _play(subject: Subject, envs: TextVectorEnv) -> Iterator[tuple[int, dict[str, Any], np.ndarray, tuple[Any, ...]]]:
    """(step, observation before, actions, what step() returned) in mode DISABLED; ended rows are reset in between."""
    observation, _ = envs.reset(seed=subject.seed)
    for t, action_B in enumerate(subject.actions(rows=envs.num_envs)):
        out = envs.step(action_B)
        yield t, observation, action_B, out
        observation, ended_B = out[0], out[2] | out[3]
        if ended_B.any():
            observation, _ = envs.reset(options={"reset_mask": ended_B})


def _takes_part(infos: Mapping[str, Any], name: str, row: int) -> bool:
    """Whether the step's infos tell something of a row."""
    return f"_{name}" in infos and bool(infos[f"_{name}"][row])


def score_only_at_the_end(subject: Subject) -> None:
    """Without a KL penalty the reward is 0 before the end and the score at it, but for the rewards of turns."""
    envs = subject.vector(autoreset_mode=AutoresetMode.DISABLED, missing_eos_penalty=0.0)
    for t, _, _, (_, reward_B, terminated_B, truncated_B, infos) in _play(subject, envs):
        for b in range(CHECKED_ROWS):
            expected = float(np.float32(infos["score"][b] if terminated_B[b] or truncated_B[b] else 0.0))
            turn_reward = float(infos["turn_reward"][b]) if _takes_part(infos, "turn_reward", b) else 0.0
            # A sum of two is rounded; without a turn's reward the score is there as it is.
            fits = abs(float(reward_B[b]) - expected - turn_reward) <= (REWARD_ATOL if turn_reward else 0.0)
            _expect(fits, f"row {b}, step {t}: reward {reward_B[b]}, expected {expected + turn_reward}")


def step_appends_one_token(subject: Subject) -> None:
    """A step writes its token and its mask at the next place, and changes nothing else; EOS is inside, once, last.

    In a conversation the environment's reply may stand behind it.
    """
    envs = subject.vector(autoreset_mode=AutoresetMode.DISABLED)
    rows = np.arange(CHECKED_ROWS)
    for t, before, action_B, (after, _, terminated_B, truncated_B, infos) in _play(subject, envs):
        # Padding stands left of a prompt and right of a completion, so the next place is counted and not searched.
        place_B = envs.max_prompt_tokens + before["attention_mask"][:, envs.max_prompt_tokens :].sum(1)
        expected = {key: value.copy() for key, value in before.items()}
        expected["input_ids"][rows, place_B] = action_B
        expected["attention_mask"][rows, place_B] = 1
        for b in range(CHECKED_ROWS):
            if _takes_part(infos, "reply", b) and not (terminated_B[b] or truncated_B[b]):
                for key, value in after.items():
                    expected[key][b, place_B[b] + 1 :] = value[b, place_B[b] + 1 :]
        _expect_same(f"step {t}", after, expected)
        for b in range(CHECKED_ROWS):
            ended = bool(terminated_B[b] or truncated_B[b])
            where = f"row {b}, step {t}"
            if action_B[b] in envs.end_ids and envs.turns is not None:
                _expect(ended or _takes_part(infos, "reply", b), f"{where}: EOS did not end the turn")
            elif action_B[b] in envs.end_ids:
                _expect(ended and infos["stop_reason"][b] is StopReason.EOS, f"{where}: EOS did not end the episode")
            elif place_B[b] + 1 == envs.max_prompt_tokens + envs.max_new_tokens:
                _expect(ended, f"{where}: the episode goes on after its budget of {envs.max_new_tokens} tokens")
            _expect(not (terminated_B[b] and truncated_B[b]), f"{where}: both terminated and truncated")


def nothing_after_the_end(subject: Subject) -> None:
    """In mode DISABLED an ended row refuses a step; in collect() nothing stands behind the last token."""
    one_turn: dict[str, Any] = {} if subject.mdp.turns is None else {"max_turns": 1}  # so that EOS ends an episode
    envs = subject.vector(autoreset_mode=AutoresetMode.DISABLED, **one_turn)
    envs.reset(seed=subject.seed)
    ended_B = np.zeros(CHECKED_ROWS, bool)
    ended_B[0] = True
    going = next(token for token in range(envs.vocab_size) if token not in envs.end_ids)
    envs.step(np.where(ended_B, envs.eos_id, going))
    _expect_error("row 0, step 1: a step after EOS", lambda: envs.step(np.full(CHECKED_ROWS, envs.eos_id)))
    rollout = collect(subject.vector(), _random_policy(subject, 1), generator=torch.Generator().manual_seed(0))
    for b in range(CHECKED_ROWS):
        last = int(rollout.present_BT[b].sum()) - 1
        _expect(bool(rollout.present_BT[b, : last + 1].all()), f"row {b}: a hole in the mask of collect()")
        behind = rollout.token_BT[b, last + 1 :]
        _expect(not bool(behind.any()), f"row {b}, step {last + 1}: collect() left tokens behind the end")
        counted_T, by_eos = rollout.mask_BT[b], int(rollout.stop_B[b] == StopReason.EOS)
        if rollout.turn_BT is not None:  # EOS ends turns, and stands nowhere else in them
            counted_T, by_eos = counted_T & ~functional.turn_ends(rollout.mask_BT, rollout.turn_BT)[b], 0
        eos = sum(token in envs.end_ids for token in rollout.token_BT[b][counted_T].tolist())
        _expect(eos == by_eos, f"row {b}: {eos} EOS inside the mask, the stop reason says {by_eos}")


def observation_in_its_space(subject: Subject) -> None:
    """Inside the space; the prompt ends at place P, padding is 0 under a mask of 0, and the text has no holes."""
    envs = subject.vector(autoreset_mode=AutoresetMode.DISABLED)
    for t, before, _, (after, *_) in _play(subject, envs):
        for observation in (before, after):
            _expect(envs.observation_space.contains(observation), f"step {t}: the observation is outside its space")
            for b, (ids, mask) in enumerate(zip(observation["input_ids"], observation["attention_mask"], strict=True)):
                where = f"row {b}, step {t}"
                prompt, response = mask[: envs.max_prompt_tokens], mask[envs.max_prompt_tokens :]
                _expect(prompt[-1] == 1 and (np.diff(prompt) >= 0).all(), f"{where}: the prompt is not left-padded")
                _expect((np.diff(response) <= 0).all(), f"{where}: a hole in the generated tokens")
                _expect(not ids[mask == 0].any(), f"{where}: tokens where the mask is 0")


def same_seed_same_everything(subject: Subject) -> None:
    """Two environments with one seed do the same, and one environment does it again when it is seeded again."""
    one, two = subject.vector(), subject.vector()
    # The second has a past, of another seed: state that a reset leaves behind would show.
    two.reset(seed=subject.seed + 1)
    two.step(subject.actions()[0])
    _expect_same("reset", one.reset(seed=subject.seed), two.reset(seed=subject.seed))
    for t, action_B in enumerate(subject.actions()):
        for name, a, b in zip(("observation", "reward"), one.step(action_B), two.step(action_B), strict=False):
            _expect_same(f"step {t}, {name}", a, b)


def groups_share_prompts(subject: Subject) -> None:
    """The j-th episodes of a group's rows have one prompt, however long the episodes are; so has each new rollout."""
    envs = subject.vector(4, group_size=2, autoreset_mode=AutoresetMode.SAME_STEP)
    _, infos = envs.reset(seed=subject.seed)
    drawn: list[list[int]] = [[int(index)] for index in infos["prompt_index"]]
    for action_B in subject.actions(rows=4):
        infos = envs.step(action_B)[4]
        for b in np.flatnonzero(infos.get("_prompt_index", [])):
            drawn[b].append(int(infos["prompt_index"][b]))
    for first in (0, 2):
        for j, (one, two) in enumerate(zip(drawn[first], drawn[first + 1], strict=False)):
            _expect(one == two, f"rows {first} and {first + 1}, episode {j}: prompts {one} and {two}")
    rows, _ = envs.draw()
    for first in (0, 2):
        _expect(rows[first]["prompt"] == rows[first + 1]["prompt"], f"rows {first} and {first + 1}: another prompt")


# -- the KL penalty ---------------------------------------------------------------------------------------------------


def _random_policy(subject: Subject, seed: int, reference: Policy | None = None) -> Policy:
    model = tiny.llama(subject.mdp.vocab_size, scale=0.1, seed=seed).to(subject.mdp.device)
    return Policy(model, reference=reference, vocab_size=subject.mdp.vocab_size)


def penalty_needs_a_source(subject: Subject) -> None:
    """With kl_coef > 0 and no policy_logprob, a plain token is an error and never a silent zero."""
    envs = subject.vector(kl_coef=0.1, reference=_random_policy(subject, 0))
    envs.reset(seed=subject.seed)
    _expect_error("step 0: a plain token under a KL penalty", lambda: envs.step(subject.actions()[0]))


def three_sources_agree(estimator: str) -> Callable[[Subject], None]:
    """The same trajectory has the same rewards with log-probabilities from actions, a callable and collect()."""

    def check(subject: Subject) -> None:
        policy = _random_policy(subject, 1, _random_policy(subject, 0))
        mode = AutoresetMode.DISABLED
        penalty: dict[str, Any] = {
            "kl_coef": 0.1,
            "kl_estimator": estimator,
            "reference": policy.reference,
            "autoreset_mode": mode,
        }
        full = estimator == "full"  # this estimator asks for the log-probabilities of all tokens

        def logprob(
            observation: Mapping[str, torch.Tensor | np.ndarray], action_B: torch.Tensor | np.ndarray
        ) -> torch.Tensor:
            ids, mask = (torch.as_tensor(observation[k], device=policy.device) for k in ("input_ids", "attention_mask"))
            logp_BV = policy.next_logprobs(ids, mask)
            return logp_BV if full else logp_BV[torch.arange(len(logp_BV)), torch.as_tensor(action_B)]

        by_action = subject.vector(**penalty)
        by_call = subject.vector(**penalty, policy_logprob=logprob)
        observation, infos = by_action.reset(seed=subject.seed)
        by_call.reset(seed=subject.seed)
        rollout = collect(
            subject.vector(**penalty),
            policy,
            generator=torch.Generator(policy.device).manual_seed(subject.seed),
            prompt_indices=infos["prompt_index"],
        )
        live_B = np.ones(CHECKED_ROWS, bool)
        # In a conversation actions have gaps between them; rows that have ended send their last one again.
        places = [mask_T.nonzero().flatten().tolist() for mask_T in rollout.mask_BT]
        for t in range(max(map(len, places))):
            place_B = [of_row[min(t, len(of_row) - 1)] for of_row in places]
            token_B = rollout.token_BT.cpu().numpy()[np.arange(CHECKED_ROWS), place_B]
            sent = {"token": token_B, "logprob": logprob(observation, token_B).cpu().numpy()}
            one, two = by_action.step(sent), by_call.step(token_B)
            for b in np.flatnonzero(live_B):
                rewards = [float(one[1][b]), float(two[1][b]), float(rollout.reward_BT[b, place_B[b]])]
                _expect(
                    np.allclose(rewards, rewards[0], rtol=1e-4, atol=1e-4),
                    f"row {b}, step {t}: rewards {rewards} by action, callable and collect()",
                )
            observation, ended_B = one[0], one[2] | one[3]
            live_B &= ~ended_B
            if ended_B.any():  # those rows play on beside the live ones, and are not looked at
                observation, _ = by_action.reset(options={"reset_mask": ended_B})
                by_call.reset(options={"reset_mask": ended_B})

    return check


PROPERTIES: dict[str, Callable[[Subject], None]] = {
    "Gymnasium's check_env passes without a warning": gymnasium_checker,
    "Stable-Baselines3's check_env passes without a warning": sb3_env_checker,
    "the spec survives a round trip through JSON": spec_round_trip,
    "same seed, same everything": same_seed_same_everything,
    "the observation is inside its space, the prompt left-padded": observation_in_its_space,
    "a step appends one token, EOS included once, and changes nothing else": step_appends_one_token,
    "the score comes only at the end": score_only_at_the_end,
    "nothing comes after the end": nothing_after_the_end,
    "rows of a group share their prompts": groups_share_prompts,
    "a KL penalty without the policy's log-probability is an error": penalty_needs_a_source,
    **{f"a vector of N is N singles, {mode.name}": vector_is_singles(mode) for mode in AutoresetMode},
    **{f"the three sources of the KL penalty agree, {name}": three_sources_agree(name) for name in kl.ESTIMATORS},
}
"""What check_env checks, in its order."""
