"""The vector environment: N rows = N singles, ends, groups, stop strings, bad values.

Shape legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from hypothesis import given, settings
from hypothesis import strategies as st

from textrl_gym.core import Row, StopReason
from textrl_gym.mdp.scorer import Scorer
from textrl_gym.mdp.task import Task
from textrl_gym.mdp.text_env import TextEnv, TextVectorEnv
from textrl_gym.models import tiny
from textrl_gym.policy.policy import Policy

EOS_ID, V = 0, 5
MODES = list(AutoresetMode)


def spread(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Another number for nearly every text."""
    return [len(p) + sum((i + 1) * ord(c) for i, c in enumerate(y)) for p, y in zip(prompts, completions, strict=True)]


class Letters(Task):
    """Prompts of one to three symbols, up to four tokens."""

    max_prompt_tokens = 3
    max_new_tokens = 4
    model = "made in code"
    reward = "unused"

    def rows(self, split: str, dataset: str | None = None) -> Sequence[Row]:
        rows: list[Row] = [{"prompt": "a", "completion": "d"}, {"prompt": "b c"}, {"prompt": "c d a"}, {"prompt": "d"}]
        return [] if dataset == "empty" else rows

    def load_tokenizer(self, name: str | None = None) -> Any:
        tokenizer = tiny.symbol_tokenizer("abcd")
        if name == "no end":
            tokenizer.eos_token = None
        return tokenizer

    def load_model(self, name: str | None = None, **kwargs: Any) -> Any:
        return tiny.llama(3 if name == "small" else V, scale=0.3)


KEYWORDS: dict[str, Any] = {"task": Letters(), "reward": spread}


def make(rows: int = 3, mode: Any = AutoresetMode.DISABLED, **changes: Any) -> TextVectorEnv:
    return TextVectorEnv(rows, autoreset_mode=mode, **(KEYWORDS | changes))


def assert_equal(one: Any, two: Any, where: str = "") -> None:
    """The same to the bit: values, types, dtypes, keys."""
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert set(one) == set(two), where
        for key in one:
            assert_equal(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, tuple):
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_equal(a, b, f"{where}[{i}]")
    elif isinstance(one, np.ndarray):
        assert (one.dtype, one.shape) == (two.dtype, two.shape), where
        if one.dtype == object:
            assert_equal(tuple(one), tuple(two), where)
        else:
            np.testing.assert_array_equal(one, two, where)
    else:
        assert one == two, where


# -- N rows = N singles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", [[], ["b c"]], ids=["", "stop"])
@settings(max_examples=25)
@given(
    tokens=st.lists(st.lists(st.integers(0, V - 1), min_size=3, max_size=3), min_size=1, max_size=14),
    seed=st.integers(0, 2**31),
)
def test_vector_is_singles(mode: AutoresetMode, stop: list[str], tokens: list[list[int]], seed: int) -> None:
    envs = make(mode=mode, stop=stop, missing_eos_penalty=0.5)
    singles = SyncVectorEnv([lambda: TextEnv(**KEYWORDS, stop=stop, missing_eos_penalty=0.5)] * 3, autoreset_mode=mode)
    assert_equal(envs.reset(seed=seed), singles.reset(seed=seed), "reset")
    for t, token_B in enumerate(tokens):
        one, two = envs.step(np.array(token_B)), singles.step(np.array(token_B))
        assert_equal(one, two, f"step {t}")
        ended_B = one[2] | one[3]
        if mode is AutoresetMode.DISABLED and ended_B.any():
            # Gymnasium takes the option out of the dict it is given, so each gets its own.
            new_seed = seed if t % 2 else None
            resets = [e.reset(seed=new_seed, options={"reset_mask": ended_B.copy()}) for e in (envs, singles)]
            assert_equal(resets[0], resets[1], f"reset after step {t}")


@pytest.mark.parametrize("mode", MODES)
def test_vector_is_singles_under_a_penalty(mode: AutoresetMode) -> None:
    """Here to 5e-5: the reference's forward sums its floats in another order for another batch size."""
    penalty: dict[str, Any] = {"kl_coef": 0.3, "reference": Policy(tiny.llama(V, scale=0.3))}
    envs = make(mode=mode, **penalty)
    singles = SyncVectorEnv([lambda: TextEnv(**KEYWORDS, **penalty)] * 3, autoreset_mode=mode)
    envs.reset(seed=0)
    singles.reset(seed=0)
    rng = np.random.default_rng(0)
    for t in range(25):
        action = {"token": rng.integers(0, V, 3), "logprob": -rng.random(3).astype(np.float32)}
        (_, one_B, _, _, one), (_, two_B, terminated_B, truncated_B, two) = envs.step(action), singles.step(action)
        np.testing.assert_allclose(one_B, two_B, atol=5e-5, rtol=0)
        assert set(one) == set(two), t
        for key in {"kl", "ref_logprob"} & set(one):
            np.testing.assert_array_equal(one[f"_{key}"], two[f"_{key}"])
            np.testing.assert_allclose(one[key], two[key], atol=5e-5, rtol=0)
        if "final_info" in one:
            np.testing.assert_allclose(one["final_info"]["kl"], two["final_info"]["kl"], atol=5e-5, rtol=0)
        ended_B = terminated_B | truncated_B
        if mode is AutoresetMode.DISABLED and ended_B.any():
            for env in (envs, singles):
                env.reset(options={"reset_mask": ended_B.copy()})


def test_torch_is_numpy() -> None:
    one, two = make(mode=AutoresetMode.SAME_STEP), make(mode=AutoresetMode.SAME_STEP, array="torch")
    one.reset(seed=0)
    two.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        token_B = rng.integers(0, V, 3)
        (obs, *rest), (tensors, *others) = one.step(token_B), two.step(torch.tensor(token_B))
        for key, value in obs.items():
            assert isinstance(tensors[key], torch.Tensor)
            np.testing.assert_array_equal(value, tensors[key].numpy())
        for a, b in zip(rest[:3], others[:3], strict=True):
            assert isinstance(b, torch.Tensor)
            np.testing.assert_array_equal(a, b.numpy())


# -- rewards and ends -------------------------------------------------------------------------------------------------


def test_rewards_by_hand() -> None:
    envs = make(missing_eos_penalty=0.5, kl_coef=0.1, policy_logprob=lambda obs, a: torch.full((3,), -1.0))
    envs.reset(options={"prompt_indices": [0, 1, 2]})
    steps = [envs.step(np.array(tokens)) for tokens in ([1, 2, 3], [0, 4, 1])]
    for _, reward_B, terminated_B, _, infos in steps:
        # k1 = logp - ref_logp = -1 - ref_logp; the reward before the end is -0.1 of it
        kl_B = -1.0 - infos["ref_logprob"]
        np.testing.assert_allclose(infos["kl"], kl_B, atol=1e-6, rtol=0)
        # row 0 ends with "a" for prompt "a": 1 + 1 * ord("a") = 98
        score_B = np.where(terminated_B, [98.0, 0.0, 0.0], 0.0)
        np.testing.assert_allclose(reward_B, score_B - 0.1 * kl_B, atol=5e-5, rtol=0)
    assert steps[1][2].tolist() == [True, False, False]


def test_missing_eos_penalty() -> None:
    envs = make(missing_eos_penalty=0.5)
    envs.reset(options={"prompt_indices": [0, 0, 0]})
    for _ in range(3):
        envs.step(np.array([1, 1, 1]))
    _, reward_B, terminated_B, truncated_B, infos = envs.step(np.array([EOS_ID, 1, 2]))
    assert terminated_B.tolist() == [True, False, False]
    assert truncated_B.tolist() == [False, True, True]
    assert infos["stop_reason"].tolist() == [StopReason.EOS, StopReason.LENGTH, StopReason.LENGTH]
    # score is the raw one; the reward has lost 0.5 where EOS is missing
    assert (infos["score"] - reward_B).tolist() == [0.0, 0.5, 0.5]


def test_stop_strings() -> None:
    envs = make(stop=["b c", "d"], max_new_tokens=3)
    envs.reset(options={"prompt_indices": [0, 0, 0]})
    _, _, terminated_B, _, infos = envs.step(np.array([1, 2, 4]))
    assert terminated_B.tolist() == [False, False, True]
    assert (infos["completion"][2], infos["stop_reason"][2]) == ("", StopReason.STOP_STRING)
    envs.reset(options={"reset_mask": terminated_B, "prompt_indices": [0, 0, 0]})
    envs.step(np.array([2, 2, 1]))
    _, _, terminated_B, truncated_B, infos = envs.step(np.array([3, 1, 2]))
    # row 0 wrote "a b c": with its last token of the budget it completes a stop string, which goes before the budget
    assert terminated_B.tolist() == [True, False, False]
    assert truncated_B.tolist() == [False, True, False]
    assert infos["completion"][0] == "a "
    assert infos["completion"][1] == "b b a"


def test_a_stop_string_as_text() -> None:
    assert make(stop="b c").stop == ("b c",)


def test_eos_goes_before_a_stop_string(monkeypatch: pytest.MonkeyPatch) -> None:
    envs = make(1, stop=["a"])
    monkeypatch.setattr(Scorer, "completes_stop", lambda self, completions: [True] * len(completions))
    envs.reset(seed=0)
    *_, infos = envs.step(np.array([EOS_ID]))
    assert infos["stop_reason"][0] is StopReason.EOS


@pytest.mark.parametrize("mode", MODES)
def test_a_budget_of_one_ends_by_termination(mode: AutoresetMode) -> None:
    envs = make(mode=mode, max_new_tokens=1, missing_eos_penalty=0.5)
    envs.reset(seed=0)
    _, _, terminated_B, truncated_B, infos = envs.step(np.array([1, EOS_ID, 2]))
    assert terminated_B.all() and not truncated_B.any()
    final = infos["final_info"] if mode is AutoresetMode.SAME_STEP else infos
    assert final["stop_reason"].tolist() == [StopReason.LENGTH, StopReason.EOS, StopReason.LENGTH]


def test_reference_text_only_where_the_row_has_one() -> None:
    envs = make()
    envs.reset(options={"prompt_indices": [0, 1, 2]})
    *_, infos = envs.step(np.array([EOS_ID] * 3))
    assert infos["_reference"].tolist() == [True, False, False]
    assert infos["reference"][0] == "d"


def test_ended_rows_refuse_a_step() -> None:
    envs = make()
    envs.reset(seed=0)
    envs.step(np.array([1, EOS_ID, EOS_ID]))
    with pytest.raises(ValueError, match=r"rows \[1, 2\] have ended"):
        envs.step(np.array([1, 1, 1]))


def test_what_is_handed_out_is_not_written_to() -> None:
    for array in ("numpy", "torch"):
        envs = make(array=array, mode=AutoresetMode.NEXT_STEP)
        first, _ = envs.reset(seed=0)
        outs = [envs.step(np.array([1, EOS_ID, 2])) for _ in range(2)]
        ids, flags = [int(first["input_ids"].sum())], [outs[0][2].tolist()]
        for _ in range(3):
            envs.step(np.array([3, 3, 3]))
        assert int(first["input_ids"].sum()) == ids[0]
        assert outs[0][2].tolist() == flags[0]


# -- seeds, groups, prompts -------------------------------------------------------------------------------------------


def test_seeds() -> None:
    envs = make(2)
    by_int = envs.reset(seed=3)[1]["prompt_index"].tolist()
    assert make(2).reset(seed=[3, 4])[1]["prompt_index"].tolist() == by_int
    later = [envs.reset()[1]["prompt_index"].tolist() for _ in range(20)]
    other = make(2)
    other.reset(seed=3)
    # None in a list lets that row go on; row 0 begins again
    assert other.reset(seed=[3, None])[1]["prompt_index"].tolist() == [by_int[0], later[0][1]]
    assert len({tuple(pair) for pair in later}) > 4
    with pytest.raises(ValueError, match="a list of seeds needs num_envs=2 entries, got 3"):
        envs.reset(seed=[1, 2, 3])


def test_unseeded_environments_differ() -> None:
    drawn = []
    for _ in range(2):
        envs = make(20)
        drawn.append(envs.reset()[1]["prompt_index"].tolist())
    assert drawn[0] != drawn[1]


def test_streams_go_on_where_they_were() -> None:
    one, two = make(4, group_size=2), make(4, group_size=2)
    one.reset(seed=0)
    two.restore_streams(one.streams())
    assert_equal(one.reset(), two.reset())


@settings(max_examples=30)
@given(tokens=st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), max_size=20), seed=st.integers(0, 1000))
def test_groups(tokens: list[list[int]], seed: int) -> None:
    envs = make(4, AutoresetMode.SAME_STEP, group_size=2)
    drawn: list[list[int]] = [[int(i)] for i in envs.reset(seed=seed)[1]["prompt_index"]]
    for token_B in tokens:
        infos = envs.step(np.array(token_B))[4]
        for b in np.flatnonzero(infos.get("_prompt_index", [])):
            drawn[b].append(int(infos["prompt_index"][b]))
    for first, second in ((drawn[0], drawn[1]), (drawn[2], drawn[3])):
        both = min(len(first), len(second))
        assert first[:both] == second[:both]
    # A reset of all rows ends any difference.
    index_B = envs.reset()[1]["prompt_index"]
    assert index_B[0] == index_B[1] and index_B[2] == index_B[3]
    # A group's rows are seeded by its first: the rows of a vector without groups, every second one.
    plain = make(4).reset(seed=seed)[1]["prompt_index"]
    assert drawn[0][0] == plain[0] and drawn[2][0] == plain[2]


def test_prompt_indices() -> None:
    envs = make()
    observation, infos = envs.reset(options={"prompt_indices": [2, 0, 1]})
    assert infos["prompt_index"].tolist() == [2, 0, 1]
    # "c d a", "a" and "b c" with EOS 0, a 1, b 2, c 3, d 4
    assert observation["input_ids"][:, :3].tolist() == [[3, 4, 1], [0, 0, 1], [0, 2, 3]]
    assert observation["attention_mask"][:, :3].tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_indices": [0, 1]}, r"prompt_indices must be 3 integers, got \[0, 1\]"),
        ({"prompt_indices": [0, 1, 4]}, r"prompt_indices must lie in \[0, 4\), got \[0, 1, 4\]"),
        ({"prompt_indices": [-1, 0, 0]}, r"prompt_indices must lie in \[0, 4\), got \[-1"),
        ({"prompt_indices": [0.0, 1.0, 2.0]}, "prompt_indices must be 3 integers"),
        ({"reset_mask": np.zeros(3, bool)}, "reset_mask must be 3 booleans with at least one True"),
        ({"reset_mask": [True]}, r"reset_mask must be 3 booleans .* got \[True\]"),
        ({"reset_mask": [0, 1, 2]}, "reset_mask must be 3 booleans"),
        ({"prompts": [1]}, r"unknown reset options \['prompts'\]; allowed: prompt_indices, reset_mask"),
    ],
)
def test_bad_reset_options(options: dict[str, Any], message: str) -> None:
    envs = make()
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        envs.reset(options=options)


def test_a_reset_mask_before_the_first_reset() -> None:
    with pytest.raises(gym.error.ResetNeeded, match="the first reset"):
        make().reset(options={"reset_mask": [True, False, False]})


# -- bad values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kl_estimator": "k4"}, "unknown kl_estimator 'k4'; allowed: k1, k2, k3, full"),
        ({"array": "jax"}, "array must be one of numpy, torch, got 'jax'"),
        ({"render_mode": "rgb"}, "render_mode must be one of ansi, human, rgb_array or None, got 'rgb'"),
        ({"mode": "Sometimes"}, "autoreset_mode must be one of NEXT_STEP, SAME_STEP, DISABLED, got 'Sometimes'"),
        ({"group_size": 2}, "num_envs=3 is no multiple of group_size=2"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"rows": 0}, "num_envs must lie in .1, 1e.06., got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must lie in .1, 1e.07., got 0"),
        ({"max_prompt_tokens": 1.5}, "max_prompt_tokens must be a whole number, got 1.5"),
        ({"kl_coef": -0.1}, "kl_coef must be at least 0, got -0.1"),
        ({"kl_coef": float("nan")}, "kl_coef must be a finite number, got nan"),
        ({"missing_eos_penalty": -1}, "missing_eos_penalty must be at least 0, got -1"),
        ({"stop": [""]}, "stop must hold texts that are not empty"),
        ({"stop": [1]}, r"stop must hold texts that are not empty, got \[1\]"),
        ({"policy_logprob": 0.5}, "policy_logprob must be .* got 0.5"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"tokenizer": "no end"}, "the tokenizer 'no end' has no EOS token"),
        ({"dataset": "empty"}, "dataset 'empty' has no rows in split 'train'"),
        ({"reward": "nonsense"}, "unknown reward 'nonsense'"),
    ],
)
def test_bad_keywords(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**bad)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ([1, 2], r"actions must be 3 integers, got \[1, 2\]"),
        ([0.0, 1.0, 2.0], "actions must be 3 integers"),
        ([True, False, True], "actions must be 3 integers"),
        ([0, 1, 5], r"actions must lie in \[0, 5\), got \[0, 1, 5\]"),
        ([0, 1, -1], r"actions must lie in \[0, 5\), got \[0, 1, -1\]"),
        ({"logprob": [0.0] * 3}, r"an action needs the keys .* got \['logprob'\]"),
    ],
)
def test_bad_actions(action: Any, message: str) -> None:
    envs = make()
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        envs.step(action)
    envs.step([1, 2, 3])  # a refused action changes nothing


def test_read_only_actions() -> None:
    envs = make()
    envs.reset(seed=0)
    token_B = np.array([1, 2, 3])
    token_B.flags.writeable = False  # as JAX hands them out
    observation, *_ = envs.step(token_B)
    assert observation["input_ids"][:, envs.max_prompt_tokens].tolist() == [1, 2, 3]


# -- the KL penalty ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ([1, 2, 3], "kl_coef=0.1 needs the policy's log-probability"),
        ({"token": [1, 2, 3]}, "an action needs the keys 'token' and 'logprob'"),
        ({"token": [1, 2, 3], "logprob": [0.0]}, r"logprob must be finite numbers of shape \(3,\)"),
        ({"token": [1, 2, 3], "logprob": [0.0, 0.0, -np.inf]}, "logprob must be finite numbers"),
    ],
)
def test_a_penalty_needs_a_source(action: Any, message: str) -> None:
    envs = make(kl_coef=0.1)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        envs.step(action)


def test_a_callable_of_a_wrong_shape() -> None:
    envs = make(kl_coef=0.1, policy_logprob=lambda observation, action: torch.zeros(2))
    envs.reset(seed=0)
    with pytest.raises(
        ValueError,
        match=r"what policy_logprob returns must be finite numbers of shape \(3,\), got tensor\(\[0., 0.\]\)",
    ):
        envs.step([1, 2, 3])


@pytest.mark.parametrize(
    ("logprob", "message"),
    [
        ([3.0, -1.0, -1.0], "at most 0, got 3"),
        ([True, True, False], "got torch.bool in"),
        ([1j, -1.0, -1.0], "got torch.complex128 in"),
        (["a", "b", "c"], r"numbers of shape \(3,\)"),
        ([-1.0, float("nan"), -1.0], "finite numbers"),
        ([None, -1.0, -1.0], "numbers"),
    ],
)
def test_what_is_no_logprob(logprob: list[Any], message: str) -> None:
    envs = make(kl_coef=0.1)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=f"logprob must be .*{message}"):
        envs.step({"token": [1, 2, 3], "logprob": logprob})


def test_what_is_no_distribution() -> None:
    envs = make(kl_coef=0.1, kl_estimator="full")
    envs.reset(seed=0)
    logprob = torch.zeros(3, envs.vocab_size)
    with pytest.raises(ValueError, match=f"add up to 1, got a sum of {envs.vocab_size}"):
        envs.step({"token": [1, 2, 3], "logprob": logprob})
    envs.step({"token": [1, 2, 3], "logprob": logprob.bfloat16().log_softmax(-1)})


@pytest.mark.parametrize("seed", [-1, 1.5, "x", True, [0, 1, -1], [0, 1, "x"], np.zeros(3)])
def test_what_is_no_seed(seed: Any) -> None:
    with pytest.raises(ValueError, match="seed must be"):
        make().reset(seed=seed)


def test_a_reference_of_another_vocabulary() -> None:
    envs = make(kl_coef=0.1, reference="small")
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="the tokenizer has ids up to 4"):
        envs.step({"token": [1, 2, 3], "logprob": [-1.0] * 3})


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
def test_action_and_callable_agree_and_the_single_env_with_them(estimator: str) -> None:
    policy = Policy(tiny.llama(V, scale=0.3, seed=1))

    def logprob(observation: Any, action: Any) -> torch.Tensor:
        ids, mask = (torch.as_tensor(observation[k]) for k in ("input_ids", "attention_mask"))
        logp_BV = policy.next_logprobs(torch.atleast_2d(ids), torch.atleast_2d(mask))
        picked = logp_BV if estimator == "full" else logp_BV[torch.arange(len(logp_BV)), torch.as_tensor(action)]
        return picked if ids.ndim == 2 else picked[0]

    penalty = {"kl_coef": 0.2, "kl_estimator": estimator}
    sent, called = make(2, **penalty), make(2, **penalty, policy_logprob=logprob)
    single = TextEnv(**KEYWORDS, **penalty, policy_logprob=logprob)
    observation, _ = sent.reset(seed=0)
    called.reset(seed=0)
    single.reset(seed=0)
    assert isinstance(sent.single_action_space, gym.spaces.Dict)
    assert isinstance(called.single_action_space, gym.spaces.Discrete)
    for tokens in ([1, 2], [3, 1], [0, 4]):
        action = {"token": np.array(tokens), "logprob": logprob(observation, tokens).numpy()}
        observation, one_B, *_, infos = sent.step(action)
        _, two_B, *_ = called.step(np.array(tokens))
        _, three, *_ = single.step(tokens[0])
        np.testing.assert_allclose(one_B, two_B, atol=1e-6, rtol=0)
        np.testing.assert_allclose(one_B[0], float(three), atol=5e-5, rtol=0)
        assert (np.abs(infos["kl"]) > 1e-4).all()


# -- wrappers and making ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_make_vec(mode: AutoresetMode) -> None:
    envs = gym.make_vec("CopyText-v0", num_envs=3, autoreset_mode=mode, group_size=3, max_new_tokens=2)
    assert isinstance(envs, TextVectorEnv)
    assert envs.metadata["autoreset_mode"] is mode
    observation, _ = envs.reset(seed=0)
    assert envs.observation_space.contains(observation)
    envs.step(envs.action_space.sample())
    assert gym.make_vec("CopyText-v0", num_envs=2, vectorization_mode="sync").reset(seed=0)


def test_render() -> None:
    envs = gym.make_vec("CopyText-v0", num_envs=2, render_mode="ansi")
    with pytest.raises(gym.error.ResetNeeded):
        envs.render()
    envs.reset(options={"prompt_indices": [0, 6]})
    envs.step(np.array([1, EOS_ID]))
    assert envs.render() == ("a a a", "b c <eos> [EOS]")


def test_render_human_shows_the_first_row(capsys: pytest.CaptureFixture[str]) -> None:
    envs = make(2, AutoresetMode.SAME_STEP, render_mode="human")
    envs.reset(options={"prompt_indices": [1, 0]})
    envs.step(np.array([1, EOS_ID]))
    assert capsys.readouterr().out == "\nb c a"
    envs.step(np.array([EOS_ID, 1]))
    # spread: len("b c") + ord("a") = 3 + 97
    assert capsys.readouterr().out.startswith(" <eos>\n[EOS] score 100.000\n\n")


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_record_episode_statistics(mode: AutoresetMode) -> None:
    envs = RecordEpisodeStatistics(make(2, mode))
    envs.reset(options={"prompt_indices": [0, 0]})
    envs.step(np.array([1, 1]))
    *_, infos = envs.step(np.array([EOS_ID, 1]))
    assert infos["episode"]["l"].tolist() == [2, 0]
    # spread: 1 + ord("a") = 98
    assert infos["episode"]["r"].tolist() == [98.0, 0.0]


def test_remake_shares_what_is_loaded_and_keeps_the_names() -> None:
    envs = make(2, kl_coef=0.1)
    again = envs.remake(4, kl_coef=0.1, max_new_tokens=2)
    assert again.num_envs == 4
    assert again.max_new_tokens == 2
    assert again.tokenizer is envs.tokenizer
    assert again.reward_model is envs.reward_model
    assert again.settings["reference"] is None
    assert again.settings["reward"] is spread
