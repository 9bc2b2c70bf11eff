"""torch.compile changes no number: passes with their gradients, sampling, and training, compiled and not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_trunk import SOURCE, make_model, rollout

from textrl_gym.agents import GRPO
from textrl_gym.models import onednn
from textrl_gym.policy import attention_kernels, compiling
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts.sampler import generate

# PyTorch says this of its own code.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
compiled_graphs: list[torch.fx.GraphModule] = []


def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
    """A compiler that runs the graph as it is: what could change the numbers is what was captured."""
    compiled_graphs.append(graph)
    return graph.forward


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs that were given to the compiler."""
    torch.compiler.reset()
    compiled_graphs.clear()
    monkeypatch.setattr(compiling, "BACKEND", backend)
    return compiled_graphs


# Tracing takes seconds a model: the one that shows most is quick, the others are for `make reliability`.
@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("llama", True),
        *[pytest.param(*which, marks=pytest.mark.slow) for which in [("llama", False), ("gemma2", False)]],
    ],
)
def test_a_pass_and_its_gradients_are_the_same(
    name: str, fused: bool, captured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = attention_kernels.KERNELS["cpu"]._replace(least_positions=0)
    monkeypatch.setattr(attention_kernels, "KERNELS", {"cpu": cpu} if fused else {})
    eager, compiled = (Policy(make_model(name, num_hidden_layers=1), compile=which) for which in ("none", "update"))
    for r in (rollout(), rollout(torch.tensor([0, 0, 0, 1, 1, 2, 3]), seed=1)):  # other numbers of rows and prompts
        logp_BT = []
        for one in (eager, compiled):
            one.zero_grad()
            logp_BT.append(one.logprobs(r))
            logp_BT[-1].square().sum().backward()
        torch.testing.assert_close(logp_BT[1], logp_BT[0], atol=5e-5, rtol=0)
        for mine, other in zip(compiled.parameters(), eager.parameters(), strict=True):
            assert mine.grad is not None and other.grad is not None
            assert (mine.grad - other.grad).norm() <= 5e-5 * other.grad.norm() + 1e-7
    assert len(captured) == 4  # prompts and completions, each whole, for the first shapes and for varying ones


def test_rows_without_a_prompt_in_common_are_the_same(captured: list[Any]) -> None:
    eager, compiled = (Policy(make_model("llama"), compile=which) for which in ("none", "update"))
    r = rollout(torch.arange(3))
    torch.testing.assert_close(compiled.logprobs(r), eager.logprobs(r), atol=5e-5, rtol=0)
    assert len(captured) == 1


def test_sampling_is_the_same_while_rows_leave(captured: list[Any]) -> None:
    r, uniform_BT = rollout(), torch.rand((6, 30), generator=torch.Generator().manual_seed(2))
    prompts = (r.prompt_BP[[0, 2, 3]], r.prompt_mask_BP[[0, 2, 3]], SOURCE, uniform_BT)
    eager, compiled = (
        generate(
            Policy(make_model("llama", num_hidden_layers=1), compile=which), *prompts, max_new_tokens=30, end_ids=(3,)
        )
        for which in ("none", "decode")
    )
    assert len(compiled.mask_BT.sum(1).unique()) > 2, "rows end together: the test shows nothing"
    assert torch.equal(compiled.token_BT, eager.token_BT)
    torch.testing.assert_close(compiled.logp_BT, eager.logp_BT, atol=5e-5, rtol=0)
    assert 1 <= len(captured) <= 4  # not one a token


def test_a_compiler_is_given_plain_linear_layers(captured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own cannot lower the call of oneDNN that this project makes."""
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    monkeypatch.setattr(onednn, "LEAST_PRODUCT", 0)
    policy = Policy(make_model("llama", num_hidden_layers=1), compile="update")
    assert isinstance(policy.model.model.layers[0].mlp.up_proj, onednn.OneDNNLinear)
    policy.logprobs(rollout(torch.arange(3)))
    targets = {str(node.target) for graph in captured for node in graph.graph.nodes}
    assert any("linear" in target for target in targets) and not any("mkldnn" in target for target in targets)


def test_what_is_not_asked_for_is_not_compiled(captured: list[Any]) -> None:
    r = rollout()
    prompts = (r.prompt_BP[[0, 2, 3]], r.prompt_mask_BP[[0, 2, 3]], SOURCE, None)
    generate(Policy(make_model("llama"), compile="update"), *prompts, max_new_tokens=3, end_ids=(3,))
    Policy(make_model("llama"), compile="decode").logprobs(r)
    assert not captured


def test_a_missing_compiler_is_told_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("g++: not found\nand much more")

    torch.compiler.reset()
    compiling.require_compiler.cache_clear()
    monkeypatch.setattr(compiling, "BACKEND", broken)
    with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler .* on the device 'cpu', .*g\+\+: not found"):
        GRPO("CopyText-v0", compile="all", out=tmp_path)
    with pytest.raises(ValueError, match="compile"):
        GRPO("CopyText-v0", compile="everything", out=tmp_path)


@pytest.mark.slow  # a real compiler takes minutes on two busy cores
def test_training_compiled_by_the_real_compiler_learns_the_same(tmp_path: Path) -> None:
    torch.compiler.reset()
    weights = []
    for which in ("none", "all"):
        agent = GRPO("CopyText-v0", seed=1, rollout_episodes=16, compile=which, out=tmp_path / which)
        for _ in range(2):
            agent.update(agent.collect())
        weights.append(torch.cat([p.detach().flatten() for p in agent.policy.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], atol=1e-4, rtol=0)
