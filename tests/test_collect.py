"""The fast driver is the same MDP: collect() = stepping, cached sampling = the full forward, greedy = transformers.

Shape legend: B rows, P prompt places, T response places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gymnasium.vector import AutoresetMode

from textrl_gym.agents import Reinforce
from textrl_gym.core import Rollout, Row, StopReason
from textrl_gym.mdp.task import Task
from textrl_gym.mdp.text_env import TextEnv, TextVectorEnv
from textrl_gym.models import tiny
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts import sampler
from textrl_gym.rollouts.batching import micro_batches
from textrl_gym.rollouts.collect import collect

SYMBOLS = ("a", "b", "c", "d", "e", "f", "g")
EOS_ID = 0
P, T = 5, 9
ATOL = 5e-5  # float32 sums in another order; without vector instructions a logprob differs by 1.1e-5


def spread(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Another number for nearly every text, so that a wrong prompt or completion is seen in the score."""
    return [
        len(p) + sum((i + 1) * ord(c) for i, c in enumerate(y)) / 1000
        for p, y in zip(prompts, completions, strict=True)
    ]


class Letters(Task):
    """Prompts of one to five symbols."""

    max_prompt_tokens = P
    max_new_tokens = T
    model = "made in code"
    reward = "unused"

    def rows(self, split: str, dataset: str | None = None) -> Sequence[Row]:
        return [{"prompt": " ".join(SYMBOLS[i : i + n])} for n in range(1, 6) for i in range(3)]

    def load_tokenizer(self, name: str | None = None) -> Any:
        return tiny.symbol_tokenizer(SYMBOLS)


SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
ROPE = {**SIZE, "num_key_value_heads": 1, "max_position_embeddings": 64}
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, ROPE),
    "gpt2": (transformers.GPT2Config, {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}),
    "qwen2": (transformers.Qwen2Config, ROPE),
    "qwen3": (transformers.Qwen3Config, {**ROPE, "head_dim": 16}),
    "gemma": (transformers.GemmaConfig, {**ROPE, "head_dim": 16}),
    # A window of 4 is shorter than prompt and completion, so that it matters.
    "gemma2": (transformers.Gemma2Config, {**ROPE, "head_dim": 16, "sliding_window": 4}),
    "mistral": (transformers.MistralConfig, {**ROPE, "sliding_window": 4}),
}


def make_model(name: str, seed: int = 0) -> Any:
    """A random language model, far from uniform: with initializer_range 0.02 every token would have the same logit."""
    config_class, size = CONFIGS[name]
    special = {"bos_token_id": None, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID}
    scale = 0.1 if name.startswith("gemma") else 0.3  # Gemma multiplies its embeddings by sqrt(hidden_size)
    config = config_class(vocab_size=len(SYMBOLS) + 1, initializer_range=scale, **special, **size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def make_env(rows: int, **settings: Any) -> TextVectorEnv:
    mode: dict[str, Any] = {"autoreset_mode": AutoresetMode.DISABLED, "array": "torch"}
    return TextVectorEnv(rows, task=Letters, reward=spread, **(mode | settings))


def uniforms(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.rand((rows, T), generator=torch.Generator().manual_seed(seed))


def step_through(env: TextVectorEnv, policy: Policy, uniform_BT: torch.Tensor, seed: int) -> dict[str, Any]:
    """One episode a row by step() and act(), written down as collect() would. Rows that ended play on unseen."""
    rows = env.num_envs
    observation, _ = env.reset(seed=seed)
    prompts = [observation["input_ids"][b, :P][observation["attention_mask"][b, :P] == 1].tolist() for b in range(rows)]
    said: dict[str, Any] = {"prompt": prompts, "score": [0.0] * rows, "stop": [0] * rows, "completion": [""] * rows}
    for name in ("token", "reward", "logp", "kl", "ref_logp"):
        said[name] = torch.zeros((rows, T))
    live_B = torch.ones(rows, dtype=torch.bool)
    said["length"] = torch.zeros(rows, dtype=torch.int64)
    for t in range(T):
        token_B, logp_B = policy.act(observation, uniform_B=uniform_BT[:, t])
        action = {"token": token_B, "logprob": logp_B} if env.kl_coef > 0 else token_B
        observation, reward_B, terminated_B, truncated_B, infos = env.step(action)
        columns = {"token": token_B, "reward": reward_B, "logp": logp_B}
        if env.kl_coef > 0:
            columns |= {"kl": infos["kl"], "ref_logp": infos["ref_logprob"]}
        for name, value_B in columns.items():
            said[name][live_B, t] = value_B[live_B].float()
        said["length"] += live_B
        ended_B = terminated_B | truncated_B
        for b in (live_B & ended_B).nonzero().flatten().tolist():
            said["score"][b], said["stop"][b] = infos["score"][b], infos["stop_reason"][b]
            said["completion"][b] = infos["completion"][b]
        live_B &= ~ended_B
        if not live_B.any():
            break
        if ended_B.any():
            observation, _ = env.reset(options={"reset_mask": ended_B.numpy()})
    return said


def assert_same(rollout: Rollout, said: dict[str, Any], atol: float = ATOL) -> None:
    width = rollout.token_BT.shape[1]
    prompts = [ids[mask].tolist() for ids, mask in zip(rollout.prompt_BP, rollout.prompt_mask_BP, strict=True)]
    assert prompts == said["prompt"]
    assert torch.equal(rollout.mask_BT.sum(1), said["length"])
    assert torch.equal(rollout.token_BT, said["token"][:, :width].long())
    assert rollout.stop_B.tolist() == said["stop"]
    assert rollout.completions == said["completion"]
    assert rollout.score_B.tolist() == [np.float32(s) for s in said["score"]]
    for name, fast_BT in {"reward": rollout.reward_BT, "logp": rollout.logp_BT}.items():
        torch.testing.assert_close(fast_BT, said[name][:, :width], atol=atol, rtol=0)
    if said["kl"].any():
        torch.testing.assert_close(rollout.kl_BT, said["kl"][:, :width], atol=atol, rtol=0)
        torch.testing.assert_close(rollout.ref_logp_BT, said["ref_logp"][:, :width], atol=atol, rtol=0)
    assert not rollout.token_BT[~rollout.mask_BT].any()


@pytest.mark.parametrize("settings", [{}, {"group_size": 4, "kl_coef": 0.2}], ids=["plain", "group and KL"])
@pytest.mark.parametrize("name", CONFIGS)
def test_collect_is_stepping(name: str, settings: dict[str, Any]) -> None:
    policy = Policy(make_model(name), reference=make_model(name, seed=1))
    env = make_env(12, **settings, reference=policy.reference)
    said = step_through(env, policy, uniforms(12), seed=3)
    env.streams_of_prompts.seed(3)  # collect() draws on from where reset() left the streams: begin them again
    rollout = collect(env, policy, uniform_BT=uniforms(12))
    assert_same(rollout, said)
    # The test means something only if prompts and stops are unequal.
    assert len({len(p) for p in said["prompt"]}) > 1
    assert len(set(said["length"].tolist())) > 2


@pytest.mark.parametrize("group_size", [1, 4])
def test_collect_is_stepping_with_stop_strings(group_size: int) -> None:
    policy = Policy(make_model("llama"), reference=make_model("gpt2"))
    settings = {"stop": ["b c", "d"], "kl_coef": 0.1, "missing_eos_penalty": 0.5, "group_size": group_size}
    env = make_env(16, reference=policy.reference, **settings)
    said = step_through(env, policy, uniforms(16), seed=5)
    env.streams_of_prompts.seed(5)
    assert_same(collect(env, policy, uniform_BT=uniforms(16)), said)
    assert {StopReason.EOS, StopReason.STOP_STRING} <= set(said["stop"])
    assert not any("d" in completion for completion in said["completion"])


def test_budget_and_its_penalty() -> None:
    policy = Policy(make_model("llama"))
    env = make_env(8, missing_eos_penalty=0.5, max_new_tokens=2)
    said = step_through(env, policy, uniforms(8), seed=0)
    env.streams_of_prompts.seed(0)
    rollout = collect(env, policy, uniform_BT=uniforms(8))
    assert_same(rollout, said)
    budget_B = rollout.stop_B == StopReason.LENGTH
    assert budget_B.any() and not budget_B.all()
    # reward = score - 0.5 where the budget ran out, score elsewhere; no KL
    torch.testing.assert_close(rollout.reward_BT.sum(1), rollout.score_B - 0.5 * budget_B, atol=0, rtol=0)


@pytest.mark.parametrize("estimator", ["k2", "k3", "full"])
def test_estimators_agree_between_drivers(estimator: str) -> None:
    policy = Policy(make_model("qwen2"), reference=make_model("qwen2", seed=1))

    def logprob(observation: Any, action_B: torch.Tensor) -> torch.Tensor:
        logp_BV = policy.next_logprobs(observation["input_ids"], observation["attention_mask"])
        return logp_BV if estimator == "full" else logp_BV.gather(1, action_B[:, None]).squeeze(1)

    env = make_env(6, kl_coef=0.3, kl_estimator=estimator, reference=policy.reference, policy_logprob=logprob)
    said = step_through_tokens(env, policy, uniforms(6))
    env.streams_of_prompts.seed(0)
    rollout = collect(env, policy, uniform_BT=uniforms(6))
    # k2 and k3 are up to exp(5) here, so float32's 1e-7 becomes more
    torch.testing.assert_close(rollout.reward_BT, said[:, : rollout.token_BT.shape[1]], atol=1e-4, rtol=1e-4)
    assert float(rollout.kl_BT.abs().max()) > 0.1


def step_through_tokens(env: TextVectorEnv, policy: Policy, uniform_BT: torch.Tensor) -> torch.Tensor:
    """Rewards [B, T] of one episode a row, sent as plain tokens, from seed 0."""
    observation, _ = env.reset(seed=0)
    reward_BT = torch.zeros((env.num_envs, T))
    live_B = torch.ones(env.num_envs, dtype=torch.bool)
    for t in range(T):
        token_B, _ = policy.act(observation, uniform_B=uniform_BT[:, t])
        observation, reward_B, terminated_B, truncated_B, _ = env.step(token_B)
        reward_BT[:, t] = torch.where(live_B, reward_B, 0.0)
        ended_B = terminated_B | truncated_B
        live_B &= ~ended_B
        if ended_B.any():
            observation, _ = env.reset(options={"reset_mask": ended_B.numpy()})
    return reward_BT


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_sampling_is_the_full_forward(name: str) -> None:
    policy = Policy(make_model(name), temperature=0.8)
    env = make_env(16, group_size=4)
    env.reset(seed=1)
    rollout = collect(env, policy, uniform_BT=uniforms(16))
    torch.testing.assert_close(policy.logprobs(rollout), rollout.logp_BT, atol=ATOL, rtol=0)
    # Row by row and without padding, too: the padding of the batch leaks nowhere.
    for b in range(0, 16, 5):
        alone = rollout.select(torch.tensor([b]))
        torch.testing.assert_close(policy.logprobs(alone), alone.logp_BT, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_transformers_generate(name: str) -> None:
    model = make_model(name)
    env = make_env(15)
    rollout = collect(env, Policy(model), greedy=True, prompt_indices=np.arange(15))
    generated_BL = model.generate(
        rollout.prompt_BP,
        attention_mask=rollout.prompt_mask_BP.long(),
        do_sample=False,
        max_new_tokens=T,
        pad_token_id=EOS_ID,  # pad = EOS: only lengths can tell them apart
    )
    said_BT = generated_BL[:, rollout.prompt_BP.shape[1] :]
    width = min(said_BT.shape[1], rollout.token_BT.shape[1])
    assert torch.equal(said_BT[:, :width], rollout.token_BT[:, :width])
    assert not said_BT[:, width:].any()


def test_collect_leaves_stepped_episodes_alone() -> None:
    policy = Policy(make_model("llama"))
    env = make_env(4)
    observation, _ = env.reset(seed=0)
    prompt = env.tokenizer.decode(observation["input_ids"][0, :P][observation["attention_mask"][0, :P] == 1])
    collect(env, policy, uniform_BT=uniforms(4))
    *_, infos = env.step(torch.full((4,), EOS_ID))
    assert infos["prompt"][0] == prompt


def test_groups_share_prompts_in_collect_whatever_was_stepped() -> None:
    policy = Policy(make_model("llama"))
    env = make_env(4, group_size=2, autoreset_mode=AutoresetMode.SAME_STEP)
    env.reset(seed=0)
    for _ in range(3):  # rows 0 and 2 have three episodes more than their neighbours
        env.step(torch.tensor([EOS_ID, 1, EOS_ID, 1]))
    rollout = collect(env, policy, uniform_BT=uniforms(4))
    assert rollout.prompts[0] == rollout.prompts[1]
    assert rollout.prompts[2] == rollout.prompts[3]
    assert rollout.group_B.tolist() == [0, 0, 1, 1]


def test_collect_of_a_single_environment() -> None:
    policy = Policy(make_model("llama"))
    rollout = collect(TextEnv(task=Letters, reward=spread), policy, uniform_BT=uniforms(1))
    assert len(rollout) == 1
    assert rollout.reward_BT[0, -1] == rollout.score_B[0]


def test_penalty_without_a_reference_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"kl_coef=0\.1 needs a reference"):
        collect(make_env(2), Policy(make_model("llama")), kl_coef=0.1)


def test_no_text_environment_is_an_error() -> None:
    import gymnasium

    with pytest.raises(ValueError, match="is not a text environment"):
        collect(gymnasium.make("CartPole-v1"), Policy(make_model("llama")))


def test_what_is_no_policy_is_told_how_to_become_one() -> None:
    agent = Reinforce("CopyText-v0", seed=0, rollout_episodes=8)
    with pytest.raises(ValueError, match=r"^policy must be a Policy, got <.*Reinforce.*>: give agent\.policy$"):
        collect(agent.env, agent)
    with pytest.raises(ValueError, match=r"policy must be a Policy, got GPT2LMHeadModel: make one by Policy\(model\)$"):
        collect(agent.env, agent.policy.model)
    with pytest.raises(ValueError, match=r"policy must be a Policy, got 'ppo': make one by"):
        collect(agent.env, "ppo")  # type: ignore[arg-type]


MIXTURE = {"length": -0.5, "regex:a": 2.0}


def assert_components(rollout: Rollout) -> None:
    """They are those of the rollout's own texts: tokens, and whether there is an a."""
    assert {name: part_B.tolist() for name, part_B in rollout.components.items()} == {
        "length": rollout.mask_BT.sum(1).tolist(),
        "regex:a": [float("a" in text) for text in rollout.completions],
    }


def test_components_of_a_mixture_follow_their_rows() -> None:
    policy = Policy(make_model("llama"))
    env = TextVectorEnv(16, task=Letters, reward=MIXTURE, group_size=4, array="torch")
    env.reset(seed=1)
    rollout = collect(env, policy, uniform_BT=uniforms(16))
    assert len(set(rollout.components["length"].tolist())) > 1
    other = collect(env, policy, uniform_BT=uniforms(16).flip(0))
    assert other.completions != rollout.completions  # the reward was called again, for other texts
    assert_components(rollout)
    parts = [rollout.select(rows) for rows in micro_batches(rollout, 100)]
    assert len(parts) > 1
    for part in parts:
        assert_components(part)
    joined = Rollout.cat([parts[1], other, parts[0]])
    assert len(joined) == len(parts[1]) + 16 + len(parts[0])
    assert_components(joined)
    assert_components(joined.select(joined.components["length"] > 2))


def test_stepping_tells_the_components_of_a_mixture() -> None:
    env = TextVectorEnv(2, task=Letters, reward=MIXTURE)
    env.reset(seed=1)
    for tokens in ([1, 2], [1, EOS_ID]):  # row 0 writes "a a" and goes on, row 1 "b"
        *_, infos = env.step(np.array(tokens))
    assert infos["components"].tolist() == [None, {"length": 2.0, "regex:a": 0.0}]
    assert infos["_components"].tolist() == [False, True]
    single = TextEnv(task=Letters, reward="length")
    single.reset(seed=1)
    assert "components" not in single.step(EOS_ID)[4]


def test_sampling_copies_tokens_to_the_host_only_for_stop_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each copy waits for a GPU, once a token. What collect() does after sampling may copy.
    policy = Policy(make_model(next(iter(CONFIGS))))
    copies = []
    tolist, generate = torch.Tensor.tolist, sampler.generate

    def counting(tensor: torch.Tensor) -> Any:
        copies.append(tuple(tensor.shape))
        return tolist(tensor)

    def watched(*args: Any, **kwargs: Any) -> sampler.Completions:
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", counting)
            return generate(*args, **kwargs)

    collect(make_env(6), policy, uniform_BT=uniforms(6), sample=watched)
    assert copies == []
    collect(make_env(6, stop=["a b c d e f g"]), policy, uniform_BT=uniforms(6), sample=watched)
    # Of one token a row at a time, and not of all tokens so far, which would be quadratic.
    assert copies and all(len(shape) == 1 for shape in copies)
