"""Conversations: collect() = stepping with replies of unequal length, a vector = N singles, tokens as the model saw.

Shape legend: B rows, P prompt places, T response places, L = P + T, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from textrl_gym.core import Message, Reply, Rollout, Row
from textrl_gym.evaluation.check_env import check_env
from textrl_gym.mdp.task import Task
from textrl_gym.mdp.text_env import TextEnv, TextVectorEnv
from textrl_gym.models import tiny
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts.collect import collect

SYMBOLS = ("a", "b", "c", "d", "e", "f", "g", "h")
EOS_ID, V = 0, len(SYMBOLS) + 1
P, T = 4, 26
ATOL = 5e-5  # float32 sums in another order


def points(
    prompts: list[str],
    completions: list[str],
    *,
    turns: list[Any],
    completion_ids: list[list[int]],
    action_mask: list[list[bool]],
    **columns: Any,
) -> list[float]:
    """Another number for nearly every conversation."""
    rows = zip(turns, completions, completion_ids, action_mask, strict=True)
    return [
        len(said)
        + sum((i + 1) * ord(c) for i, c in enumerate(text)) / 1000
        + sum((2 + own) * i for i, own in zip(ids, mask, strict=True)) / 64
        for said, text, ids, mask in rows
    ]


class Echo(Task):
    """The reply depends on all that was said; it is 0 to 4 symbols long, and an "h" in a turn ends the conversation."""

    max_prompt_tokens = P
    max_new_tokens = T
    max_turns = 4
    max_turn_tokens = 5
    turn_markers = ("", "")
    model = "made in code"
    reward = "unused"

    def rows(self, split: str, dataset: str | None = None) -> Sequence[Row]:
        return [{"prompt": " ".join(SYMBOLS[i : i + n])} for n in range(1, 5) for i in range(3)]

    def reply(self, row: Row, turns: Sequence[Message]) -> Reply:
        said = turns[-1]["content"].split()
        number = len(row["prompt"]) + len(turns) + 3 * len(said)
        text = " ".join(SYMBOLS[(number + n) % 7] for n in range(number % 5))
        return Reply(text, reward=0.1 * len(said) - 0.01 * len(turns), done="h" in said)

    def load_tokenizer(self, name: str | None = None) -> Any:
        return tiny.symbol_tokenizer(SYMBOLS)


SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
ROPE = {**SIZE, "num_key_value_heads": 1, "max_position_embeddings": 64}
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, ROPE),
    "gpt2": (transformers.GPT2Config, {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}),
    "qwen2": (transformers.Qwen2Config, ROPE),
}


def make_model(name: str = "llama", seed: int = 0) -> Any:
    config_class, size = CONFIGS[name]
    special = {"bos_token_id": None, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID}
    config = config_class(vocab_size=V, initializer_range=0.3, **special, **size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def make_env(rows: int, **chosen: Any) -> TextVectorEnv:
    mode: dict[str, Any] = {"autoreset_mode": AutoresetMode.DISABLED, "array": "torch", "task": Echo, "reward": points}
    return TextVectorEnv(rows, **(mode | chosen))


def uniforms(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.rand((rows, T), generator=torch.Generator().manual_seed(seed))


def step_through(env: TextVectorEnv, policy: Policy, uniform_BT: torch.Tensor, seed: int) -> dict[str, Any]:
    """One episode a row by step() and act(); the number of an action is that of its position, as in collect()."""
    rows = env.num_envs
    observation, _ = env.reset(seed=seed)
    seen: dict[str, Any] = {name: [0] * rows for name in ("score", "stop", "completion", "turns", "ids")}
    for name in ("reward", "logp", "turn", "turn_reward", "kl"):
        seen[name] = torch.zeros((rows, T))
    seen["mask"] = torch.zeros((rows, T), dtype=torch.bool)
    live_B = torch.ones(rows, dtype=torch.bool)
    while live_B.any():
        place_B = observation["attention_mask"][:, P:].sum(1).long()
        uniform_B = uniform_BT.gather(1, place_B.clamp(max=T - 1)[:, None]).squeeze(1)
        token_B, logp_B = policy.act(observation, uniform_B=uniform_B)
        action = {"token": token_B, "logprob": logp_B} if env.kl_coef > 0 else token_B
        observation, reward_B, terminated_B, truncated_B, infos = env.step(action)
        live, at = live_B.nonzero().squeeze(1), place_B[live_B]
        seen["reward"][live, at], seen["logp"][live, at] = reward_B[live].float(), logp_B[live]
        seen["mask"][live, at] = True
        seen["turn"][live, at] = torch.tensor(infos["turn"], dtype=torch.float)[live]
        if "turn_reward" in infos:
            seen["turn_reward"][live, at] = torch.tensor(infos["turn_reward"], dtype=torch.float)[live]
        if "kl" in infos:
            seen["kl"][live, at] = infos["kl"][live].float()
        ended_B = terminated_B | truncated_B
        for b in (live_B & ended_B).nonzero().flatten().tolist():
            for name, key in {
                "score": "score",
                "stop": "stop_reason",
                "completion": "completion",
                "turns": "turns",
            }.items():
                seen[name][b] = infos[key][b]
            seen["ids"][b] = observation["input_ids"][b, P:][observation["attention_mask"][b, P:] == 1].tolist()
        live_B &= ~ended_B
        if ended_B.any():
            observation, _ = env.reset(options={"reset_mask": ended_B.numpy()})
    return seen


def assert_same(rollout: Rollout, seen: dict[str, Any]) -> None:
    width = rollout.token_BT.shape[1]
    assert torch.equal(rollout.mask_BT, seen["mask"][:, :width])
    ids = [ids[mask].tolist() for ids, mask in zip(rollout.token_BT, rollout.present_BT, strict=True)]
    assert ids == seen["ids"]
    assert rollout.stop_B.tolist() == seen["stop"]
    assert rollout.completions == seen["completion"]
    assert rollout.turns == seen["turns"]
    assert rollout.score_B.tolist() == [np.float32(s) for s in seen["score"]]
    assert rollout.turn_BT is not None and rollout.turn_reward_BT is not None
    assert torch.equal((rollout.turn_BT * rollout.mask_BT).float(), seen["turn"][:, :width])
    floats = {"reward": rollout.reward_BT, "logp": rollout.logp_BT, "turn_reward": rollout.turn_reward_BT}
    for name, fast_BT in (floats | {"kl": rollout.kl_BT}).items():
        torch.testing.assert_close(fast_BT, seen[name][:, :width], atol=ATOL, rtol=0)
    assert not rollout.token_BT[~rollout.present_BT].any()


@pytest.mark.parametrize("chosen", [{}, {"group_size": 4, "kl_coef": 0.2, "stop": "c d"}], ids=["plain", "group"])
@pytest.mark.parametrize("name", CONFIGS)
def test_collect_is_stepping(name: str, chosen: dict[str, Any]) -> None:
    policy = Policy(make_model(name), reference=make_model(name, seed=1))
    env = make_env(12, **chosen, reference=policy.reference)
    seen = step_through(env, policy, uniforms(12), seed=3)
    env.streams_of_prompts.seed(3)
    rollout = collect(env, policy, uniform_BT=uniforms(12), kl_coef=env.kl_coef)
    if env.kl_coef == 0:
        seen["kl"] = rollout.kl_BT
    assert_same(rollout, seen)
    # It means something only if turns, replies and ends are unequal.
    assert rollout.reply_BT is not None
    assert len(set(rollout.reply_BT.sum(1).tolist())) > 3
    assert len(set(rollout.mask_BT.sum(1).tolist())) > 3
    assert len(set(rollout.stop_B.tolist())) > 1


# -- stepping ---------------------------------------------------------------------------------------------------------


def same(one: Any, two: Any, where: str) -> None:
    """Equal bit for bit, kinds and keys included."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), (where, one.keys(), two.keys())
        for key in one:
            same(one[key], two[key], f"{where}, {key}")
    elif isinstance(one, tuple):
        for number, (a, b) in enumerate(zip(one, two, strict=True)):
            same(a, b, f"{where}, {number}")
    elif isinstance(one, np.ndarray):
        assert one.dtype == two.dtype and one.shape == two.shape, (where, one, two)
        if one.dtype != object:
            assert np.array_equal(one, two), (where, one, two)
            return
        for a, b in zip(one, two, strict=True):
            same(a, b, where)
    else:
        assert type(one) is type(two) and one == two, (where, one, two)


@pytest.mark.parametrize("chosen", [{}, {"stop": "c d", "max_turns": 2}], ids=["plain", "stop"])
@pytest.mark.parametrize("mode", AutoresetMode)
def test_a_vector_is_singles(mode: AutoresetMode, chosen: dict[str, Any]) -> None:
    rows = 4
    envs = make_env(rows, autoreset_mode=mode, array="numpy", **chosen)
    singles = SyncVectorEnv([lambda: TextEnv(task=Echo, reward=points, **chosen)] * rows, autoreset_mode=mode)
    same(envs.reset(seed=5), singles.reset(seed=5), "reset")
    rng, names = np.random.default_rng(0), set[str]()
    for step in range(90):
        action_B = rng.integers(V, size=rows)
        out = envs.step(action_B)
        same(out, singles.step(action_B), f"step {step}")
        names |= out[4].keys()
        ended_B = out[2] | out[3]
        if mode is AutoresetMode.DISABLED and ended_B.any():
            one, two = (e.reset(options={"reset_mask": ended_B.copy()}) for e in (envs, singles))
            same(one, two, f"reset after step {step}")
    own = {"final_info", "final_obs"} if mode is AutoresetMode.SAME_STEP else {"turns", "score"}
    assert own | {"turn", "turn_reward", "reply"} <= names


def test_torch_is_numpy() -> None:
    numbers, tensors = (make_env(3, array=array, autoreset_mode="SAME_STEP") for array in ("numpy", "torch"))
    numbers.reset(seed=1)
    tensors.reset(seed=1)
    rng = np.random.default_rng(2)
    for _ in range(40):
        action_B = rng.integers(V, size=3)
        one, two = numbers.step(action_B), tensors.step(torch.tensor(action_B))
        for key in one[0]:
            assert np.array_equal(one[0][key], two[0][key].numpy())
        for a, b in zip(one[1:4], two[1:4], strict=True):
            assert np.array_equal(a, b.numpy())


@pytest.mark.slow  # GuessNumber-v0 goes through the same checks in tests/test_env.py
def test_check_env_passes() -> None:
    assert check_env(TextEnv(task=Echo, reward=points, stop="c d"))


@given(
    st.integers(1, 5), st.integers(1, 6), st.integers(2, T), st.integers(0, 999), st.sampled_from([None, "a", "b c"])
)
@settings(max_examples=12)
def test_collect_is_stepping_whatever_the_budgets(turns: int, of_turn: int, new: int, seed: int, stop: Any) -> None:
    policy = Policy(make_model())
    env = make_env(4, max_turns=turns, max_turn_tokens=of_turn, max_new_tokens=new, stop=stop)
    seen = step_through(env, policy, uniforms(4, seed), seed=seed)
    env.streams_of_prompts.seed(seed)
    rollout = collect(env, policy, uniform_BT=uniforms(4, seed))
    seen["kl"] = rollout.kl_BT
    assert_same(rollout, seen)
    assert int(rollout.present_BT.sum(1).max()) <= new
    assert rollout.turn_BT is not None and int(rollout.turn_BT.max()) < turns


class Together(Echo):
    """Another side that answers many conversations at once."""

    reply = Task.reply

    def replies(self, rows: Sequence[Row], turns: Sequence[Sequence[Message]]) -> list[Reply]:
        self.asked = [*getattr(self, "asked", []), len(rows)]
        return [Echo().reply(row, of_row) for row, of_row in zip(rows, turns, strict=True)][: self.given]

    given: int | None = None


def test_many_are_answered_at_once() -> None:
    task = Together()
    assert task.replies_to_turns
    one, two = make_env(3, task=task, array="numpy"), make_env(3, array="numpy")
    same(one.reset(seed=0), two.reset(seed=0), "reset")
    for _ in range(3):
        same(one.step(np.zeros(3, int)), two.step(np.zeros(3, int)), "step")
    assert task.asked == [3, 3, 3]
    task.given = 2
    with pytest.raises(ValueError, match="Together\\.replies must give 3 replies, got 2"):
        one.step(np.zeros(3, int))
