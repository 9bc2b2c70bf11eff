"""watch: only its own two pages, only to whom they are for, and new ones when a run has ended."""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from servers import running

from textrl_gym.cli import main
from textrl_gym.cli.compare import watch_command
from textrl_gym.web import server as web_server
from textrl_gym.web import watch, watched


def write_run(folder: Path, name: str, gold: float | None, **progress: float) -> Path:
    """A run under way, or, with gold, a finished one."""
    run = folder / "runs" / name
    run.mkdir(parents=True, exist_ok=True)
    spec = {"environment": "CopyText-v0", "agent": name[:-2], "seed": int(name[-1]), "kl_coef": None}
    (run / "cell.json").write_text(json.dumps(spec | {"total_timesteps": 400}))
    if progress:
        (run / "progress.json").write_text(
            json.dumps({key.replace("__", "/"): x for key, x in progress.items()}) + "\n"
        )
    if gold is not None:
        sample = {"index": 0, "prompt": "p", "completion": "<c>", "tokens": 2, "score": gold, "stop_reason": "EOS"}
        (run / "episodes.jsonl").write_text(json.dumps(sample) + "\n")
        numbers = {"score": gold, "kl_sequence": 0.5, "completion_tokens": 2.0, "eos_share": 1.0}
        (run / "evaluation.json").write_text(
            json.dumps({"timesteps": 400, "updates": 5, "train_seconds": 1.0} | numbers)
        )
    return run


def write_comparison(folder: Path) -> Path:
    """Two runs, one of which has begun."""
    config = {
        "agents": ["alpha", "beta"],
        "seeds": 1,
        "total_timesteps": 400,
        "kl_coef": [],
        "set": [],
        "eval_episodes": 1,
    }
    (folder / "compare.json").write_text(json.dumps({"environment": "CopyText-v0", "config": config, "versions": {}}))
    write_run(folder, "alpha-0", None, time__total_timesteps=100, time__collect_seconds=2.0, rollout__score=0.25)
    write_run(folder, "beta-0", None)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_text("the secret")
    return write_comparison(tmp_path)


def serving(folder: Path, host: str = "127.0.0.1") -> AbstractContextManager[watch.WatchServer]:
    return running(watch.make_server(folder, host))


def ask(
    server: watch.WatchServer, path: str = "/", method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], str]:
    """Status, headers and body; the path goes over the wire as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(method, path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read().decode()
    finally:
        connection.close()


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_before_any_run_has_finished_there_is_progress(folder: Path) -> None:
    with serving(folder) as server:
        status, _, page = ask(server)
        assert status == 200
        assert "No run has finished yet." in page
        (folder / "runs" / "alpha-0" / ".lock").touch()
        with (folder / "runs" / "alpha-0" / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # as the run's process does
            told = json.loads(ask(server, "/status")[2])
        assert f'data-version="{told["version"]}"' in page
        # 2 seconds for 100 tokens: 6 for the other 300.
        alpha = {
            "run": "alpha-0",
            "state": "running",
            "done": 100,
            "total": 400,
            "score": 0.25,
            "kl": None,
            "left": 6.0,
        }
        beta = {"run": "beta-0", "state": "waiting", "done": 0, "total": 400, "score": None, "kl": None, "left": None}
        assert told["runs"] == [alpha, beta]
        assert json.loads(ask(server, "/status")[2])["runs"][0]["state"] == "waiting"  # its process has ended


def test_a_score_that_is_no_number_is_none(folder: Path) -> None:
    write_run(folder, "beta-0", None, time__total_timesteps=10, rollout__score=float("nan"))
    with serving(folder) as server:
        assert json.loads(ask(server, "/status")[2])["runs"][1]["score"] is None


@pytest.mark.parametrize(("name", "text"), [("cell.json", "{"), ("cell.json", '{"total_timesteps": "many"}')])
def test_a_malformed_file_is_an_answer_and_no_closed_connection(folder: Path, name: str, text: str) -> None:
    run = folder / "runs" / "alpha-0"
    (run / name).write_text(text)
    with serving(folder) as server:
        code, headers, body = ask(server, "/status")
        assert code == 500 and name in body and headers["Content-Type"].startswith("text/plain")
        assert ask(server, "/nothing")[0] == 404, "it goes on"


def test_a_run_that_ends_makes_a_new_page(folder: Path) -> None:
    with serving(folder) as server:
        versions = [json.loads(ask(server, "/status")[2])["version"]]
        write_run(folder, "alpha-0", 0.5)
        versions.append(json.loads(ask(server, "/status")[2])["version"])
        page = ask(server)[2]
        assert "<h1>CopyText-v0: agents compared</h1>" in page
        assert f'data-version="{versions[1]}"' in page
        assert "connect-src 'self'" in page
        assert "1 finished run of 400 tokens" in page
        assert "beta-0: 0 of 400 tokens" not in page  # the live table says how far it is
        made = server.pages._made[1]
        assert ask(server)[2] == page and server.pages._made[1] is made, "made once"
        write_run(folder, "beta-0", 0.25)
        versions.append(json.loads(ask(server, "/status")[2])["version"])
        assert "2 finished runs" in ask(server)[2]
        (folder / "runs" / "beta-0" / "evaluation.json").write_text("{")
        versions.append(json.loads(ask(server, "/status")[2])["version"])
        assert "evaluation.json&#39; is no JSON" in ask(server)[2]
        write_run(folder, "beta-0", 0.5)
        assert "2 finished runs" in ask(server)[2], "it goes on"
    assert len(set(versions)) == 4
    assert not (folder / "report.html").exists(), "nothing is written"


def evaluate(run: Path, timesteps: int, score: float, name: str = "evaluations.jsonl") -> None:
    """An evaluation of a run under way."""
    row = {"timesteps": timesteps, "updates": timesteps // 50, "score": score, "kl_sequence": 0.5, "train_seconds": 1.0}
    with (run / name).open("a") as log:
        log.write(json.dumps(row) + "\n")


def update(run: Path, timesteps: int, score: float) -> None:
    """An update of a run under way."""
    with (run / "progress.json").open("a") as log:
        log.write(json.dumps({"time/total_timesteps": timesteps, "rollout/score": score}) + "\n")


def test_curves_are_there_from_the_first_update(folder: Path) -> None:
    beta = folder / "runs" / "beta-0"
    with serving(folder) as server:
        versions = [json.loads(ask(server, "/status")[2])["curves"]]
        evaluate(beta, 0, 0.25)
        update(beta, 50, 0.5)
        versions.append(json.loads(ask(server, "/status")[2])["curves"])
        update(beta, 100, 0.75)
        versions.append(json.loads(ask(server, "/status")[2])["curves"])
        curves = ask(server, "/curves")[2]
        (line,) = re.findall('<polyline class="s1 rollout" points="([^"]*)"', curves)  # beta's colour on the page
        assert len(line.split()) == 2
        assert curves.count("<circle") == 2  # the evaluation's score and KL
        write_run(folder, "beta-0", 0.5)
        assert "beta-0" not in ask(server, "/curves")[2], "the page has it now"
    assert len(set(versions)) == 3


def test_a_folder_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    with serving(folder) as server:
        page = ask(server)[2]
        assert f"{folder} is not there yet. This page fills itself when a run begins." in page
        told = json.loads(ask(server, "/status")[2])
        assert told["runs"] == [] and f'data-version="{told["version"]}"' in page
        assert ask(server, "/curves")[2] == ""
        folder.mkdir()
        assert f"{folder} holds no run yet." in ask(server)[2]
        evaluate(folder, 0, 0.25)
        assert json.loads(ask(server, "/status")[2])["version"] != told["version"]
        assert "<h1>Training report</h1>" in ask(server)[2]


def test_a_single_run_is_served(tmp_path: Path) -> None:
    run = tmp_path / "grpo"
    run.mkdir()
    (run / "agent.json").write_text(json.dumps({"total_timesteps": 400, "finished": False, "agent": "<grpo>"}))
    evaluate(run, 0, 0.25)
    update(run, 100, 0.5)
    with serving(run) as server:
        page, told = ask(server)[2], json.loads(ask(server, "/status")[2])
        assert "<h1>Training report</h1>" in page and f'data-version="{told["version"]}"' in page
        assert "connect-src &#39;self&#39;" in page or "connect-src 'self'" in page
        assert "<grpo>" not in page and page.count("<script>") == 1
        expected = {
            "run": "grpo",
            "state": "stopped",
            "done": 100,
            "total": 400,
            "score": 0.5,
            "kl": None,
            "left": None,
        }
        assert told["runs"] == [expected]
        with (run / ".training.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert json.loads(ask(server, "/status")[2])["runs"][0]["state"] == "running"
        update(run, 150, 0.6)
        later = json.loads(ask(server, "/status")[2])
        assert later["version"] == told["version"] and later["curves"] != told["curves"]
        evaluate(run, 200, 0.75)
        (run / "agent.json").write_text(json.dumps({"total_timesteps": 400, "finished": True}))
        later = json.loads(ask(server, "/status")[2])
        assert later["version"] != told["version"] and later["runs"][0]["state"] == "done"
        assert "200 tokens" in ask(server)[2]


def test_a_comparison_over_tasks_is_served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    suite = tmp_path_factory.mktemp("suite")
    (suite / "suite.json").write_text(json.dumps({"environments": ["CopyText-v0", "Other-v0"], "config": {}}))
    for task in ("CopyText-v0", "Other-v0"):
        shutil.copytree(folder, suite / task)
    with serving(suite) as server:
        assert ask(server, "/CopyText-v0/report.html")[0] == 404, "no status was asked for"
        told = json.loads(ask(server, "/status")[2])
        assert [run["run"] for run in told["runs"]] == [
            "CopyText-v0/alpha-0", "CopyText-v0/beta-0", "Other-v0/alpha-0", "Other-v0/beta-0"
        ]  # fmt: skip
        assert "No run has finished yet." in ask(server)[2]
        for task in ("CopyText-v0", "Other-v0"):
            run = write_run(suite / task, "alpha-0", 0.5)
            episode = json.loads((run / "episodes.jsonl").read_text())
            start = {"completion": "c", "tokens": 2, "score": 0.25}
            (run / "episodes.jsonl").write_text(json.dumps(episode | {"start": start}) + "\n")
        page = ask(server)[2]
        assert "<h1>Agents over tasks</h1>" in page and 'href="CopyText-v0/report.html"' in page
        assert "<h1>CopyText-v0: agents compared</h1>" in ask(server, "/CopyText-v0/report.html")[2]
        assert ask(server, "/CopyText-v0/secret.txt")[0] == 404


PROBE = """<script>
const form = document.getElementById("filters"), live = document.getElementById("live");
const done = (found) => document.body.replaceChildren("FOUND" + JSON.stringify(found) + "DNUOF");
if (!sessionStorage.getItem("probed")) {
  sessionStorage.setItem("probed", live.dataset.version);
  form.elements.text.value = "zebra";
  form.querySelector("[name=agent]").click(); // alpha is not shown
  form.dispatchEvent(new Event("input"));
  const wait = setInterval(() => {
    const button = live.querySelector("button");
    if (!button) return;
    clearInterval(wait);
    sessionStorage.setItem("told", live.innerText);
    button.click();
  }, 100);
} else setTimeout(() => done({
  before: sessionStorage.getItem("told"), text: form.elements.text.value,
  boxes: [...form.querySelectorAll("[name=agent]")].map((box) => box.checked),
  found: document.getElementById("found").textContent,
  fresh: live.dataset.version !== sessionStorage.getItem("probed")}), 500);
</script></body>"""


def browse(address: str, folder: Path) -> tuple[str, list[str]]:
    """The document after twenty seconds of a headless Chromium's own time, and what its console said."""
    browser = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), "")
    if not browser:
        pytest.skip("there is no Chromium on this machine")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def ends_meanwhile(folder: Path, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second question on the run has ended."""
    asked, status = [], watched.Watched.status

    def ask_and_end(now: watched.Watched) -> dict[str, Any]:
        asked.append(now)
        if len(asked) == 2:
            write_run(folder, run, 0.5)
        return status(watched.look(folder))

    monkeypatch.setattr(watched.Watched, "status", ask_and_end)


def test_a_page_that_nobody_uses_is_made_new(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends_meanwhile(folder, "alpha-0", monkeypatch)
    with serving(folder) as server:
        document, console = browse(server.address, tmp_path)
    assert console == []
    assert "<h1>CopyText-v0: agents compared</h1>" in document  # it was the waiting page at first
    assert "<figcaption>Score (training reward)</figcaption><svg" not in document, "beta has no curve"
    assert "1 of 2 runs have finished." in document
    assert '<th scope="row">beta-0</th><td>waiting</td>' in document


def test_who_filters_is_asked_and_keeps_the_filter(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(folder, "alpha-0", 0.5)
    ends_meanwhile(folder, "beta-0", monkeypatch)
    with serving(folder) as server:
        make = server.pages._make
        monkeypatch.setattr(server.pages, "_make", lambda now: make(now).replace("</body>", PROBE))
        document, console = browse(server.address, tmp_path)
    assert console == []
    found = json.loads(document.partition("FOUND")[2].partition("DNUOF")[0])
    assert "2 of 2 runs have finished.\n\nNew results: reload" in found["before"]
    assert (found["text"], found["found"], found["fresh"]) == ("zebra", "0 of 1 prompts shown", True)
    assert found["boxes"] == [False, True]  # beta is new, and shown


# -- to whom ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/secret.txt", "/../secret.txt", "/%2e%2e/secret.txt", "/..%2fsecret.txt", "//secret.txt", "/./", "/compare.json",
     "/runs/alpha-0/cell.json", "/status/../secret.txt", "/etc/passwd", "/report.html", "/\\..\\secret.txt"],
)  # fmt: skip
def test_there_is_nothing_else(folder: Path, path: str) -> None:
    with serving(folder) as server:
        status, _, body = ask(server, path)
    assert (status, body) == (404, "not found\n")


def test_methods_and_headers(folder: Path) -> None:
    with serving(folder) as server:
        for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            status, headers, body = ask(server, method=method)
            assert (status, headers["Allow"], body) == (405, "GET, HEAD", "")
        assert ask(server, method="TRACE")[0] == 501
        with socket.create_connection(("127.0.0.1", server.port)) as plain:  # http.client would not read a body
            plain.sendall(f"HEAD / HTTP/1.0\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
            said = plain.makefile("rb").read().decode()
        assert said.endswith("\r\n\r\n") and f"Content-Length: {len(ask(server)[2].encode())}\r\n" in said
        for path, expected in (("/", 200), ("/status", 200), ("/nowhere", 404)):
            status, headers, _ = ask(server, path)
            assert status == expected
            assert headers["Cache-Control"] == "no-store"
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Referrer-Policy"] == "no-referrer"
            assert headers["Content-Security-Policy"].startswith("default-src 'none';")
            assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
            assert "Python" not in headers["Server"]


def test_a_name_that_is_not_ours_is_refused(folder: Path) -> None:
    """A page of evil.example whose name now points to 127.0.0.1 sends its own name."""
    with serving(folder) as server:
        for host, expected in [
            (f"127.0.0.1:{server.port}", 200),
            (f"localhost:{server.port}", 200),
            (f"LOCALHOST:{server.port}", 200),
            (f"evil.example:{server.port}", 403),
            ("127.0.0.1", 403),
            (f"127.0.0.1:{server.port}.evil.example", 403),
            ("", 403),
        ]:
            assert ask(server, headers={"Host": host})[0] == expected, host
        assert "token" not in server.address


def test_beyond_this_machine_a_token_is_asked_for(folder: Path) -> None:
    with serving(folder, "0.0.0.0") as server:
        asked = urlsplit(server.address)
        assert asked.hostname == socket.gethostname().lower()
        assert len(server.token) >= 32 and asked.query == f"token={server.token}"
        for path in ("/", "/status"):
            assert ask(server, f"{path}?{asked.query}")[0] == 200
            for query in ("", "?token=", "?token=x", f"?token={server.token}x", "?token=%ff", f"?t={server.token}"):
                status, _, body = ask(server, path + query)
                assert (status, body) == (403, "forbidden\n"), query
        assert ask(server, "/nowhere")[0] == 403, "nothing is told to those without"
    with watch.make_server(folder, "0.0.0.0") as other:
        assert other.token != server.token


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.0.1", False), ("localhost.evil.example", False)],
)  # fmt: skip
def test_loopback(host: str, loopback: bool) -> None:
    assert web_server.is_loopback(host) is loopback


# -- the command ------------------------------------------------------------------------------------------------------


def test_wrong_input(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*args: Any) -> str:
        assert main.main(["watch", *map(str, args)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    assert "is no folder: name that of a comparison or of a run" in error(folder / "compare.json")
    assert "port must lie in [0, 65535], got 70000" in error(folder, "--port", 70000)
    assert "cannot listen at --host 203.0.113.9 --port 0" in error(folder, "--host", "203.0.113.9")
    with serving(folder) as server:
        assert f"port {server.port} of 127.0.0.1 is taken: name another --port" in error(folder, "--port", server.port)


def test_ctrl_c_ends_it(folder: Path, root: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "textrl_gym", "watch", str(folder)],
        env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    address = re.match(r"http://127\.0\.0\.1:(\d+)/  \(Ctrl-C ends it\)$", line)
    assert address is not None, (line, process.communicate())
    connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=60)
    connection.request("GET", "/")
    assert "No run has finished yet." in connection.getresponse().read().decode()
    connection.close()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "interrupted\n")


def test_its_help_says_what_it_is() -> None:
    assert (watch_command.__doc__ or "").startswith("Serve the page of runs while they go on")
