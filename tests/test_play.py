"""People at a scripted terminal and models behind a loopback endpoint play; what they played is a run of `compare`."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_endpoint import Handler, Server, server

from textrl_gym import files
from textrl_gym.cli import main
from textrl_gym.cli.play import read_text
from textrl_gym.core import Message
from textrl_gym.data.trajectories import read_trajectories
from textrl_gym.evaluation.evaluator import Evaluator, evaluation_prompts
from textrl_gym.experiments import worker
from textrl_gym.experiments.compare import CompareConfig, prepare
from textrl_gym.experiments.results import SPEC, read_comparison

__all__ = ["server"]  # a fixture

GUESS = "test_text_actions:Guess"


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def play(env: str, out: Path, *more: str) -> int:
    return main.main(["play", env, "--out", str(out), *more])


def episodes(out: Path) -> list[dict[str, Any]]:
    return files.read_json_lines(out / "episodes.jsonl")


# -- a person ---------------------------------------------------------------------------------------------------------


def test_several_lines_are_one_text() -> None:
    def lines(*given: str) -> Iterator[str]:
        yield from given
        yield ""

    one = lines("\n", "a b\n", "\\\n", "c\r\n", "\n", "next\n", "\n")
    assert read_text(lambda: next(one)) == "a b\n\nc" and read_text(lambda: next(one)) == "next"
    with pytest.raises(EOFError):
        read_text(lambda: next(one))
    two = lines("\\\n", "\n", "half\n")
    assert read_text(lambda: next(two)) == ""
    with pytest.raises(EOFError):  # nothing of an answer that was not ended
        read_text(lambda: next(two))


def test_a_person_plays_stops_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = evaluation_prompts(16, 3, 1).tolist()
    asked = ["--episodes", "3", "--seed", "1"]
    typed(monkeypatch, "hello\n\na b\n\nno end")
    assert play("CopyText-v0", tmp_path, *asked) == 0
    out, err = capsys.readouterr()
    assert "no token for 'hello'" in out and "the reference text" in out
    assert "1 episodes are saved in" in err and "the same command goes on" in err
    assert [row["index"] for row in episodes(tmp_path)] == places[:1]
    # Ctrl-C: exit code 130, and nothing is lost.
    monkeypatch.setattr("sys.stdin.readline", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert play("CopyText-v0", tmp_path, *asked) == 130
    source = Evaluator("CopyText-v0", 3, 1).mdp.source
    monkeypatch.undo()
    typed(monkeypatch, "".join(f"{source[i]['prompt']}\n\n" for i in places[1:]))
    assert play("CopyText-v0", tmp_path, *asked) == 0
    assert [row["index"] for row in episodes(tmp_path)] == places
    assert [row["score"] for row in episodes(tmp_path)[1:]] == [1.0, 1.0]
    assert "mean score" in capsys.readouterr().out
    assert play("CopyText-v0", tmp_path, *asked) == 0  # nothing is left, nobody is asked
    assert play("CopyText-v0", tmp_path, "--episodes", "4", "--seed", "1") == 2
    assert "was played with episodes=3, not 4" in capsys.readouterr().err
    assert play("CopyText-v0", tmp_path / "new", "--endpoint.model", "x") == 2
    assert "settings are of --player endpoint" in capsys.readouterr().err


def test_a_conversation_goes_on_in_its_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "a\n\nb c\n\n")
    assert play(GUESS, tmp_path, "--episodes", "1") == 0
    assert episodes(tmp_path) == [] and len(files.read_json_lines(tmp_path / "answers.jsonl")) == 2
    typed(monkeypatch, "e\n\n")
    assert play(GUESS, tmp_path, "--episodes", "1") == 0
    (row,) = episodes(tmp_path)
    assert row["answers"] == ["a", "b c", "e"] and row["stop_reason"] == "DONE" and row["tokens"] == 7
    # 0.25 for each of 4 words, and a score of 6, one for each message; see test_text_actions.
    assert row["return"] == 7.0 and row["score"] == 6.0 and len(row["turns"]) == 6
    # As trajectories, with the environment's words marked.
    assert main.main(["collect", GUESS, "--agent", str(tmp_path), "--out", str(tmp_path / "t.jsonl")]) == 0
    (one,) = read_trajectories(tmp_path / "t.jsonl").trajectories
    assert one.num_actions == 7 and one.total == 7.0 and sum(one.replies) == 5 and one.turn[-1] == 2


def test_a_conversation_has_its_gold_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A half-played folder goes on: the second call says the first answer again.
    for text in ("8\n\n", "12\n\n14\n\n15\n\n13\n\n"):
        typed(monkeypatch, text)
        assert play("GuessNumber-v0", tmp_path, "--episodes", "1") == 0
    (row,) = episodes(tmp_path)
    # 14 at the third guess: 1 less 0.1 for each of the two before it.
    assert row["answers"] == ["8", "12", "14"] and row["gold"] == pytest.approx(0.8)


# -- a model ----------------------------------------------------------------------------------------------------------


def copies(handler: Handler, *_: Any) -> None:
    """The prompt, with words that have no token."""
    handler.say(f"Here: {handler.body['messages'][-1]['content']}")


@pytest.fixture
def flags(server: Server) -> list[str]:
    return [
        "--player", "endpoint", "--endpoint.model", "me", "--endpoint.url", server.url,
        "--endpoint.backoff-seconds", "0.001", "--endpoint.retries", "1",
    ]  # fmt: skip


def test_a_model_plays(server: Server, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server.act = copies
    more = [*flags, "--endpoint.temperature", "0.5", "--endpoint.system-prompt", "Copy.", "--episodes", "6"]
    assert play("CopyText-v0", tmp_path, *more) == 0
    assert [row["score"] for row in episodes(tmp_path)] == [1.0] * 6
    assert len(server.bodies) == 6 and all(body["temperature"] == 0.5 for body in server.bodies)
    assert all("max_tokens" not in body for body in server.bodies)
    assert [m["role"] for m in server.bodies[0]["messages"]] == ["system", "user"]
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert not any(b"sk-secret" in path.read_bytes() for path in tmp_path.iterdir())


def test_a_model_that_fails_is_gone_on_with_and_asked_nothing_twice(
    server: Server,
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = [True]

    def act(handler: Handler, *_: Any) -> None:
        # "e" in the third turn ends the conversation.
        said = sum(m["role"] == "assistant" for m in handler.body["messages"])
        if broken[0] and said == 2:
            handler.send(500, "down")
        else:
            handler.say("e" if said == 2 else "a")

    server.act = act
    assert play(GUESS, tmp_path, *flags, "--episodes", "2") == 2
    assert "status 500: down (2 tries)" in capsys.readouterr().err
    assert episodes(tmp_path) == [] and len(files.read_json_lines(tmp_path / "answers.jsonl")) == 4
    broken[0], before = False, len(server.bodies)
    assert play(GUESS, tmp_path, *flags, "--episodes", "2") == 0
    assert len(server.bodies) - before == 2  # the third turn of each
    assert [row["answers"] for row in episodes(tmp_path)] == [["a", "a", "e"]] * 2
    messages: list[Message] = server.bodies[-1]["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert play(GUESS, tmp_path, "--player", "endpoint", "--episodes", "2") == 2
    assert "needs the name of its model: --endpoint.model NAME" in capsys.readouterr().err


# -- in a comparison --------------------------------------------------------------------------------------------------


def compared(out: Path, agents: Sequence[str], count: int) -> Any:
    """A finished comparison, its runs in this process."""
    config = CompareConfig(tuple(agents), eval_episodes=count, eval_seed=1, device="cpu")
    for folder in prepare(out, "CopyText-v0", config).values():
        worker.run(folder, json.loads((folder / SPEC).read_text()))
    return read_comparison(out)


def test_who_played_is_a_run_of_a_comparison(
    server: Server,
    flags: list[str],
    tmp_path: Path,
) -> None:
    server.act = copies
    played = tmp_path / "alice"
    assert play("CopyText-v0", played, *flags, "--episodes", "5", "--seed", "1") == 0
    comparison = compared(tmp_path / "same", ("reference", str(played)), 5)
    by_agent = {group.agent: group.runs[0] for group in comparison.groups}
    assert list(by_agent) == ["reference", "alice"]
    assert by_agent["alice"].prompts == by_agent["reference"].prompts and comparison.same_prompts()[1] == []
    final = by_agent["alice"].final
    assert final["score"] == 1.0 and final["completion_tokens"] == 3 and final["timesteps"] == 0
    # What needs log-probabilities is left out; the win rate is against the initial policy, as everybody's is.
    assert not {"kl_sequence", "kl_token", "entropy_token", "model_calls", "unplayed_prompts"} & final.keys()
    assert final["win_rate"] == sum(1 - 0.5 * (e["start"]["score"] == 1) for e in by_agent["alice"].episodes) / 5
    assert [e["start"]["completion"] for e in by_agent["alice"].episodes] == [
        e["completion"] for e in by_agent["reference"].episodes
    ]


def test_prompts_that_were_not_played_are_counted(server: Server, flags: list[str], tmp_path: Path) -> None:
    server.act = copies
    played = tmp_path / "alice"
    assert play("CopyText-v0", played, *flags, "--episodes", "5", "--seed", "1") == 0
    both = set(evaluation_prompts(16, 5, 1).tolist()) & set(evaluation_prompts(16, 12, 1).tolist())
    (group,) = compared(tmp_path / "more", (str(played),), 12).groups
    assert group.runs[0].final["unplayed_prompts"] == 12 - len(both) > 0
    assert {e["index"] for e in group.runs[0].episodes} == both
    (played / "episodes.jsonl").unlink()
    with pytest.raises(ValueError, match=r"none of the 5 prompts was played in .*play ENV --episodes N --seed S"):
        compared(tmp_path / "none", (str(played),), 5)
