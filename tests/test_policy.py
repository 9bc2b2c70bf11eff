"""Policy: one temperature, no dropout, left padding that changes nothing, critics, reference, precision."""

from typing import Any

import gymnasium as gym
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from textrl_gym import collect
from textrl_gym.core import Rollout
from textrl_gym.models import tiny
from textrl_gym.policy.backbone import position_ids
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts.batching import micro_batches

V = 5


def rollout(policy: Policy, seed: int = 0, rows: int = 6) -> Rollout:
    envs = gym.make_vec("CopyText-v0", num_envs=rows, array="torch", max_new_tokens=3, max_prompt_tokens=2)
    envs.reset(seed=seed)
    return collect(envs, policy, kl_coef=0.0, generator=torch.Generator().manual_seed(seed))


def logits(policy: Policy, r: Rollout) -> torch.Tensor:
    """[B, T, V], which no pass of the package ever holds whole."""
    return policy.logits(policy.hidden(r).flatten(0, 1)).unflatten(0, r.mask_BT.shape)


def padded(r: Rollout, more: int) -> Rollout:
    """The same episodes with more left padding."""
    fields = dict(vars(r))
    pad = torch.zeros((len(r), more), dtype=torch.int64)
    fields["prompt_BP"] = torch.cat([pad, r.prompt_BP], 1)
    fields["prompt_mask_BP"] = torch.cat([pad.bool(), r.prompt_mask_BP], 1)
    return Rollout(**fields)


def test_position_ids_count_real_tokens() -> None:
    mask_BL = torch.tensor([[False, False, True, True], [True, True, True, True]])
    assert position_ids(mask_BL).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("make", [lambda: tiny.gpt2(V, 20), lambda: tiny.llama(V, scale=0.3)], ids=["gpt2", "llama"])
def test_left_padding_changes_neither_logprobs_nor_gradients(make: Any) -> None:
    policies = [Policy(make(), value_head=True) for _ in range(2)]
    r = rollout(policies[0])
    logps = [policies[0].logprobs(r), policies[1].logprobs(padded(r, 7))]
    torch.testing.assert_close(logps[0], logps[1], atol=1e-5, rtol=0)
    for logp_BT in logps:
        logp_BT.sum().backward()
    for one, two in zip(policies[0].parameters(), policies[1].parameters(), strict=True):
        if one.grad is not None:
            assert two.grad is not None and torch.isfinite(two.grad).all()
            torch.testing.assert_close(one.grad, two.grad, atol=2e-4, rtol=0)


def test_next_logprobs_of_unequal_prefixes_are_those_of_each_alone() -> None:
    policy = Policy(tiny.gpt2(V, 20))
    # rows of 3, 1 and 5 real tokens that end in different places
    input_BL = torch.tensor([[0, 0, 1, 2, 3, 0, 0], [0, 0, 4, 0, 0, 0, 0], [1, 2, 3, 4, 1, 0, 0]])
    mask_BL = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]])
    together_BV = policy.next_logprobs(input_BL, mask_BL)
    for b in range(3):
        ids = input_BL[b][mask_BL[b].bool()][None]
        alone_V = policy.model(input_ids=ids).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(together_BV[b], alone_V, atol=1e-5, rtol=0)


def test_temperature_is_everywhere() -> None:
    warm = Policy(tiny.gpt2(V, 20), reference="copy", temperature=2.0)
    plain = Policy(tiny.gpt2(V, 20))
    r = rollout(warm)
    assert (r.kl_BT.abs() < 1e-5).all()  # the reference is warm too
    torch.testing.assert_close(warm.logprobs(r), r.logp_BT, atol=1e-5, rtol=0)
    logits_BTV = logits(plain, r)
    expected = (logits_BTV / 2).log_softmax(-1).gather(-1, r.token_BT[..., None]).squeeze(-1) * r.mask_BT
    torch.testing.assert_close(r.logp_BT, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="temperature must be > 0, got -1"):
        Policy(tiny.gpt2(V, 20), temperature=-1.0)


def test_dropout_stays_off_even_in_train_mode() -> None:
    config = GPT2Config(vocab_size=V, n_positions=20, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.9, embd_pdrop=0.9)
    model = GPT2LMHeadModel(config)
    model.train()
    policy = Policy(model).train()
    r = rollout(policy)
    assert torch.equal(policy.logprobs(r), policy.logprobs(r))
    torch.testing.assert_close(policy.logprobs(r), r.logp_BT, atol=1e-5, rtol=0)


def test_value_heads_start_at_zero_and_learn_on_their_own_trunk() -> None:
    for separate in (False, True):
        policy = Policy(tiny.gpt2(V, 20), value_head=True, value_model=tiny.gpt2(V, 20) if separate else None)
        r = rollout(policy)
        assert (r.value_BT == 0).all()
        torch.nn.init.ones_(policy.value_head.weight)  # type: ignore[union-attr]
        value_BT = policy.values(r)
        assert value_BT.abs().sum() > 0
        assert (value_BT[~r.mask_BT] == 0).all()
        value_BT.sum().backward()
        assert (policy.model.transformer.h[0].attn.c_attn.weight.grad is None) == separate


def test_the_reference_is_frozen_and_not_trained() -> None:
    policy = Policy(tiny.gpt2(V, 20), reference="copy")
    assert policy.reference is not None
    assert not any(p.requires_grad for p in policy.reference.parameters())
    mine = {id(p) for p in policy.parameters()}
    assert not mine & {id(p) for p in policy.reference.parameters()}
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(3)
    r = rollout(policy)
    assert r.kl_BT.abs().sum() > 0.1


def test_rows_beyond_the_tokenizer_are_never_sampled() -> None:
    policy = Policy(tiny.gpt2(50, 20), vocab_size=V)
    r = rollout(policy, rows=30)
    assert int(r.token_BT.max()) < V
    logits_BTV = logits(policy, r)
    assert logits_BTV.shape[-1] == V
    with pytest.raises(ValueError, match="60 tokens, the model only 50"):
        Policy(tiny.gpt2(50, 20), vocab_size=60)


def test_bfloat16_recomputes_logprobs_by_the_training_forward() -> None:
    policy = Policy(tiny.gpt2(V, 20), reference="copy", dtype=torch.bfloat16)
    assert next(policy.model.parameters()).dtype == torch.float32
    r = rollout(policy, rows=16)
    # Rounding depends on the batch's padding, so the two forwards agree to bf16's 3 digits, not bit for bit.
    torch.testing.assert_close(policy.logprobs(r).detach(), r.logp_BT, atol=2e-2, rtol=0)
    assert (r.kl_BT.abs() < 2e-2).all()


def test_micro_batches_hold_every_row_once_within_the_budget() -> None:
    r = rollout(Policy(tiny.gpt2(V, 20)), rows=30)
    for groups_of in (1, 5):
        r.group_B = torch.arange(30) // groups_of
        for budget in (12, 25):
            batches = micro_batches(r, budget)
            assert sorted(torch.cat(batches).tolist()) == list(range(30))
            for rows in batches:
                part = r.select(rows)
                prompts = len(part.group_B.unique())
                places = prompts * part.prompt_BP.shape[1] + len(part) * part.token_BT.shape[1]
                assert places <= budget or len(part) == 1
    assert len(micro_batches(r, 1)) == 30  # a row that alone passes the budget still goes


@pytest.mark.parametrize("make", [lambda: tiny.gpt2(V, 20), lambda: tiny.llama(V, scale=0.3)], ids=["gpt2", "llama"])
def test_prompts_computed_once_are_prompts_computed_for_each_row(make: Any) -> None:
    shared, apart = (Policy(make().double(), value_head=True) for _ in range(2))
    for policy in (shared, apart):
        torch.nn.init.ones_(policy.value_head.weight)  # type: ignore[union-attr]
    r = rollout(shared, rows=12)
    r.prompt_BP, r.prompt_mask_BP = r.prompt_BP[:3].repeat(4, 1), r.prompt_mask_BP[:3].repeat(4, 1)
    r.prompt_mask_BP[1::3, 0] = False  # one of the three prompts is shorter
    r.prompt_BP[1::3, 0] = 0
    together = shared.response(r)
    rows = [r.select(torch.tensor([b])) for b in range(12)]
    for b, row in enumerate(rows):
        alone = apart.response(row)
        width = row.token_BT.shape[1]
        torch.testing.assert_close(together.logp_BT[b, :width], alone.logp_BT[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together.value_BT[b, :width], alone.value_BT[0], atol=1e-5, rtol=0)
        (alone.logp_BT.sum() + alone.value_BT.sum()).backward()
    (together.logp_BT.sum() + together.value_BT.sum()).backward()
    for one, two in zip(shared.parameters(), apart.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        assert (one.grad - two.grad).norm() <= 1e-5 * (1e-3 + two.grad.norm())
