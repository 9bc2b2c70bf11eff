"""Rollouts by a vLLM server, against a stub that speaks its protocol over our own sampler.

What a real vLLM does beyond that is in docs/vllm.md, with what was run.
"""

from __future__ import annotations

import base64
import copy
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conversations import Halving
from minibatches import last_gradient, minibatch
from ranks import outcome
from servers import running
from torch import Tensor
from torch.cuda import nccl
from vllm_stub import Stub, uniforms

from textrl_gym import functional
from textrl_gym.agents import GRPO
from textrl_gym.core import Rollout, Row, StopReason
from textrl_gym.mdp.task import Task
from textrl_gym.mdp.text_env import TextVectorEnv
from textrl_gym.models import lora, tiny
from textrl_gym.policy.policy import Policy
from textrl_gym.registry import load_agent_class
from textrl_gym.rollouts import sampler, vllm, weight_transfer
from textrl_gym.rollouts.collect import collect
from textrl_gym.rollouts.vllm import StaleWeightsError, VLLMSampler, row_seeds
from textrl_gym.rollouts.vllm_client import Client, ServerError, Unreachable
from textrl_gym.rollouts.vllm_process import server_environment
from textrl_gym.rollouts.weight_transfer import DiskTransfer, IPCTransfer, NCCLTransfer
from textrl_gym.training.config import TrainOptions
from textrl_gym.training.run_folder import read_rollouts

ATOL = 5e-5  # float32 sums in another order: the stub samples row by row


class Letters(Task):
    """Prompts of one to five symbols."""

    max_prompt_tokens, max_new_tokens = 5, 9
    model, reward = "made in code", "length"

    def rows(self, split: str, dataset: str | None = None) -> Sequence[Row]:
        return [{"prompt": " ".join("abcdefg"[first : first + size])} for size in range(1, 6) for first in range(3)]

    def load_tokenizer(self, name: str | None = None) -> Any:
        return tiny.symbol_tokenizer(tuple("abcdefg"))


def environment(**settings: Any) -> TextVectorEnv:
    env = TextVectorEnv(8, task=Letters, group_size=4, array="torch", **settings)
    env.reset(seed=3)
    return env


def model(seed: int = 0, vocab_size: int = 8) -> torch.nn.Module:
    torch.manual_seed(seed)
    made_up: torch.nn.Module = tiny.llama(vocab_size)
    return made_up


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Stub]:
    """A server of a model with other weights than the policies that use it."""
    other = model(seed=9)
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(50)  # type: ignore[operator] # sharp: it takes other tokens
    other.save_pretrained(tmp_path / "served")  # type: ignore[operator]
    with running(Stub(tmp_path / "served")) as server:
        yield server


@pytest.fixture
def client(stub: Stub) -> Iterator[Client]:
    """A client of the stub."""
    own = Client(stub.url)
    yield own
    own.close()


Remote = Callable[[Policy], VLLMSampler]


@pytest.fixture
def remote(client: Client, tmp_path: Path) -> Remote:
    """Makes a sampler that has given the stub a policy's weights."""

    def make(policy: Policy) -> VLLMSampler:
        own = VLLMSampler(client, DiskTransfer(tmp_path / "weights"), restart_seconds=1.0)
        own.check(policy, environment())
        return own

    return make


def same_numbers(uniform_BT: Tensor) -> Tensor:
    """The random numbers that the stub makes of the seeds that the rows of these get."""
    return torch.stack([uniforms(seed, uniform_BT.shape[1]) for seed in row_seeds(uniform_BT)])


def assert_same(own: Rollout, other: Rollout) -> None:
    """Two rollouts of the same tokens, ends, scores, rewards and log-probabilities of the policy."""
    for name in ("prompt_BP", "token_BT", "mask_BT", "stop_B", "group_B"):
        assert torch.equal(getattr(own, name), getattr(other, name)), name
    for name in ("logp_BT", "ref_logp_BT", "kl_BT", "value_BT", "score_B", "reward_BT"):
        torch.testing.assert_close(getattr(own, name), getattr(other, name), atol=ATOL, rtol=0)


# -- one rollout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"stop": "b "}, {"stop": ["a", "g"]}], ids=["eos", "stop string", "letters"])
def test_collect_through_the_server_equals_collect_without(
    stub: Stub, remote: Remote, settings: dict[str, Any]
) -> None:
    policy = Policy(model(), reference="copy", value_head=True, temperature=1.3)
    uniform_BT = torch.rand(8, 9, generator=torch.Generator().manual_seed(1))
    own = collect(environment(**settings), policy, kl_coef=0.1, uniform_BT=same_numbers(uniform_BT))
    served = remote(policy)
    other = collect(environment(**settings), policy, kl_coef=0.1, uniform_BT=uniform_BT, sample=served.generate)
    assert_same(own, other)
    assert own.sampler_logp_BT is None and other.sampler_logp_BT is not None
    torch.testing.assert_close(other.sampler_logp_BT, other.logp_BT, atol=ATOL, rtol=0)
    reasons = {StopReason.EOS, StopReason.LENGTH} | ({StopReason.STOP_STRING} if settings else set())
    assert {StopReason(int(stop)) for stop in other.stop_B} <= reasons
    assert not settings or StopReason.STOP_STRING in {int(stop) for stop in other.stop_B}


def test_greedy_rollouts_too(stub: Stub, remote: Remote) -> None:
    policy = Policy(model())
    served = remote(policy)
    own, other = (
        collect(environment(), policy, greedy=True, sample=how) for how in (sampler.generate, served.generate)
    )
    assert_same(own, other)
    assert all(request["temperature"] == 0.0 and "seed" not in request for request in stub.requests[1:])


def test_what_a_row_is_asked_for(stub: Stub, remote: Remote) -> None:
    # Ten rows of the head for eight tokens: the others must get no probability.
    policy = Policy(model(vocab_size=10), temperature=0.7, vocab_size=8)
    model(seed=9, vocab_size=10).save_pretrained(stub.folder)  # type: ignore[operator]
    stub.restart()
    env = environment()
    served = remote(policy)
    stub.requests.clear()
    rollout = collect(env, policy, generator=torch.Generator().manual_seed(0), sample=served.generate)
    assert len(stub.requests) == 8 and rollout.token_BT.max() < 8
    seeds = {request["seed"] for request in stub.requests}
    assert len(seeds) == 8
    prompts = {tuple(ids[mask].tolist()) for ids, mask in zip(rollout.prompt_BP, rollout.prompt_mask_BP, strict=True)}
    assert {tuple(request["prompt"]) for request in stub.requests} == prompts
    request = stub.requests[0]
    whole = {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": 0}
    assert request.items() >= (whole | {"ignore_eos": True, "max_tokens": 9, "return_token_ids": True}).items()
    assert request["stop_token_ids"] == list(env.end_ids) and request["logit_bias"] == {"8": -100, "9": -100}


def test_seeds_are_of_the_row_alone() -> None:
    uniform_BT = torch.tensor([[0.5, 0.25, 0.9], [0.5, 0.25, 0.1], [0.0, 0.5, 0.3]])
    half, quarter = 2**23, 2**22  # of 2**24
    assert row_seeds(uniform_BT) == [half + (quarter << 24), half + (quarter << 24), half << 24]
    assert row_seeds(uniform_BT[1:]) == row_seeds(uniform_BT)[1:]  # another process's block
    assert row_seeds(uniform_BT[:, :1]) == [half, half, 0]  # a budget of one token
    assert max(row_seeds(torch.full((1, 2), 1 - 2**-24))) < 2**63  # what a server takes


def test_tokens_are_neither_encoded_nor_decoded(stub: Stub, remote: Remote) -> None:
    policy, env = Policy(model()), environment()
    served = remote(policy)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a tokenizer was asked")

    _, prompt_ids = env.draw()
    unique = functional.unique_ids(prompt_ids, policy.device)
    uniform_BT = torch.rand(8, 9, generator=torch.Generator().manual_seed(2))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("encode", "decode", "__call__"):
            patch.setattr(type(env.tokenizer), name, refuse)
        out = served.generate(policy, *unique, uniform_BT, max_new_tokens=9, end_ids=env.end_ids)
    answered = [row[mask].tolist() for row, mask in zip(out.token_BT, out.mask_BT, strict=True)]
    # The ids of the stub's own sampler, by another way: every row alone.
    for number, ids in enumerate(answered):
        alone = sampler.generate(
            policy,
            torch.tensor([prompt_ids[number]]),
            torch.ones(1, len(prompt_ids[number]), dtype=torch.bool),
            torch.tensor([0]),
            same_numbers(uniform_BT)[number : number + 1],
            max_new_tokens=9,
            end_ids=env.end_ids,
        )
        assert ids == alone.token_BT[alone.mask_BT].tolist()


@pytest.mark.parametrize(
    ("ids", "length", "reason"),
    [
        ([3, 0, 4, 0], 2, StopReason.EOS),  # nothing behind the first end, which is counted once
        ([3, 4, 5, 0], 3, StopReason.LENGTH),
        ([3, 4, 0], 3, StopReason.EOS),  # with the last token of the budget it has ended by itself
        ([5, 6, 0], 2, StopReason.STOP_STRING),
    ],
)
def test_the_stop_rule_cuts_what_was_sampled_elsewhere(ids: list[int], length: int, reason: StopReason) -> None:
    def stopped(texts: list[list[int]]) -> list[bool]:
        return [text[-1] == 6 for text in texts]

    logps = [-float(place + 1) for place in range(len(ids))]
    out = sampler.sampled_elsewhere([ids], [logps], max_new_tokens=3, end_ids=(0,), stopped=stopped)
    assert out.token_BT.tolist() == [ids[:length] + [0] * (3 - length)]
    assert out.mask_BT.sum() == length and out.stop_B.tolist() == [reason]
    assert out.logp_BT.tolist() == [logps[:length] + [0.0] * (3 - length)]


# -- weights ----------------------------------------------------------------------------------------------------------


def test_a_lora_is_sent_as_the_weights_that_it_makes() -> None:
    pytest.importorskip("peft")
    adapted = lora.add_lora(model(), rank=2, alpha=8, seed=0)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if ".lora_B." in name:
                p.normal_()
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    sent = dict(lora.whole_weights(adapted))
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    plain, merged = dict(model().named_parameters()), dict(copy.deepcopy(adapted).merge_and_unload().named_parameters())
    assert sent.keys() == plain.keys() == merged.keys()
    for name, value in sent.items():
        torch.testing.assert_close(value, merged[name].detach(), atol=1e-6, rtol=0)
    assert sum(not torch.equal(value, plain[name]) for name, value in sent.items()) == 14  # of 2 layers, 7 each


def described(policy: Policy) -> dict[str, Any]:
    """What vLLM's NCCLWeightTransferUpdateInfo and IPCWeightTransferUpdateInfo have of weights (0.33.0)."""
    weights = dict(policy.model.named_parameters())
    shapes = [list(p.shape) for p in weights.values()]
    return {"names": list(weights), "dtype_names": ["float32"] * len(weights), "shapes": shapes}


def test_weights_over_nccl_are_announced_and_broadcast_in_one_order(
    stub: Stub, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL itself is faked: there is no GPU. The fields are those of vLLM 0.33.0's NCCLWeightTransferInitInfo."""
    policy, moved = Policy(model()), list[list[Tensor]]()
    fake = {"unique_id": lambda: bytes(range(128)), "init_rank": lambda size, uid, rank: (size, uid, rank)}
    fake |= {"all_reduce": lambda tensors, comms: moved.append(tensors)}
    fake |= {"broadcast": lambda tensors, root, comms: moved.append([*tensors, root, *comms])}
    for name, function in fake.items():
        monkeypatch.setattr(nccl, name, function)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    transfer = NCCLTransfer()
    transfer.open(client, policy.device)
    transfer.send(client, policy, "v-1")
    unique_id = base64.b64encode(bytes(range(128))).decode()
    assert stub.bodies == [
        (
            "/init_weight_transfer_engine",
            {"init_info": {"nccl_unique_id_b64": unique_id, "rank_offset": 1, "world_size": 3, "packed": False}},
        ),
        ("/start_weight_update", {}),
        ("/update_weights", {"update_info": described(policy)}),
        ("/finish_weight_update", {"weight_version": "v-1"}),
    ]
    # One number that the workers' warm-up waits for, then each weight from rank 0 of the communicator of three.
    assert [len(tensors) for tensors in moved] == [1] + [3] * len(described(policy)["names"])
    for (sent, root, communicator), p in zip(moved[1:], policy.model.parameters(), strict=True):
        assert torch.equal(sent, p) and root == 0 and communicator == (3, bytes(range(128)), 0)


def test_weights_by_ipc_are_handles_of_the_gpus_memory(
    stub: Stub, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA is faked. The fields are those of vLLM 0.33.0's IPCWeightTransferInitInfo and -UpdateInfo."""
    policy = Policy(model())
    monkeypatch.setattr(weight_transfer, "reduce_tensor", lambda p: (None, ("handle", p.data_ptr())))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    transfer = IPCTransfer()
    transfer.open(client, policy.device)
    transfer.send(client, policy, "v-2")
    (_, init), (_, _), (path, update), finish = stub.bodies
    assert init == {"init_info": {"packed": False}} and path == "/update_weights"
    handles = pickle.loads(base64.b64decode(update["update_info"].pop("ipc_handles_pickled")))
    assert handles == [{"GPU-1": ("handle", p.data_ptr())} for p in policy.model.parameters()]
    assert update["update_info"] == described(policy)
    assert finish == ("/finish_weight_update", {"weight_version": "v-2"})


def test_a_started_server_gets_the_gpus_that_training_leaves() -> None:
    given = {"CUDA_VISIBLE_DEVICES": "0,2,5", "LOCAL_WORLD_SIZE": "2", "PYTHONPATH": "here", "HOME": "/root"}
    over_nccl = server_environment(given, "nccl")
    assert over_nccl == {"CUDA_VISIBLE_DEVICES": "5", "HOME": "/root", "VLLM_SERVER_DEV_MODE": "1"}
    by_ipc = server_environment(given, "ipc")
    assert (by_ipc["CUDA_VISIBLE_DEVICES"], by_ipc["VLLM_ALLOW_INSECURE_SERIALIZATION"]) == ("0", "1")
    assert server_environment(given, "disk")["CUDA_VISIBLE_DEVICES"] == "0,2,5"
    with pytest.raises(ValueError, match=r"1 GPU\(s\) \(0\) for 1 training process\(es\) leave none.*take 'ipc'"):
        server_environment({"CUDA_VISIBLE_DEVICES": "0"}, "nccl")


# -- a server that misbehaves -----------------------------------------------------------------------------------------


def rollout_of(served: VLLMSampler, policy: Policy, seed: int = 0) -> Rollout:
    return collect(environment(), policy, generator=torch.Generator().manual_seed(seed), sample=served.generate)


def test_dropped_connections_are_tried_again(stub: Stub, remote: Remote) -> None:
    policy = Policy(model())
    served = remote(policy)
    own = rollout_of(served, policy)
    stub.drops, before = 5, stub.calls["/v1/completions"]
    assert_same(own, rollout_of(served, policy))
    assert stub.calls["/v1/completions"] == before + 8 + 5  # what was answered is not asked for again


def test_one_that_answers_nothing_is_given_up(stub: Stub, remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(model())
    served = remote(policy)
    monkeypatch.setattr(vllm, "TRIES", 2)
    stub.drops = 1000
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1.*8 of 8 completions got no answer in 2 tries"):
        rollout_of(served, policy)


def test_a_slow_one_is_waited_for_and_given_up_by_the_clients_limit(stub: Stub, remote: Remote) -> None:
    policy = Policy(model())
    served = remote(policy)
    stub.seconds = 0.2
    assert len(rollout_of(served, policy)) == 8
    hasty = Client(stub.url, answer_seconds=0.05)
    assert hasty.complete(stub.requests[:1]) == [None]
    hasty.close()


def test_one_that_was_started_again_gets_the_weights_again(
    stub: Stub, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(model())
    served = remote(policy)
    own = rollout_of(served, policy)
    version = served.version
    # In the middle of a rollout: answers by the first weights do not count, nor do those before in the same try.
    stub.restarts_after = 3
    assert_same(own, rollout_of(served, policy))
    assert served.version != version and stub.version == served.version
    # Between two rollouts, and before other weights are sent: what moves them begins anew.
    stub.restart()
    assert_same(own, rollout_of(served, policy))
    opened = list[torch.device]()
    monkeypatch.setattr(served.transfer, "open", lambda client, device: opened.append(device))
    served.sync(policy, 1)
    assert opened == []
    stub.restart()
    served.sync(policy, 2)
    assert opened == [policy.device]
    assert_same(own, rollout_of(served, policy))
    # Not while an update changes the weights.
    served.sends_again = False
    stub.restart()
    with pytest.raises(StaleWeightsError, match="was started again: go on from the last checkpoint"):
        rollout_of(served, policy)


def test_stale_weights_are_refused(stub: Stub, remote: Remote) -> None:
    policy = Policy(model())
    served = remote(policy)
    calls = stub.calls["/collective_rpc"]
    served.sync(policy, 0)
    assert stub.calls["/collective_rpc"] == calls  # it has them
    stub.keeps_weights = True
    with pytest.raises(StaleWeightsError, match=r"has weights '\w+-1' after '\w+-2' were sent to it"):
        served.sync(policy, 1)
    stub.keeps_weights = False
    stub.version = "another run's"
    with pytest.raises(StaleWeightsError, match="needs a server of its own"):
        rollout_of(served, policy)


def test_an_error_is_shown_in_the_servers_words(stub: Stub, remote: Remote) -> None:
    policy = Policy(model())
    served = remote(policy)
    stub.refusal = "This model's maximum context length is 4 tokens."
    with pytest.raises(
        ServerError, match=r"v1/completions: status 400: This model's maximum context length is 4 tokens"
    ):
        rollout_of(served, policy)
    stub.refusal, stub.leaves_out = "", ("token_ids",)
    with pytest.raises(ServerError, match="gives no token ids"):
        rollout_of(served, policy)
    stub.leaves_out = ("logprobs",)
    with pytest.raises(ServerError, match="no log-probability of each"):
        rollout_of(served, policy)
    stub.leaves_out, stub.most_tokens = (), 1
    with pytest.raises(ServerError, match="breaks off after 1 of 9 tokens"):
        rollout_of(served, policy)


def test_what_cannot_work_is_said_before_the_first_rollout(stub: Stub, client: Client, tmp_path: Path) -> None:
    policy, config = Policy(model()), copy.deepcopy(stub.config)

    def refused(words: str, transfer: Any = None, env: TextVectorEnv | None = None) -> None:
        served = VLLMSampler(client, transfer or DiskTransfer(tmp_path / "weights"))
        with pytest.raises(ServerError, match=words):
            served.check(policy, env or environment())

    class NeedsIPC(DiskTransfer):
        needs = "ipc"  # type: ignore[assignment]

    refused("takes weights by 'nccl', not 'ipc'", NeedsIPC(tmp_path))
    stub.config["model_config"]["logprobs_mode"] = "raw_logprobs"
    refused("start it with --logprobs-mode processed_logprobs")
    stub.config["model_config"] = config["model_config"] | {"max_model_len": 13}
    refused("room for 13 tokens .* have up to 14")
    stub.config = config
    # Another model: the weights are sent, and change nothing.
    stub.take_weights = lambda folder: None  # type: ignore[method-assign]
    refused(r"differ from the policy's by \d.* nats a token: its model .*served' is another one")
    nobody = Client("http://127.0.0.1:9")
    with pytest.raises(Unreachable, match=r"no vLLM server answers at http://127\.0\.0\.1:9"):
        VLLMSampler(nobody, DiskTransfer(tmp_path)).check(policy, environment())
    nobody.close()
    with pytest.raises(ValueError, match=r"must be http\(s\)://HOST:PORT, got '127.0.0.1'"):
        Client("127.0.0.1")


# -- importance weights -----------------------------------------------------------------------------------------------


def test_importance_weights_by_hand() -> None:
    # pi_old / pi_sampler = 0.5 / 0.25, 0.1 / 0.2, 0.9 / 0.1 and 0.3 / 0.3; at most 2.
    logp = torch.tensor([0.5, 0.1, 0.9, 0.3]).log()
    sampler_logp = torch.tensor([0.25, 0.2, 0.1, 0.3]).log()
    weights = functional.importance_weights(logp, sampler_logp, 2.0)
    torch.testing.assert_close(weights, torch.tensor([2.0, 0.5, 2.0, 1.0]), atol=1e-6, rtol=0)
    assert functional.importance_weights(logp, torch.full((4,), -math.inf), 2.0).tolist() == [2.0] * 4

    mask_BT = torch.tensor([[True, True, True, True], [True, True, False, False]])
    both = {
        "logp_BT": torch.stack([logp, logp]) * mask_BT,
        "sampler_logp_BT": torch.stack([sampler_logp] * 2) * mask_BT,
    }
    part = minibatch(mask_BT)
    part.logp_BT, part.sampler_logp_BT, part.importance_cap = both["logp_BT"], both["sampler_logp_BT"], 2.0
    expected = torch.tensor([[2.0, 0.5, 2.0, 1.0], [2.0, 0.5, 1.0, 1.0]])
    torch.testing.assert_close(part.weighted(torch.ones(2, 4)), expected, atol=1e-6, rtol=0)
    # Of a completion the geometric mean: (2 * 0.5 * 9 * 1)^(1/4) = sqrt(3), and (2 * 0.5)^(1/2) = 1.
    torch.testing.assert_close(part.weighted(torch.ones(2)), torch.tensor([3**0.5, 1.0]), atol=1e-6, rtol=0)
    part.importance_cap = None
    assert part.weighted(expected) is expected


ALGORITHMS = ("reinforce", "rloo", "reinforce_pp", "ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo")


def gradient_of(name: str, change: float | None) -> Tensor:
    """The first gradient of an algorithm on a rollout whose sampler's log-probabilities are the policy's and a change;
    None: the policy has sampled itself."""
    settings: dict[str, Any] = {"rollout_episodes": 8, "group_size": 4, "epochs": 1, "minibatches": 1, "kl_coef": 0.0}
    settings |= {"max_grad_norm": 1e9} | ({"vf_coef": 0.0} if name == "ppo" else {})
    agent = load_agent_class(name)("CopyText-v0", seed=2, device="cpu", **settings)
    rollout = agent.collect()
    if change is not None:
        rollout.sampler_logp_BT = (rollout.logp_BT + change) * rollout.mask_BT
    with last_gradient(agent) as gradients:
        agent.update(rollout)
    return gradients[0]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_policy_gradient_is_weighed(name: str) -> None:
    own = gradient_of(name, None)
    assert own.abs().max() > 1e-4
    assert torch.equal(gradient_of(name, 0.0), own)  # weights of exactly 1: the identical update
    # All weights are 1/4, and so is the gradient of the policy's loss; at most 2 where they would be 4.
    torch.testing.assert_close(gradient_of(name, math.log(4)), own / 4, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(gradient_of(name, -math.log(4)), own * 2, atol=1e-6, rtol=1e-4)


# -- whole runs -------------------------------------------------------------------------------------------------------

QUIET: dict[str, Any] = {"progress_bar": False, "eval_every": 0, "eval_episodes": 4, "on_hacking": "off"}
QUIET |= {"vllm_transfer": "disk"}


def agent_for(tmp_path: Path, name: str = "run", **settings: Any) -> GRPO:
    batch: dict[str, Any] = {"rollout_episodes": 8, "group_size": 4, "seed": 1, "device": "cpu"}
    return GRPO("CopyText-v0", out=tmp_path / name, **(batch | settings))


@pytest.fixture
def copy_stub(tmp_path: Path) -> Iterator[Stub]:
    """A server of CopyText's model with other weights."""
    agent = agent_for(tmp_path, seed=7)
    agent.policy.model.save_pretrained(tmp_path / "served")
    with running(Stub(tmp_path / "served")) as server:
        yield server


def weights(agent: GRPO) -> Tensor:
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])


@pytest.mark.slow
def test_a_run_by_the_server_stopped_and_gone_on_with_is_the_same_run(copy_stub: Stub, tmp_path: Path) -> None:
    whole = agent_for(tmp_path, "whole", lr_schedule="constant")
    whole.learn(120, vllm_url=copy_stub.url, **QUIET)
    assert whole.num_updates >= 4 and whole.served is None
    rows = read_rollouts(tmp_path / "whole")
    assert all(0 < row["rollout/mismatch_max"] < ATOL and row["rollout/importance_clipped"] == 0 for row in rows)
    assert not (tmp_path / "whole" / "vllm_weights").exists()

    parts = agent_for(tmp_path, "parts", lr_schedule="constant")
    parts.learn(60, vllm_url=copy_stub.url, **QUIET)
    parts = GRPO.load(tmp_path / "parts", out=tmp_path / "parts", device="cpu")
    copy_stub.restart()
    parts.learn(120 - parts.num_timesteps, reset_num_timesteps=False, vllm_url=copy_stub.url, **QUIET)
    assert parts.num_updates == whole.num_updates
    assert parts.generator.get_state().equal(whole.generator.get_state())
    torch.testing.assert_close(weights(parts), weights(whole), atol=1e-6, rtol=0)
    assert (weights(whole) - weights(agent_for(tmp_path, "fresh"))).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "ppo+shard"])
def test_two_processes_with_a_server_train_as_one(name: str, copy_stub: Stub, tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("ranks.py"))
    command = [sys.executable, script, str(tmp_path), "--work", name, "--vllm-url", copy_stub.url, "--updates", "3"]
    done = subprocess.run(command, timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, rows = outcome(tmp_path / "1", name)
    # Before each of four rollouts, of which three are trained on; of two processes the first sends alone.
    assert copy_stub.calls["/collective_rpc"] == copy_stub.calls["/update_weight_version"] == 8
    seeds = [request["seed"] for request in copy_stub.requests if request["seed"]]  # 0: asked before the run begins
    half = len(seeds) // 2
    assert sorted(seeds[:half]) == sorted(seeds[half:]) and half >= 4 * 16
    for rank in (0, 1):
        two, rows_of_two = outcome(tmp_path / "2", name, rank)
        torch.testing.assert_close(two["weights"], one["weights"], atol=1e-6, rtol=0)
        assert [row["score"] for row in rows_of_two] == pytest.approx([row["score"] for row in rows])
    fresh = load_agent_class(name.split("+")[0])("CopyText-v0", seed=5, device="cpu")
    trained = torch.cat([p.detach().flatten() for p in fresh.policy.parameters()])
    assert float((one["weights"] - trained).abs().max()) > 1e-3


def test_the_mismatch_is_logged_and_on_the_health_card(copy_stub: Stub, tmp_path: Path, capsys: Any) -> None:
    copy_stub.changes_logprobs = -0.05  # the training forward finds each token 1.05 times as likely
    agent = agent_for(tmp_path, importance_cap=1.01)
    agent.learn(30, vllm_url=copy_stub.url, **(QUIET | {"progress_bar": True}))
    row = read_rollouts(tmp_path / "run")[0]
    assert row["rollout/mismatch_mean"] == pytest.approx(0.05, abs=ATOL)
    assert row["rollout/mismatch_max"] == pytest.approx(0.05, abs=ATOL)
    assert row["rollout/importance_clipped"] == 1.0
    assert "ok   log-ratio of training forward to rollout server: max 5.0e-02" in capsys.readouterr().err
    copy_stub.changes_logprobs = -0.2
    with pytest.raises(Exception, match=r"rollout server: max 2\.0e-01.*likely cause: the server has another model"):
        agent_for(tmp_path, "other").learn(30, vllm_url=copy_stub.url, **QUIET)


@pytest.mark.slow
def test_one_step_ahead_is_the_same_at_learning_rate_0_and_another_run_at_others(
    copy_stub: Stub, tmp_path: Path
) -> None:
    def run(name: str, learning_rate: float, **options: Any) -> tuple[list[Rollout], GRPO]:
        agent, rollouts = agent_for(tmp_path, name, learning_rate=learning_rate, lr_schedule="constant"), []
        update = agent.update

        def seen(rollout: Rollout) -> dict[str, float]:
            rollouts.append(rollout)
            return update(rollout)

        agent.update = seen  # type: ignore[method-assign]
        agent.learn(120, vllm_url=copy_stub.url, **(QUIET | options))
        return rollouts, agent

    tiny_step = 1e-12  # 0 is no learning rate; a step of it is below float32's rounding of any weight
    plain, agent = run("plain", tiny_step)
    ahead, other = run("ahead", tiny_step, rollouts_ahead=True)
    assert len(plain) == len(ahead) >= 4
    for own, one in zip(plain, ahead, strict=True):
        assert_same(own, one)
    # What was drawn ahead at the end is given back.
    assert agent.generator.get_state().equal(other.generator.get_state())
    assert agent.env.streams() == other.env.streams()

    # With real steps the second rollout is of the first weights: the policy has moved, and the sampler has not.
    fast, _ = run("fast", 3e-2, rollouts_ahead=True)
    assert fast[0].sampler_logp_BT is not None and fast[1].sampler_logp_BT is not None
    torch.testing.assert_close(fast[0].logp_BT, fast[0].sampler_logp_BT, atol=ATOL, rtol=0)
    assert (fast[1].logp_BT - fast[1].sampler_logp_BT).abs().max() > 0.01
    torch.testing.assert_close(fast[1].sampler_logp_BT, plain[1].logp_BT, atol=ATOL, rtol=0)


@pytest.mark.slow
def test_a_server_is_started_for_a_run_and_ends_with_it(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("vllm_stub.py")} "$@"\n')
    python.chmod(0o755)
    agent = agent_for(tmp_path)
    agent.learn(30, vllm_python=str(python), vllm_args="--seed 3", **QUIET)
    log = (tmp_path / "run" / "vllm.log").read_text()
    assert "serving -m vllm.entrypoints.cli.main serve" in log and "--seed 3" in log
    assert "--logprobs-mode processed_logprobs --generation-config vllm" in log
    port = int(log.split("--port ")[1].split()[0])
    assert not (tmp_path / "run" / "vllm_model").exists()
    gone = Client(f"http://127.0.0.1:{port}")
    with pytest.raises(Unreachable):
        gone.get("health")
    gone.close()
    with pytest.raises(ServerError, match=r"ended with 1 before it answered; .*vllm.log ends:\n.*no GPU today"):
        agent_for(tmp_path, "broken").learn(30, vllm_python=str(python), vllm_args="--break", **QUIET)


# -- who can and who cannot -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quark", "nlpo", "dpo", "filtered_bc", "best_of_n", "reference"])
def test_agents_without_rollouts_for_a_server_are_refused(name: str, tmp_path: Path) -> None:
    cls = load_agent_class(name)
    with pytest.raises(ValueError, match=f"{cls.__name__} has no rollouts that a vLLM server could sample"):
        cls("CopyText-v0", out=tmp_path, device="cpu").learn(10, vllm_url="http://127.0.0.1:9", **QUIET)


def test_environments_and_settings_that_cannot_are_refused(tmp_path: Path) -> None:
    url: dict[str, Any] = {"vllm_url": "http://127.0.0.1:9"}
    talk = TextVectorEnv(4, task=Halving, group_size=2)
    with pytest.raises(ValueError, match="Halving is a conversation"):
        GRPO(talk, tiny.llama(talk.vocab_size), out=tmp_path / "a", device="cpu").learn(10, **url, **QUIET)
    with pytest.raises(
        ValueError, match="vllm_transfer='ipc' needs the policy on a GPU, and it is on cpu: take 'disk'"
    ):
        agent_for(tmp_path, "b").learn(10, **url, **(QUIET | {"vllm_transfer": "ipc"}))
    with pytest.raises(ValueError, match="give importance_cap"):
        agent_for(tmp_path, importance_cap=None).learn(10, rollouts_ahead=True, **url, **QUIET)
    for options, words in (
        ({"vllm_url": "http://a", "vllm_python": "python"}, "give one of both"),
        ({"vllm_args": "--seed 1"}, "vllm_args='--seed 1' are of a server that is started"),
        ({"rollouts_ahead": True}, "give vllm_url or vllm_python"),
        ({"vllm_transfer": "fax"}, "vllm_transfer must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            TrainOptions(**options)
