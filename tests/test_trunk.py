"""Shared prompts change nothing but the time: shared = each row alone, in numbers, gradients and decoding.

Shape legend: U prompts, P prompt places, B rows, T response places, X = T + 1, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from textrl_gym import functional
from textrl_gym.core import Rollout
from textrl_gym.policy import decoders, policy, prefix_attention
from textrl_gym.policy.backbone import Trunk, position_ids, unique_prompts
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts.sampler import generate

V, P, T = 37, 7, 9
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
ROPE = {**SIZE, "num_key_value_heads": 2, "max_position_embeddings": 64}
GEMMA = {**ROPE, "head_dim": 8, "query_pre_attn_scalar": 8}
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, ROPE),
    "gpt2": (transformers.GPT2Config, {"n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}),
    "qwen2": (transformers.Qwen2Config, ROPE),
    "qwen3": (transformers.Qwen3Config, {**ROPE, "head_dim": 8}),
    "gemma": (transformers.GemmaConfig, {**ROPE, "head_dim": 8}),
    # Windows of 4 end within the completion, of 11 within the prompt; gemma2 caps attention's logits and the model's.
    "gemma2": (transformers.Gemma2Config, {**GEMMA, "sliding_window": 4}),
    "gemma3": (transformers.Gemma3TextConfig, {**GEMMA, "sliding_window": 11}),
    "mistral": (transformers.MistralConfig, {**ROPE, "sliding_window": 11}),
    "opt": (transformers.OPTConfig, {**SIZE, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "cohere": (transformers.CohereConfig, {**ROPE, "logit_scale": 0.3}),
}
# transformers' eager attention makes NaN of float64's lowest number on left padding; Gemma 2 has no other attention.
DOUBLE = [name for name in CONFIGS if name != "gemma2"]
SOURCE = torch.tensor([0, 0, 1, 2, 2, 2])  # groups of unequal sizes


def make_model(name: str, **changes: Any) -> Any:
    """A random causal LM far from uniform."""
    config_class, size = CONFIGS[name]
    sizes = {"vocab_size": V, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, **size, **changes}
    config = config_class(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Eager: some versions of transformers give Gemma 2 to PyTorch's attention, which ignores its caps.
        how = {"attn_implementation": "eager"} if name == "gemma2" else {}
        model = transformers.AutoModelForCausalLM.from_config(config, **how).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def rollout(source_B: Tensor = SOURCE, seed: int = 0) -> Rollout:
    """Rows with prompts and completions of unequal lengths; every place that is masked holds junk."""
    generator = torch.Generator().manual_seed(seed)
    prompts, rows = int(source_B.max()) + 1, len(source_B)
    prompt_UP = torch.randint(V, (prompts, P), generator=generator)
    start_U1 = torch.arange(prompts)[:, None] * 2 % P
    length_B1 = torch.randint(1, T + 1, (rows, 1), generator=generator)
    length_B1[0] = T
    mask_BT = torch.arange(T) < length_B1
    zeros_BT = torch.zeros(rows, T)
    return Rollout(
        prompt_BP=prompt_UP[source_B],
        prompt_mask_BP=(torch.arange(P) >= start_U1)[source_B],
        token_BT=torch.randint(V, (rows, T), generator=generator),
        mask_BT=mask_BT,
        logp_BT=zeros_BT,
        ref_logp_BT=zeros_BT,
        kl_BT=zeros_BT,
        value_BT=zeros_BT,
        score_B=torch.zeros(rows),
        reward_BT=zeros_BT,
        stop_B=torch.ones(rows, dtype=torch.long),
        group_B=source_B,
        prompts=[""] * rows,
        completions=[""] * rows,
    )


def inputs(r: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return r.prompt_BP, r.prompt_mask_BP, r.token_BT[:, :-1], r.mask_BT[:, :-1]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes every trunk compute each row's prompt apart."""
    return lambda: monkeypatch.setattr(Trunk, "shares_prompts", False)


def test_unique_prompts_are_numbered_by_their_first_rows() -> None:
    prompt_BP = torch.tensor([[9, 9], [0, 1], [9, 9], [0, 1], [0, 1]])
    mask_BP = torch.tensor([[1, 1], [1, 1], [1, 1], [0, 1], [1, 1]], dtype=torch.bool)
    first_U, source_B = unique_prompts(prompt_BP, mask_BP)
    assert first_U.tolist() == [0, 1, 3]  # the same tokens with another mask are another prompt
    assert source_B.tolist() == [0, 1, 0, 2, 1]


@pytest.mark.parametrize("source_B", [SOURCE, torch.arange(3).repeat_interleave(2), torch.tensor([2, 0, 1, 0, 2, 2])])
@pytest.mark.parametrize("name", DOUBLE)
def test_shared_prompts_give_the_numbers_and_gradients_of_each_row_alone(
    name: str, source_B: Tensor, refuse: Callable[[], None]
) -> None:
    shared, apart = (Policy(make_model(name).double(), value_head=True) for _ in range(2))
    for one in (shared, apart):
        assert one.value_head is not None
        one.value_head.double()
        torch.nn.init.normal_(one.value_head.weight, generator=torch.Generator().manual_seed(3))
    r = rollout(source_B)
    assert shared.trunk.shares_prompts
    hidden_BTD = shared.hidden(r)
    together = shared.response(r, entropy=True)
    refuse()
    alone = apart.response(r, entropy=True)
    mask_BT = r.mask_BT
    torch.testing.assert_close(hidden_BTD[mask_BT], apart.hidden(r)[mask_BT], atol=1e-9, rtol=0)
    for field in ("logp_BT", "entropy_BT", "value_BT"):
        torch.testing.assert_close(getattr(together, field), getattr(alone, field), atol=1e-9, rtol=0)
        assert getattr(alone, field)[mask_BT].std() > 0.01
    for found in (together, alone):
        assert found.entropy_BT is not None
        (found.logp_BT.square() + found.entropy_BT + found.value_BT).sum().backward()
    for (where, mine), theirs in zip(shared.named_parameters(), apart.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None, where
        assert (mine.grad - theirs.grad).norm() <= 5e-5 * theirs.grad.norm() + 1e-12, where


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2", "mistral"])
def test_bfloat16_stays_near_float32(name: str) -> None:
    """Rotary positions leave queries and keys in float32 under autocast, where values are bfloat16."""
    exact, rough = (Policy(make_model(name), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    r = rollout()
    assert rough.trunk.shares_prompts
    expected, found = exact.logprobs(r), rough.logprobs(r)
    assert found.dtype == torch.float32
    # 8 bits of logits below 16 over three layers: a tenth of a nat on average, where logprobs spread by nats
    assert (found - expected).abs()[r.mask_BT].mean() < 0.15
    assert expected[r.mask_BT].std() > 1
    found.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rough.model.parameters())
    out = generate(
        rough,
        r.prompt_BP[[0, 2, 3]],
        r.prompt_mask_BP[[0, 2, 3]],
        SOURCE,
        torch.rand((6, 5), generator=torch.Generator().manual_seed(2)),
        max_new_tokens=5,
        end_ids=(3,),
    )
    assert out.logp_BT.isfinite().all()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_gives_the_hidden_states_of_the_full_pass(name: str, static: bool) -> None:
    model = make_model(name)
    trunk, r = Trunk(model, static=static), rollout()
    first_U, source_B = unique_prompts(r.prompt_BP, r.prompt_mask_BP)
    with torch.no_grad():
        mask_BL = torch.cat([r.prompt_mask_BP, torch.ones_like(r.mask_BT)], 1)
        full_BLV = model(
            input_ids=torch.cat([r.prompt_BP, r.token_BT], 1),
            attention_mask=mask_BL.long(),
            position_ids=position_ids(mask_BL),
            use_cache=False,
        ).logits
        decoder = decoders.decoder(trunk, r.prompt_BP[first_U], r.prompt_mask_BP[first_U], source_B, T)
        hidden_kD, rows = decoder.first_BD, torch.arange(len(r))
        for t in range(T):
            torch.testing.assert_close(trunk.logits(hidden_kD), full_BLV[rows, P - 1 + t], atol=2e-4, rtol=0)
            if t in (2, 4, 5):  # rows leave: one of the group of three, then whole groups
                keep_k = torch.tensor({2: [0, 1, 2, 4, 5], 4: [2, 3, 4], 5: [1, 2]}[t])
                decoder.keep(keep_k)
                rows = rows[keep_k]
            hidden_kD = decoder.step(r.token_BT[rows, t]).clone()
    assert trunk.shares_prompts and full_BLV.std() > 0.5


def test_fixed_shapes_change_no_token() -> None:
    uniform_BT = torch.rand((6, 30), generator=torch.Generator().manual_seed(2))
    r, done = rollout(), []
    for cuda_graphs in (False, True):
        pi = Policy(make_model("llama"), cuda_graphs=cuda_graphs)
        prompts = (r.prompt_BP[[0, 2, 3]], r.prompt_mask_BP[[0, 2, 3]], SOURCE)
        done.append(generate(pi, *prompts, uniform_BT, max_new_tokens=30, end_ids=(3,)))
    assert torch.equal(done[0].token_BT, done[1].token_BT)
    torch.testing.assert_close(done[0].logp_BT, done[1].logp_BT, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = make_model(name)
    before = model.config._attn_implementation
    Policy(model).response(rollout())
    assert model.config._attn_implementation == before
    assert "forward" not in vars(model.base_model)
    assert prefix_attention._active.prefix is None


def test_compaction_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    pi = Policy(make_model("llama"))
    prompt_UP = torch.randint(1, V, (3, P), generator=torch.Generator().manual_seed(1))
    uniform_BT = torch.rand((6, 30), generator=torch.Generator().manual_seed(2))

    def sample() -> Any:
        mask_UP = torch.ones_like(prompt_UP, dtype=torch.bool)
        return generate(pi, prompt_UP, mask_UP, SOURCE, uniform_BT, max_new_tokens=30, end_ids=(3,))

    kept: list[int] = []
    keep = prefix_attention.Prefix.keep

    def watched(self: prefix_attention.Prefix, keep_k: Tensor) -> None:
        kept.append(len(keep_k))
        keep(self, keep_k)

    monkeypatch.setattr(prefix_attention.Prefix, "keep", watched)
    with_compaction = sample()
    assert kept, "no row ended before another: the test shows nothing"
    monkeypatch.setattr(
        "textrl_gym.policy.decoders.SharedDecoder.compaction_threshold", 1.0
    )  # rows leave when all have ended
    without = sample()
    assert torch.equal(with_compaction.token_BT, without.token_BT)
    assert torch.equal(with_compaction.mask_BT, without.mask_BT)
    torch.testing.assert_close(with_compaction.logp_BT, without.logp_BT, atol=5e-5, rtol=0)


def test_a_model_that_cannot_share_says_so_once_and_stays_right() -> None:
    config = transformers.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
    torch.manual_seed(0)
    model = transformers.BloomForCausalLM(config).eval()
    pi, r = Policy(model), rollout()
    with pytest.warns(UserWarning, match=r"BloomForCausalLM cannot share a prompt .*its attention cannot be replaced"):
        logp_BT = pi.logprobs(r)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pi.logprobs(r)
    for b in range(len(r)):
        prompt, length = r.prompt_BP[b][r.prompt_mask_BP[b]], int(r.mask_BT[b].sum())
        ids = torch.cat([prompt, r.token_BT[b, :length]])
        logits_LV = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
        expected_T = functional.token_logprobs(logits_LV, ids[len(prompt) :])
        torch.testing.assert_close(logp_BT[b, :length], expected_T, atol=2e-5, rtol=0)
    uniform_BT = torch.rand((6, 20), generator=torch.Generator().manual_seed(2))
    out = generate(
        pi,
        r.prompt_BP[[0, 2, 3]],
        r.prompt_mask_BP[[0, 2, 3]],
        SOURCE,
        uniform_BT,
        max_new_tokens=20,
        end_ids=(3,),
    )
    sampled = Rollout(**(vars(r) | {"token_BT": out.token_BT, "mask_BT": out.mask_BT, "logp_BT": out.logp_BT}))
    torch.testing.assert_close(pi.logprobs(sampled), out.logp_BT, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["chunked_attention", "linear_attention"])
def test_layers_of_an_unknown_kind_are_not_shared(kind: str) -> None:
    model = make_model("llama")
    model.config.layer_types = ["full_attention", kind, "full_attention"]
    trunk = Trunk(model)
    with (
        pytest.warns(UserWarning, match="cannot go on from its cache"),  # a made-up model has none of that kind
        pytest.warns(UserWarning, match=f"layers of the kind {kind}"),
    ):
        assert not trunk.shares_prompts


def test_caps_hold_where_a_model_was_given_to_an_attention_without_them(refuse: Callable[[], None]) -> None:
    refuse()
    capped, given = (Policy(make_model("gemma2")) for _ in range(2))
    for config in given.trunk.configs:
        config._attn_implementation = "sdpa"  # as transformers 5.17 does
    expected_BT = capped.logprobs(rollout())
    torch.testing.assert_close(given.logprobs(rollout()), expected_BT, atol=1e-5, rtol=0)
    assert {config._attn_implementation for config in given.trunk.configs} == {"sdpa"}  # and the model is as it was


def test_a_model_whose_numbers_would_change_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = Trunk(make_model("llama"))
    monkeypatch.setattr(trunk, "shared", lambda *args: 1.1 * Trunk.shared(trunk, *args))
    with pytest.warns(UserWarning, match="its numbers would change"):
        assert not trunk.shares_prompts


def test_attention_with_sinks_is_not_shared() -> None:
    sizes: dict[str, Any] = {
        **ROPE,
        "head_dim": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "sliding_window": 4,
    }
    config = transformers.GptOssConfig(vocab_size=V, **sizes)
    trunk = Trunk(transformers.GptOssForCausalLM(config).eval())
    with pytest.warns(UserWarning, match="s_aux"):
        assert not trunk.shares_prompts


def test_chunked_logprobs_are_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, chunked = (Policy(make_model("gemma2"), temperature=0.7, vocab_size=30) for _ in range(2))
    r = rollout()
    r.token_BT %= 30
    expected = whole.response(r, entropy=True)
    monkeypatch.setattr(policy, "CHUNK_NUMBERS", 30 * 7)  # 7 places at a time
    found = chunked.response(r, entropy=True)
    assert expected.entropy_BT is not None and found.entropy_BT is not None
    torch.testing.assert_close(found.logp_BT, expected.logp_BT, atol=5e-5, rtol=0)
    torch.testing.assert_close(found.entropy_BT, expected.entropy_BT, atol=5e-5, rtol=0)
    for response in (expected, found):
        assert response.entropy_BT is not None
        (response.logp_BT.square().sum() + response.entropy_BT.sum()).backward()
    for one, two in zip(whole.parameters(), chunked.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        assert (one.grad - two.grad).norm() <= 5e-5 * one.grad.norm() + 1e-9


def saved_bytes(run: Callable[[], Tensor]) -> tuple[int, int]:
    """Bytes of the different storages kept for the backward pass, and the most numbers in one of them."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values()), max(kept.values()) // 4


def test_the_update_keeps_less_and_never_all_logits(
    monkeypatch: pytest.MonkeyPatch, refuse: Callable[[], None]
) -> None:
    model = make_model("llama", vocab_size=5000)
    r = rollout(torch.arange(3).repeat_interleave(8))
    r = Rollout(**(vars(r) | {"prompt_BP": r.prompt_BP.repeat(1, 6), "prompt_mask_BP": r.prompt_mask_BP.repeat(1, 6)}))
    places, own = int(r.mask_BT.sum()), {p.numel() for p in model.parameters()}
    kept_whole, largest_whole = saved_bytes(lambda: Policy(model).logprobs(r))
    assert largest_whole >= places * 5000  # one chunk holds them all
    monkeypatch.setattr(policy, "CHUNK_NUMBERS", 5000 * 16)
    kept, largest = saved_bytes(lambda: Policy(model).logprobs(r))
    assert largest < places * 5000 or largest in own
    assert kept < 0.5 * kept_whole
    refuse()
    kept_apart, _ = saved_bytes(lambda: Policy(model).logprobs(r))
    assert kept < 0.5 * kept_apart  # 3 prompts of 42 places instead of 24


def test_heads_that_are_no_function_of_the_hidden_state_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    forward = model.forward

    def biased(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits + kwargs["input_ids"][..., None]
        return out

    monkeypatch.setattr(model, "forward", biased)
    with pytest.raises(ValueError, match="the logits of LlamaForCausalLM are no function of its last hidden state"):
        Policy(model).logprobs(rollout())


def test_a_copied_policy_has_a_head_of_its_own() -> None:
    pi, r = Policy(make_model("gemma2")), rollout()  # its logits are capped: the head is more than a matrix
    before = pi.logprobs(r)
    copied = copy.deepcopy(pi)
    with torch.no_grad():
        copied.model.get_output_embeddings().weight.zero_()
    # all logits are 0: each of V tokens has probability 1 / V
    torch.testing.assert_close(copied.logprobs(r), -math.log(V) * r.mask_BT, atol=5e-5, rtol=0)
    assert torch.equal(pi.logprobs(r), before)
