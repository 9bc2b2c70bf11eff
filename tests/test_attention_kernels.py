"""Fused attention in two parts is attention by plain products: output, every gradient, and whole training passes.

Shape legend: U prompts, P prompt positions, B rows, H query heads, K key heads, T positions, D head width.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import pytest
import torch
from test_trunk import SOURCE, make_model, rollout, saved_bytes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from textrl_gym.models import flops
from textrl_gym.policy import attention_kernels, prefix_attention
from textrl_gym.policy.attention_kernels import KERNELS, Kernel, Part, attend
from textrl_gym.policy.policy import Policy
from textrl_gym.policy.prefix_attention import Prefix
from textrl_gym.rollouts.sampler import generate

CPU = KERNELS["cpu"]._replace(least_positions=0)
P, T = 6, 4
SOURCES = {
    "ragged": SOURCE,
    "in order": torch.arange(3).repeat_interleave(2),
    "out of order": torch.tensor([2, 0, 1, 0, 2, 2]),
}


def use(monkeypatch: pytest.MonkeyPatch, kernel: Kernel | None) -> None:
    monkeypatch.setattr(attention_kernels, "KERNELS", {} if kernel is None else {"cpu": kernel})


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[Part]:
    """Kernels for prompts of any length; the parts that they were given to attend to, trials included."""
    given: list[Part] = []

    def forward(part: Part) -> Any:
        given.append(part)
        return CPU.forward(part)

    use(monkeypatch, CPU._replace(forward=forward))
    return given


def make_prefix(source_B: Tensor, paddings: tuple[int, ...]) -> Prefix:
    mask_UP = torch.arange(P) >= torch.tensor(paddings)[:, None]
    slots = prefix_attention._slots(source_B, len(mask_UP))
    return Prefix([], [], mask_UP, source_B, *slots, padded=any(paddings))


def numbers(source_B: Tensor, heads: int, key_heads: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, own keys and values, the prompts' keys and values, and the gradient of the output."""
    generator, rows = torch.Generator().manual_seed(0), len(source_B)
    prompts = int(source_B.max()) + 1
    shapes = [(rows, heads, T), *[(rows, key_heads, T)] * 2, *[(prompts, key_heads, P)] * 2, (rows, heads, T)]
    return [torch.randn(*shape, width, generator=generator, dtype=dtype) for shape in shapes]


def both(given: list[Tensor], prefix: Prefix) -> list[list[Tensor]]:
    """Output and five gradients of plain products and of the fused kernels."""
    plain = functools.partial(prefix_attention._plain, prefix=prefix, scale=0.4)
    mask_UP = prefix.mask_UP if prefix.padded else None
    fused = functools.partial(attend, CPU, groups=prefix, mask_UP=mask_UP, scale=0.4)
    return [prefix_attention._with_gradients(attention, given) for attention in (plain, fused)]


@pytest.mark.parametrize("width", [5, 8, 64])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("paddings", [(0, 0, 0), (3, 0, P)], ids=["full", "padded"])
@pytest.mark.parametrize("source", SOURCES)
def test_output_and_gradients_are_those_of_plain_products(
    source: str, paddings: tuple[int, ...], key_heads: int, width: int
) -> None:
    prefix = make_prefix(SOURCES[source], paddings)
    plain, fused = both(numbers(SOURCES[source], 4, key_heads, width, torch.float64), prefix)
    for expected, found in zip(plain, fused, strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_low_precision_stays_near(dtype: torch.dtype, digits: float) -> None:
    given = numbers(SOURCE, 4, 2, 16, dtype)
    prefix = make_prefix(SOURCE, (3, 0, 1))
    exact, _ = both([x.double() for x in given], prefix)
    _, fused = both(given, prefix)
    for expected, found in zip(exact, fused, strict=True):
        assert found.dtype == dtype
        assert (found - expected).abs().max() <= digits * expected.abs().max()


def test_gradients_are_those_of_finite_differences() -> None:
    *inputs, _ = numbers(SOURCE, 2, 1, 3, torch.float64)
    prefix = make_prefix(SOURCE, (2, 0, 0))
    attention = functools.partial(attend, CPU, groups=prefix, mask_UP=prefix.mask_UP, scale=0.5)
    assert torch.autograd.gradcheck(attention, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_training_pass_is_the_same_with_and_without(
    name: str, source: str, parts: list[Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    r = rollout(SOURCES[source])
    changes = {"sliding_window": 64} if name == "gemma3" else {}  # a window that hides nothing here
    one, two = (Policy(make_model(name, **changes).double()) for _ in range(2))
    assert one.trunk.shares_prompts
    parts.clear()
    fused_BT = one.logprobs(r)
    assert parts, "no kernel was used"
    use(monkeypatch, None)
    plain_BT = two.logprobs(r)
    torch.testing.assert_close(fused_BT, plain_BT, atol=1e-9, rtol=0)
    for logp_BT in (fused_BT, plain_BT):
        logp_BT.square().sum().backward()
    for (where, mine), other in zip(one.named_parameters(), two.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None, where
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-8, rtol=1e-8, msg=where)


def test_the_gradient_reaches_an_adapter_through_frozen_weights(parts: list[Part]) -> None:
    policy = Policy(make_model("llama"))
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
    last = policy.model.model.layers[-1].self_attn.q_proj.weight.requires_grad_()  # keys and values need no gradient
    policy.logprobs(rollout()).sum().backward()
    assert parts and last.grad is not None and last.grad.abs().max() > 0


def test_the_update_keeps_less(parts: list[Part], monkeypatch: pytest.MonkeyPatch) -> None:
    r = rollout(torch.arange(3).repeat_interleave(8))
    r = dataclasses.replace(r, prompt_BP=r.prompt_BP.repeat(1, 20), prompt_mask_BP=r.prompt_mask_BP.repeat(1, 20))
    policy = Policy(make_model("llama", max_position_embeddings=256))
    fused, _ = saved_bytes(lambda: policy.logprobs(r))
    assert parts
    use(monkeypatch, None)
    kept, _ = saved_bytes(lambda: policy.logprobs(r))
    # 24 rows x 4 heads x 9 positions x (139 + 9) float32 scores in three layers, at least
    assert kept - fused > 3 * 24 * 4 * 9 * 148 * 4


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_capped_scores_and_windows_that_hide_go_by_plain_products(name: str, parts: list[Part]) -> None:
    policy = Policy(make_model(name))
    assert policy.trunk.shares_prompts
    parts.clear()  # mistral's window of 11 hides nothing in the four tokens of the trial, and much in the rollout's 15
    policy.logprobs(rollout())
    assert not parts


@pytest.mark.parametrize("static", [False, True])
def test_decoding_goes_by_plain_products(static: bool, parts: list[Part]) -> None:
    policy, r = Policy(make_model("llama"), cuda_graphs=static), rollout()
    uniform_BT = torch.rand((6, 5), generator=torch.Generator().manual_seed(2))
    prompts = (r.prompt_BP[[0, 2, 3]], r.prompt_mask_BP[[0, 2, 3]], SOURCE)
    for _ in range(2):  # the first time the model is tried out, by teacher-forced passes
        parts.clear()
        generate(policy, *prompts, uniform_BT, max_new_tokens=5, end_ids=(3,))
    assert not parts


def test_short_prompts_go_by_plain_products_on_a_cpu(parts: list[Part], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, attention_kernels.KERNELS["cpu"]._replace(least_positions=KERNELS["cpu"].least_positions))
    Policy(make_model("llama")).logprobs(rollout())
    assert not parts


def test_the_counter_of_floating_point_operations_sees_fused_attention() -> None:
    *inputs, grad = numbers(SOURCE, 4, 2, 8, torch.float32)
    prefix = make_prefix(SOURCE, (0, 0, 0))
    with flops.counter() as counted:
        attention = functools.partial(attend, CPU, groups=prefix, mask_UP=None, scale=0.4)
        attention(*[x.requires_grad_() for x in inputs]).backward(grad)
    # Queries and keys that meet: 6 rows x 4 heads x 4 x 4 own ones; 3 prompts x 2 heads x (3 rows x 2 x 4) x 6. Each
    # pair costs 2 x 8 in each of 2 products forward and of 5 backward.
    assert counted.get_total_flops() == (6 * 4 * 4 * 4 + 3 * 2 * 24 * 6) * 2 * 8 * 7


# -- try before trust -------------------------------------------------------------------------------------------------


def wrong(part: Part, grad: Tensor, out: Tensor, lse: Tensor, rest: tuple[Any, ...]) -> Any:
    query, key, value = CPU.backward(part, grad, out, lse, rest)
    return query, 1.1 * key, value


def nan(part: Part) -> Any:
    out, lse, rest = CPU.forward(part)
    return out * torch.nan, lse, rest


def absent(part: Part) -> Any:
    raise NotImplementedError(
        "Could not run 'aten::attention' with arguments from the 'CPU' backend. This could be so."
    )


@pytest.mark.parametrize(
    ("faulty", "reason"),
    [
        (CPU._replace(backward=wrong), "its numbers would change"),
        (CPU._replace(forward=nan), "its numbers would change"),
        (CPU._replace(forward=absent), r"arguments from the 'CPU' backend\)"),
    ],
)
def test_a_kernel_that_fails_its_trial_is_told_once_and_not_used(
    faulty: Kernel, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, r = Policy(make_model("llama")), rollout()
    use(monkeypatch, None)
    expected_BT = policy.logprobs(r)
    use(monkeypatch, faulty)
    with pytest.warns(
        UserWarning, match=f"without fused attention on cpu in torch.float32 .*{reason}.*scores are kept"
    ):
        found_BT = policy.logprobs(r)
    assert torch.equal(found_BT, expected_BT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.logprobs(r)


def test_the_trial_may_come_in_a_pass_without_gradients() -> None:
    prefix_attention._TRUSTED.clear()
    with torch.inference_mode():
        assert prefix_attention._trusted(CPU, "cpu", torch.float32, 8, 8)


def test_values_of_another_width_than_keys_are_told() -> None:
    with pytest.warns(UserWarning, match="queries and values differ in width"):
        assert not prefix_attention._trusted(CPU, "cpu", torch.float32, 8, 16)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_of_a_gpu_take_and_give_what_this_code_thinks(dtype: torch.dtype, padded: bool) -> None:
    """By PyTorch's own shape functions, which a build without CUDA has too: no number is computed."""
    kernel = KERNELS["cuda"]
    with FakeTensorMode():
        shape, keys = (2, 3, 70, 64), (2, 3, 37, 64)
        query, grad = (torch.empty(shape, dtype=dtype, device="cuda") for _ in range(2))
        key, value = (torch.empty(keys, dtype=dtype, device="cuda") for _ in range(2))
        bias = torch.zeros(2, 1, 1, 37, device="cuda") if padded else None
        part = Part(query, key, value, bias, False, 0.1)
        out, lse, rest = kernel.forward(part)
        assert out.shape == shape and lse.shape == shape[:3] and lse.dtype == torch.float32
        lse = torch.empty(shape[:3], device="cuda")  # as the merged one: contiguous
        gradients = kernel.backward(part, grad, out, lse, rest)
        assert [x.shape for x in gradients] == [shape, keys, keys]
        assert {x.dtype for x in gradients} == {dtype} and {x.device.type for x in gradients} == {"cuda"}
