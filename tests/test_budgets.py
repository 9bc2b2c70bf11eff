"""Token budgets against data: what is cut is told before work begins, and written down."""

import json
from pathlib import Path
from typing import Any

import pytest

from textrl_gym.agents import GRPO
from textrl_gym.data.preferences import load_preferences
from textrl_gym.envs.tldr_summarize import TLDRSummarize
from textrl_gym.mdp import budgets
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.mdp.vector_env import TextVectorEnv
from textrl_gym.pipeline import sft
from textrl_gym.pipeline.reward_data import RewardModelConfig, gather

TLDR = "TLDRSummarize-v0"
TOKENIZER = TLDRSummarize().load_tokenizer()


def posts(number: int, words: int) -> list[dict[str, Any]]:
    """Half of them with a completion of 1 token and EOS, half of `words` and EOS."""
    return [{"prompt": f"POST: {i}\n\nTL;DR:", "completion": " my" * (words if i % 2 else 1)} for i in range(number)]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return str(path)


def test_lengths_are_counted_with_their_ends() -> None:
    # 1 to 100 tokens: 50, 95 and 99% are at most 50, 95 and 99; "higher" of 1 ... 100 at 50% is 51, by its rule.
    found = budgets.lengths("completions", 90, 500, range(1, 101))
    assert found is not None
    assert (found.rows, found.counted, found.cut) == (500, 100, 10)
    assert found.quantiles == (51, 96, 100)
    assert found.much
    assert "max_new_tokens=90 cuts 10.0%. WARNING: raise it by --env.max-new-tokens" in str(found)
    found = budgets.lengths("prompts", 95, 500, range(1, 101))
    assert found is not None
    assert not found.much  # 5% is not over 5%
    assert "WARNING" not in str(found)
    assert budgets.lengths("prompts", 95, 0, []) is None


def test_an_environment_knows_what_its_budgets_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", posts(40, 10))
    env = TextVectorEnv(1, task=TLDRSummarize, dataset=path, reward="length", max_new_tokens=8, max_prompt_tokens=20)
    prompts, completions = budgets.of_env(env)
    size = max(len(TOKENIZER(f"POST: {i}\n\nTL;DR:")["input_ids"]) for i in range(40))
    assert prompts.quantiles[2] == size
    assert (prompts.cut, prompts.counted, prompts.rows) == (0, len(env.source), len(env.source))
    odd = sum(row["completion"] != " my" for row in env.source)  # type: ignore[attr-defined]
    assert completions.cut == odd
    assert completions.quantiles[2] == 11
    # What a task makes itself needs no telling; prompts alone have no completions.
    assert budgets.of_env(TextVectorEnv(1, task=TLDRSummarize)) == []
    alone = TextVectorEnv(1, task=TLDRSummarize, dataset=write(tmp_path / "b.jsonl", [{"prompt": "Why?"}] * 3))
    assert [one.what for one in budgets.of_env(alone)] == ["prompts"]


def test_many_rows_are_drawn_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "COUNTED_ROWS", 10)
    env = TextVectorEnv(1, task=TLDRSummarize, dataset=write(tmp_path / "a.jsonl", posts(100, 10)), reward="length")
    prompts, completions = budgets.of_env(env)
    assert (prompts.counted, completions.counted) == (10, 10)
    assert prompts.rows == len(env.source)
    assert budgets.of_env(env) == [prompts, completions]  # the same ones each time


def test_training_tells_and_writes_it_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", [*posts(40, 10), {"prompt": None, "completion": "x"}])
    settings: dict[str, Any] = {"dataset": path, "reward": "length", "bad_rows": "skip"}
    env = TextVectorEnv(4, task=TLDRSummarize, array="torch", max_new_tokens=4, group_size=2, **settings)
    agent = GRPO(env, seed=0, device="cpu", out=tmp_path / "run")
    agent.learn(8, eval_episodes=2, eval_every=0, on_bad_health="warn", show_samples=0)
    said = capsys.readouterr().err
    rows = len(agent.env.source)
    assert f"train ({rows} rows), prompts: 50, 95 and 99% have at most" in said
    assert "max_new_tokens=4 cuts" in said
    assert "WARNING: raise it by --env.max-new-tokens" in said
    assert "validation (" in said
    record = json.loads((tmp_path / "run" / budgets.DATA_FILE).read_text())
    assert record["rows"]["train"] == rows
    assert record["lengths"]["train"]["completions"]["budget"] == 4
    assert record["left_out"]["train"] == {"column 'prompt' is not a text": 1}


def test_the_pipeline_tells_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = EnvSettings(dataset=write(tmp_path / "a.jsonl", posts(40, 10)), max_new_tokens=4)
    tiny = sft.SFTConfig(steps=1, batch_size=2, copy_steps=0, hidden_size=16, intermediate_size=32, layers=2)
    record = sft.sft(TLDR, tiny, tmp_path / "sft", env)
    assert record["measured"]["lengths"]["train"]["completions"]["budget"] == 4
    assert "train (" in capsys.readouterr().err
    pairs = [{"prompt": f"POST: {i}\n\nTL;DR:", "chosen": " my my my", "rejected": " my"} for i in range(20)]
    path = write(tmp_path / "pairs.jsonl", pairs)
    data = gather(TLDR, RewardModelConfig(dataset=(path,)), EnvSettings(max_new_tokens=3))
    of_train = data.lengths[f"{path}, train"]
    assert of_train["completions"] | {"quantiles": None} == {
        "what": "completions", "budget": 3, "rows": 18, "counted": 36, "cut": 18, "quantiles": None,
    }  # fmt: skip
    assert f"{path}, validation (2 rows), completions" in capsys.readouterr().err
    task = TLDRSummarize()
    rows = load_preferences(path, "train", TOKENIZER).rows
    assert budgets.measure_preferences(rows, task, TOKENIZER)[1].cut == 0
