"""The same on every device: a CPU always, a GPU with `pytest -m gpu` (`make gpu`).

The bodies run on the CPU too, so that what is left to a GPU is the device and nothing else.

Shape legend: B rows, P prompt places, T response places.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_agents
import test_collect
import test_trunk
import torch
from devices import DEVICES, gpu
from minibatches import last_gradient
from torch import Tensor

import textrl_gym
from textrl_gym import registry
from textrl_gym.core import Rollout
from textrl_gym.evaluation import health
from textrl_gym.policy import attention_kernels, compiling, decoders, prefix_attention
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts import sampler
from textrl_gym.rollouts.collect import collect

SOURCE = test_trunk.SOURCE
NEW = 30
FAMILIES = ["llama", "gpt2", "qwen2", "gemma2", "mistral"]
# float32 sums in another order (1.1e-5 without vector instructions), and matrix products of a GPU
ATOL = {"cpu": 3e-5, "cuda": 1e-4}


refuse = test_trunk.refuse


def sample(policy: Policy, new: int = NEW) -> sampler.Completions:
    """Completions of test_trunk's prompts, with the same random numbers on every device."""
    r = test_trunk.rollout()
    uniform_BT = torch.rand((len(SOURCE), new), generator=torch.Generator().manual_seed(2))
    given = (r.prompt_BP[[0, 2, 3]], r.prompt_mask_BP[[0, 2, 3]], SOURCE, uniform_BT)
    return sampler.generate(policy, *(x.to(policy.device) for x in given), max_new_tokens=new, end_ids=(3,))


def agent(name: str, device: str, out: Path, **settings: Any) -> Any:
    return registry.load_agent_class(name)("CopyText-v0", seed=1, device=device, out=out, **settings)


def moved(r: Rollout, device: str) -> Rollout:
    """A rollout on a device."""
    fields: dict[str, Any] = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in vars(r).items()}
    return Rollout(**fields)


# -- equivalences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FAMILIES)
def test_collect_is_stepping(name: str, device: str) -> None:
    policy = Policy(test_collect.make_model(name).to(device), reference=test_collect.make_model(name, seed=1))
    # The environment and its reference are on the CPU, whatever the policy's device is.
    reference = Policy(test_collect.make_model(name, seed=1))
    env = test_collect.make_env(12, group_size=4, kl_coef=0.2, reference=reference)
    uniform_BT = test_collect.uniforms(12)
    said = test_collect.step_through(env, OnHost(policy), uniform_BT, seed=3)  # type: ignore[arg-type]
    env.streams_of_prompts.seed(3)
    rollout = collect(env, policy, uniform_BT=uniform_BT)
    assert rollout.token_BT.device.type == device
    test_collect.assert_same(moved(rollout, "cpu"), said, ATOL[device])


class OnHost:
    """A policy whose actions are on the CPU, as an environment there takes them."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def act(self, observation: Any, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
        token_B, logp_B = self.policy.act(observation, uniform_B=uniform_B.to(self.policy.device))
        return token_B.cpu(), logp_B.cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FAMILIES)
def test_cached_sampling_is_the_full_forward(name: str, device: str) -> None:
    policy = Policy(test_collect.make_model(name).to(device), temperature=0.8)
    env = test_collect.make_env(16, group_size=4)
    env.reset(seed=1)
    rollout = collect(env, policy, uniform_BT=test_collect.uniforms(16))
    torch.testing.assert_close(policy.logprobs(rollout), rollout.logp_BT, atol=ATOL[device], rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FAMILIES)
def test_fixed_shapes_change_no_token(name: str, device: str) -> None:
    """On a GPU at fixed shapes a step is the replay of a CUDA graph."""
    done = [sample(Policy(test_trunk.make_model(name).to(device), cuda_graphs=graphs)) for graphs in (False, True)]
    assert torch.equal(done[0].token_BT, done[1].token_BT)
    torch.testing.assert_close(done[0].logp_BT, done[1].logp_BT, atol=ATOL[device], rtol=0)
    assert done[0].mask_BT.sum(1).unique().numel() > 1, "no row ended before another: no graph was captured anew"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_the_health_card_passes(name: str, cuda_graphs: bool, dtype: str, device: str, tmp_path: Path) -> None:
    one = agent(name, device, tmp_path, dtype=dtype, cuda_graphs=cuda_graphs)
    lines = health.card(one.policy, one.collect(), one.env.end_ids, fresh=True)
    assert all(line.ok for line in lines), health.text(lines)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_fused_attention_and_its_gradients_are_those_of_plain_products(
    width: int, dtype: torch.dtype, device: str
) -> None:
    kernel = attention_kernels.KERNELS[device]
    assert prefix_attention._obstacle(kernel, device, dtype, width) == ""


@pytest.mark.parametrize("device", DEVICES[1:])  # on a CPU: tests/test_compiling.py
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_where_the_pass_is_compiled(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")  # traced and differentiated as for the real compiler
    r, gradients = moved(test_trunk.rollout(), device), []
    for which in ("none", "update"):
        policy = Policy(test_trunk.make_model("llama").to(device), dtype=dtype, compile=which)
        policy.logprobs(r).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() <= (1e-3 if dtype == torch.float32 else 5e-2) * gradients[0].norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["grpo", "ppo", "online_dpo"])
def test_micro_batches_are_one_batch(name: str, device: str, tmp_path: Path) -> None:
    gradients = []
    for places in (1_000_000, 40):
        one = agent(name, device, tmp_path, micro_batch_tokens=places, epochs=1, minibatches=1)
        with last_gradient(one) as found:
            one.update(one.collect())
        gradients.append(found[-1])
    assert gradients[0].norm() > 0
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < ATOL[device]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", test_trunk.CONFIGS)
def test_gradients_are_those_of_each_row_alone(name: str, device: str, refuse: Any) -> None:
    shared, apart = (Policy(test_trunk.make_model(name).to(device)) for _ in range(2))
    r = moved(test_trunk.rollout(), device)
    assert shared.trunk.shares_prompts
    together = shared.logprobs(r)
    refuse()
    alone = apart.logprobs(r)
    torch.testing.assert_close(together, alone, atol=20 * ATOL[device], rtol=0)
    for found in (together, alone):
        found.square().sum().backward()
    gradients = [torch.cat([p.grad.flatten() for p in one.model.parameters()]) for one in (shared, apart)]
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[1].norm()


@pytest.mark.parametrize("device", DEVICES)
def test_the_optimizer_is_one_kernel_on_a_gpu(device: str, tmp_path: Path) -> None:
    one = agent("grpo", device, tmp_path)
    assert one.optimizer.defaults["fused"] is (device == "cuda")
    before = [p.detach().clone() for p in one.policy.parameters()]
    one.update(one.collect())
    one.save(tmp_path)
    again = type(one).load(tmp_path, device=device)
    assert again.optimizer.state_dict()["state"][0]["step"] == 1
    assert not all(torch.equal(*pair) for pair in zip(before, again.policy.parameters(), strict=True))


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize(("name", "cuda_graphs"), [("grpo", False), ("grpo", True), ("ppo", False)])
def test_copy_text_is_solved(name: str, cuda_graphs: bool, device: str, tmp_path: Path) -> None:
    settings = test_agents.MAXIMISERS[name] | {"learning_rate": 3e-3, "cuda_graphs": cuda_graphs}
    one = registry.load_agent_class(name)("CopyText-v0", seed=0, device=device, out=tmp_path, **settings)
    one.learn(16_000, **test_agents.QUIET)
    metrics = textrl_gym.evaluate(one, episodes=64)
    assert metrics["score_greedy"] == 1.0
    assert metrics["score"] > 0.9


# -- waiting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_no_decode_step_waits_for_the_device(cuda_graphs: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By CUDA's own watch. On a CPU only where the watch is on; tests/test_pretended_device.py counts there."""
    policy = Policy(test_trunk.make_model("llama").to(device), value_head=True, cuda_graphs=cuda_graphs)
    sample(policy)  # what is found out at the first call
    modes: list[str] = []
    set_mode = torch.cuda.set_sync_debug_mode if device == "cuda" else lambda mode: None

    def watch(mode: str) -> None:
        modes.append(mode)
        set_mode(mode)

    kind = decoders.StaticDecoder if cuda_graphs else decoders.SharedDecoder
    step, completions, begun = kind.step, sampler._Written.completions, [0]

    def counted(self: Any, token_B: Tensor) -> Tensor:
        begun[0] += 1
        if begun[0] == 3:  # the prompts' own step, and with graphs the capture, are behind it
            watch("error")
        return step(self, token_B)

    def after(self: Any, *dialogues: Any) -> sampler.Completions:
        watch("default")
        return completions(self, *dialogues)

    monkeypatch.setattr(sampler, "POLL_EVERY", NEW + 1)  # to ask who has ended is to wait
    monkeypatch.setattr(kind, "step", counted)
    monkeypatch.setattr(sampler._Written, "completions", after)
    try:
        sample(policy)
    finally:
        set_mode("default")
    assert modes == ["error", "default"]
    assert begun[0] > 10, "the rows ended early: few steps were watched"
