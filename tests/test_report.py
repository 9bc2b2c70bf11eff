"""The report: what it warns of, that it escapes, and that it reads one run or many."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from textrl_gym.reports import run_page
from textrl_gym.training.run_folder import read_run

START = {"timesteps": 0, "score": -1.0, "gold": 0.4, "kl_sequence": 0.0, "kl_token": 0.0, "completion_tokens": 30.0}


def evaluation(timesteps: int, **changes: float) -> dict[str, Any]:
    return START | {"timesteps": timesteps, "train_seconds": timesteps / 100} | changes


def write_run(folder: Path, evaluations: list[dict[str, Any]], completion: str = " a text", prompt: str = "p") -> Path:
    folder.mkdir(parents=True)
    samples = [
        {"timesteps": row["timesteps"], "index": i, "prompt": prompt, "completion": completion, "score": 1.25}
        | {"gold": 0.5, "stop_reason": "LENGTH", "reference": None}
        for row in (evaluations[0], evaluations[-1])
        for i in range(10)
    ]
    logged = [{"time/total_timesteps": 10 * i, "rollout/score": float(i), "rollout/kl_sequence": 0.1} for i in range(5)]
    for name, rows in (("evaluations.jsonl", evaluations), ("samples.jsonl", samples), ("progress.json", logged)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """Every element's name, and the balance of those that must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def make(dirs: list[Path], out: Path) -> str:
    assert run_page.report(dirs, out) == out
    text = out.read_text(encoding="utf-8")
    assert Page(text).open == []
    return text


def test_one_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "ppo", [START, evaluation(5000), evaluation(10_000, score=2.0, gold=0.9)])
    text = make([run], run / "report.html")
    assert "Reward hacking" not in text
    assert "10,000 tokens" in text
    assert "0.900" in text
    assert Page(text).seen.count("figure") == 4
    assert "KL to the reference, nats per sequence" in text
    assert text.count("gold 0.50") == 2 * run_page.SAMPLES_SHOWN
    assert "the gold score is not trained on" in text


def test_the_file_stands_alone(tmp_path: Path) -> None:
    text = make([write_run(tmp_path / "ppo", [START])], tmp_path / "report.html")
    assert not {"script", "link", "img", "iframe"} & set(Page(text).seen)
    assert "http:" not in text and "https:" not in text
    assert "default-src 'none'" in text
    assert "url(" not in text
    assert len(text) < 100_000


def test_runs_in_subfolders(tmp_path: Path) -> None:
    for name in ("ppo", "grpo"):
        write_run(tmp_path / "both" / name, [START, evaluation(100)])
    text = make([tmp_path / "both"], tmp_path / "report.html")
    assert text.index("<h2>grpo</h2>") < text.index("<h2>ppo</h2>")
    assert Page(text).seen.count("figure") == 4  # all runs in each chart
    several = make([tmp_path / "both" / "ppo", tmp_path / "both"], tmp_path / "three.html")
    assert several.count("<h2>ppo</h2>") == 2


def test_numbers_that_no_table_knows_are_shown_under_their_names(tmp_path: Path) -> None:
    """generated_tokens is best_of_n's, reward/length of a mixture, and another an agent's own."""
    own = {"generated_tokens": 12.34, "reward/length": 5.0, "my_<b>metric": 0.12345}
    text = make([write_run(tmp_path / "run", [START, evaluation(100, **own)])], tmp_path / "report.html")
    for words in ("Tokens generated per prompt", "Reward component length", "my_&lt;b&gt;metric"):
        assert f"<th>{words}</th>" in text
    for shown in ("12.3", "5.000", "0.123"):
        assert f"<td>{shown}</td>" in text
    assert "<th>timesteps</th>" not in text


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        run_page.report([tmp_path], tmp_path / "report.html")


def test_broken_line_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "ppo", [START])
    with (run / "evaluations.jsonl").open("a") as file:
        file.write('{"timesteps": 3\n')
    with pytest.raises(ValueError, match=r"evaluations.jsonl', line 2 is no JSON"):
        run_page.report([run], tmp_path / "report.html")


@pytest.mark.parametrize(
    ("later", "numbers"),
    [
        ([{"score": 1.0, "gold": 0.3}], ["the initial policy", "-1.000", "1.000", "0.400", "0.300"]),  # below the start
        ([{"score": 1.0, "gold": 0.8}, {"score": 2.0, "gold": 0.7}], ["100 tokens", "1.000", "2.000", "0.700"]),
        ([{"score": 1.0, "gold": 0.8}, {"score": 2.0, "gold": 0.76}], None),  # a fall of 0.04 from the best is noise
        ([{"score": 1.0, "gold": 0.8}, {"score": 0.9, "gold": 0.5}], None),  # both fell: worse, but nothing exploited
        ([{"score": 1.0, "gold": 0.8}], None),
    ],
)
def test_hacking(tmp_path: Path, later: list[dict[str, float]], numbers: list[str] | None) -> None:
    rows = [START] + [evaluation(100 * i, **changes) for i, changes in enumerate(later, start=1)]
    text = make([write_run(tmp_path / "run", rows)], tmp_path / "report.html")
    found = re.search(r'<div class="warning".*?</div>', text)
    if numbers is None:
        assert found is None
    else:
        assert found is not None
        assert all(number in found[0] for number in numbers)


def test_without_a_gold_score(tmp_path: Path) -> None:
    rows = [{k: v for k, v in evaluation(t, score=float(t)).items() if k != "gold"} for t in (0, 100)]
    text = make([write_run(tmp_path / "run", rows)], tmp_path / "report.html")
    assert Page(text).seen.count("figure") == 3
    assert "Reward hacking" not in text
    assert "the gold score" not in text and "judge" not in text


def test_all_text_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>&amp;'
    run = write_run(tmp_path / "<b>run", [START, evaluation(100, gold=0.1, score=5.0)], completion=evil, prompt=evil)
    (run / "agent.json").write_text(json.dumps({"agent": evil}))
    text = make([run], tmp_path / "report.html")
    assert "<script" not in text
    assert "<b>run" not in text
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;&amp;amp;" in text


def test_resumed_run_counts_once(tmp_path: Path) -> None:
    rows = [START, evaluation(4000), evaluation(4000, gold=0.6), evaluation(6000)]  # the same place twice: the later
    run = read_run(write_run(tmp_path / "run", rows))
    assert [row["timesteps"] for row in run.evaluations] == [0, 4000, 6000]
    assert run.evaluations[1]["gold"] == 0.6


def test_ticks_are_round_and_inside() -> None:
    assert run_page.ticks(-0.05, 1.05) == [0.0, 0.5, 1.0]  # 1.1 / 4 = 0.275, the next round step is 0.5
    assert run_page.ticks(0, 240_000) == [0.0, 100_000.0, 200_000.0]
    assert run_page.ticks(-2.3, 7.9) == [0.0, 5.0]
    assert run_page.ticks(0.31, 0.33) == [0.31, 0.315, 0.32, 0.325, 0.33]


def test_chart_skips_what_is_not_finite() -> None:
    points = [(0.0, float("nan")), (1.0, 2.0), (2.0, float("inf"))]
    text = run_page.chart("a", [run_page.Series("a", 0, points)])
    assert text.count("<circle") == 1
    assert "nan" not in text
    assert run_page.chart("a", [run_page.Series("a", 0, [])]) == ""
