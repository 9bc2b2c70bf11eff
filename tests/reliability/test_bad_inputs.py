"""Bad inputs by hypothesis: each is an error that names it and says what is allowed, or is taken for what it is.

`make test` tries a few hundred of them; `make reliability` more than 10,000.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bounds import allowed
from torch import Tensor

from textrl_gym import registry
from textrl_gym.agents import GRPO
from textrl_gym.cli import main
from textrl_gym.evaluation.evaluator import evaluate
from textrl_gym.rewards import load_reward

ENV = "CopyText-v0"
EXAMPLES = pytest.mark.parametrize("examples", [30, pytest.param(2_000, marks=pytest.mark.slow)])
QUIET: dict[str, Any] = {"progress_bar": False, "eval_every": 0, "eval_episodes": 4, "show_samples": 0}


class Thing:
    """An object of a class that nobody knows."""


NUMBERS = st.one_of(
    st.integers(-5, 20),
    st.integers(),
    st.sampled_from([2**31, 2**63, -(2**64), 10**400]),
    st.floats(),
    st.booleans(),
    st.complex_numbers(),
    st.sampled_from([np.int64(3), np.float32(0.5), np.float64("nan"), np.bool_(True)]),
)
TEXTS = st.one_of(
    st.text(max_size=9), st.sampled_from(["1", "nan", "-1", "None", "[", "cuda", "gpu", "/", "..", "\0", "é" * 400])
)
ATOMS = st.one_of(st.none(), NUMBERS, TEXTS, st.binary(max_size=4), st.builds(Thing))
ARRAYS = st.sampled_from(
    [
        np.zeros(2),
        np.zeros((2, 2)),
        np.array(["a"]),
        np.array([]),
        np.array(None),
        torch.zeros(2),
        torch.tensor(math.nan),
    ]
)
JUNK = st.recursive(
    ATOMS | ARRAYS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner), st.dictionaries(TEXTS | st.integers(), inner, max_size=2)
    ),
    max_leaves=4,
)


def run(examples: int, test: Callable[..., None], *strategies: Any) -> None:
    """Try a property on so many examples, the same ones each time."""
    quiet = list(HealthCheck)
    settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=quiet,
        database=None,
        report_multiple_bugs=False,
    )(given(*strategies)(test))()


def assert_named(error: BaseException, *names: str) -> None:
    """An error for users: of a kind that the command line shows in words, with one of the names, and not too long."""
    assert isinstance(error, ValueError | ImportError | gym.error.Error), repr(error)
    assert any(name in str(error) for name in names), (names, str(error)[:300])
    assert len(str(error)) < 3_000


# -- gym.make ---------------------------------------------------------------------------------------------------------

POSITIVE = {"max_prompt_tokens", "max_new_tokens", "group_size"}
KEYWORDS = ("split", "dataset", "tokenizer", "reward", "max_prompt_tokens", "max_new_tokens", "stop", "group_size",
            "kl_coef", "kl_estimator", "reference", "policy_logprob", "missing_eos_penalty", "device", "array",
            "render_mode", "autoreset_mode", "num_envs", "eos_token_id", "skip_special_tokens", "bad_rows", "template",
            "system_prompt", "few_shot")  # fmt: skip


def is_number(value: object) -> bool:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    return isinstance(value, int) or bool(math.isfinite(value))


def may_be(name: str, value: Any) -> bool:
    """Whether the card of the environments allows it, written apart from the checks."""
    if value is None:
        return name not in ("split", "group_size", "num_envs", "kl_coef", "kl_estimator", "missing_eos_penalty",
                            "device", "array", "autoreset_mode", "skip_special_tokens", "bad_rows",
                            "template")  # fmt: skip
    if name in ("kl_coef", "missing_eos_penalty"):
        return is_number(value) and bool(value >= 0)
    if name in (*POSITIVE, "num_envs"):
        return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(1 <= value <= 10**7)
    if name == "stop":
        texts = [value] if isinstance(value, str) else value
        return isinstance(texts, list | tuple) and all(isinstance(text, str) and text for text in texts)
    if name == "device":
        return isinstance(value, str) and value in ("cpu", "auto")
    if name == "eos_token_id":
        ids = value if isinstance(value, list | tuple) else [value]
        return all(isinstance(one, int | np.integer) and not isinstance(one, bool) and 0 <= one < 5 for one in ids)
    if name == "few_shot":
        return isinstance(value, list | tuple) and not value
    # A reference is read when it is first needed, and with no penalty it never is.
    return name == "reference" and isinstance(value, str)


@EXAMPLES
def test_keywords_of_gym_make(examples: int) -> None:
    def holds(name: str, value: Any) -> None:
        try:
            envs = gym.make_vec(ENV, **({"num_envs": 2} | {name: value}))
        except Exception as error:  # noqa: BLE001 - what it may be is asserted
            # What is loaded is named by its own name.
            assert_named(error, name, *{"tokenizer": ["no Hub id"], "system_prompt": ["encoded"]}.get(name, []))
            return
        assert may_be(name, value), (name, value)
        envs.reset(seed=0)
        action: Any = np.ones(envs.num_envs, int)
        if envs.unwrapped.wants_logprob:  # type: ignore[attr-defined] # a text environment
            action = {"token": action, "logprob": np.full(envs.num_envs, -1.0)}
        reward = envs.step(action)[1]
        assert np.isfinite(reward).all()

    run(examples, holds, st.sampled_from(KEYWORDS), JUNK)


# -- settings and arguments of agents ---------------------------------------------------------------------------------

CONFIGS = [registry.load_agent_class(name).Config for name in registry.names("agents")]


@EXAMPLES
def test_settings_of_agents(examples: int) -> None:
    fields = [(cls, field.name) for cls in CONFIGS for field in dataclasses.fields(cls)]

    def holds(field: tuple[type[Any], str], value: Any) -> None:
        cls, name = field
        given = {"ppo": "folder"} if "ppo" in cls.__dataclass_fields__ else {}
        try:
            cls(**(given | {name: value}))
        except Exception as error:  # noqa: BLE001
            assert_named(error, name)
        else:
            value = value.item() if isinstance(value, np.number) else value
            assert allowed(value, get_type_hints(cls, include_extras=True)[name]), (name, value)

    run(examples, holds, st.sampled_from(fields), JUNK)


@EXAMPLES
def test_arguments_of_agents(examples: int, tmp_path: Path) -> None:
    agent = GRPO(ENV, rollout_episodes=8, seed=0, out=tmp_path)
    learning = (
        "total_timesteps",
        "log_interval",
        "eval_every",
        "save_every_minutes",
        "gold",
        "on_hacking",
        "show_samples",
    )

    def holds(name: str, value: Any) -> None:
        try:
            if name in ("seed", "device", "model", "reference", "env"):
                arguments: dict[str, Any] = {"env": ENV, "seed": 0, name: value}
                GRPO(**arguments, rollout_episodes=8)
                fine = {"seed": is_number(value), "device": value in ("cpu", "auto")}.get(name, value is None)
            elif name in ("episodes", "split"):
                arguments = {"episodes": 2, "split": "validation", name: value}
                evaluate(agent, **arguments)
                fine = is_number(value) and value >= 1
            else:
                arguments = QUIET | {"total_timesteps": 0, "callback": stop_at_once} | {name: value}
                agent.learn(**arguments)
                fine = value is None or is_number(value) or (name == "gold" and callable(value))
        except Exception as error:  # noqa: BLE001
            assert_named(error, name, "gold", "environment", "no folder", "no model")
        else:
            assert fine, (name, value)

    def stop_at_once(*_: object) -> bool:
        return False

    names = ("seed", "device", "model", "reference", "env", "episodes", "split", *learning)
    run(examples // 2, holds, st.sampled_from(names), JUNK.filter(lambda value: not too_much(value)))


def too_much(value: object) -> bool:
    """A number that a user may want, and a test may not wait for."""
    return is_number(value) and isinstance(value, int | float) and value > 20


# -- flags ------------------------------------------------------------------------------------------------------------


@EXAMPLES
def test_flags(
    examples: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("textrl_gym.cli.train.learn", lambda *_, **__: 0)
    flags = ["--learning-rate", "--epochs", "--clip-low", "--seed", "--device", "--total-timesteps", "--kl-coef",
             "--group-size", "--rollout-episodes", "--env.max-new-tokens", "--env.reward", "--env.stop", "--model",
             "--save-every-minutes", "--gold", "--aggregation", "--env.split", "--nonsense"]  # fmt: skip
    words = st.one_of(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6),
        st.sampled_from(
            ["nan", "inf", "-1", "1e400", "1.5", "True", "None", "", "0", "rouge", "1e20", "-0", "٣", "0x10"]
        ),
    )

    def holds(flag: str, word: str) -> None:
        out = str(tmp_path / "out")
        arguments = ["train", "grpo", ENV, "--total-timesteps", "20", "--out", out, f"{flag}={word}"]
        code = main.main(arguments)
        said = capsys.readouterr()
        assert code in (0, 2), (flag, word, said.err)
        assert "Traceback" not in said.err
        # An error says something.
        assert code == 0 or (said.out + said.err).strip()

    run(examples // 5, holds, st.sampled_from(flags), words)


# -- rewards, actions, seeds and options ------------------------------------------------------------------------------


@EXAMPLES
def test_what_rewards_return(examples: int) -> None:
    def holds(values: Any) -> None:
        reward = load_reward(lambda completions, **columns: values)
        try:
            score_B = reward(["p", "q"], ["a", "b"])
        except Exception as error:  # noqa: BLE001
            assert_named(error, "reward")
        else:
            assert isinstance(score_B, Tensor)
            assert score_B.shape == (2,)
            assert score_B.isfinite().all()
            parts = values if isinstance(values, Mapping) else {"whole": values}
            assert all(part for part in parts)
            assert {np.asarray(of_part, dtype=float).shape for of_part in parts.values()} == {(2,)}

    pairs = st.lists(JUNK, min_size=2, max_size=2)
    run(examples, holds, JUNK | pairs)


@EXAMPLES
def test_actions(examples: int) -> None:
    envs = {
        kl: gym.make_vec(ENV, num_envs=2, kl_coef=kl, autoreset_mode="NextStep", array="numpy") for kl in (0.0, 0.1)
    }

    def holds(kl: float, action: Any) -> None:
        env = envs[kl]
        env.reset(seed=0)
        try:
            _, reward, *_ = env.step(action)
        except Exception as error:  # noqa: BLE001
            assert_named(error, "action", "logprob")
            return
        assert np.isfinite(reward).all()
        token = np.asarray(action["token"] if isinstance(action, Mapping) else action)
        assert token.dtype.kind in "iu"
        assert ((token >= 0) & (token < 5)).all()
        if kl:
            logprob = np.asarray(action["logprob"])
            assert logprob.dtype.kind in "fiu"
            assert (logprob <= 1e-3).all()

    tokens = st.lists(ATOMS, min_size=2, max_size=2) | st.just([1, 2])
    whole = st.fixed_dictionaries({"token": tokens | JUNK, "logprob": st.lists(NUMBERS, min_size=2, max_size=2) | JUNK})
    run(examples, holds, st.sampled_from([0.0, 0.1]), JUNK | tokens | whole)


@EXAMPLES
def test_seeds_and_options_of_reset(examples: int) -> None:
    vector = gym.make_vec(ENV, num_envs=2)
    vector.reset(seed=0)
    single = gym.make(ENV).unwrapped

    def holds(which: bool, seed: Any, options: Any) -> None:
        env: Any = single if which else vector
        try:
            observation, _ = env.reset(seed=seed, options=options)
        except Exception as error:  # noqa: BLE001
            assert_named(error, "seed", "options", "prompt_indices", "reset_mask")
            return
        seeds = seed if isinstance(seed, list | tuple) else [seed]
        assert all(one is None or (isinstance(one, int | np.integer) and one >= 0) for one in seeds)
        assert options is None or isinstance(options, dict)
        assert np.asarray(observation["input_ids"]).shape[-1] == 5

    named = st.dictionaries(st.sampled_from(["prompt_indices", "reset_mask", "seed"]), JUNK, max_size=2)
    run(examples, holds, st.booleans(), st.none() | JUNK, st.none() | JUNK | named)


# -- rows -------------------------------------------------------------------------------------------------------------


@EXAMPLES
def test_rows_of_a_users_file(examples: int, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    values = st.recursive(
        st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
        max_leaves=4,
    )
    names = st.sampled_from(["prompt", "completion", "question", "answer", "messages", "post", "chosen", "x"])

    def holds(rows: list[Any]) -> None:
        good = [{"prompt": f"Post {i}\n\nTL;DR:", "completion": " yes"} for i in range(12)]
        file.write_text("".join(json.dumps(row) + "\n" for row in [*good, *rows]))
        try:
            envs = gym.make_vec("TLDRSummarize-v0", num_envs=2, dataset=str(file), reward="length")
            for _ in range(3):
                envs.reset(seed=0)
        except Exception as error:  # noqa: BLE001
            assert_named(error, "dataset", "rows.jsonl", "prompt")

    run(examples // 3, holds, st.lists(st.dictionaries(names, values, max_size=3), min_size=1, max_size=2))
