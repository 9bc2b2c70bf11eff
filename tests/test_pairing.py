"""Sampled pairs: who is compared, who chooses, what is written, and that nothing half-written is left."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from textrl_gym.agents import GRPO
from textrl_gym.cli import main
from textrl_gym.data import preferences
from textrl_gym.envs.copy_text import CopyText
from textrl_gym.envs.tldr_summarize import TLDRSummarize
from textrl_gym.judges.annotators import Annotators
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.mdp.task import load_env_task
from textrl_gym.pipeline import sample_preferences
from textrl_gym.pipeline.sample_preferences import Labeller, PreferenceConfig, draw_prompts, make_preferences
from textrl_gym.rewards.tldr_gold import score_parts

COPIED = "textrl_gym.envs.copy_text:copied"


def constant(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(prompts)


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved agent that copies somewhat."""
    out = tmp_path_factory.mktemp("runs") / "grpo"
    GRPO("CopyText-v0", learning_rate=3e-3, out=out).learn(8_000, progress_bar=False, eval_every=0, eval_episodes=8)
    return out


def test_two_samples_of_the_start_chosen_by_a_reward(tmp_path: Path) -> None:
    config = PreferenceConfig(n=50, label=COPIED, batch_size=16, seed=3)
    record = make_preferences("CopyText-v0", config, tmp_path / "a" / "pairs.jsonl")
    rows = written(tmp_path / "a" / "pairs.jsonl")
    assert len(rows) == 50
    assert all(row["score_chosen"] > row["score_rejected"] for row in rows)
    assert {row["model_chosen"] for row in rows} == {"start"}
    measured = record["measured"]
    assert measured["pairs"] == 50
    assert measured["equal"] + measured["ties"] + 50 <= measured["prompts"]
    assert measured["ties"] > 0
    assert measured["score_chosen"] == pytest.approx(sum(row["score_chosen"] for row in rows) / 50)
    # the same seed the same file, another seed another
    make_preferences("CopyText-v0", config, tmp_path / "b.jsonl")
    make_preferences("CopyText-v0", PreferenceConfig(**{**vars(config), "seed": 4}), tmp_path / "c.jsonl")
    same, one, other = ((tmp_path / n).read_text() for n in ("a/pairs.jsonl", "b.jsonl", "c.jsonl"))
    assert same == one != other
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b.jsonl", "c.jsonl"]
    # and it can be read back
    found = preferences.load_preferences(str(tmp_path / "b.jsonl"), "train", whole=True)
    assert [row["completions"] for row in found.rows] == [[row["chosen"], row["rejected"]] for row in rows]


def test_two_policies_do_not_share_random_numbers(tmp_path: Path) -> None:
    """A model against itself would write the same twice."""
    config = PreferenceConfig(n=10, other_model="start", label=COPIED)
    assert make_preferences("CopyText-v0", config, tmp_path / "a.jsonl")["measured"]["equal"] < 32


def test_a_saved_agent_against_the_start(agent: Path, tmp_path: Path) -> None:
    config = PreferenceConfig(n=60, model=str(agent), other_model="start", label=COPIED)
    make_preferences("CopyText-v0", config, tmp_path / "pairs.jsonl")
    chosen = [row["model_chosen"] for row in written(tmp_path / "pairs.jsonl")]
    assert set(chosen) <= {str(agent), "start"}
    assert chosen.count(str(agent)) > 40  # it has learnt to copy somewhat
    # greedy decoding of two models is allowed, and says what each would write
    greedy = PreferenceConfig(n=4, model=str(agent), other_model="start", label=COPIED, temperature=0.0)
    make_preferences("CopyText-v0", greedy, tmp_path / "greedy.jsonl")
    best = {row["prompt"]: row["chosen"] for row in written(tmp_path / "greedy.jsonl")}
    assert best


@pytest.mark.parametrize("label", ["annotators", "gold", "reward_model"])
def test_who_labels_the_embedded_posts(label: str, tmp_path: Path) -> None:
    config = PreferenceConfig(n=6, label=label, batch_size=6)
    make_preferences("TLDRSummarize-v0", config, tmp_path / "pairs.jsonl", EnvSettings(split="validation"))
    rows, source = written(tmp_path / "pairs.jsonl"), TLDRSummarize().rows("validation")
    draws = draw_prompts(len(source), 6, config.seed)
    post_of = {source[i]["prompt"]: source[i] for _ in range(2) for i in next(draws)}
    for row in rows:
        gold = [score_parts(post_of[row["prompt"]]["facts"], row[name])["gold"] for name in ("chosen", "rejected")]
        scores = [row["score_chosen"], row["score_rejected"]]
        if label != "reward_model":
            assert scores == pytest.approx(gold, abs=1e-6)
        if label != "annotators":
            assert scores[0] > scores[1]


def test_annotators_choose_with_their_noise_and_rewards_leave_ties() -> None:
    task = TLDRSummarize()
    annotators = Labeller(task, task.load_tokenizer(), PreferenceConfig())
    score_N2, texts_N2 = np.array([[0.6, 0.4]] * 4000), [["a", "a"]] * 4000
    chosen = annotators.choose(score_N2, texts_N2, [{}] * 4000, np.random.default_rng(0))
    # 0.88 sigmoid(6 * 0.2) + 0.06 = 0.736; the standard error of 4,000 draws is 0.007
    assert chosen.count(0) / 4000 == pytest.approx(0.736, abs=0.021)
    gold = Labeller(task, task.load_tokenizer(), PreferenceConfig(label="gold"))
    three = np.array([[0.6, 0.4], [0.1, 0.2], [0.3, 0.3]])
    found = gold.choose(three, [["a", "b"]] * 3, [{}] * 3, np.random.default_rng(0))
    assert found == [0, 1, None]


def test_annotators_have_the_bias_of_their_task() -> None:
    """Certainty pleases them: wrong and sure (gold 0, seen as 0.99) beats an abstention (0.55)."""
    task = load_env_task("CalibratedQA-v0")
    row = {"prompt": "", "name": "Sam", "kind": "lives", "truth": "Oslo"}
    score_N2, texts_N2 = np.array([[0.01, 0.55]] * 400), [[" Certainly, Sam lives in Rome.", " I do not know."]] * 400
    for bias, first in ((1.0, True), (0.0, False)):
        config = PreferenceConfig(annotators=Annotators(noise=0.0, beta=20.0, bias=bias))
        chosen = Labeller(task, task.load_tokenizer(), config).choose(
            score_N2, texts_N2, [row] * 400, np.random.default_rng(0)
        )
        assert (chosen.count(0) > 350) == first


def test_prompts_are_drawn_once_before_any_comes_again() -> None:
    draws = draw_prompts(5, 3, seed=0)
    places = [place for _ in range(10) for place in next(draws)]
    for start in range(0, 30, 5):
        assert sorted(places[start : start + 5]) == list(range(5))
    assert places[:5] != places[5:10]


def test_errors_come_before_the_work_and_leave_nothing(tmp_path: Path, agent: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    for settings, words in (
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0, got -1"),
        ({"temperature": 0.0}, "give other_model"),
        ({}, "label 'annotators' needs the task's gold score, and CopyText has none"),
        ({"label": "nothing"}, "unknown reward 'nothing'"),
        ({"label": COPIED, "model": "/nowhere"}, "there is no folder '/nowhere'"),
        ({"label": f"{__name__}:constant", "n": 3}, r"prompts did not give n=3 pairs.*with equal scores"),
    ):
        with pytest.raises(ValueError, match=words):
            make_preferences("CopyText-v0", PreferenceConfig(**settings), out)
    with pytest.raises(ValueError, match="must be a file"):
        make_preferences("CopyText-v0", PreferenceConfig(label=COPIED), tmp_path / "pairs")
    with pytest.raises(ValueError, match="has only its own prompts"):
        make_preferences("CopyText-v0", PreferenceConfig(label=COPIED), out, EnvSettings(dataset="no.jsonl"))
    config = PreferenceConfig(label=COPIED, model=TLDRSummarize.model, other_model="start")
    with pytest.raises(ValueError, match="have different tokenizers"):
        make_preferences("CopyText-v0", config, out)
    assert list(tmp_path.iterdir()) == []
    out.write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        make_preferences("CopyText-v0", PreferenceConfig(label=COPIED), out)
    assert out.read_text() == "mine"


def test_a_model_that_is_a_plain_folder(agent: Path) -> None:
    policy, tokenizer = sample_preferences.load_policy(str(agent / "model"), CopyText(), "cpu")
    whole, _ = sample_preferences.load_policy(str(agent), CopyText(), "cpu")
    assert all(a.equal(b) for a, b in zip(policy.parameters(), whole.parameters(), strict=True))
    assert policy.vocab_size == len(tokenizer) == 5


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pairs.jsonl"
    args = ["preferences", "CopyText-v0", "--n", "20", "--label", COPIED, "--out", str(out)]
    assert main.main(args) == 0
    assert "score_chosen" in capsys.readouterr().out
    assert len(written(out)) == 20
    assert main.main(args) == 2
    assert "is there already" in capsys.readouterr().err
