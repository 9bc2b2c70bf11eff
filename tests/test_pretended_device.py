"""What a GPU would refuse or wait for, found on a CPU: mixed devices, and host synchronisations of the decode loop.

Shape legend: B rows, T response places.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_device import CUDA, PretendedTensor, all_pretended, pretend_, to_cpu, to_device, watching
from test_trunk import SOURCE, make_model, rollout
from torch import Tensor

from textrl_gym import functional, registry
from textrl_gym.agents import GRPO, PPO
from textrl_gym.integrations.sb3_agent import SB3Agent
from textrl_gym.models import onednn
from textrl_gym.policy import decoders
from textrl_gym.policy.attention_kernels import KERNELS
from textrl_gym.policy.policy import Policy
from textrl_gym.policy.top_p_policy import MaskedPolicy
from textrl_gym.rollouts import sampler
from textrl_gym.training.agent import Agent

# Without a GPU transformers' autocast of rotary positions says that there is none.
pytestmark = pytest.mark.filterwarnings("ignore:.*CUDA is not available")

NEW = 26
# SB3's loops step an environment, whose observations are numpy arrays of the host.
AGENTS = [cls for cls in map(registry.load_agent_class, registry.names("agents")) if cls.trains]
BY_ROLLOUT = [cls for cls in AGENTS if not issubclass(cls, SB3Agent)]


@pytest.fixture(autouse=True)
def plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's layers do not go by oneDNN; fused attention is that of the CPU, which computes here."""
    monkeypatch.setattr(onednn, "is_faster", lambda: False)
    monkeypatch.setitem(KERNELS, "cuda", KERNELS["cpu"]._replace(least_positions=0))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many waits there were in all when each decode step of SharedDecoder began, once `watching`."""
    found: list[int] = []
    step = decoders.SharedDecoder.step

    def watched(self: decoders.SharedDecoder, token_B: Tensor) -> Tensor:
        found.append(total())
        return step(self, token_B)

    monkeypatch.setattr(decoders.SharedDecoder, "step", watched)
    return found


def total() -> int:
    from pretended_device import waits

    return waits.total()


def sample(policy: Policy, move: Any = lambda tensor: tensor) -> sampler.Completions:
    """Completions of test_trunk's prompts; `move` puts what is given to the sampler onto a device."""
    r = rollout()
    uniform_BT = torch.rand((len(SOURCE), NEW), generator=torch.Generator().manual_seed(2))
    given = (r.prompt_BP[[0, 2, 3]], r.prompt_mask_BP[[0, 2, 3]], SOURCE, uniform_BT)
    return sampler.generate(policy, *map(move, given), max_new_tokens=NEW, end_ids=(3,))


def waits_between_polls(steps: list[int]) -> list[int]:
    """The waits of each decode step after which the sampler does not ask who has ended."""
    # Call 0 is the decoder's own, of the prompts' last tokens; call t + 1 follows token t.
    polls = sampler.POLL_EVERY
    return [steps[t + 1] - steps[t] for t in range(1, len(steps) - 1) if t % polls != polls - 1]


# -- the pretended device ---------------------------------------------------------------------------------------------


def test_a_pretended_tensor_computes_and_says_where_it_is() -> None:
    with watching() as waits:
        a = torch.arange(3, device="cuda") * 2
        assert a.device == CUDA and isinstance(a, PretendedTensor)
        assert torch.zeros_like(a).device == torch.ones(2, device=a.device).device == CUDA
        assert a.cpu().device == torch.zeros(2).device == a.to("cpu").device == torch.device("cpu")
        assert waits == {"copy to the host": 2}
        assert a.tolist() == [0, 2, 4] and int(a.sum()) == 6
        assert waits == {"copy to the host": 2, "tolist": 1, "item": 1}


def test_mixed_devices_are_refused_but_single_numbers_and_indices_are_not() -> None:
    with watching() as waits:
        a = torch.arange(3.0, device="cuda")
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            a + torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([torch.ones(2), a])
        assert (a + torch.tensor(1.0)).tolist() == [1, 2, 3]
        waits.clear()
        assert a[torch.tensor([2, 0])].device == CUDA  # a GPU takes them, after a copy
        assert waits == {"copy to the device": 1}


@pytest.mark.parametrize(
    ("reason", "work"),
    [
        ("item", lambda a: float(a[0])),
        ("item", lambda a: bool(a.all())),
        ("nonzero", lambda a: a.nonzero()),
        ("mask as index", lambda a: a[a > 0]),
        ("unique", lambda a: a.unique()),
        ("equal", lambda a: torch.equal(a, a)),
        ("bincount", lambda a: a.bincount()),
        ("copy to the device", lambda a: torch.tensor([1, 2], device=a.device)),
        ("copy to the device", lambda a: torch.tensor([1, 2]).to(a.device)),
        ("copy to the host", lambda a: a.cpu()),
    ],
)
def test_waits_are_counted(reason: str, work: Any) -> None:
    with watching() as waits:
        a = torch.arange(3, device="cuda")
        work(a)
        assert +waits == Counter({reason: 1})


# -- the decode loop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_decoding_mixes_no_devices_and_waits_only_to_ask_who_has_ended(name: str, steps: list[int]) -> None:
    policy = Policy(make_model(name), value_head=True)
    expected = sample(policy)
    pretend_(policy)
    steps.clear()
    with watching():
        found = sample(policy, to_device)
        assert all_pretended(vars(found).values())
        assert torch.equal(to_cpu(found.token_BT), expected.token_BT)
    assert len(waits_between_polls(steps)) > NEW / 2, "no row lasted long: the test shows nothing"
    assert not any(waits_between_polls(steps))
    assert steps[-1] > steps[1], "nobody asked who has ended: the counter sees nothing"


def test_an_item_planted_into_the_decode_loop_is_found(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    inverse_cdf = functional.inverse_cdf

    def planted(logp_BV: Tensor, uniform_B: Tensor) -> Tensor:
        token_B = inverse_cdf(logp_BV, uniform_B)
        token_B[0].item()
        return token_B

    monkeypatch.setattr(functional, "inverse_cdf", planted)
    policy = Policy(make_model("llama"))
    pretend_(policy)
    with watching():
        sample(policy, to_device)
    assert set(waits_between_polls(steps)) == {1}


def test_nothing_waits_or_is_copied_while_a_cuda_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    captures: list[int] = []

    class Graph:
        def __init__(self, decoder: decoders.StaticDecoder) -> None:
            self.decoder = decoder

        def replay(self) -> None:
            # In place: whoever holds the output of the capture sees the new one, as on a GPU.
            self.decoder.hidden_BD.copy_(self.decoder._run(self.decoder.token_B1)[:, 0])

    def capture(self: decoders.StaticDecoder) -> None:
        self._run(self.token_B1)
        before = total()
        self.hidden_BD = self._run(self.token_B1)[:, 0]
        captures.append(total() - before)
        self.graph = Graph(self)  # type: ignore[assignment]

    monkeypatch.setattr(decoders.StaticDecoder, "_capture", capture)
    expected = sample(Policy(make_model("llama")))
    policy = Policy(make_model("llama"), cuda_graphs=True)
    pretend_(policy)
    with watching():
        found = sample(policy, to_device)
        assert torch.equal(to_cpu(found.token_BT), expected.token_BT)
    assert captures and not any(captures)


# -- an iteration of training -----------------------------------------------------------------------------------------


def make_agent(cls: type[Agent], out: Path) -> Agent:
    """With parts of a rollout in several micro-batches, and a rollout of few rows."""
    return cls("CopyText-v0", seed=1, rollout_episodes=16, micro_batch_tokens=40, out=out)


def move_(agent: Agent) -> None:
    """The agent's models to the pretended device, as if it had been made there."""
    policy = agent.policy
    mask = [policy.mask] if isinstance(policy, MaskedPolicy) else []
    for one in filter(None, [policy, policy.reference, *mask]):
        pretend_(one)
    agent.device = CUDA


def weights(agent: Agent) -> Tensor:
    return torch.cat([to_cpu(p.detach()).flatten() for p in agent.policy.parameters()])


@pytest.mark.parametrize(
    "cls",
    [pytest.param(cls, marks=pytest.mark.slow) if cls.__name__ in ("AWR", "FilteredBC") else cls for cls in BY_ROLLOUT],
)
def test_collect_and_update_mix_no_devices(cls: type[Agent], tmp_path: Path) -> None:
    here, there = (make_agent(cls, tmp_path) for _ in range(2))
    expected = here.collect()
    here.update(expected)
    with watching():
        move_(there)
        found = there.collect()
        assert all_pretended(vars(found).values())
        assert torch.equal(to_cpu(found.token_BT), expected.token_BT)
        there.update(found)
        torch.testing.assert_close(weights(there), weights(here), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cls", [GRPO, PPO])
def test_a_tensor_of_the_cpu_planted_into_the_update_is_found(
    cls: type[Agent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surrogate = functional.clipped_surrogate

    def planted(logp_BT: Tensor, old_logp_BT: Tensor, advantage_BT: Tensor, *clips: float) -> Any:
        return surrogate(logp_BT, old_logp_BT, advantage_BT * torch.ones(advantage_BT.shape), *clips)

    monkeypatch.setattr(functional, "clipped_surrogate", planted)
    agent = make_agent(cls, tmp_path)
    with watching():
        move_(agent)
        r = agent.collect()
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            agent.update(r)
