"""Credit: what agents say of tokens is what their updates learn from, on texts that are the same for all."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from minibatches import last_gradient

from textrl_gym import functional, registry
from textrl_gym.agents import DAPO, GRPO, NLPO, PPO, RLOO, SB3PPO, Reinforce, ReinforcePP
from textrl_gym.agents.dapo import overlong
from textrl_gym.agents.grpo import group_advantages
from textrl_gym.core import Rollout
from textrl_gym.evaluation import token_credit
from textrl_gym.evaluation.evaluator import Evaluator
from textrl_gym.mdp.task import load_task
from textrl_gym.training.agent import Agent

ENV = "CopyText-v0"
PROMPTS = [3, 0]


def moved(cls: type[Agent], tmp_path: Path, **settings: Any) -> Any:
    """An agent that has learnt a little, so that it is not its reference any more."""
    agent = cls(ENV, seed=1, out=tmp_path, rollout_episodes=16, learning_rate=1e-2, **settings)
    for _ in range(3):
        agent.update(agent.collect())
    return agent


def texts(agent: Any) -> Rollout:
    return token_credit.start_texts(agent, Evaluator(agent.env, 4).mdp, PROMPTS, seed=0)


# -- texts ------------------------------------------------------------------------------------------------------------


def test_texts_are_the_starts_and_the_same_for_all(tmp_path: Path) -> None:
    agents = [moved(PPO, tmp_path), moved(GRPO, tmp_path), GRPO(ENV, seed=7, out=tmp_path)]
    first, *others = [texts(agent) for agent in agents]
    assert len(first) == 2 * token_credit.GROUP
    assert first.group_B.tolist() == [0] * token_credit.GROUP + [1] * token_credit.GROUP
    source = Evaluator(agents[0].env, 4).mdp.source
    assert first.prompts == [source[i]["prompt"] for i in PROMPTS for _ in range(token_credit.GROUP)]
    assert len(set(first.completions)) > 4  # sampled
    for other in others:
        assert other.completions == first.completions
        assert torch.equal(other.score_B, first.score_B)
    again = token_credit.start_texts(agents[0], Evaluator(agents[0].env, 4).mdp, PROMPTS, seed=1)
    assert again.completions != first.completions


class Bytes:
    """A tokenizer whose tokens are bytes; 0 is special."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(i for i in ids if i).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ab", ["a", "b", ""]),
        ("é!", ["", "é", "!", ""]),  # two bytes: the first shows nothing, the second the character
        ("a🙂b", ["a", "", "", "", "🙂", "b", ""]),
    ],
)
def test_pieces_of_bytes(text: str, expected: list[str]) -> None:
    assert token_credit.pieces(Bytes(), [*text.encode(), 0]) == expected


def test_pieces_of_a_broken_character_are_the_text() -> None:
    ids = [*b"a", 0xF0, 0x9F, *b"b", 0x9F]  # half an emoji, and a byte that begins nothing
    found = token_credit.pieces(Bytes(), ids)
    assert "".join(found) == Bytes().decode(ids)
    assert len(found) == len(ids)


def test_pieces_of_the_embedded_tokenizer() -> None:
    tokenizer = load_task("textrl_gym.envs.tldr_summarize").load_tokenizer()
    text = "My cat says naïve 🙂 things, and\n\nthat's  it."
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    found = token_credit.pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
    assert len(found) == len(ids)
    assert found[-1] == ""
    assert "🙂" in "".join(found[:-1]) and len([piece for piece in found if piece]) > 8


# -- quantities -------------------------------------------------------------------------------------------------------


def test_at_the_start_nothing_differs_from_the_reference(tmp_path: Path) -> None:
    agent = PPO(ENV, out=tmp_path)
    rollout = texts(agent)
    found = token_credit.token_credit(agent, rollout)
    assert list(found) == list(token_credit.QUANTITIES)
    mask_BT = rollout.mask_BT
    torch.testing.assert_close(found["kl"], torch.zeros(mask_BT.shape), atol=1e-5, rtol=0)
    torch.testing.assert_close(found["ratio"], mask_BT.float(), atol=1e-5, rtol=0)
    assert torch.equal(found["value"], torch.zeros(mask_BT.shape))  # the head starts at 0
    # V = 0, gamma = lambda = 1 and no KL: every token's advantage is the score, then whitened over all tokens.
    score_BT = rollout.score_B[:, None] * mask_BT
    torch.testing.assert_close(found["advantage"], functional.whiten(score_BT, mask_BT), atol=1e-4, rtol=0)


@pytest.mark.parametrize("cls", [PPO, GRPO, NLPO])
def test_quantities_are_those_of_the_policy_teacher_forced(cls: type[Agent], tmp_path: Path) -> None:
    agent = moved(cls, tmp_path)
    rollout = texts(agent)
    found = token_credit.token_credit(agent, rollout)
    mask_BT = rollout.mask_BT
    with torch.no_grad():
        logp_BT, ref_BT = agent.policy.logprobs(rollout), agent.policy.reference.logprobs(rollout)
        logits_BTV = agent.policy.logits(agent.policy.hidden(rollout)[mask_BT], rollout.token_BT[mask_BT])
        value_BT = agent.policy.values(rollout)
    torch.testing.assert_close(found["kl"], logp_BT - ref_BT, atol=1e-5, rtol=0)
    assert found["kl"].abs().max() > 0.05
    torch.testing.assert_close(found["ratio"][mask_BT], (logp_BT - ref_BT).exp()[mask_BT], atol=1e-4, rtol=0)
    torch.testing.assert_close(found["entropy"][mask_BT], functional.entropy(logits_BTV), atol=1e-5, rtol=0)
    assert ("value" in found) == agent.uses_value
    if agent.uses_value:
        torch.testing.assert_close(found["value"], value_BT, atol=1e-5, rtol=0)
    for name, x_BT in found.items():
        assert x_BT.dtype == torch.float32, name
        assert x_BT.shape == mask_BT.shape, name
        assert not x_BT[~mask_BT].any(), f"{name} is 0 outside the mask"


def test_grpo_gives_a_text_one_number_against_its_group(tmp_path: Path) -> None:
    agent = moved(GRPO, tmp_path)
    rollout = texts(agent)
    advantage_BT = token_credit.token_credit(agent, rollout)["advantage"]
    expected_B, _ = group_advantages(rollout.score_B, rollout.group_B, True, 1e-4)  # the KL is in its loss
    torch.testing.assert_close(advantage_BT, expected_B[:, None] * rollout.mask_BT, atol=1e-6, rtol=0)
    assert advantage_BT.abs().max() > 0.5


def test_ppo_gives_each_token_its_own(tmp_path: Path) -> None:
    agent = moved(PPO, tmp_path, gae_lambda=0.9, gamma=0.8, whiten_advantages=False)
    rollout = texts(agent)
    found = token_credit.token_credit(agent, rollout)
    # The last token: score less its KL penalty less the value before it. The one before: its own delta and 0.72 of it.
    for row in range(4):
        n = int(rollout.mask_BT[row].sum())
        kl, value, advantage = (found[name][row].tolist() for name in ("kl", "value", "advantage"))
        last = float(rollout.score_B[row]) - agent.kl.coef * kl[n - 1] - value[n - 1]
        assert advantage[n - 1] == pytest.approx(last, rel=0, abs=1e-5)
        if n > 1:
            delta = -agent.kl.coef * kl[n - 2] + 0.8 * value[n - 1] - value[n - 2]
            assert advantage[n - 2] == pytest.approx(delta + 0.72 * last, rel=0, abs=1e-5)
    assert len({round(x, 5) for x in found["advantage"][0][rollout.mask_BT[0]].tolist()}) > 1


def test_dapo_shapes_its_rewards_first(tmp_path: Path) -> None:
    agent = DAPO(ENV, out=tmp_path, scale_by_std=False, overlong_share=1.0)
    rollout = texts(agent)
    off_B = overlong(rollout.mask_BT.sum(1), agent.env.max_new_tokens, 1.0, 1.0)
    expected_B, _ = group_advantages(rollout.score_B + off_B, rollout.group_B, False, 0.0)
    advantage_BT = token_credit.token_credit(agent, rollout)["advantage"]
    torch.testing.assert_close(advantage_BT[:, 0], expected_B, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["dpo", "online_dpo", "raft", "reference", "random", "best_of_n"])
def test_agents_without_advantages_have_none(name: str, tmp_path: Path) -> None:
    agent = registry.load_agent_class(name)(ENV, out=tmp_path, rollout_episodes=16)
    assert list(token_credit.token_credit(agent, texts(agent))) == ["kl", "entropy", "ratio"]


def test_a_ratio_stays_a_number(tmp_path: Path) -> None:
    agent = GRPO(ENV, out=tmp_path, temperature=0.01)
    with torch.no_grad():
        for parameter in agent.policy.model.parameters():
            parameter.mul_(-3)  # what the reference found unlikely is certain now
    found = token_credit.token_credit(agent, agent.collect())
    assert found["kl"].max() > 90, "float32 has no exponential of that"
    assert found["ratio"].isfinite().all()


# -- the viewer sees what the update learns from ----------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Reinforce, RLOO, ReinforcePP, GRPO, PPO])
def test_an_update_learns_from_these_advantages(cls: type[Agent], tmp_path: Path) -> None:
    """advantages(rollout) is the loss's weight: the first step's gradient is that of -mean A log pi (or its mean)."""
    settings: dict[str, Any] = {"epochs": 1, "minibatches": 1, "max_grad_norm": 1e9, "kl_coef": 0.0}
    settings |= {"vf_coef": 0.0, "gae_lambda": 0.9} if cls is PPO else {}
    agent = cls(ENV, seed=1, out=tmp_path, rollout_episodes=16, group_size=4, **settings)
    rollout = agent.collect()
    advantage_BT = agent.advantages(rollout)
    assert advantage_BT is not None and not advantage_BT[~rollout.mask_BT].any()
    again = agent.advantages(rollout)
    assert again is not None and torch.equal(advantage_BT, again), "it changes nothing"
    fresh = cls(ENV, seed=1, out=tmp_path, rollout_episodes=16, group_size=4, **settings)
    divisor = len(rollout) if cls is RLOO else rollout.num_tokens
    (-(advantage_BT * fresh.policy.logprobs(rollout)).sum() / divisor).backward()
    expected = torch.cat([p.grad.flatten() for p in fresh.policy.model.parameters()])
    with last_gradient(agent) as found:
        agent.update(rollout)
    torch.testing.assert_close(found[-1][: len(expected)], expected, atol=1e-6, rtol=0)  # a critic's are after them
    assert expected.norm() > 1e-3


def test_sb3_has_those_of_its_buffer(tmp_path: Path) -> None:
    agent: Any = SB3PPO(ENV, seed=0, out=tmp_path, rollout_episodes=16, gae_lambda=0.9, whiten_advantages=False)
    torch.nn.init.normal_(agent.policy.value_head.weight, std=0.3)  # a critic with something to say
    rollout = agent.collect()
    advantage_BT = agent.advantages(rollout)
    # All texts that ended began within this first rollout: each stands in a column of the buffer as it is.
    columns = agent.algorithm.rollout_buffer.advantages.T.tolist()
    for own_T, mask_T in zip(advantage_BT, rollout.mask_BT, strict=True):
        text = own_T[mask_T].tolist()
        starts = [column[i : i + len(text)] for column in columns for i in range(len(column) - len(text) + 1)]
        assert any(text == pytest.approx(there, rel=0, abs=1e-5) for there in starts)
    assert len({round(x, 4) for x in advantage_BT[rollout.mask_BT].tolist()}) > 20
    agent.config = dataclasses.replace(agent.config, whiten_advantages=True)
    scaled = agent.advantages(rollout)[rollout.mask_BT]
    assert scaled.mean().item() == pytest.approx(0, abs=1e-5)
    assert scaled.std().item() == pytest.approx(1, abs=1e-5)


# -- what is written down ---------------------------------------------------------------------------------------------


def test_lines(tmp_path: Path) -> None:
    agent = moved(PPO, tmp_path)
    evaluator = Evaluator(agent.env, 8, seed=0)
    rows = [json.loads(line) for line in token_credit.lines(agent, evaluator.mdp, evaluator.indices, seed=0)]
    assert [row["index"] for row in rows[::2]] == evaluator.indices[:6].tolist()
    assert len(rows) == 2 * token_credit.PROMPTS
    for row in rows:
        assert "".join(row["tokens"]) == row["completion"]
        assert len(row["group_scores"]) == token_credit.GROUP
        assert row["score"] in row["group_scores"]
    for best, worst in zip(rows[::2], rows[1::2], strict=True):
        assert best["score"] == max(best["group_scores"]) and worst["score"] == min(worst["group_scores"])
    assert any(best["score"] > worst["score"] for best, worst in zip(rows[::2], rows[1::2], strict=True))
    for row in rows:
        for name in token_credit.QUANTITIES:
            assert len(row[name]) == len(row["tokens"])
            assert all(float(f"{x:.4g}") == x for x in row[name])
    assert token_credit.rounded(math.nan) is None and token_credit.rounded(-math.inf) is None
    assert token_credit.rounded(0.000123456) == 0.0001235


def test_few_prompts_are_enough(tmp_path: Path) -> None:
    agent = GRPO(ENV, out=tmp_path)
    evaluator = Evaluator(agent.env, 2, seed=0)
    assert len(token_credit.lines(agent, evaluator.mdp, evaluator.indices, seed=0)) == 4
