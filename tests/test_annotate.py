"""The annotation page: what its server gives away and to whom, and the page itself in headless Chromium."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from chromium import SHIFT, Browser, axe_script, violations
from servers import running

from textrl_gym.cli import main
from textrl_gym.data import labels
from textrl_gym.feedback.questions import AnnotateConfig
from textrl_gym.web import annotate
from textrl_gym.web.annotate import AnnotateServer

JSON = {"Content-Type": "application/json"}
HOSTILE = """"'></script><img src=x onerror=alert(1)>"""


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def pairs(file: Path, count: int = 30, end: str = "") -> str:
    return write(
        file, [{"prompt": f"p{n}{end}", "chosen": f"good {n}{end}", "rejected": f"bad {n}{end}"} for n in range(count)]
    )


def serving(source: str, out: Path, host: str = "127.0.0.1", **settings: Any) -> AbstractContextManager[AnnotateServer]:
    return running(annotate.make_server(source, out, AnnotateConfig(**settings), host=host))


def ask(port: int, path: str, body: dict[str, Any] | None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Status, and what was answered: from JSON where it is some, else the text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        sent = JSON | (headers or {}) if body is not None else headers or {}
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), sent)
        answer = connection.getresponse()
        text = answer.read().decode()
        return answer.status, json.loads(text) if answer.headers.get_content_type() == "application/json" else text
    finally:
        connection.close()


def choose(port: int, view: dict[str, Any], ranks: list[int] | None, **more: Any) -> dict[str, Any]:
    """What comes after an answer."""
    given = {"annotator": view["annotator"], "item": view["item"]["id"], "turn": view["item"]["turn"], "ranks": ranks}
    status, fresh = ask(port, "/answer", given | more)
    assert status == 200, fresh
    return fresh


# -- over HTTP --------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_runs_its_own_script_alone(tmp_path: Path) -> None:
    (tmp_path / "say.txt").write_text(f"Choose. {HOSTILE}")
    instructions = tmp_path / "say.txt"
    with serving(pairs(tmp_path / "pairs.jsonl"), tmp_path / "labels.jsonl", instructions=instructions) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("GET", "/")
        answer = connection.getresponse()
        html, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
        connection.close()
    script = html[html.rindex("<script>") + 8 : html.rindex("</script>")]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert "unsafe" not in policy and policy.startswith("default-src 'none';")
    assert "<img" not in html and "Choose." in html, "the instructions are data"
    assert re.findall(r"""<\w[^>]*\b(?:src|href)=(?!["']?data:)""", html) == [], "nothing is fetched"


def test_nothing_says_who_wrote_an_answer_or_what_is_known(tmp_path: Path) -> None:
    source = pairs(tmp_path / "pairs.jsonl")
    with serving(source, tmp_path / "labels.jsonl", check_every=2, qualification=source, n=5) as server:
        _, view = ask(server.port, "/view", {"annotator": "ann"})
        seen: set[str] = set()
        while "item" in view:
            seen |= {view["phase"]}
            assert set(view["item"]) == {"id", "turn", "prompt", "completions"}, "kind, models and gold stay here"
            good = [1 if "good" in text else 2 for text in view["item"]["completions"]]
            view = choose(server.port, view, good)
    assert seen == {"qualification", "pairs"}


def test_whom_it_answers(tmp_path: Path) -> None:
    with serving(pairs(tmp_path / "pairs.jsonl"), tmp_path / "labels.jsonl") as server:
        own = {"annotator": "ann"}
        for headers in (
            {"Host": "evil.example"},
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": f"http://evil.example:{server.port}"},
        ):
            for path in ("/view", "/answer", "/undo"):
                assert ask(server.port, path, own, headers) == (403, "forbidden\n"), (path, headers)
        assert ask(server.port, "/", None, {"Host": "evil.example"})[0] == 403
        assert ask(server.port, "/view", own, {"Origin": f"http://127.0.0.1:{server.port}"})[0] == 200
        assert ask(server.port, "/view", {"annotator": ""})[0] == 400
        assert ask(server.port, "/undo", own) == (400, "there is no answer to take back\n")
        assert ask(server.port, "/answer", own | {"item": "x"})[0] == 400
        assert ask(server.port, "/labels.jsonl", None)[0] == 404
    assert (tmp_path / "labels.jsonl").read_bytes() == b""


def test_over_the_network_with_a_token(tmp_path: Path) -> None:
    with serving(pairs(tmp_path / "pairs.jsonl"), tmp_path / "labels.jsonl", host="0.0.0.0") as server:
        assert ask(server.port, "/view", {"annotator": "ann"})[0] == 403
        bearer = {"Authorization": f"Bearer {server.token}"}
        assert ask(server.port, "/view", {"annotator": "ann"}, bearer)[0] == 200
        assert ask(server.port, f"/?token={server.token}", None)[0] == 200
        assert f"?token={server.token}" in server.address


def test_two_annotators_at_once(tmp_path: Path) -> None:
    """Each of 30 questions to two of three, who answer as fast as they can."""
    failures = []

    def work(port: int, name: str) -> None:
        try:
            _, view = ask(port, "/view", {"annotator": name})
            while view["phase"] in ("pairs", "wait"):
                if view["phase"] == "wait":
                    time.sleep(0.01)
                    _, view = ask(port, "/view", {"annotator": name})
                else:
                    view = choose(port, view, [1, 2])
        except BaseException as error:
            failures.append(error)
            raise

    with serving(pairs(tmp_path / "pairs.jsonl"), tmp_path / "labels.jsonl", per_pair=2) as server:
        people = [threading.Thread(target=work, args=(server.port, name)) for name in ("ann", "ben", "cat")]
        for person in people:
            person.start()
        for person in people:
            person.join()
    assert failures == []
    rows = labels.read_labels(tmp_path / "labels.jsonl")
    assert len(rows) == 60 and len({(row.item, row.annotator) for row in rows}) == 60
    assert [row.id for row in rows] == list(range(1, 61))


# -- the command, and kills -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(source: str, out: Path, root: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The command in a process of its own, and its port."""
    command = [sys.executable, "-m", "textrl_gym", "annotate", source, "--out", str(out), *flags]
    started = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        address = re.match(r"http://127\.0\.0\.1:(\d+)/  \(Ctrl-C ends it; the same command goes on\)$", line)
        assert address is not None, (line, started.communicate())
        yield started, int(address[1])
    finally:
        started.kill()
        started.communicate()


def kill_while_answering(source: str, out: Path, root: Path, seed: int) -> int:
    """Answers that were said to be saved by a server that was killed at a random moment."""
    saved = 0
    with process(source, out, root, "--n", "3000") as (server, port):
        _, view = ask(port, "/view", {"annotator": "ann"})
        timer = threading.Timer(random.Random(seed).uniform(0.02, 0.4), server.kill)
        timer.start()
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            while "item" in view:
                view = choose(port, view, [1, 2])
                saved += 1
        timer.join()
    return saved


def test_killed_or_interrupted_it_goes_on(tmp_path: Path, root: Path) -> None:
    """After SIGKILL everything that was said to be saved is there; after Ctrl-C the same command asks the same."""
    # So many that a quick machine has not answered them all when the kill comes.
    source, out = pairs(tmp_path / "pairs.jsonl", 3000), tmp_path / "labels.jsonl"
    saved = kill_while_answering(source, out, root, 0)
    rows = labels.read_labels(out)
    # One may be on the disk whose word was on its way.
    assert saved > 0 and len(rows) - saved in (0, 1)
    assert len({row.item for row in rows}) == len(rows), "none twice"
    with process(source, out, root, "--n", "3000") as (server, port):
        _, view = ask(port, "/view", {"annotator": "ann"})
        assert view["progress"]["yours"] == len(rows)
        choose(port, view, [1, 2])
        server.send_signal(signal.SIGINT)
        _, err = server.communicate(timeout=30)
        assert (server.returncode, err) == (130, "interrupted\n")
    assert len(labels.read_labels(out)) == len(rows) + 1


def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*args: Any) -> str:
        assert main.main(["annotate", *map(str, args)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    source, out = pairs(tmp_path / "pairs.jsonl"), tmp_path / "labels.jsonl"
    assert "out must be a file *.jsonl" in error(source, "--out", tmp_path / "labels.csv")
    assert "unknown environment 'CopyTexd-v0'" in error("CopyTexd-v0", "--out", out)
    config = tmp_path / "annotate.toml"
    config.write_text("[annotate]\nper_pairs = 2\n")
    assert "unknown key 'per_pairs' (did you mean 'per_pair'?)" in error(source, "--out", out, "--config", config)
    assert "instructions" in error(source, "--out", out, "--instructions", tmp_path / "none.txt")
    assert "port must lie in [0, 65535], got 70000" in error(source, "--out", out, "--port", 70000)
    with serving(source, out):
        assert "another process writes" in error(source, "--out", out)
    assert "begun with other questions: seed was 0 and is 1" in error(source, "--out", out, "--seed", 1)


# -- from the page to a policy ----------------------------------------------------------------------------------------


def better(prompt: str, texts: list[str]) -> int:
    """Which of two completions has more of the prompt's symbols at their places, and fewer others."""
    scores = [
        sum(a == b for a, b in zip(prompt.split(), text.split(), strict=False)) - len(text) / 10 for text in texts
    ]
    return int(scores[1] > scores[0])


def from_labels_to_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reward model, PPO on it, DPO, and their pages, of the labels as they are."""
    file, reward, run = tmp_path / "labels.jsonl", tmp_path / "reward", tmp_path / "runs" / "ppo"
    given = ["--dataset", file, "--out", reward, "--epochs", 3, "--annotator-weights", "dawid-skene"]
    commands: list[list[Any]] = [
        ["reward-model", "CopyText-v0", *given],
        ["train", "ppo", "CopyText-v0", "--env.reward", reward, "--total-timesteps", 200, "--out", run],
        ["train", "dpo", "CopyText-v0", "--pairs", file, "--total-timesteps", 100, "--out", tmp_path / "runs" / "dpo"],
        ["report", tmp_path / "runs"],
        ["labels", "report", file],
    ]
    for command in commands:
        assert main.main([*map(str, command)]) == 0, capsys.readouterr().err
    record = json.loads((reward / "reward_training.json").read_text())
    assert record["config"]["annotator_weights"] == "dawid-skene"
    html = (tmp_path / "runs" / "report.html").read_text()
    assert "ppo" in html and "dpo" in html
    assert "Krippendorff" in (tmp_path / "labels.html").read_text()
    # Its reward is the one that the annotators taught.
    assert json.loads((run / "agent.json").read_text())["env"]["reward"] == str(reward)


def test_from_the_page_to_a_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving("CopyText-v0", tmp_path / "labels.jsonl", n=40, per_pair=2) as server:
        for name in ("ann", "ben"):
            _, view = ask(server.port, "/view", {"annotator": name})
            while "item" in view:
                second = better(view["item"]["prompt"], view["item"]["completions"])
                view = choose(server.port, view, [2, 1] if second else [1, 2], seconds=3.0)
    assert len(labels.read_labels(tmp_path / "labels.jsonl")) == 80
    from_labels_to_a_report(tmp_path, capsys)


@pytest.mark.slow
def test_from_clicks_in_a_browser_to_a_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"n": 40, "per_pair": 2}
    with serving("CopyText-v0", tmp_path / "labels.jsonl", **settings) as server:
        for name in ("ann", "ben"):
            with Browser(tmp_path / name) as browser:
                join(browser, server.address, name)
                for number in range(40):
                    prompt = browser.run("document.getElementById('prompt').textContent")
                    second = better(prompt, browser.run(TEXTS))
                    browser.click(f"document.querySelectorAll('.answer button')[{second}]")
                    after = f"{TITLE} === 'Question {number + 2}' || document.getElementById('end').offsetParent"
                    browser.wait(after)
                assert browser.console == []
    from_labels_to_a_report(tmp_path, capsys)


# -- in a browser -----------------------------------------------------------------------------------------------------

TITLE = "document.getElementById('title').textContent"
NOTICE = "document.getElementById('notice').textContent"


TEXTS = "[...document.querySelectorAll('#answers .text')].map((box) => box.textContent)"


def join(browser: Browser, address: str, name: str = "ann") -> None:
    browser.open(address)
    browser.press("Tab")
    while not browser.run("document.activeElement.id === 'name'"):
        browser.press("Tab")
    browser.write(name)
    browser.press("Enter")
    browser.wait("!document.getElementById('start').offsetParent && document.getElementById('state').offsetParent")


def answer(browser: Browser, key: str) -> None:
    """Press a key, and wait until the next question is there."""
    before = json.dumps(browser.run(TITLE))
    browser.press(key)
    fresh = f"({TITLE} !== {before} || document.getElementById('end').offsetParent)"
    browser.wait(f"{fresh} && !document.querySelector('[aria-busy]')")


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow, id="two_hundred")])
def test_choices_by_the_keyboard(tmp_path: Path, count: int) -> None:
    """So many comparisons by the keyboard alone; what is on the disk is what was pressed."""
    source = pairs(tmp_path / "pairs.jsonl", count, HOSTILE)
    keys = random.Random(0).choices(["1", "2", "ArrowLeft", "ArrowRight", "t", "b", "s"], k=count)
    with serving(source, tmp_path / "labels.jsonl", n=count) as server, Browser(tmp_path / "profile") as browser:
        join(browser, server.address)
        shown = []
        for number, key in enumerate(keys):
            assert browser.run(TITLE) == f"Question {number + 1}"
            assert browser.run("document.activeElement.id") == "title", "a screen reader begins here"
            shown.append(browser.run(TEXTS))
            answer(browser, key)
        assert browser.run("document.getElementById('end-title').textContent") == "All questions are answered"
        assert browser.console == [] and all(url.startswith(server.address) for url in browser.requests)
    rows = labels.read_labels(tmp_path / "labels.jsonl")
    assert [[row.completions[place] for place in row.order] for row in rows] == shown
    ranks = {"1": [1, 2], "2": [2, 1], "ArrowLeft": [1, 2], "ArrowRight": [2, 1], "t": [1, 1], "b": [1, 1], "s": None}
    given = [None if row.ranks is None else [row.ranks[place] for place in row.order] for row in rows]
    assert given == [ranks[key] for key in keys]
    assert [row.all_bad for row in rows] == [key == "b" for key in keys]
    assert all(row.seconds is not None and 0 <= row.seconds < 60 for row in rows)


def test_what_is_said_beside_a_choice(tmp_path: Path) -> None:
    """Marks, confidence and a comment by the keyboard; the choice saves them, and the next question has none."""
    rows = [
        {"prompt": "p", "completions": ["a \N{CAT FACE} sits", "no cat here"]},
        {"prompt": "q", "completions": ["a", "b"]},
    ]
    source = write(tmp_path / "pairs.jsonl", rows)
    with serving(source, tmp_path / "labels.jsonl") as server, Browser(tmp_path / "profile") as browser:
        join(browser, server.address)
        while "sits" not in "".join(browser.run(TEXTS)):
            answer(browser, "s")
        first = browser.run(TEXTS)
        browser.press("m")
        if "sits" not in first[0]:
            browser.press("Tab")
        browser.press("ArrowRight")
        browser.press("ArrowRight", SHIFT)
        assert browser.run(NOTICE) == "\N{CAT FACE} sits"
        browser.press("g")
        browser.press("ArrowLeft")
        browser.press("ArrowLeft")
        browser.press("x")
        found = browser.run("[...document.querySelectorAll('mark')].map((mark) => [mark.textContent, mark.className])")
        assert found == [["a", "bad cursor"], ["\N{CAT FACE} sits", "good"]]
        browser.press("Escape")
        browser.press("c")
        browser.press(" ")
        browser.press("ArrowRight")
        browser.press("ArrowRight")
        browser.press("Tab")
        browser.write("1 2 t")  # letters in a field are no choice
        browser.press("Escape")
        answer(browser, "1")
        assert browser.run("document.querySelectorAll('mark, :checked:not(#keys)').length") == 0
        assert browser.run("document.getElementById('comment').value") == ""
        assert browser.console == []
    row = next(row for row in labels.read_labels(tmp_path / "labels.jsonl") if row.prompt == "p" and row.ranks)
    assert (row.confidence, row.comment) == (3, "1 2 t")
    marked = {span["mark"]: row.completions[span["completion"]][span["start"] : span["end"]] for span in row.spans}
    assert marked == {"good": "\N{CAT FACE} sits", "bad": "a"}, "characters, and not halves of them"


def test_undo_differences_and_help(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "completions": ["the cat sat on it", "the dog sat on it"]} for n in range(3)]
    source = write(tmp_path / "pairs.jsonl", rows)
    with serving(source, tmp_path / "labels.jsonl") as server, Browser(tmp_path / "profile") as browser:
        join(browser, server.address)
        first = browser.run("document.getElementById('prompt').textContent"), browser.run(TEXTS)
        browser.press("d")
        marks = "[...document.querySelectorAll('mark.differ')].map((mark) => mark.textContent)"
        assert sorted(browser.run(marks)) == ["cat", "dog"]
        browser.press("d")
        assert browser.run(marks) == []
        browser.press("?")
        assert browser.run("document.getElementById('help').open")
        browser.press("1")  # not a choice: help is open
        browser.press("Escape")
        assert not browser.run("document.getElementById('help').open")
        answer(browser, "1")
        assert browser.run(NOTICE) == "Saved: answer 1 is better."
        answer(browser, "u")
        assert browser.run(NOTICE) == "Taken back."
        assert (browser.run("document.getElementById('prompt').textContent"), browser.run(TEXTS)) == first
        for key in "221":
            answer(browser, key)
        browser.press("u")
        browser.wait("document.getElementById('work').offsetParent")
        assert browser.run(TITLE) == "Question 3", "the last can be taken back at the end too"
        assert browser.console == []
    assert len(labels.read_history(tmp_path / "labels.jsonl")) == 6


def test_a_ranking(tmp_path: Path) -> None:
    source = write(
        tmp_path / "texts.jsonl", [{"prompt": f"p{n}", "completions": ["a", "b", "c", "d"]} for n in range(2)]
    )
    with serving(source, tmp_path / "labels.jsonl") as server, Browser(tmp_path / "profile") as browser:
        join(browser, server.address)
        browser.press("Enter")
        assert browser.run(NOTICE) == "4 answers have no rank yet."
        for key in ("3", "1", "Backspace", "t", "2", "4", "1"):  # 3 and 2 tie, then 4, then 1
            browser.press(key)
        assert browser.run("[...document.querySelectorAll('.rank')].map((rank) => rank.textContent)") == [
            "rank 4", "rank 1", "rank 1", "rank 3",
        ]  # fmt: skip
        answer(browser, "Enter")
        answer(browser, "b")
        assert browser.console == []
    first, second = labels.read_labels(tmp_path / "labels.jsonl")
    assert first.ranks is not None and [first.ranks[place] for place in first.order] == [4, 1, 1, 3]
    assert (second.ranks, second.all_bad) == ([1, 1, 1, 1], True)


def test_what_cannot_be_saved_is_kept_and_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    source = pairs(tmp_path / "pairs.jsonl")
    with serving(source, tmp_path / "labels.jsonl") as server, Browser(tmp_path / "profile") as browser:
        join(browser, server.address)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            browser.press("2")
            browser.wait("document.getElementById('problem').offsetParent")
        words = browser.run("document.getElementById('problem-words').textContent")
        assert words == "Not saved: [Errno 28] No space left on device."
        browser.press("1")  # not another choice: the first waits
        assert browser.run(TITLE) == "Question 1" and labels.read_labels(tmp_path / "labels.jsonl") == []
        answer(browser, "Enter")
        assert browser.run(TITLE) == "Question 2"
    (row,) = labels.read_labels(tmp_path / "labels.jsonl")
    assert row.ranks is not None and [row.ranks[place] for place in row.order] == [2, 1]


def test_sizes(tmp_path: Path) -> None:
    """Side by side on a desktop, one below the other on a phone, and no sideways scrolling there."""
    rows = [{"prompt": "p " * 900, "completions": ["a" * 300, "b " * 300]}]
    tops = "[...document.querySelectorAll('.answer')].map((box) => box.getBoundingClientRect().top)"
    with (
        serving(write(tmp_path / "texts.jsonl", rows), tmp_path / "labels.jsonl") as server,
        Browser(tmp_path / "profile") as browser,
    ):
        browser.look(1280, 900)
        join(browser, server.address)
        first, second = browser.run(tops)
        assert first == second
        browser.look(390, 844, dark=True, touch=True)
        first, second = browser.run(tops)
        assert first < second
        assert browser.run("document.documentElement.scrollWidth") == 390
        assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(19, 20, 22)"
        assert (
            browser.run("Math.min(...[...document.querySelectorAll('.answer button')].map((b) => b.offsetHeight))")
            >= 44
        )


@pytest.mark.slow
def test_axe_finds_no_violation(tmp_path: Path) -> None:
    script, found = axe_script(), []
    many: list[dict[str, Any]] = [{"prompt": "p", "completions": ["a b", "b c", "c d"]}]
    talk = [{"role": "user", "content": "Hi " * 600}]
    two: list[dict[str, Any]] = [{"prompt": talk, "completions": ["a b", "b c"]}] * 1 + [
        {"prompt": "x", "completions": ["a", "b"]}
    ]
    for name, rows in {"two": two, "many": many}.items():
        source = write(tmp_path / f"{name}.jsonl", rows)
        with serving(source, tmp_path / f"{name}-labels.jsonl") as server, Browser(tmp_path / name) as browser:
            for width, height, dark in ((1280, 900, False), (390, 844, True)):
                browser.run("sessionStorage.clear()") if browser.requests else None
                browser.look(width, height, dark)
                browser.open(server.address)
                where = f"{name} {width}"
                found += violations(browser, script, f"{where} start")
                join(browser, server.address)
                found += violations(browser, script, f"{where} question")
                for key in "dmg":
                    browser.press(key)
                found += violations(browser, script, f"{where} marks")
                browser.press("Escape")
                browser.press("c")
                found += violations(browser, script, f"{where} comment")
                browser.press("Escape")
                browser.press("?")
                found += violations(browser, script, f"{where} help")
                browser.press("Escape")
                browser.run("document.getElementById('problem').hidden = false")
                found += violations(browser, script, f"{where} problem")
            for _ in rows:
                browser.run("document.getElementById('problem').hidden = true")
                answer(browser, "s")
            found += violations(browser, script, f"{name} end")
    assert found == [], "\n".join(found)


@pytest.mark.slow
def test_twenty_kills_of_server_and_browser_lose_nothing(tmp_path: Path, root: Path) -> None:
    """Each at a random moment while somebody answers; the server's SIGKILL or the browser's comes first, in turn."""
    source, out = pairs(tmp_path / "pairs.jsonl", 10_000), tmp_path / "labels.jsonl"
    told = 0
    for number in range(20):
        with process(source, out, root, "--n", "10000") as (server, port), Browser(tmp_path / f"{number}") as browser:
            join(browser, f"http://127.0.0.1:{port}/")
            begun = browser.run(TITLE)
            assert begun == f"Question {len(labels.read_labels(out)) + 1}", "what is on the disk is not asked again"
            victims: list[subprocess.Popen[Any]] = (
                [server, browser.process] if number % 2 else [browser.process, server]
            )
            timers = [
                threading.Timer(random.Random(10 * number + who).uniform(0.1 + 0.2 * who, 0.6 + 0.2 * who), victim.kill)
                for who, victim in enumerate(victims)
            ]
            for timer in timers:
                timer.start()
            last = begun
            # The page says that an answer was saved by asking the next question.
            with contextlib.suppress(ConnectionError, OSError, AssertionError):
                while server.poll() is None:
                    browser.press("12t"[random.Random(number).randrange(3)])
                    last = browser.run(TITLE)
            for timer in timers:
                timer.join()
            told = max(told, int(last.split()[-1]) - 1)
        rows = labels.read_labels(out)
        assert len(rows) >= told, f"kill {number}: {told} were said to be saved, {len(rows)} are there"
        assert len({row.item for row in rows}) == len(rows), "none twice"
    assert told >= 20
