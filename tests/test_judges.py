"""Judges: rewards that compare, noise, and what a comparison's answers are judged to be."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import textrl_gym
from textrl_gym.agents import GRPO
from textrl_gym.cli import main
from textrl_gym.core import Row
from textrl_gym.envs.copy_text import CopyText
from textrl_gym.envs.tldr_summarize import TLDRSummarize
from textrl_gym.evaluation.evaluator import Evaluator, mean_entropy
from textrl_gym.experiments import win_rates
from textrl_gym.judges.annotators import Annotators
from textrl_gym.judges.judge import Answer, Noisy, Pointwise, load_judge, load_scorer
from textrl_gym.mdp.task import Task
from textrl_gym.mdp.text_env import TextVectorEnv
from textrl_gym.policy.policy import Policy
from textrl_gym.stats import pairwise
from textrl_gym.stats.estimates import Array


def longer(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A judge that likes words."""
    return [float(len(text.split())) for text in completions]


def rows_of(*prompts: str) -> list[Row]:
    return [{"prompt": prompt, "completion": f"what {prompt} wants"} for prompt in prompts]


def texts(*some: str) -> list[Answer]:
    return [Answer(text) for text in some]


# -- pointwise judges -------------------------------------------------------------------------------------------------


def test_the_higher_score_wins() -> None:
    judge = load_judge(longer)
    found = judge.prefer(rows_of("p", "q", "r"), texts("a b", "a", "a b"), texts("a", "b", "a b c"))
    assert judge.name == "longer" and found.tolist() == [1.0, 0.5, 0.0]


def test_a_judge_gets_columns_and_tokens_and_scores_nothing_twice() -> None:
    seen: list[tuple[str, str, str, list[int]]] = []

    def judge(
        prompts: list[str], completions: list[str], completion: list[str], completion_ids: list[list[int]], **more: Any
    ) -> list[float]:
        assert set(more) == {"prompt_ids", "trainer_state", "log_extra", "log_metric"}
        seen.extend(zip(prompts, completions, completion, completion_ids, strict=True))
        return [float(len(text)) for text in completions]

    rows = [{**row, "prompt_ids": [1, 2]} for row in rows_of("p", "q")]
    pointwise = load_judge(judge)
    a, b = [Answer("xx", (5, 0)), Answer("y", (6,))], [Answer("z", (7, 0)), Answer("y", (6,))]
    assert pointwise.prefer(rows, a, b).tolist() == [1.0, 0.5]
    wants = {"p": "what p wants", "q": "what q wants"}
    assert seen == [("p", "xx", wants["p"], [5, 0]), ("q", "y", wants["q"], [6]), ("p", "z", wants["p"], [7, 0])]
    assert pointwise.prefer(rows, b, a).tolist() == [0.0, 0.5]
    assert len(seen) == 3
    # The same text for another prompt, or cut off where it had ended, is another answer.
    pointwise.prefer(rows[:1], [Answer("y", (6,))], [Answer("xx", (5,))])
    assert [(prompt, ids) for prompt, _, _, ids in seen[3:]] == [("p", [6]), ("p", [5])]


def test_a_task_of_version_0_1_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Old\.judge is called gold since version 0\.2: rename it"):
        type("Old", (Task,), {"judge": "length"})


def test_names_of_judges() -> None:
    class Gold(Task):
        gold = "length"

    assert load_judge("gold", task=Gold()).name == "gold"
    assert isinstance(load_judge("length"), Pointwise)
    custom = Noisy(load_judge(longer), 0.1)
    assert load_judge(custom) is custom
    for spec, task, words in (
        ("gold", Task(), "judge 'gold': Task has no gold score of its own; name a reward"),
        ("gold", None, "judge 'gold': no task is known"),
        (
            "lenght",
            None,
            r"judge \(gold, or a reward\): unknown reward 'lenght'; allowed: conversational, ensemble, exact_match, ",
        ),
        ("endpoint", None, "textrl-gym judge DIR --judge endpoint"),
    ):
        with pytest.raises(ValueError, match=words):
            load_scorer(spec, task=task)


# -- noise ------------------------------------------------------------------------------------------------------------


class Always:
    """Prefers the first answer, but for ties and silence on demand."""

    name = "always"

    def prefer(self, rows: Any, a: Any, b: Any) -> Array:
        special = {"tie": 0.5, "silent": math.nan}
        return np.array([special.get(row["prompt"].split()[0], 1.0) for row in rows])


def test_noise_turns_a_share_of_the_verdicts_round() -> None:
    n = 4000
    rows, a, b = rows_of(*(f"p{i}" for i in range(n))), texts(*(["x"] * n)), texts(*(["y"] * n))
    noisy = Noisy(Always(), 0.25, seed=1)
    found = noisy.prefer(rows, a, b)
    # The standard error is sqrt(0.25 * 0.75 / 4000) = 0.007.
    assert set(found.tolist()) == {0.0, 1.0} and abs((found == 0).mean() - 0.25) < 0.03
    assert noisy.name == "always, noise 0.25"
    assert (found == Noisy(Always(), 0.25, seed=1).prefer(rows, a, b)).all()
    assert (found != Noisy(Always(), 0.25, seed=2).prefer(rows, a, b)).any()
    # The same pairs err, whichever answer comes first and whatever else is judged.
    assert (noisy.prefer(rows, b, a) == found).all()
    assert (noisy.prefer(rows[100:200], a[:100], b[:100]) == found[100:200]).all()


def test_noise_leaves_ties_and_silence() -> None:
    rows = rows_of(*(f"{kind} {i}" for kind in ("tie", "silent") for i in range(20)))
    found = Noisy(Always(), 0.5).prefer(rows, texts(*["x"] * 40), texts(*["y"] * 40))
    assert (found[:20] == 0.5).all() and np.isnan(found[20:]).all()
    for wrong in (-0.1, 0.6, math.nan):
        with pytest.raises(ValueError, match=f"between 0 and 0.5 .a coin., got {wrong}"):
            Noisy(Always(), wrong)


# -- counting ---------------------------------------------------------------------------------------------------------


def test_tally_by_hand() -> None:
    outcome_N = np.array([1, 1, 0.5, 0, math.nan, 1])
    longer_N = np.array([3, 1, 0, -2, 50, 1.0])
    found = win_rates.tally(outcome_N, longer_N, list("abcdef"))
    assert (found.wins, found.ties, found.losses, found.no_verdict) == (3, 1, 1, 1)
    judged = [1, 1, 0.5, 0, 1]  # what has no verdict is in no rate: 3.5 of 5
    assert found.win_rate == pairwise.win_rate(judged) and found.win_rate is not None
    assert found.win_rate.value == pytest.approx(0.7, abs=1e-12, rel=0)
    assert found.length_controlled == pairwise.length_controlled_win_rate(judged, [3, 1, 0, -2, 1]).win_rate
    assert set(found.numbers()) >= {"win_rate_low", "length_controlled_high", "no_verdict"}


def test_tally_of_little() -> None:
    nothing = win_rates.tally(np.array([math.nan]), np.array([1.0]), ["a"])
    assert (nothing.win_rate, nothing.length_controlled) == (None, None)
    assert nothing.numbers() == {"wins": 0, "ties": 0, "losses": 0, "no_verdict": 1}
    alike = win_rates.tally(np.ones(4), np.full(4, 2.0), list("abcd"))  # what length does cannot be told
    assert alike.win_rate is not None and alike.length_controlled is None


def test_a_prompt_that_is_met_again_is_no_further_prompt() -> None:
    outcome_N = np.array([1, 1, 1, 1, 1, 0, 0, 1], float)
    again = win_rates.tally(outcome_N, np.zeros(8), list("aaaabcda"))
    assert (again.wins, again.losses) == (6, 2)
    assert again.win_rate == pairwise.win_rate([1, 1, 0, 0]), "of four prompts"


class Liked(Task):
    """A task whose annotators love the word "sure"."""

    def appeal(self, row: Row, text: str) -> float:
        return 0.5 * ("sure" in text)


def test_simulated_annotators_prefer_by_gold_length_and_appeal() -> None:
    source = rows_of("p", "q")

    def episode(index: int, own: str, start: str) -> dict[str, Any]:
        return {"index": index, "completion": own, "gold": 0.5, "start": {"completion": start, "gold": 0.25}}

    episodes = [episode(0, "a b c", "a b"), episode(1, "a", "a b"), episode(1, "sure a", "b c")]
    fair = win_rates.by_annotators(episodes, Annotators(beta=2, noise=0, length_preference=1, bias=0), Liked(), source)
    # sigmoid(2 * 0.25 + 1) = 0.8176; sigmoid(0.5 - 1) = 0.3775 and sigmoid(0.5) = 0.6225, which are of one prompt
    assert fair.win_rate is not None and fair.win_rate.value == pytest.approx(0.6588, abs=1e-4, rel=0)
    assert (fair.wins, fair.losses) == (2, 1)
    biased = win_rates.by_annotators(episodes, Annotators(beta=2, noise=0, length_preference=1), Liked(), source)
    # the third: sigmoid(2 * (0.25 + 0.5)) = 0.8176
    assert biased.win_rate is not None and biased.win_rate.value == pytest.approx(0.7076, abs=1e-4, rel=0)


def test_equal_length_undoes_annotators_who_love_length() -> None:
    """Texts that are worse and most often longer win by length; at equal length they lose."""
    rng = np.random.default_rng(0)
    episodes = []
    for index in range(300):
        words, gold = int(rng.integers(3, 8)), 0.5
        more = int(rng.integers(-1, 5))
        own = {"index": index, "completion": "a " * (words + more), "gold": gold - 0.1}
        episodes.append({**own, "start": {"completion": "a " * words, "gold": gold}})
    tally = win_rates.by_annotators(episodes, Annotators(length_preference=1.0), Liked(), rows_of(*("p" * 300)))
    assert tally.win_rate is not None and tally.win_rate.low > 0.5
    assert tally.length_controlled is not None and tally.length_controlled.high < 0.5


# -- the evaluator ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def agent() -> GRPO:
    return GRPO("CopyText-v0", rollout_episodes=16, group_size=4, device="cpu", seed=0)


def test_entropy_is_that_of_what_was_sampled_from(agent: GRPO) -> None:
    evaluator = Evaluator(agent.env, 20)
    rollouts = evaluator.play(agent)
    total, places = 0.0, 0
    for rollout in rollouts:
        for b in range(len(rollout)):  # a row at a time, by the model's own forward
            prompt = rollout.prompt_BP[b][rollout.prompt_mask_BP[b]]
            tokens = rollout.token_BT[b][rollout.mask_BT[b]]
            ids = torch.cat([prompt, tokens])[None]
            with torch.no_grad():
                logits_TV = agent.policy.model(ids).logits[0, len(prompt) - 1 : -1, :5]
            logp_TV = logits_TV.log_softmax(-1)
            total -= float((logp_TV.exp() * logp_TV).sum())
            places += len(tokens)
    assert mean_entropy(agent.policy, rollouts) == pytest.approx(total / places, abs=1e-5, rel=0)
    assert evaluator.run(agent)[0]["entropy_token"] == pytest.approx(total / places, abs=1e-5, rel=0)
    uniform = textrl_gym.evaluate(_random(), episodes=8)["entropy_token"]
    assert uniform == pytest.approx(math.log(5), abs=1e-6, rel=0)  # of 5 tokens, each alike


def _random() -> Any:
    from textrl_gym.agents import Random

    return Random("CopyText-v0", device="cpu", rollout_episodes=8)


def test_win_rate_against_the_reference_texts(agent: GRPO) -> None:
    evaluator = Evaluator(agent.env, 20, gold=longer)
    metrics, samples = evaluator.run(agent)
    # The reference text is the prompt: two words.
    words = np.array([len(s["completion"].split()) for s in samples])
    assert metrics["win_rate_human"] == pytest.approx(((words > 2) + 0.5 * (words == 2)).mean(), abs=1e-12, rel=0)
    assert [s["gold"] for s in samples] == words.tolist()
    # By the task's own reward, which knows of ends, a reference text is worth 1.
    own = Evaluator(agent.env, 20)
    own.run(agent)
    assert own.human([]).tolist() == [1.0] * 20
    assert {"rouge_l", "distinct_1"} <= set(own.run(agent)[0])


def test_reference_texts_are_scored_once(agent: GRPO) -> None:
    calls = []

    def gold(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        calls.append(len(prompts))
        return [0.0] * len(prompts)

    evaluator = Evaluator(agent.env, 16, gold=gold)
    evaluator.run(agent, greedy=False)
    assert calls == [16, 16, 16]  # the answers, the start's, the reference texts
    assert evaluator.run(agent, greedy=False)[0]["win_rate_human"] == 0.5
    assert calls == [16] * 4


def test_rows_without_a_reference_text_or_with_too_long_a_one_are_left_out() -> None:
    known = GRPO("KnownOptimum-v0", rollout_episodes=4, group_size=2, device="cpu")
    metrics, _ = Evaluator(known.env, 4, gold=longer).run(known)
    assert "win_rate_human" not in metrics and "rouge_l" not in metrics

    class Few(CopyText):
        def rows(self, split: str, dataset: str | None = None) -> list[Row]:
            # Places are 2 + 3: two symbols, two more and EOS fit, three more and EOS do not.
            return [{"prompt": "a b", "completion": text} for text in ("a b", "a b c", None, "")]

    env = TextVectorEnv(num_envs=4, task=Few(), array="torch", device="cpu")
    evaluator = Evaluator(env, 4, gold=longer)
    evaluator.run(Policy(Few().load_model(), vocab_size=5), greedy=False)
    by_text = {
        evaluator.mdp.source[i]["completion"]: score
        for i, score in zip(evaluator.indices, evaluator.human([]).tolist(), strict=True)
    }
    assert by_text["a b"] == 2.0 and all(math.isnan(by_text[text]) for text in ("a b c", None, ""))


# -- a comparison's folder --------------------------------------------------------------------------------------------

ANSWERS = {
    "grpo-0": ["a b", "a b", "a", "a b c"],
    "grpo-1": ["a b", "a", "a", "a b c"],
    "ppo-0": ["a", "a", "a b", "a b"],
}
"""By words, against the start's "a b": grpo-0 tie tie loss win, grpo-1 tie loss loss win, ppo-0 loss loss tie tie."""
PROMPTS = ["a a", "a b", "b a", "c d"]


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """A finished comparison on CopyText-v0, with answers written by hand; the references are the prompts."""
    config = {"agents": ["grpo", "ppo"], "seeds": 2, "total_timesteps": 9, "kl_coef": [], "set": [], "eval_episodes": 4}
    (tmp_path / "compare.json").write_text(json.dumps({"environment": "CopyText-v0", "config": config}))
    for name, answers in ANSWERS.items():
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        agent, _, seed = name.partition("-")
        spec = {"environment": "CopyText-v0", "agent": agent, "seed": int(seed), "kl_coef": None, "total_timesteps": 9}
        (folder / "cell.json").write_text(json.dumps(spec))
        (folder / "evaluation.json").write_text(json.dumps({"timesteps": 9, "score": 0.5}))
        lines = [
            {"index": i, "prompt": prompt, "completion": text, "tokens": len(text.split()) + 1, "score": 0.5}
            | {"stop_reason": "EOS", "reference": prompt}
            | {"start": {"completion": "a b", "tokens": 3, "score": 0.1, "stop_reason": "LENGTH"}}
            for i, (prompt, text) in enumerate(zip(PROMPTS, answers, strict=True))
        ]
        (folder / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def judged_rows(folder: Path, name: str) -> dict[str, dict[str, str]]:
    with (folder / name).open(newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


LENGTH = "textrl_gym_test_judge:longer"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "textrl_gym_test_judge.py").write_text(
        "def longer(prompts, completions, **columns):\n    return [len(text.split()) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_rows_of_conversations_are_found_again_by_a_judge(comparison: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TLDRSummarize().load_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(comparison / "model")
    rows = [{"prompt": [{"role": "user", "content": prompt}], "solution": prompt} for prompt in PROMPTS]
    data = comparison / "data"
    data.mkdir()
    # The bad row stands first, so that an index counts good ones.
    lines = [json.dumps({"prompt": None, "solution": "z"}), *map(json.dumps, rows)]
    (data / "train.jsonl").write_text("\n".join(lines))
    (data / "validation.jsonl").write_text("\n".join(lines))
    plan = json.loads((comparison / "compare.json").read_text())
    plan["environment"] = "TLDRSummarize-v0"
    plan["config"]["model"] = str(comparison / "model")
    plan["env"] = {"dataset": str(data), "bad_rows": "skip"}
    (comparison / "compare.json").write_text(json.dumps(plan))
    for file in comparison.glob("runs/*/cell.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"environment": "TLDRSummarize-v0"}))
    for file in comparison.glob("runs/*/episodes.jsonl"):
        episodes = [json.loads(line) for line in file.read_text().splitlines()]
        # What the template writes of each prompt.
        written = [episode | {"prompt": episode["prompt"] + " "} for episode in episodes]
        file.write_text("".join(json.dumps(one) + "\n" for one in written))
    (comparison / "textrl_gym_test_solution.py").write_text(
        "def solved(prompts, completions, solution, chat, **columns):\n"
        "    return [float(one == text) for one, text in zip(solution, completions)]\n"
    )
    monkeypatch.syspath_prepend(comparison)
    assert main.main(["judge", str(comparison), "--judge", "textrl_gym_test_solution:solved"]) == 0
    row = judged_rows(comparison, "judged-textrl_gym_test_solution-solved-start.csv")
    # The start's "a b" solves the second prompt alone. grpo-0 writes it there too; grpo-1's "a" does not.
    counts = {run: [int(one[key]) for key in ("wins", "ties", "losses")] for run, one in row.items()}
    assert counts == {"grpo-0": [0, 4, 0], "grpo-1": [0, 3, 1], "ppo-0": [0, 3, 1]}


@pytest.mark.usefixtures("module")
def test_judge_against_the_start(comparison: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["judge", str(comparison), "--judge", LENGTH]) == 0
    rows = judged_rows(comparison, "judged-textrl_gym_test_judge-longer-start.csv")
    counts = {run: [int(row[key]) for key in ("wins", "ties", "losses", "no_verdict")] for run, row in rows.items()}
    assert counts == {"grpo-0": [1, 2, 1, 0], "grpo-1": [1, 1, 2, 0], "ppo-0": [0, 2, 2, 0]}
    assert [float(rows[run]["win_rate"]) for run in ANSWERS] == [0.5, 0.375, 0.25]
    rate = pairwise.win_rate([0.5, 0, 0, 1])
    row = rows["grpo-1"]
    assert (float(row["win_rate_low"]), float(row["win_rate_high"])) == (rate.low, rate.high)
    assert (row["agent"], row["seed"], row["judge"], row["against"]) == ("grpo", "1", LENGTH, "start")
    fair = pairwise.length_controlled_win_rate([0.5, 0, 0, 1], [0, -1, -1, 1]).win_rate
    assert float(row["length_controlled"]) == fair.value
    # The table has a line for an agent: the mean over seeds of each prompt, 0.5, 0.25, 0, 1.
    shown = pairwise.win_rate([0.5, 0.25, 0, 1])
    assert f"{shown.value:.3f} [{shown.low:.3f}, {shown.high:.3f}]" in capsys.readouterr().out


@pytest.mark.usefixtures("module")
def test_judge_against_reference_texts_and_agents(comparison: Path) -> None:
    assert main.main(["judge", str(comparison), "--judge", LENGTH, "--against", "human"]) == 0
    rows = judged_rows(comparison, "judged-textrl_gym_test_judge-longer-human.csv")
    assert float(rows["grpo-0"]["win_rate"]) == 0.5 and float(rows["ppo-0"]["win_rate"]) == 0.25
    assert main.main(["judge", str(comparison), "--judge", LENGTH, "--against", "grpo"]) == 0
    rows = judged_rows(comparison, "judged-textrl_gym_test_judge-longer-grpo.csv")
    assert list(rows) == ["ppo-0"]  # against grpo's run of its seed: loss loss win loss
    assert [rows["ppo-0"][key] for key in ("wins", "ties", "losses")] == ["1", "0", "3"]
    assert main.main(["judge", str(comparison), "--judge", LENGTH, "--against", "ppo"]) == 0
    rows = judged_rows(comparison, "judged-textrl_gym_test_judge-longer-ppo.csv")
    assert [float(row["win_rate"]) for row in rows.values()] == [0.75, 0.625]  # grpo-1 against ppo's only run


def test_judge_by_a_reward_that_reads_tokens(comparison: Path) -> None:
    # CopyText's own reward wants EOS: "a b" is right for the second prompt, and ended; the start's was cut off, so that
    # it is worth 1/2 there, 1/4 where one symbol is right, as for "a a" and none for "b a" and "c d".
    judge = ["--judge", "textrl_gym.envs.copy_text:copied"]
    assert main.main(["judge", str(comparison), *judge]) == 0
    row = judged_rows(comparison, "judged-textrl_gym.envs.copy_text-copied-start.csv")["grpo-0"]
    # "a b" for "a a": 1/2 + 1/4 against 1/4; for "a b": 1 against 1/2; "a" for "b a": 0 against 0; "a b c": 0 and 0.
    assert [row[key] for key in ("wins", "ties", "losses")] == ["2", "2", "0"]


@pytest.mark.usefixtures("module")
def test_judge_with_noise(comparison: Path) -> None:
    noise = ["--judge-noise", "0.5", "--judge-seed", "3"]
    assert main.main(["judge", str(comparison), "--judge", LENGTH, *noise]) == 0
    rows = judged_rows(comparison, "judged-textrl_gym_test_judge-longer-noise-0.5-start.csv")
    assert rows["ppo-0"]["ties"] == "2" and rows["ppo-0"]["judge"] == f"{LENGTH}, noise 0.5"
    decided = [int(row["wins"]) + int(row["losses"]) for row in rows.values()]
    assert decided == [2, 3, 2] and rows["ppo-0"]["losses"] != "2"


def one_error(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert main.main([str(arg) for arg in args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_wrong_words_for_judge(comparison: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    by_length = ("judge", comparison, "--judge", "length")
    line = one_error(capsys, *by_length, "--against", "gpro")
    assert "unknown opponent 'gpro' (did you mean 'grpo'?); allowed: grpo, human, ppo, start" in line
    assert "CopyText has no gold score of its own" in one_error(capsys, "judge", comparison)
    assert "holds no comparison" in one_error(capsys, "judge", tmp_path / "nowhere")
    assert "judge 'endpoint' needs the name of its model: --endpoint.model NAME" in one_error(
        capsys, "judge", comparison, "--judge", "endpoint"
    )
    assert "--endpoint. settings are of --judge endpoint, and the judge is length" in one_error(
        capsys, *by_length, "--endpoint.model", "m"
    )
    assert "between 0 and 0.5" in one_error(capsys, *by_length, "--judge-noise", "0.7")
    file = comparison / "runs" / "ppo-0" / "episodes.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**line, "prompt": "b b"}) + "\n" for line in lines))
    assert "answered different prompts" in one_error(capsys, *by_length, "--against", "grpo")
    file.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "start"}) + "\n" for line in lines))
    assert "the run ppo-0 has not kept the initial policy's completions" in one_error(capsys, *by_length)


def test_a_comparison_of_a_task_that_is_not_registered_is_judged_by_its_texts(comparison: Path) -> None:
    plan = json.loads((comparison / "compare.json").read_text()) | {"environment": "Elsewhere-v0"}
    (comparison / "compare.json").write_text(json.dumps(plan))
    assert main.main(["judge", str(comparison), "--judge", "exact_match", "--against", "start"]) == 0
    # exact_match reads the reference: grpo-0 is right about the second prompt only, and so is the start.
    row = judged_rows(comparison, "judged-exact_match-start.csv")["grpo-0"]
    assert (row["wins"], row["ties"], row["losses"]) == ("0", "4", "0")


def test_a_row_is_its_sources_only_where_the_prompt_is_the_same() -> None:
    reader = win_rates.Reader(source=[{"prompt": "p", "completion": "c", "facts": 1}])
    assert reader.row({"index": 0, "prompt": "p", "reference": "r"}) == {"prompt": "p", "completion": "c", "facts": 1}
    for index, prompt in ((0, "q"), (1, "p")):  # of another data set
        sample = {"index": index, "prompt": prompt, "reference": "r"}
        assert reader.row(sample) == {"prompt": prompt, "completion": "r"}


def test_words_of_another_vocabulary_are_judged() -> None:
    task = CopyText()
    reader = win_rates.Reader(task, task.load_tokenizer(), task.rows("validation"), task.max_prompt_tokens)
    answers = [reader.answer("a b", "a blonger text", "EOS"), reader.answer("a b", "zebra", "LENGTH")]
    assert answers == [Answer("a blonger text", (1, 0)), Answer("zebra", ())]
    rows = [reader.row({"index": 1, "prompt": "a b"})] * 2
    scores = load_judge(task.reward, task=task, tokenizer=reader.tokenizer).score(rows, answers)  # type: ignore[attr-defined]
    assert scores.tolist() == [0.25, 0.0]  # the first of two symbols is right; it has ended after three words


# -- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(agent: GRPO, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "agent"
    agent.save(folder)
    return folder


@pytest.mark.usefixtures("module")
def test_evaluate_with_a_judge(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "numbers.json"
    common = ["evaluate", str(saved), "--episodes", "16", "--device", "cpu", "--json", str(file)]
    own = ["--judge", "textrl_gym.envs.copy_text:copied"]
    assert main.main([*common, *own, "--against", "human"]) == 0
    assert "judged by textrl_gym.envs.copy_text:copied against human" in " ".join(capsys.readouterr().out.split())
    numbers = json.loads(file.read_text())
    judged = numbers["judged"]
    assert judged["win_rate"] == numbers["win_rate_human"]  # the judge is the reward that was trained on
    assert judged["wins"] + judged["ties"] + judged["losses"] == 16
    assert judged["win_rate_low"] <= judged["win_rate"] < judged["win_rate_high"]
    for against in ("start", str(saved)):  # the policy is its own start
        assert main.main([*common, *own, "--against", against]) == 0
        judged = json.loads(file.read_text())["judged"]
        assert (judged["ties"], judged["win_rate"], judged["against"]) == (16, 0.5, against)
    assert main.main(common) == 0
    assert "judged" not in json.loads(file.read_text())
    capsys.readouterr()
    assert "CopyText has no gold score of its own" in one_error(capsys, *common, "--against", "start")
    line = one_error(capsys, *common, "--judge", LENGTH, "--against", "nobody")
    assert "--against must be start, human or the folder of a saved agent, got 'nobody'" in line
