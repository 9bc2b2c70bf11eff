"""Encoder-decoders: the same MDP, agents and exactness as decoders alone, on tiny random T5s and BARTs.

Shape legend: B rows, P prompt places, T response places, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from seq2seq_models import MODELS, bart, t5, tokenizer_with_end
from test_collect import P, T, assert_same, make_env, step_through, uniforms

from textrl_gym import collect
from textrl_gym.agents import DPO, GRPO, NLPO, PPO
from textrl_gym.cli.main import main
from textrl_gym.core import Rollout
from textrl_gym.data.prompts import encode_prompt
from textrl_gym.models import loading, memory, packing, positions, tiny
from textrl_gym.policy import seq2seq
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts import sampler
from textrl_gym.rollouts.batching import micro_batches

V = 8
ATOL = 5e-5


def rollout_of(policy: Policy, rows: int = 12, seed: int = 0, group_size: int = 4) -> Rollout:
    """Groups that share a prompt; prompts and completions of unequal length."""
    env = make_env(rows, group_size=group_size)
    env.reset(seed=seed)
    return collect(env, policy, uniform_BT=uniforms(rows, seed))


def padded(r: Rollout, more: int) -> Rollout:
    """The same episodes with more left padding, of which the ids are not 0."""
    fields = dict(vars(r))
    pad = torch.full((len(r), more), 3)
    fields["prompt_BP"] = torch.cat([pad, r.prompt_BP], 1)
    fields["prompt_mask_BP"] = torch.cat([torch.zeros_like(pad, dtype=torch.bool), r.prompt_mask_BP], 1)
    return Rollout(**fields)


def plain_logprobs(model: Any, r: Rollout, left: bool = False) -> torch.Tensor:
    """By transformers alone, a row at a time, or of a whole left-padded batch with its mask. [B, T]."""
    start_B1 = torch.full((len(r), 1), model.config.decoder_start_token_id)
    decoder_ids_BT = torch.cat([start_B1, r.token_BT[:, :-1]], 1)
    if left:
        whole = {"input_ids": r.prompt_BP, "attention_mask": r.prompt_mask_BP.long()}
        logits_BTV = model(**whole, decoder_input_ids=decoder_ids_BT).logits
    else:
        rows = zip(r.prompt_BP, r.prompt_mask_BP, decoder_ids_BT, strict=True)
        outs = [model(input_ids=ids[mask][None], decoder_input_ids=after[None]) for ids, mask, after in rows]
        logits_BTV = torch.cat([out.logits for out in outs])
    return logits_BTV.log_softmax(-1).gather(-1, r.token_BT[..., None]).squeeze(-1) * r.mask_BT


@pytest.mark.parametrize("settings", [{}, {"group_size": 4, "kl_coef": 0.2}], ids=["plain", "group and KL"])
@pytest.mark.parametrize("name", MODELS)
def test_collect_is_stepping(name: str, settings: dict[str, Any]) -> None:
    policy = Policy(MODELS[name](V), reference=MODELS[name](V, seed=1))
    env = make_env(12, **settings, reference=policy.reference)
    policy.try_out(P, T)
    said = step_through(env, policy, uniforms(12), seed=3)
    env.streams_of_prompts.seed(3)
    assert_same(collect(env, policy, uniform_BT=uniforms(12)), said)
    assert len({len(p) for p in said["prompt"]}) > 1 and len(set(said["length"].tolist())) > 2


@pytest.mark.parametrize("name", MODELS)
def test_a_vector_environment_is_single_ones(name: str) -> None:
    policy, uniform_BT = Policy(MODELS[name](V)), uniforms(4)
    env = make_env(4)
    env.reset(seed=5)
    together = collect(env, policy, uniform_BT=uniform_BT)
    for b in range(4):
        alone_env = make_env(1)
        alone_env.reset(seed=5 + b)
        alone = collect(alone_env, policy, uniform_BT=uniform_BT[b : b + 1])
        assert alone.completions[0] == together.completions[b]
        width = alone.token_BT.shape[1]
        torch.testing.assert_close(alone.logp_BT[0], together.logp_BT[b, :width], atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_sampled_logprobs_and_gradients_are_those_of_the_plain_forward(name: str) -> None:
    policy = Policy(MODELS[name](V).double(), value_head=True)
    plain = MODELS[name](V).double()
    r = rollout_of(policy)
    assert len(r.prompt_BP.unique(dim=0)) < len(r) and r.mask_BT.sum(1).unique().numel() > 1
    torch.testing.assert_close(policy.logprobs(r).float(), r.logp_BT, atol=1e-5, rtol=0)
    torch.testing.assert_close(policy.logprobs(r), plain_logprobs(plain, r), atol=1e-10, rtol=0)
    (policy.logprobs(r) * r.mask_BT).sum().backward()
    plain_logprobs(plain, r).sum().backward()
    for (label, one), two in zip(policy.model.named_parameters(), plain.parameters(), strict=True):
        if two.grad is None:  # of a BART, the rows of no position
            assert one.grad is None, label
            continue
        torch.testing.assert_close(one.grad, two.grad, atol=1e-6, rtol=0, msg=label)
    # T5's positions are relative: there, and only there, transformers may be given prompts that are padded on the left.
    with torch.no_grad():
        difference = float((plain_logprobs(plain, padded(r, 3), left=True) - policy.logprobs(r)).abs().max())
    assert (difference > 1e-3) == (name == "bart")


@pytest.mark.parametrize("name", MODELS)
def test_padding_of_prompts_changes_nothing(name: str) -> None:
    policy = Policy(MODELS[name](V))
    r = rollout_of(policy)
    more = padded(r, 7)
    torch.testing.assert_close(policy.logprobs(r), policy.logprobs(more), atol=1e-5, rtol=0)
    unique = sampler.generate(
        policy, more.prompt_BP, more.prompt_mask_BP, torch.arange(len(r)), uniforms(len(r)), max_new_tokens=T, end_ids=[0]
    )
    assert torch.equal(unique.token_BT[:, : r.token_BT.shape[1]], r.token_BT)


def test_each_prompt_is_encoded_once() -> None:
    policy = Policy(t5(V))
    policy.try_out(P, T)
    rows: list[int] = []
    policy.trunk.encoder.register_forward_hook(lambda _, __, out: rows.append(len(out[0])))  # type: ignore[attr-defined]
    r = rollout_of(policy, rows=12, group_size=6)
    assert rows == [2]
    policy.logprobs(r)
    assert rows == [2, 2]


@pytest.mark.parametrize("name", MODELS)
def test_micro_batches_are_one_batch(name: str) -> None:
    whole, parts = (Policy(MODELS[name](V).double(), value_head=True) for _ in range(2))
    for policy in (whole, parts):
        assert policy.value_head is not None
        torch.nn.init.ones_(policy.value_head.double().weight)
    r = rollout_of(whole)
    out = whole.response(r, entropy=True)
    (out.logp_BT.sum() + out.value_BT.sum()).backward()
    pieces = micro_batches(r, 20)
    assert len(pieces) > 2
    for rows in pieces:
        part = parts.response(r.select(rows), entropy=True)
        assert part.entropy_BT is not None and out.entropy_BT is not None
        torch.testing.assert_close(part.entropy_BT, out.entropy_BT[rows, : part.entropy_BT.shape[1]], atol=1e-9, rtol=0)
        (part.logp_BT.sum() + part.value_BT.sum()).backward()
    for one, two in zip(whole.parameters(), parts.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_generate_and_eos_comes_once(name: str) -> None:
    policy = Policy(MODELS[name](V))
    env = make_env(12)
    env.reset(seed=2)
    r = collect(env, policy, greedy=True)
    # Forced tokens of a generation config are not the policy's: generate() is asked without them.
    own = {"forced_bos_token_id": None, "forced_eos_token_id": None, "do_sample": False, "num_beams": 1}
    for b, (ids, mask) in enumerate(zip(r.prompt_BP, r.prompt_mask_BP, strict=True)):
        out = policy.model.generate(ids[mask][None], max_new_tokens=T, eos_token_id=0, pad_token_id=0, **own)
        written = r.token_BT[b][r.mask_BT[b]].tolist()
        assert out[0, 1:].tolist() == written  # behind the start token
        assert 0 not in written[:-1]


def test_what_goes_on_without_cache_or_padding_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = rollout_of(Policy(bart(V)))
    together, step = seq2seq.Seq2SeqTrunk.together, seq2seq.CachedRows.step
    monkeypatch.setattr(seq2seq.Seq2SeqTrunk, "together", lambda *a: (together(*a)[0] * 1.5, together(*a)[1]))
    monkeypatch.setattr(seq2seq.CachedRows, "step", lambda *a: step(*a) * 1.5)
    policy = Policy(bart(V))
    with pytest.warns(UserWarning, match=r"cannot (be padded|go on from its cache) \(its numbers would change\)") as said:
        r = rollout_of(policy)
    assert len([w for w in said if "its numbers would change" in str(w.message)]) == 2
    assert torch.equal(r.token_BT, expected.token_BT)
    torch.testing.assert_close(r.logp_BT, expected.logp_BT, atol=1e-5, rtol=0)


def test_a_peek_leaves_nothing_behind() -> None:
    for policy in (Policy(t5(V)), Policy(bart(V))):
        ids = torch.tensor([[1, 2], [3, 4]])
        mask, source, paths = torch.ones_like(ids, dtype=torch.bool), torch.tensor([0, 1, 1]), torch.tensor([[1, 2, 3]] * 3)
        with torch.no_grad():
            one, two = (policy.trunk.lookahead(ids, mask, source, 8) for _ in range(2))
            seen = one.peek(paths)
            stepped = torch.stack([two.step(paths[:, t]) for t in range(3)], 1)
            torch.testing.assert_close(seen, stepped, atol=1e-5, rtol=0)
            one.keep(torch.tensor([2, 0]))
            torch.testing.assert_close(one.step(paths[:2, 0]), stepped[[2, 0], 0], atol=1e-5, rtol=0)


# -- agents -----------------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {"rollout_episodes": 32, "device": "cpu"}


def copier(name: str) -> Any:
    """A tiny model for the five tokens of CopyText-v0, near uniform at the start."""
    return MODELS[name](6, scale=0.3)


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("agent", [PPO, GRPO])
def test_the_score_rises(agent: Any, name: str, tmp_path: Path) -> None:
    learner = agent("CopyText-v0", copier(name), device="cpu", out=tmp_path)
    before = float(learner.collect().score_B.mean())
    learner.learn(4_000, progress_bar=False, eval_episodes=16)
    after = float(learner.collect().score_B.mean())
    assert after > before + 0.15, (before, after)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert abs(rows[0]["rollout/kl_sequence"]) < 1e-4  # the reference is the policy as it was


def test_saved_and_loaded_it_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    for name in ("t5", "bart"):
        MODELS[name](6).save_pretrained(tmp_path / name)
        tiny.symbol_tokenizer("abcd").save_pretrained(tmp_path / name)
        straight, stopped = (PPO("CopyText-v0", str(tmp_path / name), seed=1, **TINY) for _ in range(2))
        for _ in range(3):
            straight.update(straight.collect())
        stopped.update(stopped.collect())
        stopped.save(tmp_path / f"{name}-run")
        loaded = PPO.load(tmp_path / f"{name}-run", device="cpu")
        for _ in range(2):
            loaded.update(loaded.collect())
        for (label, one), two in zip(straight.policy.named_parameters(), loaded.policy.parameters(), strict=True):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5, msg=label)
        assert loaded.policy.reference is not None
        initial = loading.load_model(str(tmp_path / name)).state_dict()
        for label, weight in loaded.policy.reference.model.state_dict().items():
            torch.testing.assert_close(weight, initial[label], msg=label)
