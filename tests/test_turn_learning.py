"""Learning from conversations: what counts are actions, whatever the environment says between them.

Shape legend: B rows, T response places, K turns, D hidden width.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3 import PPO as StableBaselinesPPO
from test_turns import Echo, make_env, make_model, points
from torch import Tensor

from textrl_gym import functional, registry
from textrl_gym.agents import DPO, GRPO, GSPO, MCTS, PPO, RLOO, BestOfN, ValueGuided
from textrl_gym.agents.grpo import group_advantages
from textrl_gym.agents.rloo import leave_one_out
from textrl_gym.core import Rollout
from textrl_gym.evaluation.evaluator import Evaluator
from textrl_gym.integrations.sb3_env import TextVecEnv
from textrl_gym.integrations.sb3_policy import CausalLMPolicy
from textrl_gym.mdp.text_env import TextVectorEnv
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts.batching import micro_batches
from textrl_gym.rollouts.collect import collect
from textrl_gym.training.agent import Agent
from textrl_gym.training.logs import rollout_metrics
from textrl_gym.training.minibatch import Minibatch

ROWS = 8
TRAINED = [cls for cls in map(registry.load_agent_class, registry.names("agents")) if cls.trains]


def agent_of(cls: type[Agent], **settings: Any) -> Agent:
    env = TextVectorEnv(ROWS, task=Echo, reward=points, group_size=4, array="torch", autoreset_mode="DISABLED")
    model = make_model("gpt2")
    return cls(env, model=model, device="cpu", kl_coef=0.05, **settings)


def weights(agent: Agent) -> Tensor:
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])


def with_words_behind(rollout: Rollout, token: int) -> Rollout:
    """The rollout with two more tokens of the environment behind each row's end, which no action attends to."""
    assert rollout.reply_BT is not None
    wider: dict[str, Any] = {
        field.name: torch.nn.functional.pad(value, (0, 2))
        for field in dataclasses.fields(Rollout)
        if field.name.endswith("_BT") and isinstance(value := getattr(rollout, field.name), Tensor)
    }
    length_B1 = rollout.present_BT.sum(1, keepdim=True)
    place_T = torch.arange(wider["token_BT"].shape[1])
    behind_BT = (place_T >= length_B1) & (place_T < length_B1 + 2)
    wider |= {"reply_BT": wider["reply_BT"] | behind_BT, "token_BT": wider["token_BT"].masked_fill(behind_BT, token)}
    return dataclasses.replace(rollout, **wider)


@pytest.mark.parametrize("cls", [cls for cls in TRAINED if not cls.single_turn and not cls.is_offline])
def test_words_that_no_action_attends_to_change_nothing(cls: type[Agent]) -> None:
    learnt = []
    for token in (2, 5):
        agent = agent_of(cls)
        rollout = agent.collect()
        agent.update(with_words_behind(rollout, token))
        learnt.append(weights(agent))
    assert torch.equal(*learnt)
    # And the words between turns, which actions do attend to, change what is learnt.
    agent = agent_of(cls)
    before, rollout = weights(agent), agent.collect()
    other_BT = torch.where(rollout.present_BT & ~rollout.mask_BT, 6, rollout.token_BT)
    agent.update(dataclasses.replace(rollout, token_BT=other_BT))
    assert not torch.equal(weights(agent), learnt[0]) and not torch.equal(before, learnt[0])


@pytest.mark.parametrize("cls", [PPO, GRPO])
def test_gradients_are_zero_where_the_environment_speaks(cls: type[Agent], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the hidden states only those below an action's logits have a gradient."""
    agent = agent_of(cls, minibatches=1, epochs=1)
    rollout = agent.collect()
    hidden: list[tuple[Tensor, Tensor]] = []
    inner = Policy.hidden

    def watched(self: Policy, part: Rollout) -> Tensor:
        hidden_BTD = inner(self, part)
        if hidden_BTD.requires_grad:
            hidden_BTD.retain_grad()
            hidden.append((hidden_BTD, part.mask_BT))
        return hidden_BTD

    monkeypatch.setattr(Policy, "hidden", watched)
    agent.update(rollout)
    assert hidden
    for hidden_BTD, mask_BT in hidden:
        assert hidden_BTD.grad is not None
        assert not hidden_BTD.grad[~mask_BT].any()
        assert hidden_BTD.grad[mask_BT].any(-1).float().mean() > 0.5


@pytest.mark.parametrize("credit", ["trajectory", "turn"])
def test_micro_batches_give_the_gradient_of_one_batch(credit: str) -> None:
    learnt = []
    for size in (30, 100_000):
        agent = agent_of(GRPO, micro_batch_tokens=size, credit=credit)
        agent.update(agent.collect())
        learnt.append(weights(agent))
    torch.testing.assert_close(learnt[0], learnt[1], atol=1e-5, rtol=0)


def test_the_reference_and_the_policy_read_what_was_said() -> None:
    """Log-probabilities of the sampler are those of the training forward, and of each text alone."""
    policy = Policy(make_model("llama"), reference=make_model("llama", 1))
    rollout = collect(make_env(6), policy, generator=torch.Generator().manual_seed(0))
    logp_BT = policy.logprobs(rollout)
    torch.testing.assert_close(logp_BT, rollout.logp_BT, atol=5e-5, rtol=0)
    assert not rollout.kl_BT[~rollout.mask_BT].any() and not rollout.value_BT.any()
    for b in range(len(rollout)):
        prompt_L = rollout.prompt_BP[b][rollout.prompt_mask_BP[b]]
        ids_L = torch.cat([prompt_L, rollout.token_BT[b][rollout.present_BT[b]]])
        alone_LV = policy.model(ids_L[None]).logits[0].log_softmax(-1)
        own_T = alone_LV[len(prompt_L) - 1 : -1].gather(1, ids_L[len(prompt_L) :, None]).squeeze(1)
        mask_T = rollout.mask_BT[b][: len(own_T)]
        torch.testing.assert_close(own_T[mask_T], logp_BT[b][: len(own_T)][mask_T], atol=5e-5, rtol=0)


# -- masks with gaps --------------------------------------------------------------------------------------------------


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """mask_BT, reply_BT, turn_BT of rows of 1 to 4 turns of 1 to 3 actions, with replies of 0 to 3 tokens between."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        turns = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3)), min_size=1, max_size=4))
        who = [(k, own) for k, (actions, words) in enumerate(turns) for own in [True] * actions + [False] * words]
        rows.append(who[: len(who) - turns[-1][1]])
    width = max(map(len, rows)) + draw(st.integers(0, 2))
    mask_BT, reply_BT = (torch.zeros(len(rows), width, dtype=torch.bool) for _ in range(2))
    turn_BT = torch.zeros(len(rows), width, dtype=torch.long)
    for b, who in enumerate(rows):
        for t, (k, own) in enumerate(who):
            mask_BT[b, t], reply_BT[b, t], turn_BT[b, t] = own, not own, k
    return mask_BT, reply_BT, turn_BT


@given(conversations(), st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0]))
def test_gae_goes_from_action_to_action(made: tuple[Tensor, Tensor, Tensor], seed: int, lam: float) -> None:
    mask_BT, _, _ = made
    generator = torch.Generator().manual_seed(seed)
    # Whatever stands between the actions must not count.
    reward_BT, value_BT = (torch.randn(mask_BT.shape, generator=generator).double() for _ in range(2))
    advantage_BT, return_BT = functional.gae(reward_BT, value_BT, mask_BT, 0.9, lam)
    assert not advantage_BT[~mask_BT].any() and not return_BT[~mask_BT].any()
    for b in range(len(mask_BT)):
        own_T = mask_BT[b]
        reward_T, value_T = reward_BT[b][own_T], value_BT[b][own_T]
        inside_1T = torch.ones(1, len(reward_T), dtype=torch.bool)
        expected_1T, _ = functional.gae(reward_T[None], value_T[None], inside_1T, 0.9, lam)
        assert torch.equal(advantage_BT[b][own_T], expected_1T[0])


@given(conversations(), st.integers(0, 99))
def test_returns_and_ends_of_turns(made: tuple[Tensor, Tensor, Tensor], seed: int) -> None:
    mask_BT, _, turn_BT = made
    reward_BT = torch.randint(-9, 9, mask_BT.shape, generator=torch.Generator().manual_seed(seed)).double()
    return_BK, there_BK = functional.turn_returns(reward_BT, mask_BT, turn_BT)
    ends_BT, last_B = functional.turn_ends(mask_BT, turn_BT), functional.last_places(mask_BT)
    to_go_BT = functional.returns_to_go(reward_BT, mask_BT)
    for b in range(len(mask_BT)):
        places = mask_BT[b].nonzero().flatten().tolist()
        turns = [int(turn_BT[b, t]) for t in places]
        assert last_B[b] == places[-1]
        ends = [t for n, t in enumerate(places) if n + 1 == len(places) or turns[n + 1] != turns[n]]
        assert ends_BT[b].nonzero().flatten().tolist() == ends
        for k in range(there_BK.shape[1]):
            assert bool(there_BK[b, k]) == (k in turns)
            assert return_BK[b, k] == sum(float(reward_BT[b, t]) for t, n in zip(places, turns, strict=True) if n >= k)
            if k in turns:
                assert return_BK[b, k] == to_go_BT[b, places[turns.index(k)]]


@given(conversations(), st.integers(0, 99))
def test_rollouts_keep_their_masks(made: tuple[Tensor, Tensor, Tensor], seed: int) -> None:
    mask_BT, reply_BT, turn_BT = made
    there_BT = (mask_BT | reply_BT).float()
    floats: dict[str, Any] = dict.fromkeys(("logp_BT", "ref_logp_BT", "kl_BT", "value_BT", "reward_BT"), there_BT)
    rows = len(mask_BT)
    rollout = Rollout(
        prompt_BP=torch.ones(rows, 2, dtype=torch.long),
        prompt_mask_BP=torch.ones(rows, 2, dtype=torch.bool),
        token_BT=(there_BT * torch.arange(1, there_BT.shape[1] + 1)).long(),
        **floats,
        mask_BT=mask_BT,
        score_B=torch.zeros(rows),
        stop_B=torch.ones(rows, dtype=torch.long),
        group_B=torch.arange(rows),
        reply_BT=reply_BT,
        turn_BT=turn_BT,
        turn_reward_BT=mask_BT.float(),
        turns=[[{"role": "assistant", "content": str(b)}] for b in range(rows)],
    )
    order_B = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    again = Rollout.cat([rollout.select(order_B[:1]), rollout.select(order_B)]).trim()
    assert again.turns == [rollout.turns[int(b)] for b in [order_B[0], *order_B]]
    width = again.token_BT.shape[1]
    assert again.present_BT.any(0).all() and again.num_tokens == int(mask_BT[order_B[0]].sum() + mask_BT.sum())
    for name in ("token_BT", "mask_BT", "reply_BT", "turn_BT", "turn_reward_BT"):
        was, now = getattr(rollout, name), getattr(again, name)
        assert now is not None and torch.equal(now[1:], was[order_B][:, :width]), name
    assert torch.equal(again.outcome_B[1:], mask_BT[order_B].sum(1).float())


# -- credit -----------------------------------------------------------------------------------------------------------


def test_turn_advantages_by_hand() -> None:
    # One group. Row 0: turns with rewards 1, 2; row 1: 4; row 2: 0, 6, 1. Returns from each turn on:
    #   turn 0: 3, 4, 7, mean 14/3;  turn 1: 2, -, 7, mean 4.5;  turn 2: -, -, 1, nobody to compare with
    mask_BT = torch.tensor([[1, 0, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 1, 1]]).bool()
    turn_BT = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 2, 2]])
    reward_BT = torch.tensor([[1.0, 9, 2, 9, 9], [4, 9, 9, 9, 9], [0, 6, 9, 0, 1]])
    group_B = torch.zeros(3, dtype=torch.long)

    def mean_off(return_N: Tensor, group_N: Tensor) -> Tensor:
        return group_advantages(return_N, group_N, scale_by_std=False, std_eps=0.0)[0]

    found_BT = functional.turn_advantages(reward_BT, mask_BT, turn_BT, group_B, mean_off)
    a = 14 / 3
    expected = torch.tensor([[3 - a, 0, 2 - 4.5, 0, 0], [4 - a, 0, 0, 0, 0], [7 - a, 2.5, 0, 0, 0]])
    torch.testing.assert_close(found_BT, expected, atol=1e-6, rtol=0)
    # Leave-one-out: turn 0: 3 - 5.5, 4 - 5, 7 - 3.5; turn 1: 2 - 7, 7 - 2
    found_BT = functional.turn_advantages(reward_BT, mask_BT, turn_BT, group_B, leave_one_out)
    expected = torch.tensor([[-2.5, 0, -5, 0, 0], [-1, 0, 0, 0, 0], [3.5, 5, 0, 0, 0]])
    torch.testing.assert_close(found_BT, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("cls", [GRPO, RLOO])
def test_credit_of_turns(cls: type[Agent]) -> None:
    """Of one turn it is that of the trajectory; of several it is another."""
    for turns, equal in ((1, True), (4, False)):
        env = TextVectorEnv(
            ROWS, task=Echo, reward=points, group_size=4, max_turns=turns, array="torch", autoreset_mode="DISABLED"
        )
        agents = [cls(env, model=make_model(), device="cpu", kl_coef=0.0, credit=c) for c in ("trajectory", "turn")]
        whole, of_turns = (agent.advantages(agent.collect()) for agent in agents)
        assert whole is not None and of_turns is not None
        assert torch.allclose(whole, of_turns, rtol=0, atol=1e-6) == equal
        for agent in agents:
            agent.update(agent.collect())
        assert torch.allclose(weights(agents[0]), weights(agents[1]), rtol=0, atol=1e-6) == equal


# -- agents that do something else ------------------------------------------------------------------------------------


def test_pairs_of_dialogues(tmp_path: Path) -> None:
    agent = agent_of(DPO)
    assert isinstance(agent, DPO)
    rollout = agent.collect()
    assert rollout.reply_BT is not None and rollout.reply_BT.any() and not rollout.logp_BT[~rollout.mask_BT].any()
    assert int(rollout.token_BT.min()) >= 0 and not (rollout.reply_BT & rollout.mask_BT).any()
    # The environment's tokens are those that it says after such turns.
    agent.update(rollout)
    agent.save(tmp_path / "dpo")
    again = DPO.load(tmp_path / "dpo", env=agent.env, device="cpu")
    assert again.pairs == agent.pairs


def test_best_of_n_takes_the_best_conversation() -> None:
    agent = agent_of(BestOfN, n=4)
    rollout = agent.play(agent.env, generator=torch.Generator().manual_seed(0))
    plain = agent_of(BestOfN, n=1)
    others = plain.play(plain.env, generator=torch.Generator().manual_seed(0))
    assert float(rollout.outcome_B.mean()) > float(others.outcome_B.mean())


@pytest.mark.parametrize("cls", [*(cls for cls in TRAINED if cls.single_turn), MCTS, ValueGuided])
def test_single_turn_agents_say_so(cls: type[Agent]) -> None:
    critic = {"ppo": "of no matter where"} if cls in (MCTS, ValueGuided) else {}
    with pytest.raises(ValueError, match="completes a single turn, and Echo is a conversation"):
        agent_of(cls, **critic)


def test_credit_of_gspo_is_refused() -> None:
    with pytest.raises(ValueError, match="credit must be 'trajectory'"):
        agent_of(GSPO, credit="turn")


def test_learning_runs(tmp_path: Path) -> None:
    """learn() with its health card, evaluations, logs and checkpoints."""
    agent = agent_of(GRPO, credit="turn", out=tmp_path)
    agent.learn(200, progress_bar=False, eval_episodes=8, show_samples=1)
    again = GRPO.load(tmp_path, env=agent.env, device="cpu")
    assert torch.equal(weights(again), weights(agent))


def test_minibatch_means_count_actions() -> None:
    agent = agent_of(GRPO)
    rollout = agent.collect()
    batch = Minibatch.of(rollout)
    assert batch.tokens == int(rollout.mask_BT.sum()) < int(rollout.present_BT.sum())
    assert float(batch.mean(torch.ones_like(rollout.logp_BT))) == pytest.approx(1.0, abs=1e-6)


def test_the_page_about_turns(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/turns.md as it is printed, with a smaller budget."""
    page = (root / "docs" / "turns.md").read_text()
    task, use, _ = re.findall(r"^```python.*?\n(.*?)^```", page, re.M | re.S)
    (tmp_path / "two_turns.py").write_text(task)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    exec(compile(use.replace("15_000", "300").replace("episodes=64", "episodes=8"), "docs/turns.md", "exec"), {})
    sys.modules.pop("two_turns")
    printed = capsys.readouterr().out
    assert "[agent]" in printed and "[environment]" in printed
    assert 0 <= float(printed.split()[-1]) <= 2, "what the second print says: rewards of two turns"


def test_turns_are_reported() -> None:
    agent = agent_of(GRPO)
    metrics, samples = Evaluator(agent.env, episodes=4).run(agent)
    rollouts = Evaluator(agent.env, episodes=4).play(agent)
    assert samples[0]["turns"] == rollouts[0].turns[0]
    spoken = [sum(turn["role"] == "assistant" for turn in said) for said in rollouts[0].turns]
    assert metrics["turns"] == pytest.approx(sum(spoken) / 4, abs=1e-6)
    assert metrics["turn_rewards"] == pytest.approx(
        float(rollouts[0].outcome_B.sub(rollouts[0].score_B).mean()), abs=1e-6
    )
    assert metrics["completion_tokens"] == pytest.approx(rollouts[0].num_tokens / 4, abs=1e-6)
    logged = rollout_metrics(rollouts[0])
    assert (logged["rollout/turns"], logged["rollout/turn_rewards"]) == pytest.approx(
        (metrics["turns"], metrics["turn_rewards"]), abs=1e-6
    )


def test_micro_batches_count_all_positions() -> None:
    rollout = agent_of(GRPO).collect()
    prompt_B, there_B = rollout.prompt_mask_BP.sum(1), rollout.present_BT.sum(1)
    budget = 60
    parts = micro_batches(rollout, budget)
    assert sorted(torch.cat(parts).tolist()) == list(range(ROWS)) and len(parts) > 2
    for rows in parts:
        prompts = len(rollout.group_B[rows].unique())
        positions = prompts * int(prompt_B[rows].max()) + len(rows) * int(there_B[rows].max())
        assert len(rows) == 1 or positions <= budget


def test_stable_baselines_steps_conversations() -> None:
    """What SB3 learns from, read off whole texts, is what was sampled state by state."""
    envs = TextVecEnv(make_env(4, array="numpy"))
    model = StableBaselinesPPO(
        CausalLMPolicy, envs, n_steps=24, batch_size=32, n_epochs=1, seed=0, policy_kwargs={"model": make_model("gpt2")}
    )
    model.learn(24 * 4)
    buffer: Any = model.rollout_buffer  # which training has flattened
    observations = {name: torch.as_tensor(value) for name, value in buffer.observations.items()}
    fresh = CausalLMPolicy(
        envs.observation_space,
        envs.action_space,
        lambda _: 1e-3,
        model=make_model("gpt2"),  # as it was then
    )
    actions = torch.as_tensor(buffer.actions).flatten()
    with torch.no_grad():
        _, logp, _ = fresh.evaluate_actions(observations, actions)
    torch.testing.assert_close(logp, torch.as_tensor(buffer.log_probs).flatten(), atol=1e-4, rtol=0)
