"""Agents that do not train: baselines, best-of-n, and decoding with a critic."""

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import textrl_gym
from textrl_gym.agents import GRPO, PPO
from textrl_gym.agents.best_of_n import (
    BestOfN,
    best_of_n_kl_exact,
    best_of_n_logprobs,
    best_rows,
)
from textrl_gym.agents.mcts import MCTS, Leaves, puct, search
from textrl_gym.agents.random import Random
from textrl_gym.agents.reference import Reference
from textrl_gym.agents.value_guided import ValueGuided, guided_logprobs
from textrl_gym.cli import main
from textrl_gym.core import Rollout, StopReason
from textrl_gym.envs import known_optimum
from textrl_gym.models import tiny
from textrl_gym.policy.backbone import Trunk
from textrl_gym.policy.policy import Policy
from textrl_gym.registry import load_agent
from textrl_gym.stats.overoptimization import best_of_n_kl_bound
from textrl_gym.training.guided_decoding import States

QUIET: dict[str, Any] = {"progress_bar": False, "eval_every": 0, "eval_episodes": 8}
COPY, KNOWN = "CopyText-v0", "KnownOptimum-v0"
ROWS = list(range(16)) * 4  # all prompts of CopyText-v0


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kl_of(rollout: Rollout) -> Tensor:
    """The sequence KL's estimate, [B]."""
    return ((rollout.logp_BT - rollout.ref_logp_BT) * rollout.mask_BT).sum(1)


@pytest.fixture(scope="module")
def ppo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PPO on CopyText-v0 with a critic that has learnt something."""
    out = tmp_path_factory.mktemp("ppo") / "shared"
    agent = PPO(COPY, seed=0, out=out, learning_rate=3e-3, vf_coef=0.5, kl_coef=0.02)
    agent.learn(4_000, **QUIET)
    return out


@pytest.fixture(scope="module")
def ppo_apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a critic of its own trunk."""
    out = tmp_path_factory.mktemp("ppo") / "apart"
    agent = PPO(COPY, seed=0, out=out, learning_rate=3e-3, separate_value_model=True, kl_coef=0.02)
    agent.learn(2_000, **QUIET)
    return out


# -- baselines --------------------------------------------------------------------------------------------------------


def test_the_reference_is_the_start(tmp_path: Path) -> None:
    agent = Reference(COPY, out=tmp_path)
    agent.learn(0, **QUIET)
    rows = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert len(rows) == 1  # one evaluation, and nothing to compare it with
    start = (rows[0]["kl_sequence"], rows[0]["win_rate"], rows[0]["model_calls"])
    assert start == pytest.approx((0.0, 0.5, 1.0), abs=1e-6, rel=0)  # the KL is rounding: 7e-8 on some machines
    again = load_agent(tmp_path)
    assert textrl_gym.evaluate(again, episodes=8) == textrl_gym.evaluate(agent, episodes=8)


def test_random_tokens_are_uniform_and_end_where_eos_is_drawn() -> None:
    agent = Random(COPY, rollout_episodes=256)
    rollout = agent.play(agent.env, generator=generator())
    vocabulary = agent.env.vocab_size
    expected_BT = -math.log(vocabulary) * rollout.mask_BT
    torch.testing.assert_close(rollout.logp_BT, expected_BT, atol=1e-6, rtol=0)
    # the first token: 256 draws of V = 5 symbols or so; 5 standard deviations of a share are 5 sqrt(p (1 - p) / 256)
    share = rollout.token_BT[:, 0].bincount(minlength=vocabulary) / 256
    p = 1 / vocabulary
    assert ((share - p).abs() < 5 * (p * (1 - p) / 256) ** 0.5).all()
    assert kl_of(rollout).mean() > 0  # the start is not uniform
    greedy = agent.play(agent.env, greedy=True, generator=generator())
    assert greedy.token_BT[:, 0].unique().numel() == vocabulary
    observation, _ = agent.env.reset(seed=0)
    assert len(set(agent.predict(observation, deterministic=True)[0].tolist())) == vocabulary


# -- best of n --------------------------------------------------------------------------------------------------------


def test_bound_by_hand() -> None:
    # log 1 - 0; log 2 - 1/2; log 4 - 3/4
    assert best_of_n_kl_bound(1) == 0
    assert best_of_n_kl_bound(2) == pytest.approx(0.693147 - 0.5, abs=1e-6)
    assert best_of_n_kl_bound(4) == pytest.approx(1.386294 - 0.75, abs=1e-6)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        best_of_n_kl_bound(0)


def test_exact_kl_by_hand() -> None:
    # pi = 1/2, 1/4, 1/4 with scores 0, 1, 1 and n = 2: F = 1/2, 1, 1. The first wins with 1/4, so the two that tie
    # have 3/8 each. KL = 1/4 log(1/2) + 2 * 3/8 log(3/2) = -0.173287 + 0.304099
    logp_Y = torch.tensor([0.5, 0.25, 0.25]).log()
    score_Y = torch.tensor([0.0, 1.0, 1.0])
    expected = torch.tensor([0.25, 0.375, 0.375], dtype=torch.float64)
    torch.testing.assert_close(best_of_n_logprobs(logp_Y, score_Y, 2).exp(), expected, atol=1e-7, rtol=0)
    assert best_of_n_kl_exact(logp_Y, score_Y, 2) == pytest.approx(-0.173287 + 0.304099, abs=1e-6)
    assert best_of_n_kl_exact(logp_Y, score_Y, 1) == pytest.approx(0.0, abs=1e-7)
    # without ties every possible winner is one outcome; 1,000 equal ones are near the bound and below it
    many_Y = torch.full((1000,), -math.log(1000.0))
    near = best_of_n_kl_exact(many_Y, torch.arange(1000.0), 4)
    assert 0 < best_of_n_kl_bound(4) - near < 0.005
    # when all tie, the best is any sample
    assert best_of_n_kl_exact(many_Y, torch.zeros(1000), 4) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match=r"must sum to 1, got 0\.75"):
        best_of_n_logprobs(logp_Y[:2], score_Y[:2], 2)


@pytest.mark.parametrize("n", [2, 3])
def test_exact_kl_is_brute_force(n: int) -> None:
    logp_Y = torch.randn(5, generator=generator(), dtype=torch.float64).log_softmax(0)
    score_Y = torch.tensor([2.0, 1.0, 2.0, 0.0, 1.0])
    chosen_Y = torch.zeros(5, dtype=torch.float64)
    for draw in itertools.product(range(5), repeat=n):  # all draws of n, the first of the best being chosen
        chosen_Y[max(draw, key=lambda y: score_Y[y].item())] += logp_Y[list(draw)].sum().exp()
    torch.testing.assert_close(best_of_n_logprobs(logp_Y, score_Y, n).exp(), chosen_Y, atol=1e-12, rtol=0)
    by_hand = float((chosen_Y * (chosen_Y.log() - logp_Y)).sum())
    assert best_of_n_kl_exact(logp_Y, score_Y, n) == pytest.approx(by_hand, abs=1e-12)
    assert by_hand < best_of_n_kl_bound(n)


def test_best_rows_take_the_first_of_equals() -> None:
    assert best_rows(torch.tensor([0.0, 3, 3, 1, 1, 1]), 3).tolist() == [1, 3]


def test_best_of_n_is_drawn_from_its_exact_distribution() -> None:
    # 2,000 answers over 40 completions: each share within 5 standard deviations
    agent = BestOfN(KNOWN, n=4, rollout_episodes=2_000, rows_at_once=3_000)
    rollout = agent.play(agent.env, generator=generator(), prompt_indices=[0] * 2_000)
    tokenizer, prompt = agent.env.tokenizer, known_optimum.PROMPTS[0]
    every = known_optimum.completions()
    texts = [str(tokenizer.decode(y, skip_special_tokens=True)) for y in every]
    score_Y = torch.tensor(known_optimum.table([prompt] * len(texts), texts))
    logp_Y = known_optimum.sequence_logprobs(agent.policy, prompt)
    p_Y = best_of_n_logprobs(logp_Y, score_Y, 4).exp()
    number = {tuple(y): i for i, y in enumerate(every)}
    drawn = [number[tuple(t[m].tolist())] for t, m in zip(rollout.token_BT, rollout.mask_BT, strict=True)]
    share_Y = torch.bincount(torch.tensor(drawn), minlength=40) / 2_000
    assert ((share_Y - p_Y).abs() <= 5 * (p_Y * (1 - p_Y) / 2_000).sqrt() + 1e-3).all()
    assert rollout.score_B.mean() > (logp_Y.exp() * score_Y).sum() + 0.1
    # what the rollout says of its KL is the bound, in every row; the exact one is less
    bound = best_of_n_kl_bound(4)
    torch.testing.assert_close(kl_of(rollout), torch.full((2_000,), bound), atol=5e-5, rtol=0)
    assert best_of_n_kl_exact(logp_Y, score_Y, 4) < bound
    assert rollout.model_calls_B is not None  # 4 completions of at most 3 tokens for each answer
    assert (rollout.model_calls_B >= rollout.mask_BT.sum(1) + 3).all() and (rollout.model_calls_B <= 12).all()


def test_best_of_1_is_the_reference_and_chunks_change_nothing() -> None:
    indices = list(range(8))
    start = Reference(COPY, rollout_episodes=8)
    expected = start.play(start.env, generator=generator(3), prompt_indices=indices)
    one = BestOfN(COPY, n=1, rollout_episodes=8)
    found = one.play(one.env, generator=generator(3), prompt_indices=indices)
    for field in dataclasses.fields(Rollout):
        if field.name != "model_calls_B":
            a, b = getattr(expected, field.name), getattr(found, field.name)
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, field.name
    numbers = textrl_gym.evaluate(one, episodes=8)
    assert numbers.pop("kl_bound") == 0
    assert numbers.pop("scored_completions") == 1
    assert numbers.pop("generated_tokens") == numbers["completion_tokens"]
    assert numbers == textrl_gym.evaluate(start, episodes=8)
    whole, parts = (  # all at once, and two prompts at a time
        BestOfN(start.env, n=3, rows_at_once=rows).play(start.env, generator=generator(3), prompt_indices=indices)
        for rows in (1_000, 7)
    )
    assert torch.equal(whole.token_BT, parts.token_BT) and whole.completions == parts.completions
    assert whole.group_B.tolist() == parts.group_B.tolist() == list(range(8))


def test_best_of_n_says_what_it_costs(tmp_path: Path) -> None:
    agent = BestOfN(COPY, n=4, out=tmp_path)
    agent.learn(0, **QUIET)
    row = json.loads((tmp_path / "evaluations.jsonl").read_text())
    assert row["kl_sequence"] == pytest.approx(best_of_n_kl_bound(4), abs=1e-4)  # the policy is its own reference
    assert (row["kl_bound"], row["scored_completions"]) == (best_of_n_kl_bound(4), 4)
    assert row["generated_tokens"] == pytest.approx(row["model_calls"] * row["completion_tokens"], abs=1e-3)
    assert row["generated_tokens"] > 3 * row["completion_tokens"] / 2
    again = load_agent(tmp_path, n=2)
    assert textrl_gym.evaluate(again, episodes=8)["scored_completions"] == 2
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        BestOfN(COPY, n=0)


# -- looking ahead ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [True, False])
def test_looking_gives_the_states_of_the_full_pass_and_forgets_them(
    shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trunk, "shares_prompts", shares)
    agent = PPO(COPY, separate_value_model=True)
    policy = agent.policy
    assert policy.reference is not None and policy.value_head is not None
    with torch.no_grad():
        torch.nn.init.normal_(policy.value_head.weight)
        for parameter in (*policy.reference.parameters(), *policy.value_model.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator())  # three models that differ
        rollout = agent.collect()
        rollout = rollout.select((rollout.mask_BT.sum(1) >= 3).nonzero().squeeze(1)[:5])
        prompt_ids = [ids[mask].tolist() for ids, mask in zip(rollout.prompt_BP, rollout.prompt_mask_BP, strict=True)]
        logp_BT, value_BT, ref_BT = rollout.logp_BT, policy.values(rollout), rollout.ref_logp_BT
        token_BT = rollout.token_BT
        states = States(policy, prompt_ids, token_BT.shape[1], reference=True)
        assert states.models == 3

        def check(opinion: Any, rows: list[int], t: int) -> None:
            at = token_BT[rows, t][:, None]
            assert opinion.ref_logp_BV is not None
            for found, expected in (
                (opinion.logp_BV.gather(1, at)[:, 0], logp_BT[rows, t]),
                (opinion.ref_logp_BV.gather(1, at)[:, 0], ref_BT[rows, t]),
                (opinion.value_B, value_BT[rows, t]),
            ):
                torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)

        everyone = [0, 1, 2, 3, 4]
        check(states.now, everyone, 0)
        for _ in range(2):  # looking changes nothing: the second time is the first
            said = states.look(token_BT[:, :2], torch.tensor([2, 1, 2, 1, 2]))
            for row, t in enumerate((2, 1, 2, 1, 2)):
                one = dataclasses.replace(
                    said,
                    logp_BV=said.logp_BV[row : row + 1],
                    ref_logp_BV=said.ref_logp_BV[row : row + 1],  # type: ignore[index]
                    value_B=said.value_B[row : row + 1],
                )
                check(one, [row], t)
            torch.testing.assert_close(states.values(token_BT[:, 0]), value_BT[:, 1], atol=5e-5, rtol=0)
        states.keep(torch.tensor([0, 3]))
        states.step(token_BT[[0, 3], 0])
        check(states.now, [0, 3], 1)
        check(states.look(token_BT[[0, 3], 1:2], torch.tensor([1, 1])), [0, 3], 2)


# -- value-guided -----------------------------------------------------------------------------------------------------


def test_guided_logprobs_by_hand() -> None:
    # pi = 1/2, 1/4 (the rest is no candidate), V = 0, log 6 / 2: weighed by exp(2 V) 1/2 and 6/4, shares 1/4 and 3/4
    logp_BK, value_BK = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.0, math.log(6.0) / 2]])
    expected = torch.tensor([[0.25, 0.75]])
    torch.testing.assert_close(guided_logprobs(logp_BK, value_BK, 2.0).exp(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("which", ["ppo", "ppo_apart"])
def test_weight_0_is_the_policy(which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    agent = ValueGuided(COPY, ppo=str(folder), weight=0.0, top_k=99)
    saved = PPO.load(folder)
    for greedy in (False, True):
        found, expected = (
            player.play(agent.env, greedy=greedy, generator=generator(1), prompt_indices=ROWS)
            for player in (agent, saved)
        )
        assert torch.equal(found.token_BT, expected.token_BT)
        for name in ("logp_BT", "ref_logp_BT", "value_BT", "reward_BT"):
            if name == "value_BT" or not greedy:
                torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=5e-5, rtol=0)


def test_a_larger_weight_prefers_the_critics_tokens(ppo: Path) -> None:
    agents = [ValueGuided(COPY, ppo=str(ppo), weight=weight, top_k=3) for weight in (0.0, 20.0)]
    plain, guided = (a.play(agents[0].env, generator=generator(1), prompt_indices=ROWS) for a in agents)
    assert guided.value_BT[:, 1].mean() > plain.value_BT[:, 1].mean()  # V after the first token
    model_calls_B = guided.model_calls_B
    assert model_calls_B is not None  # of a token: one for the text so far and at most one for each of 3 candidates
    assert (model_calls_B <= 4 * guided.mask_BT.sum(1)).all() and (model_calls_B > 2 * guided.mask_BT.sum(1)).all()


# -- tree search ------------------------------------------------------------------------------------------------------


def test_puct_by_hand() -> None:
    # N = 1 + 3 + 0 = 4, sqrt 2, c = 1.5: 6 / 3 + 1.5 * 0.5 * 2 / 4 = 2.375, and V + 1.5 * 0.25 * 2 / 1 = 1.75
    score = puct(
        torch.tensor([[0.5, 0.25]]), torch.tensor([[3.0, 0]]), torch.tensor([[6.0, 0]]), torch.tensor([1.0]), 1.5
    )
    torch.testing.assert_close(score, torch.tensor([[2.375, 1.75]]), atol=1e-6, rtol=0)


def grown(values: dict[tuple[int, ...], float], reward: float, over: set[tuple[int, ...]]) -> Any:
    """grow() of a tree with two candidates everywhere, priors 3/4 and 1/4, one row; the second one's edge costs."""

    def leaves(path: tuple[int, ...]) -> Leaves:
        return Leaves(
            torch.tensor([[1, 2]]),
            torch.tensor([[0.75, 0.25]]),
            torch.tensor([[0.0, reward]]),
            torch.tensor([values[path]]),
            torch.tensor([path in over]),
        )

    def grow(path_BD: Tensor, length_B: Tensor, before_B: Tensor, fresh_B: Tensor) -> Leaves:
        return leaves(tuple(path_BD[0, : int(length_B[0])].tolist()))

    return leaves(()), grow


def test_search_by_hand() -> None:
    # c = 1, V(root) = 0. Token 2's edges cost 0.5.
    # 1: scores 0.75, 0.25 (sqrt N = 1): token 1, V = -1.                    Q(1) = -1, N = 1, 0
    # 2: sqrt 2: -1 + 0.75 * 1.414 / 2 = -0.470, 0 + 0.25 * 1.414 = 0.354: token 2, V = 2, return 2 - 0.5 = 1.5
    # 3: sqrt 3: -1 + 0.375 * 1.732 = -0.350, 1.5 + 0.125 * 1.732 = 1.717: token 2, whose own scores are
    #    2 + 0.75 and 2 + 0.25: (2, 1), V = 0, over. Q(2) = (1.5 + (0 - 0.5)) / 2 = 0.5, N = 1, 2
    # 4: sqrt 4: -1 + 0.75 = -0.25, 0.5 + 0.25 * 2 / 3 = 0.667: token 2; there N = 2, sqrt 1.414:
    #    Q(2, 1) = 0 + 0.75 * 1.414 / 2 = 0.530, V + 0.25 * 1.414 = 2.354: (2, 2), V = 6, return 6 - 0.5 - 0.5 = 5
    #    Q(2) = (1.5 - 0.5 + 5) / 3 = 2, N = 1, 3
    values = {(): 0.0, (1,): -1.0, (2,): 2.0, (2, 1): 0.0, (2, 2): 6.0}
    root, grow = grown(values, -0.5, over={(2, 1)})
    for simulations, visits, totals in (
        (1, [1, 0], [-1.0, 0]),
        (2, [1, 1], [-1.0, 1.5]),
        (3, [1, 2], [-1.0, 1.0]),
        (4, [1, 3], [-1.0, 6.0]),
    ):
        tree = search(root, grow, simulations, c_puct=1.0)
        assert tree.visits_BMK[0, 0].tolist() == visits
        torch.testing.assert_close(tree.total_BMK[0, 0], torch.tensor(totals), atol=1e-6, rtol=0)
    assert tree.child_BMK[0, 0].tolist() == [1, 2]
    assert tree.child_BMK[0, 2].tolist() == [3, 4]


def test_what_is_over_has_no_children() -> None:
    # Both candidates end the text: 20 visits, 2 nodes, and Q is V of each.
    root, grow = grown({(): 0.0, (1,): 1.0, (2,): 0.0}, 0.0, over={(1,), (2,)})
    tree = search(root, grow, 20, c_puct=4.0)
    assert tree.visits_BMK[0, 0].sum() == 20
    assert (tree.child_BMK[0] >= 0).sum() == 2
    torch.testing.assert_close(tree.total_BMK[0, 0], tree.visits_BMK[0, 0] * torch.tensor([1.0, 0]), atol=5e-5, rtol=0)


def test_one_simulation_is_the_policys_most_likely_token(ppo: Path) -> None:
    agent, saved = MCTS(COPY, ppo=str(ppo), simulations=1), PPO.load(ppo)
    indices = ROWS
    greedy = saved.play(agent.env, greedy=True, prompt_indices=indices)
    for mode in (True, False):
        found = agent.play(agent.env, greedy=mode, generator=generator(), prompt_indices=indices)
        assert torch.equal(found.token_BT, greedy.token_BT)
        assert (found.logp_BT == 0).all()  # a certain token


def test_below_float32_the_search_keeps_its_own_log_probabilities(tmp_path: Path) -> None:
    # Rollouts of a policy in bfloat16 get its log-probabilities anew; those of a search are not the policy's.
    PPO(COPY, dtype="bfloat16", out=tmp_path).save(tmp_path / "ppo")
    agent = MCTS(COPY, ppo=str(tmp_path / "ppo"), simulations=1, rollout_episodes=8)
    assert agent.policy.dtype == torch.bfloat16
    assert (agent.play(agent.env, generator=generator()).logp_BT == 0).all()


def test_rows_are_searched_as_if_each_were_alone(ppo: Path) -> None:
    agent = MCTS(COPY, ppo=str(ppo), simulations=12, rollout_episodes=6)
    alone = MCTS(agent.env.remake(1), ppo=str(ppo), simulations=12)
    together = agent.play(agent.env, greedy=True, prompt_indices=list(range(6)))
    for row in range(6):
        one = alone.play(alone.env, greedy=True, prompt_indices=[row])
        assert one.completions == [together.completions[row]]
        torch.testing.assert_close(one.logp_BT[0], together.logp_BT[row, : one.logp_BT.shape[1]], atol=5e-5, rtol=0)


class Enumerated:
    """A prompt of KnownOptimum-v0 with all its completions: exact policies, values and KL-shaped returns."""

    def __init__(self, policy: Policy, reference: Policy, prompt: str, kl_coef: float) -> None:
        tokenizer = known_optimum.KnownOptimum().load_tokenizer()
        self.every = [tuple(y) for y in known_optimum.completions()]
        texts = [str(tokenizer.decode(list(y), skip_special_tokens=True)) for y in self.every]
        self.logp_Y, self.ref_Y = (known_optimum.sequence_logprobs(p, prompt) for p in (policy, reference))
        score_Y = torch.tensor(known_optimum.table([prompt] * len(texts), texts), dtype=torch.float64)
        penalty_Y = kl_coef * (self.logp_Y - self.ref_Y)
        self.kl_coef, self.return_Y = kl_coef, score_Y - penalty_Y
        self.best, self.by_score, self.by_penalty = (
            list(self.every[int(x_Y.argmax())]) for x_Y in (self.return_Y, score_Y, -penalty_Y)
        )

    def among(self, start: tuple[int, ...], x_Y: Tensor) -> Tensor:
        return x_Y[torch.tensor([y[: len(start)] == start for y in self.every])]

    def logp(self, start: tuple[int, ...], logp_Y: Tensor) -> float:
        """Of a beginning."""
        return float(self.among(start, logp_Y).logsumexp(0))

    def leaves(self, start: tuple[int, ...]) -> Leaves:
        """A node with its exact value: the expected score after it, less the expected penalties after it."""
        here, ref_here = (self.logp(start, x_Y) for x_Y in (self.logp_Y, self.ref_Y))
        p_Y = (self.among(start, self.logp_Y) - here).exp()
        value = float((p_Y * self.among(start, self.return_Y)).sum()) + self.kl_coef * (here - ref_here)
        over = start in self.every
        after = [(*start, a) for a in range(4)] if not over else [start] * 4
        logp_K, ref_K = (
            torch.tensor([[self.logp(y, x_Y) - before for y in after]])
            for x_Y, before in ((self.logp_Y, here), (self.ref_Y, ref_here))
        )
        reward_K = -self.kl_coef * (logp_K - ref_K)
        return Leaves(torch.arange(4)[None], logp_K.exp(), reward_K, torch.tensor([value]), torch.tensor([over]))


def two_policies() -> tuple[Any, Any]:
    """A model and a reference that differ, so that the KL penalty matters; no token of either is very unlikely."""
    return tiny.llama(4, scale=0.12, seed=2), tiny.llama(4, scale=0.12, seed=12)


@pytest.mark.parametrize("prompt", known_optimum.PROMPTS)
def test_with_an_exact_critic_search_finds_the_best_kl_shaped_return(prompt: str) -> None:
    policy, reference = (Policy(model) for model in two_policies())
    exact = Enumerated(policy, reference, prompt, kl_coef=1.0)
    assert exact.best != exact.by_penalty  # the score matters
    assert (exact.best == exact.by_score) == (prompt == "a")  # and for the other prompt the penalty too
    text: tuple[int, ...] = ()
    while text not in exact.every:

        def grow(path_BD: Tensor, length_B: Tensor, *_: Tensor, text: tuple[int, ...] = text) -> Leaves:
            return exact.leaves((*text, *path_BD[0, : int(length_B[0])].tolist()))

        tree = search(exact.leaves(text), grow, 300, c_puct=2.0)
        text = (*text, int(tree.visits_BMK[0, 0].argmax()))
    assert list(text) == exact.best


def test_the_agent_finds_it_too_where_ends_are_scored(tmp_path: Path) -> None:
    # The critic has learnt nothing (V = 0); all there is to know comes from the ends.
    model, reference = two_policies()
    saved = PPO(KNOWN, model, reference, kl_coef=1.0, out=tmp_path)
    saved.save(tmp_path / "ppo")
    agent = MCTS(KNOWN, ppo=str(tmp_path / "ppo"), simulations=400, end_value="score", c_puct=2.0, rollout_episodes=2)
    rollout = agent.play(agent.env, greedy=True, prompt_indices=[0, 1])
    for row, prompt in enumerate(known_optimum.PROMPTS):
        assert saved.policy.reference is not None
        best = Enumerated(saved.policy, saved.policy.reference, prompt, kl_coef=1.0).best
        assert rollout.token_BT[row][rollout.mask_BT[row]].tolist() == best


# -- as agents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["ppo", "ppo_apart"])
@pytest.mark.parametrize("cls", [ValueGuided, MCTS])
def test_saved_and_loaded_they_play_the_same_without_the_ppo(
    cls: type[Any], which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    ppo = tmp_path / "ppo"
    shutil.copytree(request.getfixturevalue(which), ppo)
    agent = cls(COPY, ppo=str(ppo), out=tmp_path / "run", rollout_episodes=8)
    agent.learn(0, **QUIET)
    shutil.rmtree(ppo)
    again = load_agent(tmp_path / "run")
    found, expected = (a.play(agent.env, generator=generator(2), prompt_indices=list(range(8))) for a in (again, agent))
    for field in dataclasses.fields(Rollout):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, field.name
    assert again.kl.coef == 0.02
    again.save(tmp_path / "copy")
    assert torch.equal(load_agent(tmp_path / "copy").policy.value_head.weight, agent.policy.value_head.weight)


def test_what_is_no_critic_says_so(ppo: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ppo must name the folder of a saved agent with a critic, got ''"):
        MCTS(COPY)
    with pytest.raises(ValueError, match=r"nowhere' is no saved agent: it holds no agent\.json"):
        MCTS(COPY, ppo=str(tmp_path / "nowhere"))
    GRPO(COPY, out=tmp_path).save(tmp_path / "grpo")
    with pytest.raises(ValueError, match="holds the agent 'grpo', which has no critic: ppo must name a saved PPO"):
        ValueGuided(COPY, ppo=str(tmp_path / "grpo"))
    with pytest.raises(ValueError, match="model and reference are those of ppo"):
        MCTS(COPY, tiny.gpt2(5, 5), ppo=str(ppo))
    wrong: list[dict[str, Any]] = [{"simulations": 0}, {"c_puct": -1.0}, {"visit_temperature": 0.0}, {"top_k": 0}]
    for settings in wrong:
        ((name, value),) = settings.items()
        with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
            MCTS(COPY, ppo=str(ppo), **settings)
    with pytest.raises(ValueError, match="weight must be at least 0, got -1"):
        ValueGuided(COPY, ppo=str(ppo), weight=-1.0)
    with pytest.raises(ValueError, match="end_value must be one of critic, score, got 'x'"):
        MCTS(COPY, ppo=str(ppo), end_value="x")


def test_stop_strings_end_a_search_too(ppo: Path) -> None:
    plain = MCTS(COPY, ppo=str(ppo), simulations=4, rollout_episodes=16)
    symbol = plain.env.scorer.decode([int(plain.play(plain.env, greedy=True, prompt_indices=[0] * 16).token_BT[0, 0])])
    env = plain.env.remake(16, stop=symbol)
    for player in (plain, ValueGuided(env, ppo=str(ppo))):
        rollout = player.play(env, greedy=True, prompt_indices=[0] * 16)
        assert (rollout.mask_BT.sum(1) == 1).all()
        assert rollout.stop_B.tolist() == [int(StopReason.STOP_STRING)] * 16


def test_scored_ends_know_the_score(ppo: Path) -> None:
    # On CopyText the score of a text that has ended is all that is not known to a critic of V = 0: with few tokens and
    # many rounds the search finds what the policy does not.
    agents = [MCTS(COPY, ppo=str(ppo), simulations=30, top_k=5, end_value=end) for end in ("critic", "score")]
    rollouts = [a.play(agents[0].env, generator=generator(), prompt_indices=ROWS) for a in agents]
    assert rollouts[1].score_B.mean() > rollouts[0].score_B.mean()
    passes = [float(r.model_calls_B.sum()) / r.num_tokens for r in rollouts if r.model_calls_B is not None]
    assert all(2 < p <= 2 * 31 for p in passes)  # policy with critic, and reference: of the text, and of each new node


def test_by_the_command_line(ppo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--eval-episodes", "4"]
    for name, more in (("reference", []), ("random", []), ("best_of_n", ["--n", "2"])):
        assert main.main(["train", name, COPY, *few, *more, "--out", str(tmp_path / name)]) == 0
        assert main.main(["evaluate", str(tmp_path / name), "--episodes", "4"]) == 0
    out = capsys.readouterr().out
    assert "Model calls per token" in out and "Completions scored per prompt" in out
    assert "Tokens generated per prompt" in out
    more = ["--ppo", str(ppo), "--simulations", "2", *few]
    assert main.main(["train", "mcts", COPY, *more, "--out", str(tmp_path / "mcts")]) == 0
    assert main.main(["evaluate", str(tmp_path / "mcts"), "--episodes", "4"]) == 0
    assert main.main(["report", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main.main(["train", "--resume", str(tmp_path / "reference")]) == 2
    assert "Reference, which does not train: nothing to resume" in capsys.readouterr().err
    assert main.main(["train", "grpo", COPY, "--out", str(tmp_path / "grpo")]) == 2
    assert "grpo trains: give --total-timesteps N" in capsys.readouterr().err
