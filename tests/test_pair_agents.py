"""DPO, online DPO and RAFT: losses by hand, what they are at the reference, known optima, and that they learn."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from minibatches import last_gradient, minibatch
from torch import Tensor

import textrl_gym
from textrl_gym.agents.dpo import DPO
from textrl_gym.agents.online_dpo import OnlineDPO
from textrl_gym.agents.raft import RAFT, best_of_groups, raft_loss
from textrl_gym.core import Rollout
from textrl_gym.envs import known_optimum
from textrl_gym.envs.guess_number import GuessNumber
from textrl_gym.mdp.text_env import TextVectorEnv
from textrl_gym.registry import load_agent
from textrl_gym.rollouts.batching import micro_batches
from textrl_gym.training.agent import Agent
from textrl_gym.training.preference_pairs import PairConfig, as_pairs, label_pairs, pair_loss, pairs_loss

QUIET: dict[str, Any] = {"progress_bar": False, "eval_every": 0, "eval_episodes": 8}


def weights(agent: Agent) -> Tensor:
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])


def gradient(agent: Agent) -> Tensor:
    return torch.cat([p.grad.flatten() for p in agent.policy.parameters() if p.grad is not None])


# -- losses -----------------------------------------------------------------------------------------------------------


def test_pair_losses_by_hand() -> None:
    # h = 2, -1, 0 with beta 0.5: beta h = 1, -0.5, 0
    margin_N = torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64)
    for loss, chance, expected in (
        ("sigmoid", 1.0, [math.log1p(math.exp(-1)), math.log1p(math.exp(0.5)), math.log(2)]),
        # 3/4 log(1 + e^-1) + 1/4 log(1 + e), and so on
        ("sigmoid", 0.75, [
            0.75 * math.log1p(math.exp(-1)) + 0.25 * math.log1p(math.exp(1)),
            0.75 * math.log1p(math.exp(0.5)) + 0.25 * math.log1p(math.exp(-0.5)),
            math.log(2),
        ]),
        ("ipo", 1.0, [1.0, 4.0, 1.0]),  # 1 / (2 beta) = 1: (2 - 1)^2, (-1 - 1)^2, 1
        ("hinge", 1.0, [0.0, 1.5, 1.0]),  # 1 - 1, 1 + 0.5, 1
        ("hinge", 0.75, [0.5, 1.25, 1.0]),  # 1/4 (1 + 1), 3/4 (1 + 0.5) + 1/4 (1 - 0.5), 1
        ("ipo", 0.75, [3.0, 3.0, 1.0]),  # 3/4 1 + 1/4 (-2 - 1)^2, 3/4 4 + 1/4 0, 1
    ):  # fmt: skip
        found_N = pair_loss(margin_N, loss, 0.5, torch.tensor(chance))  # type: ignore[arg-type]
        torch.testing.assert_close(found_N, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_pairs_of_the_prompts_that_are_not_used_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: dict[str, dict[str, str]] = {"prompts": {}, "pairs": {"chosen": "a", "rejected": "b"}}
    words = "its columns chosen and rejected are not used"
    for name, row in rows.items():
        lines = [json.dumps(row | {"prompt": f"a b {n}"}) + "\n" for n in range(12)]
        (path := tmp_path / f"{name}.jsonl").write_text("".join(lines))
        settings: dict[str, Any] = {"dataset": str(path), "reward": "regex:e", "max_new_tokens": 8}
        env = TextVectorEnv(4, task="textrl_gym.envs.tldr_summarize", group_size=2, **settings)
        agent = DPO(env, num_pairs=4, device="cpu", out=tmp_path / name)
        assert words not in capsys.readouterr().err
        for _ in range(2):
            agent.collect()
        assert capsys.readouterr().err.count(words) == int(name == "pairs")
    pairs = DPO(env, device="cpu", out=tmp_path / "file", pairs=settings["dataset"])
    pairs.collect()
    assert words not in capsys.readouterr().err


def test_ipo_is_least_at_half_of_one_over_beta() -> None:
    margin_N = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    # beta 0.1: 1 / (2 * 0.1) = 5; the sigmoid loss of the same pairs falls for ever
    assert margin_N[pair_loss(margin_N, "ipo", 0.1).argmin()].item() == pytest.approx(5.0, abs=1e-9)
    assert pair_loss(margin_N, "sigmoid", 0.1).argmin() == 2000


def test_pairs_loss_by_hand() -> None:
    # Rows of pair 7: chosen last. log-ratios: rejected (0.5 + 0.5) = 1, chosen 3; pair 2: chosen -1, rejected 0.
    # h = 3 - 1 = 2 and -1 - 0 = -1; beta 0.5, hinge: 1 - 1 = 0 and 1 + 0.5 = 1.5; over 4 pairs of the minibatch.
    logp_BT = torch.tensor([[0.5, 0.5], [3.0, 9.0], [-1.0, 9.0], [0.0, 0.0]], dtype=torch.float64)
    mask_BT = torch.tensor([[True, True], [True, False], [True, False], [True, True]])
    sign_B, group_B = torch.tensor([-1.0, 1, 1, -1]), torch.tensor([7, 7, 2, 2])
    config = PairConfig(loss="hinge")
    part = minibatch(mask_BT, rows=8, score_B=sign_B, group_B=group_B)
    loss, metrics = pairs_loss(logp_BT, part, config, 0.5)
    assert loss.item() == pytest.approx(1.5 / 4, abs=1e-12)
    told = {name: value.item() for name, value in metrics.items()}
    expected = {"accuracy": 1 / 4, "reward_margin": 0.5 * (2 - 1) / 4, "chosen_log_ratio": (3 - 1) / 4}
    assert told == pytest.approx({"loss": 0.375, "rejected_log_ratio": 1 / 4} | expected, abs=1e-12)


@pytest.mark.parametrize("config", [PairConfig(), PairConfig(label_smoothing=0.2), PairConfig(loss="ipo")])
def test_a_soft_label_is_a_mixture_of_the_two_hard_ones(config: PairConfig) -> None:
    """A pair with probability 0.75 has the loss and the gradient of four judges of whom one disagrees."""
    generator = torch.Generator().manual_seed(1)
    mask_BT = torch.arange(3) < torch.tensor([3, 1])[:, None]

    def loss_and_gradient(score: float) -> Tensor:
        logp_BT = torch.randn(2, 3, dtype=torch.float64, generator=generator.manual_seed(1)).requires_grad_()
        part = minibatch(mask_BT, score_B=torch.tensor([score, -score]), group_B=torch.tensor([0, 0]))
        loss, _ = pairs_loss(logp_BT, part, config, 0.3)
        return torch.cat([loss.detach()[None], torch.autograd.grad(loss, logp_BT)[0].flatten()])

    torch.testing.assert_close(loss_and_gradient(0.5), 0.75 * loss_and_gradient(1.0) + 0.25 * loss_and_gradient(-1.0))


def test_dpo_learns_a_file_of_soft_labels(tmp_path: Path) -> None:
    """Probabilities go from the file to the scores of the pairs; a tie is no pair, and p < 0.5 is the other order."""
    rows = [{"prompt": "a b", "chosen": "c", "rejected": "d", "probability": p} for p in (1.0, 0.75, 0.5, 0.25)]
    rows.append(rows[0] | {"prompt": "held out"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    agent = DPO("CopyText-v0", pairs=str(tmp_path / "pairs.jsonl"), rollout_episodes=6, kl_coef=0.1, out=tmp_path)
    by_text = sorted((pair.chance, agent.env.scorer.text(pair.chosen)) for pair in agent.pairs)
    assert by_text == [(0.75, "c"), (0.75, "d"), (1.0, "c")]
    rollout = agent.collect()
    assert sorted(rollout.score_B.tolist()) == [-1, -0.5, -0.5, 0.5, 0.5, 1]
    assert all(math.isfinite(value) for value in agent.update(rollout).values())


@pytest.mark.parametrize(("kl_coef", "beta"), [(None, 0.1), (0.3, 0.3)])
def test_a_task_without_a_kl_coefficient_leaves_the_papers_beta(kl_coef: float | None, beta: float) -> None:
    assert GuessNumber.kl_coef == 0
    given: dict[str, Any] = {} if kl_coef is None else {"kl_coef": kl_coef}
    assert OnlineDPO("GuessNumber-v0", rollout_episodes=8, group_size=4, **given).kl.coef == beta


def test_noise_of_rounding_makes_no_pair() -> None:
    # What two completions of one score differ by, through a KL of 1e-8.
    return_B, group_B = torch.tensor([0.5, 0.5 + 6e-8, 0.5, 0.75]), torch.tensor([0, 0, 1, 1])
    assert label_pairs(return_B, group_B, "best", None).tolist() == [[3, 2]]


def test_raft_loss_by_hand() -> None:
    logp_BT = torch.tensor([[-1.0, -2.0], [-3.0, 9.0]], dtype=torch.float64)
    mask_BT = torch.tensor([[True, True], [True, False]])
    loss, _ = raft_loss(logp_BT, minibatch(mask_BT, tokens=4))  # (1 + 2 + 3) / 4
    assert loss.item() == 1.5
    return_B, group_B = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0]), torch.tensor([4, 1, 4, 1, 1])
    assert best_of_groups(return_B, group_B).tolist() == [3, 2]  # group 1: rows 1, 3, 4, the first of 5, 5; group 4


def test_losses_pass_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    logp, ref = (torch.randn(4, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    mask_BT = torch.arange(3) < torch.tensor([3, 1, 2, 3])[:, None]
    sign_B, group_B = torch.tensor([1.0, -1, 1, -1]), torch.tensor([0, 0, 1, 1])
    part = minibatch(mask_BT, ref_logp_BT=ref, score_B=sign_B, group_B=group_B)
    for config in (PairConfig(), PairConfig(label_smoothing=0.2), PairConfig(loss="ipo"), PairConfig(loss="hinge")):

        def loss(logp_BT: Tensor, config: PairConfig = config) -> Tensor:
            return pairs_loss(logp_BT, part, config, 0.3)[0]

        assert torch.autograd.gradcheck(loss, (logp.clone().requires_grad_(),))
    assert torch.autograd.gradcheck(lambda x: raft_loss(x, part)[0], (logp.clone().requires_grad_(),))


# -- pairs ------------------------------------------------------------------------------------------------------------


def test_labels_by_hand() -> None:
    return_B, group_B = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 5.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert label_pairs(return_B, group_B, "best", None).tolist() == [[1, 0]]  # group 1 has no spread
    assert label_pairs(torch.ones(2), torch.zeros(2), "best", None).shape == (0, 2)
    # groups of 4 and 1 whose rows stand apart: neighbours within a group make pairs, a row alone makes none
    return_B, group_B = torch.tensor([60.0, 0, 0, 60, 0]), torch.tensor([1, 2, 1, 1, 1])
    assert label_pairs(return_B, group_B, "bradley_terry", torch.Generator()).tolist() == [[0, 2], [3, 4]]
    # 4,000 pairs of returns 1 and 0: sigmoid(1) = 0.731, standard error 0.007; a third row without a partner is left
    return_B, group_B = torch.tensor([1.0, 0.0, 9.0]).repeat(4000), torch.arange(4000).repeat_interleave(3)
    row_N2 = label_pairs(return_B, group_B, "bradley_terry", torch.Generator().manual_seed(0))
    assert row_N2.shape == (4000, 2)
    assert set(row_N2.flatten().remainder(3).tolist()) == {0, 1}
    assert (return_B[row_N2[:, 0]] == 1).float().mean().item() == pytest.approx(0.731, abs=0.021)


def test_a_rollout_of_pairs(tmp_path: Path) -> None:
    rollout = OnlineDPO("CopyText-v0", rollout_episodes=16, out=tmp_path).collect()
    pairs = as_pairs(rollout, torch.tensor([[3, 1], [12, 14]]))
    assert pairs.completions == [rollout.completions[i] for i in (3, 1, 12, 14)]
    assert pairs.score_B.tolist() == [1, -1, 1, -1]
    assert pairs.reward_BT.sum(1).tolist() == [1, -1, 1, -1]
    assert pairs.group_B.tolist() == [0, 0, 1, 1]


def test_micro_batches_keep_groups_whole_where_asked(tmp_path: Path) -> None:
    rollout: Rollout = OnlineDPO("CopyText-v0", rollout_episodes=24, group_size=3, out=tmp_path).collect()
    for places in (1, 30, 10_000):
        parts = micro_batches(rollout, places, whole_groups=True)
        assert sorted(torch.cat(parts).tolist()) == list(range(24))
        groups = [set(rollout.group_B[rows].tolist()) for rows in parts]
        assert sum(map(len, groups)) == 8  # no group is in two
        assert len(parts) == {1: 8, 10_000: 1}.get(places, len(parts))


# -- what they are ----------------------------------------------------------------------------------------------------


def test_gradient_of_dpo_at_the_reference_is_the_closed_form(tmp_path: Path) -> None:
    agent = DPO("CopyText-v0", rollout_episodes=16, kl_coef=0.3, max_grad_norm=1e9, out=tmp_path)
    rollout = agent.collect()
    torch.testing.assert_close(rollout.logp_BT, rollout.ref_logp_BT, atol=1e-6, rtol=0)
    with last_gradient(agent) as found:
        metrics = agent.update(rollout)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    ours = found[-1]
    fresh = DPO("CopyText-v0", out=tmp_path)
    logp_B = fresh.policy.logprobs(rollout).sum(1)
    # equation 7's gradient where sigmoid(0) = 1/2: - beta / 2 (d log pi(y_w) - d log pi(y_l)), mean over 8 pairs
    (-0.3 / 2 * (logp_B[0::2] - logp_B[1::2]).mean()).backward()
    torch.testing.assert_close(ours, gradient(fresh), atol=1e-6, rtol=0)
    assert ours.norm() > 1e-3


@pytest.mark.parametrize("cls", [DPO, OnlineDPO, RAFT])
def test_small_micro_batches_change_nothing_after_some_updates(cls: type[Agent], tmp_path: Path) -> None:
    found = []
    for places in (1_000_000, 4):  # 4 places: less than any pair needs
        agent = cls("CopyText-v0", seed=1, rollout_episodes=16, micro_batch_tokens=places, out=tmp_path)
        for _ in range(3):  # away from the reference, where every loss is the same
            with last_gradient(agent) as gradients:
                agent.update(agent.collect())
            agent.num_updates += 1
        found.append(gradients[-1])
    assert (found[0] - found[1]).norm() / found[0].norm() < 1e-3


def test_sampled_pairs_are_few_and_come_again_in_another_order(tmp_path: Path) -> None:
    agent = DPO("CopyText-v0", rollout_episodes=8, num_pairs=6, out=tmp_path)
    seen = []
    for _ in range(5):  # 20 places: three passes over 6 pairs, and two more
        rollout = agent.collect()
        assert agent.collect().completions == rollout.completions  # until it has been learnt
        seen += list(zip(rollout.prompts[::2], rollout.completions[::2], rollout.completions[1::2], strict=True))
        agent.num_updates += 1
    assert len(agent.pairs) == 6
    passes = [seen[:6], seen[6:12], seen[12:18]]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert passes[0] != passes[1] != passes[2]


def test_dpo_resumes_in_its_second_pass(tmp_path: Path) -> None:
    """The sampled pairs are saved, since a second pass needs those of the first."""

    def stop(local: dict[str, Any], _: dict[str, Any]) -> bool:
        if parted.num_updates == 3:
            raise KeyboardInterrupt
        return True

    settings: dict[str, Any] = {"rollout_episodes": 8, "num_pairs": 8, "seed": 2}
    whole = DPO("CopyText-v0", out=tmp_path / "whole", **settings).learn(150, **QUIET)
    parted = DPO("CopyText-v0", out=tmp_path / "parted", **settings)
    with pytest.raises(KeyboardInterrupt):
        parted.learn(150, callback=stop, **QUIET)
    again = load_agent(tmp_path / "parted", out=tmp_path / "parted")
    assert again.num_updates == 3  # of two updates a pass
    assert again.pairs == parted.pairs != []
    again.learn(150 - again.num_timesteps, reset_num_timesteps=False, **QUIET)
    assert torch.equal(weights(again), weights(whole))


def test_dpo_on_a_file(tmp_path: Path) -> None:
    rows = [{"prompt": p, "chosen": f" {p}", "rejected": " d d d"} for p in ("a b", "b c", "c a", "b a") for _ in "xyz"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    agent = DPO("CopyText-v0", pairs=str(tmp_path / "pairs.jsonl"), learning_rate=3e-3, out=tmp_path / "run")
    assert len(agent.pairs) == 9  # one prompt of four is held out
    agent.learn(2000, **QUIET)
    rollout = agent.collect()
    ratio_B = ((rollout.logp_BT - rollout.ref_logp_BT) * rollout.mask_BT).sum(1)
    assert ((ratio_B[0::2] - ratio_B[1::2]) > 1).all()
    again = load_agent(tmp_path / "run")
    assert again.pairs == agent.pairs
    assert torch.equal(weights(again), weights(agent))


def test_bad_settings_name_themselves(tmp_path: Path) -> None:
    for cls, settings, words in (
        (DPO, {"loss": "ppo"}, "loss must be one of sigmoid, ipo, hinge, got 'ppo'"),
        (DPO, {"labels": "x"}, "labels must be one of best, bradley_terry, got 'x'"),
        (DPO, {"label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0.5\), got 0.5"),
        (DPO, {"label_smoothing": 0.1, "loss": "ipo"}, "label_smoothing=0.1 is for loss='sigmoid', not 'ipo'"),
        (DPO, {"kl_coef": 0.0}, "kl_coef is beta"),
        (DPO, {"rollout_episodes": 5}, "must be even, got 5"),
        (DPO, {"num_pairs": 0}, "num_pairs must be at least 1, got 0"),
        (DPO, {"pairs": "nowhere.jsonl"}, "there is no such file"),
        (OnlineDPO, {"group_size": 1}, "group_size must be at least 2, got 1"),
        (RAFT, {"group_size": 1}, "group_size must be at least 2, got 1"),
    ):
        with pytest.raises(ValueError, match=words):
            cls("CopyText-v0", out=tmp_path, **settings)


def constant(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(prompts)


def test_without_spread_there_are_no_pairs(tmp_path: Path) -> None:
    import gymnasium as gym

    env = gym.make("CopyText-v0", reward=constant)
    with pytest.raises(ValueError, match="no prompt had two completions of different reward"):
        DPO(env, rollout_episodes=4, out=tmp_path).collect()
    agent = OnlineDPO(env, out=tmp_path)
    before = weights(agent).clone()
    assert agent.update(agent.collect()) == {"pairs": 0.0}
    assert torch.equal(weights(agent), before)


# -- what they learn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "score"), [pytest.param(DPO, 0.4, marks=pytest.mark.slow), (OnlineDPO, 0.9), (RAFT, 0.9)]
)
def test_copy_text_is_learnt(cls: type[Agent], score: float, tmp_path: Path) -> None:
    """Online it is solved; from the pairs of a random start alone it is no more than learnt (0.13 before)."""
    agent = cls("CopyText-v0", seed=0, learning_rate=3e-3, out=tmp_path)
    agent.learn(16_000, **QUIET)
    metrics = textrl_gym.evaluate(agent, episodes=64)
    assert metrics["score"] > score
    if cls is not DPO:
        assert metrics["score_greedy"] == 1.0


@pytest.mark.slow
def test_raft_reaches_the_known_optimum(tmp_path: Path) -> None:
    # Where pi is proportional to pi_ref exp(score / beta), score - beta log(pi / pi_ref) is the same for all
    # completions: none is better than another, and nothing moves any more.
    agent = RAFT("KnownOptimum-v0", seed=0, rollout_episodes=256, learning_rate=3e-3, out=tmp_path)
    reference = agent.policy.reference
    assert reference is not None
    before = known_optimum.distance(agent.policy, reference, agent.kl.coef)
    agent.learn(100_000, progress_bar=False, eval_every=0, eval_episodes=8)
    assert before > 0.2
    assert known_optimum.distance(agent.policy, reference, agent.kl.coef) < 0.03


@pytest.mark.slow
def test_online_dpo_with_bradley_terry_labels_reaches_the_known_optimum(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"labels": "bradley_terry", "rollout_episodes": 256, "learning_rate": 5e-4}
    agent = OnlineDPO("KnownOptimum-v0", seed=0, out=tmp_path, **settings)
    reference = agent.policy.reference
    assert reference is not None
    before = known_optimum.distance(agent.policy, reference, agent.kl.coef)
    agent.learn(45_000, **QUIET)
    assert before > 0.2
    assert known_optimum.distance(agent.policy, reference, agent.kl.coef) < 0.05  # seeds 1, 2: 0.022, 0.037


def write_pairs(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Ten judgements each of 80 pairs of completions a prompt, as (chosen, rejected), written as a data set.

    By Bradley-Terry: of ten judgements round(10 sigmoid(r_i - r_j)) prefer i, and at least one prefers either.
    """
    tokenizer = known_optimum.KnownOptimum().load_tokenizer()
    texts = [str(tokenizer.decode(y, skip_special_tokens=True)) for y in known_optimum.completions()]
    judged: dict[str, list[tuple[int, int]]] = {}
    for prompt in known_optimum.PROMPTS:
        scores = known_optimum.table([prompt] * len(texts), texts)
        judged[prompt] = []
        for i in range(len(texts)):
            for step in (1, 7):  # a ring, and chords: every completion is compared to every other through some
                j = (i + step) % len(texts)
                wins = min(max(round(10 / (1 + math.exp(scores[j] - scores[i]))), 1), 9)
                judged[prompt] += [(i, j)] * wins + [(j, i)] * (10 - wins)
    rows = [
        {"prompt": prompt, "chosen": texts[i], "rejected": texts[j]} for prompt, some in judged.items() for i, j in some
    ]
    path.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for split in ("train", "validation"):  # with a part of its own to hold out, or one of two prompts would be
        (path / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return judged


def best_log_ratios(pairs: list[tuple[int, int]], beta: float, completions: int) -> torch.Tensor:
    """log pi / pi_ref, up to a constant, of the policy with the least DPO loss of all policies: convex, so exact."""
    chosen_N, rejected_N = torch.tensor(pairs).T
    ratio_Y = torch.zeros(completions, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([ratio_Y], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = pair_loss(ratio_Y[chosen_N] - ratio_Y[rejected_N], "sigmoid", beta).mean()
        value.backward()
        return value

    optimizer.step(loss)
    assert ratio_Y.grad is not None and float(ratio_Y.grad.abs().max()) < 1e-6
    return ratio_Y.detach()


@pytest.mark.slow
def test_dpo_reaches_the_optimum_of_a_fixed_set_of_pairs(tmp_path: Path) -> None:
    judged = write_pairs(tmp_path / "pairs")
    agent = DPO(
        "KnownOptimum-v0", seed=0, out=tmp_path / "out", pairs=str(tmp_path / "pairs"), rollout_episodes=512,
        learning_rate=3e-3,
    )  # fmt: skip
    assert len(agent.pairs) == 1600

    reference = agent.policy.reference
    assert reference is not None

    def distance() -> float:
        """KL(pi || the optimum), nats a sequence, mean over prompts."""
        found = []
        for prompt, pairs in judged.items():
            logp_Y = known_optimum.sequence_logprobs(agent.policy, prompt)
            ref_Y = known_optimum.sequence_logprobs(reference, prompt)
            best_Y = (ref_Y + best_log_ratios(pairs, agent.kl.coef, len(ref_Y))).log_softmax(0)
            found.append(float((logp_Y.exp() * (logp_Y - best_Y)).sum()))
        return sum(found) / len(found)

    assert distance() > 0.2
    agent.learn(150_000, **QUIET)
    assert distance() < 0.05
