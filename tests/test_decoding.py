"""Agents that do not train: baselines, best-of-n, and decoding with a critic."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import textrl_gym
from textrl_gym import cli, plugins
from textrl_gym.agents import GRPO, PPO
from textrl_gym.agents.best_of_n import (
    BestOfN,
    best_of_n_kl_bound,
    best_of_n_kl_exact,
    best_of_n_logprobs,
    best_rows,
)
from textrl_gym.agents.mcts import MCTS, Leaves, puct, search
from textrl_gym.agents.random import Random
from textrl_gym.agents.reference import Reference
from textrl_gym.agents.value_guided import ValueGuided, guided_logprobs
from textrl_gym.core import Rollout
from textrl_gym.decoding import States
from textrl_gym.envs import known_optimum
from textrl_gym.evaluation import Evaluator, load_agent
from textrl_gym.rollout import collect

QUIET: dict[str, Any] = {"progress_bar": False, "eval_every": 0, "eval_episodes": 8}
COPY, KNOWN = "CopyText-v0", "KnownOptimum-v0"


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
    assert (rows[0]["kl_sequence"], rows[0]["win_rate"], rows[0]["forward_passes"]) == (0.0, 0.5, 1.0)
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
    with pytest.raises(ValueError, match="must sum to 1, got 0.75"):
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
    texts = [tokenizer.decode(y, skip_special_tokens=True) for y in every]
    score_Y = torch.tensor(known_optimum.table([prompt] * len(texts), texts))
    logp_Y = known_optimum.sequence_logprobs(agent.policy, prompt)
    p_Y = best_of_n_logprobs(logp_Y, score_Y, 4).exp()
    number = {tuple(y): i for i, y in enumerate(every)}
    drawn = [number[tuple(t[m].tolist())] for t, m in zip(rollout.token_BT, rollout.mask_BT, strict=True)]
    share_Y = torch.bincount(torch.tensor(drawn), minlength=40) / 2_000
    assert ((share_Y - p_Y).abs() <= 5 * (p_Y * (1 - p_Y) / 2_000).sqrt() + 1e-3).all()
    assert rollout.score_B.mean() > (logp_Y.exp() * score_Y).sum() + 0.3
    # what the rollout says of its KL is the bound, in every row; the exact one is less
    bound = best_of_n_kl_bound(4)
    torch.testing.assert_close(kl_of(rollout), torch.full((2_000,), bound), atol=1e-5, rtol=0)
    assert best_of_n_kl_exact(logp_Y, score_Y, 4) < bound
    assert rollout.passes_B is not None  # 4 completions of at most 3 tokens for each answer
    assert (rollout.passes_B >= rollout.mask_BT.sum(1) + 3).all() and (rollout.passes_B <= 12).all()


def test_best_of_1_is_the_reference_and_chunks_change_nothing() -> None:
    indices = list(range(8))
    start = Reference(COPY, rollout_episodes=8)
    expected = start.play(start.env, generator=generator(3), prompt_indices=indices)
    one = BestOfN(COPY, n=1, rollout_episodes=8)
    found = one.play(one.env, generator=generator(3), prompt_indices=indices)
    for field in dataclasses.fields(Rollout):
        if field.name != "passes_B":
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
    assert row["generated_tokens"] == pytest.approx(row["forward_passes"] * row["completion_tokens"], abs=1e-3)
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
    from textrl_gym.trunk import Trunk

    monkeypatch.setattr(Trunk, "shares_prompts", shares)
    agent = PPO(COPY, separate_value_model=True)
    policy, rollout = agent.policy, agent.collect()
    with torch.no_grad():
        torch.nn.init.normal_(policy.value_head.weight)  # type: ignore[union-attr]
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
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

        everyone = [0, 1, 2, 3, 4]
        check(states.now, everyone, 0)
        for _ in range(2):  # looking changes nothing: the second time is the first
            said = states.look(token_BT[:, :2], torch.tensor([2, 1, 2, 1, 2]))
            check(dataclasses.replace(said), everyone, 2) if False else None
            for row, t in enumerate((2, 1, 2, 1, 2)):
                one = dataclasses.replace(
                    said,
                    logp_BV=said.logp_BV[row : row + 1],
                    ref_logp_BV=said.ref_logp_BV[row : row + 1],  # type: ignore[index]
                    value_B=said.value_B[row : row + 1],
                )
                check(one, [row], t)
            torch.testing.assert_close(states.values(token_BT[:, 0]), value_BT[:, 1], atol=1e-5, rtol=0)
        states.keep(torch.tensor([0, 3]))
        states.step(token_BT[[0, 3], 0])
        check(states.now, [0, 3], 1)
        check(states.look(token_BT[[0, 3], 1:2], torch.tensor([1, 1])), [0, 3], 2)


# -- value-guided -----------------------------------------------------------------------------------------------------


def test_guided_logprobs_by_hand() -> None:
    # pi = 1/2, 1/4 (the rest is no candidate), V = 0, log 6 / 2: weighed by exp(2 V) they are 1/2 and 6/4, shares 1/4, 3/4
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
            player.play(agent.env, greedy=greedy, generator=generator(1), prompt_indices=list(range(64)))
            for player in (agent, saved)
        )
        assert torch.equal(found.token_BT, expected.token_BT)
        for name in ("logp_BT", "ref_logp_BT", "value_BT", "reward_BT"):
            if name == "value_BT" or not greedy:
                torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=0)


def test_a_larger_weight_prefers_the_critics_tokens(ppo: Path) -> None:
    agents = [ValueGuided(COPY, ppo=str(ppo), weight=weight, top_k=3) for weight in (0.0, 20.0)]
    plain, guided = (a.play(agents[0].env, generator=generator(1), prompt_indices=list(range(64))) for a in agents)
    assert guided.value_BT[:, 1].mean() > plain.value_BT[:, 1].mean()  # V after the first token
    passes_B = guided.passes_B
    assert passes_B is not None  # of a token: one for the text so far and at most one for each of 3 candidates
    assert (passes_B <= 4 * guided.mask_BT.sum(1)).all() and (passes_B > 2 * guided.mask_BT.sum(1)).all()


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
    tree = search(root, grow, 20, c_puct=1.0)
    assert tree.visits_BMK[0, 0].sum() == 20
    assert (tree.child_BMK[0] >= 0).sum() == 2
    torch.testing.assert_close(tree.total_BMK[0, 0], tree.visits_BMK[0, 0] * torch.tensor([1.0, 0]), atol=1e-5, rtol=0)


def test_one_simulation_is_the_policys_most_likely_token(ppo: Path) -> None:
    agent, saved = MCTS(COPY, ppo=str(ppo), simulations=1), PPO.load(ppo)
    indices = list(range(64))
    greedy = saved.play(agent.env, greedy=True, prompt_indices=indices)
    for mode in (True, False):
        found = agent.play(agent.env, greedy=mode, generator=generator(), prompt_indices=indices)
        assert torch.equal(found.token_BT, greedy.token_BT)
        assert (found.logp_BT == 0).all()  # a certain token


def test_rows_are_searched_as_if_each_were_alone(ppo: Path) -> None:
    agent = MCTS(COPY, ppo=str(ppo), simulations=12, rollout_episodes=6)
    alone = MCTS(agent.env.remake(1), ppo=str(ppo), simulations=12)
    together = agent.play(agent.env, greedy=True, prompt_indices=list(range(6)))
    for row in range(6):
        one = alone.play(alone.env, greedy=True, prompt_indices=[row])
        assert one.completions == [together.completions[row]]
        torch.testing.assert_close(one.logp_BT[0], together.logp_BT[row, : one.logp_BT.shape[1]], atol=1e-5, rtol=0)


def known_ppo(folder: Path) -> tuple[Path, PPO]:
    """A saved PPO on KnownOptimum-v0 whose policy is not its reference, so that the KL penalty matters."""
    agent = PPO(KNOWN, seed=0, out=folder, learning_rate=3e-3, rollout_episodes=256, kl_coef=0.5)
    agent.learn(2_000, **QUIET)
    return folder, agent


class Exact:
    """V of every state of a prompt of KnownOptimum-v0 by enumeration: the expected KL-shaped return from there on."""

    def __init__(self, agent: Any, prompt: str, kl_coef: float) -> None:
        tokenizer = agent.env.tokenizer
        self.every = known_optimum.completions()
        texts = [tokenizer.decode(y, skip_special_tokens=True) for y in self.every]
        logp_Y = known_optimum.sequence_logprobs(agent.policy, prompt)
        log_ratio_Y = logp_Y - known_optimum.sequence_logprobs(agent.policy.reference, prompt)
        score_Y = torch.tensor(known_optimum.table([prompt] * len(texts), texts), dtype=torch.float64)
        self.return_Y, self.p_Y = score_Y - kl_coef * log_ratio_Y, logp_Y.exp()
        self.best = self.every[int(self.return_Y.argmax())]

    def value(self, start: tuple[int, ...], past: float) -> float:
        """Expected return after `start`, whose own penalties were `past`."""
        inside = torch.tensor([tuple(y[: len(start)]) == start for y in self.every])
        return float((self.p_Y * self.return_Y)[inside].sum() / self.p_Y[inside].sum()) - past


@pytest.mark.parametrize("number", [0, 1])
def test_with_an_exact_critic_search_finds_the_best_kl_shaped_return(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, saved = known_ppo(tmp_path / "ppo")
    agent = MCTS(KNOWN, ppo=str(folder), simulations=800, end_value="score", c_puct=1.0, rollout_episodes=1)
    exact = Exact(saved, known_optimum.PROMPTS[number], saved.kl.coef)
    chosen: list[int] = []

    def next_token(self: Any, states: States, endings: Any, row_b: list[int], texts: list[list[int]]) -> Any:
        """As MCTS does, with the critic's values from enumeration."""
        past_of: dict[tuple[int, ...], float] = {}

        def values(token_ids: tuple[int, ...], opinion: Any) -> Any:
            past = past_of.get(token_ids, 0.0)
            return dataclasses.replace(opinion, value_B=torch.tensor([exact.value(token_ids, past)]))

        look = states.look

        def exact_look(path_BK: Tensor, length_B: Tensor) -> Any:
            said = look(path_BK, length_B)
            ids = (*texts[0], *path_BK[0, : int(length_B[0])].tolist())
            past_of[ids] = penalty(agent, saved, number, ids)
            return values(ids, said)

        ids = tuple(texts[0])
        past_of[ids] = penalty(agent, saved, number, ids)
        states.now = values(ids, states.now)
        monkeypatch.setattr(states, "look", exact_look)
        return original(self, states, endings, row_b, texts)

    original = MCTS.next_token
    monkeypatch.setattr(MCTS, "next_token", next_token)
    rollout = agent.play(agent.env, greedy=True, prompt_indices=[number])
    chosen = rollout.token_BT[0][rollout.mask_BT[0]].tolist()
    assert chosen == exact.best
    # it is no matter of the score alone, nor of the most likely tokens: see that the test could fail
    assert chosen != PPO.load(folder).play(agent.env, greedy=True, prompt_indices=[number]).token_BT[0].tolist()
