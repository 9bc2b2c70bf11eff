"""Worlds of conversations: scripts that are functions, best players that are paid best, and dialogues to learn from."""

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from textrl_gym import registry
from textrl_gym.conversations import bookings, calculator, dealer, things
from textrl_gym.conversations.replay import replay
from textrl_gym.core import Reply, Row
from textrl_gym.mdp.task import Task, load_env_task
from textrl_gym.mdp.text_env import TextEnv, vector_env
from textrl_gym.models import tiny
from textrl_gym.models.packing import Dialogue, pack
from textrl_gym.pipeline import build_assets, sft
from textrl_gym.policy.policy import Policy
from textrl_gym.rewards import load_reward
from textrl_gym.rollouts.collect import collect
from textrl_gym.worlds.world import Rows

TALKS = [env_id for env_id in registry.env_ids() if (task := load_env_task(env_id)).symbols and task.replies_to_turns]
ROWS = 300


def first(source: Any, count: int = ROWS) -> list[Row]:
    return list(itertools.islice(iter(source), count))


def paid(task: Task, row: Row, text: str) -> float:
    """The rewards of all turns of an agent that says these lines."""
    return sum(reply.reward for reply in replay(task.reply, row, text)[1])


# -- every conversation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", TALKS)
def test_what_is_learnt_is_what_the_environment_appends(env_id: str) -> None:
    """The ids of a dialogue of the references are those of an episode with the same actions, and so are the masks."""
    task = load_env_task(env_id)
    tokenizer = task.load_tokenizer()
    for row, reference in zip(first(task.rows("train"), 6), first(task.references("train"), 6), strict=True):
        assert reference["prompt"] == row["prompt"]
        dialogue = sft.encode_dialogue(task, tokenizer, reference)
        actions = [i for i, own in zip(dialogue, dialogue.actions, strict=True) if own]

        class One(type(task)):  # type: ignore[misc]
            only = row

            def rows(self, split: str, dataset: str | None = None) -> list[Row]:
                return [self.only]

        env = TextEnv(task=One(), tokenizer=tokenizer)
        env.reset(seed=0)
        for place, action in enumerate(actions):
            observation, _, terminated, _, _ = env.step(action)
            assert terminated == (place == len(actions) - 1)
        behind = observation["attention_mask"].astype(bool)
        behind[: task.max_prompt_tokens] = False
        assert observation["input_ids"][behind].tolist() == list(dialogue)


@pytest.mark.parametrize("env_id", TALKS)
def test_the_best_player_is_paid_most(env_id: str) -> None:
    """The turns of the rows' completions are worth more than those of references and of demonstrations, and fit."""
    task = load_env_task(env_id)
    rows = first(task.rows("train"))
    best = [paid(task, row, row["completion"]) for row in rows]
    references = first(task.references("train"))
    others = [paid(task, row, other["completion"]) for row, other in zip(rows, references, strict=True)]
    assert np.all(np.array(best) >= np.array(others) - 1e-9) and np.mean(best) > np.mean(others)
    assert all(len(row["completion"].split("\n")) <= task.max_turns for row in rows)


@pytest.mark.parametrize("env_id", TALKS)
def test_dialogues_fit_and_are_of_known_words(env_id: str) -> None:
    task = load_env_task(env_id)
    tokenizer = task.load_tokenizer()
    assert len(task.symbols) == len(set(task.symbols)) < 300
    for source in (task.references("train"), task.demonstrations("train")):  # type: ignore[attr-defined]
        for row in first(source):
            dialogue = sft.encode_dialogue(task, tokenizer, row)  # raises for a word without a token
            assert len(dialogue) < task.max_new_tokens or dialogue.actions[-1]
            assert len(dialogue) <= task.max_new_tokens
            assert len(tokenizer(row["prompt"])["input_ids"]) <= task.max_prompt_tokens


@pytest.mark.parametrize("env_id", TALKS)
def test_the_bundled_policy_is_mediocre(env_id: str) -> None:
    """It does worse than the best player, and not hopelessly: what RL has to gain."""
    env = vector_env(env_id, num_envs=128, split="validation", array="torch")
    policy = Policy(env.task.load_model())
    rollout = collect(env, policy, generator=torch.Generator().manual_seed(0), prompt_indices=range(128))
    assert env.task.gold is not None
    gold = load_reward(env.task.gold, task=env.task)
    rows = [env.source[i] for i in range(128)]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    score = float(gold(rollout.prompts, rollout.completions, **columns).mean())
    assert 0.3 < score < 0.75


def test_a_build_measures_what_conversations_are_worth() -> None:
    task = load_env_task("Tool-v0")
    measured = build_assets.initial_dialogue_quality("Tool-v0", Path(task.model), prompts=32)
    assert measured["greedy_gold"] > measured["sampled_gold"] and measured["best_of_8_gold"] > measured["sampled_gold"]
    # The right answer is worth 1, and calls cost: 0.1 to 0.3 of each, at most three of them.
    assert measured["sampled_gold"] - 0.9 < measured["sampled_turn_rewards"] < measured["sampled_gold"]


# -- learning dialogues ------------------------------------------------------------------------------------------------


class Twice(Task):
    """Two turns of letters."""

    symbols = ("a", "b", "c", "x", "y")
    turn_markers = ("x ", " y")
    max_prompt_tokens, max_new_tokens = 2, 12
    model = "none"

    def reply(self, row: Row, turns: Any) -> Reply:
        return Reply("c", done=len(turns) > 2)


def test_of_a_dialogue_the_turns_of_the_agent_are_learnt() -> None:
    task, tokenizer = Twice(), tiny.symbol_tokenizer(Twice.symbols)
    said = [("assistant", "a b"), ("user", "c"), ("assistant", "b"), ("user", "c")]
    row = {"prompt": "a", "turns": [{"role": role, "content": text} for role, text in said]}
    prompt_ids, (dialogue,) = sft.encode_row(task, tokenizer, row)
    assert isinstance(dialogue, Dialogue)
    # <eos> a b c x y are 0 to 5; "x c y" between the turns, and nothing of the last reply
    assert (prompt_ids, list(dialogue)) == ([1], [1, 2, 0, 4, 3, 5, 2, 0])
    assert dialogue.actions == [True, True, True, False, False, False, True, True]
    model = tiny.llama(6, scale=0.3)
    logp_LV = model(torch.tensor([prompt_ids + list(dialogue)])).logits.log_softmax(-1)[0]
    own = [n for n, action in enumerate(dialogue.actions) if action]
    expected = -torch.stack([logp_LV[n, dialogue[n]] for n in own]).mean()  # place n predicts token n behind one prompt
    # Beside a row without turns, which is learnt as before: 3 tokens more
    torch.testing.assert_close(sft.sft_loss(model, pack([(prompt_ids, [dialogue])])), expected, atol=1e-6, rtol=0)
    _, count = sft.completion_nll(model, pack([(prompt_ids, [dialogue]), ([2, 3], [[1, 2, 0]])]))
    assert int(count) == 5 + 3


def test_turns_that_do_not_alternate_are_refused() -> None:
    row = {"prompt": "a", "turns": [{"role": "user", "content": "c"}]}
    with pytest.raises(ValueError, match="turn 0 of a dialogue must be of the role 'assistant', got 'user'"):
        sft.encode_row(Twice(), tiny.symbol_tokenizer(Twice.symbols), row)


def test_a_single_turn_task_learns_its_completions_whatever_turns_is() -> None:
    class Once(Task):
        max_prompt_tokens, max_new_tokens = 2, 12

    tokenizer = tiny.symbol_tokenizer(Twice.symbols)
    row = {"prompt": "a", "completion": "b", "turns": [{"role": "user", "content": "c"}]}
    assert sft.encode_row(Once(), tokenizer, row) == ([1], [[2, 0]])


# -- the calculator ----------------------------------------------------------------------------------------------------

SUM = {"prompt": "", "answer": 119}


def calculator_replies(text: str) -> list[tuple[str, float]]:
    return [(reply.text, reply.reward) for reply in replay(calculator.reply, SUM, text)[1]]


def test_the_calculator_works_out_what_it_is_called_for() -> None:
    said = calculator_replies("CALC 12 * 7\nCALC 84+35\n#### 119\nCALC 1 + 1")
    assert said == [("= 84", -0.1), ("= 119", -0.1), ("right", 1.0)]  # nothing after the answer


@pytest.mark.parametrize(
    "text", ["CALC", "CALC 12 *", "CALC 12 / 7", "CALC 2 ** 9", "CALC 5 - 9", "CALC 99 * 99", "119"]
)
def test_what_it_cannot_work_out_costs_more(text: str) -> None:
    assert calculator_replies(text) == [("= ?", -0.3)]


@pytest.mark.parametrize(
    ("text", "reward"), [("#### 119", 1.0), ("12 * 7 + 35 #### 119", 1.0), ("#### 118", 0.0), ("#### -119", 0.0)]
)
def test_an_answer_ends_the_talk(text: str, reward: float) -> None:
    (reply,) = replay(calculator.reply, SUM, text)[1]
    assert (reply.done, reply.reward) == (True, reward)


def test_a_turn_with_a_call_is_a_call_whatever_else_it_says() -> None:
    """Else an answer behind a call would have the call's result for nothing."""
    turns = [{"role": "assistant", "content": "CALC 1 + 1\n#### 119"}]
    assert calculator.reply(SUM, turns) == ("= 2", -0.1, False)


def test_sums_of_two_digits_are_of_one_split_only() -> None:
    equations = {
        split: {row["equations"] for row in first(Rows(calculator.draw, split), 2000) if row["calls"]}
        for split in ("train", "validation", "test")
    }
    assert not equations["train"] & equations["validation"] and not equations["train"] & equations["test"]
    rows = first(Rows(calculator.draw, "train"), 2000)
    shares = [sum(row["calls"] == n for row in rows) / 2000 for n in range(3)]
    assert shares == pytest.approx([0.3, 0.4, 0.3], abs=0.035)  # three standard errors are 0.033


def test_calls_that_were_needless_and_missing() -> None:
    rows = [{"answer": 7, "calls": 0}, {"answer": 84, "calls": 1}, {"answer": 119, "calls": 2}]
    texts = ["CALC 3 + 4\n#### 7", "CALC 12 *\nCALC 12 * 7\n#### 84", "#### 110"]
    assert calculator.measures(rows, texts) == pytest.approx(
        {"calls": 1.0, "calls_needed": 1.0, "needless_calls": 2 / 3, "missing_calls": 2 / 3, "wrong_calls": 1 / 3}
    )
    assert calculator.right([], texts, answer=[7, 84, 119]) == [1.0, 1.0, 0.0]
    assert calculator.calls([], texts) == [1.0, 2.0, 0.0]


# -- the dealer --------------------------------------------------------------------------------------------------------

CAR = {"prompt": "", "first": 80, "reserve": 50, "patience": 3, "best": 57}


def dealer_replies(text: str) -> list[tuple[str, float]]:
    return [(reply.text, reply.reward * 23) for reply in replay(dealer.reply, CAR, text)[1]]  # in units of price


@pytest.mark.parametrize(
    ("text", "replies"),
    [
        # 80 - (80 - 40) // 4 = 70, 70 - 30 // 4 = 63, 63 - 23 // 4 = 58
        ("offer 40\noffer 40\noffer 40\ndeal", [("then 70", 10), ("then 63", 7), ("last 58", 5), ("deal for 58", 0)]),
        ("offer 40\noffer 69", [("then 70", 10), ("then 70", 0)]),  # 70 - 1 // 4 = 70
        ("offer 90", [("deal for 80", 0)]),  # nobody pays more than is asked
        ("offer 39\nhello", [("no 80", 0), ("bye", 0)]),
        ("offer 40\noffer 40\noffer 40\noffer 57", [("then 70", 10), ("then 63", 7), ("last 58", 5), ("bye", -22)]),
    ],
)
def test_the_dealer_comes_down_by_its_rule(text: str, replies: list[tuple[str, float]]) -> None:
    said = dealer_replies(text)
    assert [words for words, _ in said] == [words for words, _ in replies]
    assert [reward for _, reward in said] == pytest.approx([reward for _, reward in replies], abs=1e-9)


@pytest.mark.parametrize(("first", "share"), [(60, 0.6), (74, 0.65), (98, 0.6), (98, 0.75)])
@pytest.mark.parametrize("patience", dealer.PATIENCE)
def test_no_offers_bring_the_price_lower_than_the_patient_buyers(first: int, share: float, patience: int) -> None:
    """The optimum that rewards are shares of, by trying all."""
    row = {"first": first, "reserve": round(share * first), "patience": patience}

    @functools.cache
    def lowest(state: dealer.State) -> int:
        if state.over:
            return first if state.price is None else state.price
        offers = [f"offer {amount}" for amount in range(first // 2 - 1, state.ask)]
        return min(lowest(dealer.step(row, state, text)) for text in [*offers, "deal"])

    state = dealer.State(first)
    for line in dealer.patient_turns(row):
        state = dealer.step(row, state, line)
    assert state.price == lowest(dealer.State(first))


def test_rewards_of_turns_sum_to_how_low_the_price_is() -> None:
    rows = first(Rows(dealer.draw, "train"))
    texts = [row["completion"] for row in first(Rows(dealer.draw_demonstration, "train"))]
    texts[:100] = [text.replace("deal", "hello") for text in texts[:100]]  # no deal: nothing
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in ("first", "reserve", "patience", "best")}
    sums = [
        sum(reply.reward for reply in replay(dealer.reply, row, text)[1]) for row, text in zip(rows, texts, strict=True)
    ]
    ended = [replay(dealer.reply, row, text)[1][-1].done for row, text in zip(rows, texts, strict=True)]
    gold = dealer.bargain([], texts, **columns)
    assert [s for s, over in zip(sums, ended, strict=True) if over] == pytest.approx(
        [g for g, over in zip(gold, ended, strict=True) if over], abs=1e-9
    )
    assert sum(ended) > 150 and max(gold[:100]) == 0.0


def test_measures_of_talks() -> None:
    texts = ["offer 40\noffer 40\noffer 40\ndeal", "offer 40\ndeal", "offer 1\noffer 1"]
    # Of 3 answers all, one, and one of two insults
    assert dealer.measures([CAR] * 3, texts) == pytest.approx({"deals": 2 / 3, "patience": 5 / 9, "insults": 2 / 3})


# -- things ------------------------------------------------------------------------------------------------------------

THING = {"prompt": "", "thing": "tiny green wooden spoon"}


@pytest.mark.parametrize(
    ("text", "replies"),
    [
        ("is it red or blue\nis it green\nis it black", [("no green black", 0), ("yes green", 0), ("no green", 0)]),
        ("is it tiny or giant\nis it large", [("yes tiny giant", 0), ("no tiny giant", 0)]),
        ("is it a tiny black wooden spoon\nis it a tiny green wooden spoon", [("no", 0), ("", 1)]),
        # Two attributes, three values, no value, a thing without the question: no questions
        ("is it red or tiny\nis it red or blue or green", [("what ?", 0), ("what ?", 0)]),
        ("is it\ntiny green wooden spoon", [("what ?", 0), ("what ?", 0)]),
    ],
)
def test_the_oracle_says_what_is_left(text: str, replies: list[tuple[str, float]]) -> None:
    answers = replay(things.reply, THING, text)[1]
    assert [answer.text for answer in answers] == [words for words, _ in replies]
    assert [answer.reward for answer in answers] == [reward or -things.COST for _, reward in replies]


def test_no_questions_find_a_thing_in_fewer_turns_than_halves() -> None:
    """The best gold score, by trying all: any split of what is left, not only those that attributes make."""

    @functools.cache
    def turns_before(left: int) -> float:
        if left == 1:
            return 0.0
        asked = (
            1 + (part * turns_before(part) + (left - part) * turns_before(left - part)) / left
            for part in range(1, left // 2 + 1)
        )
        return min((left - 1) / left * (1 + turns_before(left - 1)), *asked)

    every = [" ".join(values) for values in itertools.product(*things.ATTRIBUTES)]
    best = {row["thing"]: row["completion"] for row in first(Rows(things.draw, "train"), 5000)}
    assert len(every) == len(best) == 256
    turns = [things.game(thing, best[thing]).turns - 1 for thing in every]
    assert np.mean(turns) == pytest.approx(turns_before(256)) == pytest.approx(things.FEWEST_TURNS)


def test_rewards_of_turns_sum_to_the_quickness_of_a_game() -> None:
    rows = first(Rows(things.draw_demonstration, "train"))
    texts = [row["completion"] for row in rows]
    texts[:20] = ["\n".join(text.split("\n")[:-1]) for text in texts[:20]]  # stopped before the end
    gold = np.array(things.quickness([], texts, [row["thing"] for row in rows]))
    sums = [
        sum(reply.reward for reply in replay(things.reply, row, text)[1]) for row, text in zip(rows, texts, strict=True)
    ]
    assert np.array(sums)[gold > 0] == pytest.approx(gold[gold > 0], abs=1e-9)
    assert not gold[:20].any() and (gold > 0).sum() > 200


@pytest.mark.parametrize(
    "text", ["", "\n" * 30, "is it a", "is it a tiny or giant", THING["thing"], "is it a " + "tiny green " * 9]
)
def test_a_game_is_not_won_by_other_lines(text: str) -> None:
    assert things.quickness([], [text], [THING["thing"]]) == [0.0]


def test_a_thing_counts_within_the_turns_of_a_game_only() -> None:
    right, other = (f"is it a {colour} {THING['thing'][5:]}" for colour in ("tiny", "small"))
    texts = ["\n".join([other] * before + [right] + [other] * 5) for before in (0, 19, 20)]
    assert things.quickness([], texts, [THING["thing"]] * 3) == pytest.approx([1.0, 1 - 19 * things.COST, 0.0])


def test_measures_of_games() -> None:
    texts = [
        # A half, a question that tells something, two whose answers are known, and the right guess
        "is it red or blue\nis it tiny\nis it small or large\nis it red\nis it a tiny green wooden spoon",
        "is it a\nis it a tiny",
    ]
    assert things.measures([THING] * 2, texts) == pytest.approx(
        {"solved": 0.5, "turns": 3.5, "halves": 1 / 4, "idle": 2 / 4, "guesses": 1.0}
    )


# -- bookings ----------------------------------------------------------------------------------------------------------

TABLE = {"prompt": "", "kind": "table", "facts": {"people": "four", "hour": "seven"}, "missing": "people"}


@pytest.mark.parametrize(
    ("text", "replies"),
    [
        ("how many people ?\ndone table for four at seven", [("four", -0.2), ("thanks", 1.0)]),
        ("at what hour ?\ndone table for five at seven", [("seven", -0.2), ("never mind", -1.0)]),
        ("what taste ?", [("never mind", -0.2)]),
        ("how many people", [("what ?", -0.2)]),
        ("done table at seven", [("never mind", -1.0)]),
        ("done table at seven for four", [("never mind", -1.0)]),
    ],
)
def test_a_person_gives_a_fact_that_is_asked_for(text: str, replies: list[tuple[str, float]]) -> None:
    assert [(reply.text, reply.reward) for reply in replay(bookings.reply, TABLE, text)[1]] == replies


def test_half_of_the_requests_lack_one_fact() -> None:
    rows = first(Rows(bookings.draw, "train"), 2000)
    assert sum(bool(row["missing"]) for row in rows) / 2000 == pytest.approx(0.5, abs=0.035)
    for row in rows:
        words = f" {row['prompt']} "
        there = [f" {bookings.WORDINGS[name].format(value)} " in words for name, value in row["facts"].items()]
        assert there == [name != row["missing"] for name in row["facts"]]


def test_shares_of_questions() -> None:
    whole = TABLE | {"missing": ""}
    done = "done table for four at seven"
    rows = [TABLE, TABLE, whole, whole]
    texts = [f"how many people ?\n{done}", f"at what hour ?\n{done}", done, f"at what hour ?\n{done} now"]
    assert bookings.measures(rows, texts) == {"asked_missing": 0.5, "asked_stated": 0.5, "booked_wrong": 0.25}
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in ("kind", "facts")}
    assert bookings.booked([], texts, **columns) == [1.0, 1.0, 1.0, 0.0]
    assert bookings.questions([], texts, **columns) == [1.0, 1.0, 0.0, 1.0]
