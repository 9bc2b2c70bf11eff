"""Bad rows: every row is looked at before work begins, and stops it or is left out, with its place and its reason."""

import dataclasses
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from hypothesis import given
from hypothesis import strategies as st

import textrl_gym  # noqa: F401 - registers the environments
from textrl_gym.cli import main
from textrl_gym.core import Row
from textrl_gym.data import prompts, rows, sources, text_files
from textrl_gym.data.ranked import read_preferences
from textrl_gym.envs.copy_text import CopyText
from textrl_gym.envs.tldr_summarize import TLDRSummarize
from textrl_gym.experiments import compare
from textrl_gym.experiments.compare import CompareConfig
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.mdp.task import PromptReader, Task, checked_rows
from textrl_gym.mdp.vector_env import TextVectorEnv
from textrl_gym.models.tokenizer import train_tokenizer
from textrl_gym.pipeline import sft
from textrl_gym.pipeline.reward_data import RewardModelConfig, gather
from textrl_gym.pipeline.sample_preferences import PreferenceConfig, make_preferences

SUFFIX = "\n\nTL;DR:"
TLDR = "TLDRSummarize-v0"
LONG = {"prompt": "steals socks " * 400, "completion": " s"}  # without the suffix it cannot be cut


def post(number: int, words: int = 3) -> dict[str, Any]:
    prompt = f"SUBREDDIT: r/a\n\nTITLE: {number}\n\nPOST: {'my cat ' * words}{SUFFIX}"
    return {"prompt": prompt, "completion": f" cat {number}"}


def write(path: Path, found: Sequence[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, found)) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def bad_file(tmp_path: Path) -> str:
    """30 good rows; line 11 cannot be cut, line 12 has no prompt, line 13 is no JSON."""
    path = tmp_path / "posts.jsonl"
    found = [*map(post, range(10)), LONG, post(0) | {"prompt": None}, "?", *map(post, range(10, 30))]
    write(path, found)
    path.write_text(path.read_text().replace('"?"', "{?"))
    return str(path)


# -- environments -----------------------------------------------------------------------------------------------------


def test_bad_rows_stop_an_environment_before_its_first_episode(bad_file: str) -> None:
    with pytest.raises(ValueError) as caught:
        gym.make_vec(TLDR, num_envs=2, dataset=bad_file, reward="length")
    words = str(caught.value)
    for part in (
        "3 of 33 rows cannot be used",
        f"1 row: its prompt cannot be encoded within max_prompt_tokens ({bad_file!r}, line 11: the prompt 'steals",
        f"1 row: column 'prompt' is not a text ({bad_file!r}, line 12: None)",
        f"1 row: is no JSON ({bad_file!r}, line 13: ",
        "--env.bad-rows skip",
    ):
        assert part in words


def test_bad_rows_stop_a_comparison_or_are_left_out(bad_file: str) -> None:
    config, env = CompareConfig(agents=("reinforce",)), EnvSettings(dataset=bad_file, reward="length")
    with pytest.raises(ValueError, match=r"of \d+ rows cannot be used"):
        compare.check(TLDR, config, env)
    assert compare.check(TLDR, config, dataclasses.replace(env, bad_rows="skip")) == TLDR


def test_bad_rows_are_left_out_and_told_once(bad_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    envs = gym.make_vec(TLDR, num_envs=2, dataset=bad_file, reward="length", bad_rows="skip")
    mdp: Any = envs.unwrapped
    kept = [mdp.source, mdp.remake(1, split="validation").source, mdp.remake(1, split="test").source]
    assert sum(map(len, kept)) == 30
    assert not [row for source in kept for row in source if row["prompt"] == LONG["prompt"]]
    said = capsys.readouterr().err
    assert said.count("3 of 33 rows cannot be used") == 1
    assert "line 11" in said
    with pytest.raises(ValueError, match=r"bad_rows must be .*stop.*skip.*, got 'drop'"):
        gym.make(TLDR, bad_rows="drop")


def test_a_data_set_of_bad_rows_alone_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [LONG] * 5)
    with pytest.raises(ValueError, match=r"5 of 5 rows cannot be used: 5 rows: .*line 3: .*, \.\.\.\).*No row is left"):
        gym.make(TLDR, dataset=path, bad_rows="skip")


def test_rows_are_looked_at_once_for_all_environments_of_one_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", [*map(post, range(20))])
    looked = []

    def look_through(*args: Any) -> rows.Scan:
        looked.append(args)
        return rows.look_through(*args)

    monkeypatch.setattr(prompts, "look_through", look_through)
    mdp: Any = gym.make_vec(TLDR, num_envs=2, dataset=path, reward="length").unwrapped
    for split in sources.SPLITS:
        mdp.remake(1, split=split)
    assert len(looked) == 1
    mdp.remake(1, max_prompt_tokens=100)  # other prompts may be too long
    assert len(looked) == 2


class Listed(TLDRSummarize):
    """A task whose rows are a list."""

    def rows(self, split: str, dataset: str | None = None) -> list[Row]:
        return [post(0), LONG, post(1)]


class Computed(Listed):
    """A task whose rows are made when they are asked for."""

    def rows(self, split: str, dataset: str | None = None) -> Any:
        return type("Endless", (), {"__len__": lambda _: 10**6, "__getitem__": lambda _, i: LONG})()


class OwnEncoding(Listed):
    """A task that cuts prompts in its own way."""

    def encode(self, row: Row, tokenizer: Any, max_prompt_tokens: int) -> list[int]:
        if row["completion"] == " cat 1":
            raise ValueError("no cat 1")
        return [5]


def test_a_tasks_own_list_is_looked_at_and_computed_rows_are_not() -> None:
    with pytest.raises(ValueError, match=r"Listed\.rows\('train', None\): 1 of 3 rows .*row 1: the prompt 'steals"):
        TextVectorEnv(1, task=Listed)
    source = TextVectorEnv(1, task=Listed, bad_rows="skip").source
    assert [row["completion"] for row in source] == [" cat 0", " cat 1"]  # type: ignore[attr-defined]
    assert len(TextVectorEnv(1, task=Computed).source) == 10**6
    with pytest.raises(ValueError, match="row 2: no cat 1"):
        TextVectorEnv(1, task=OwnEncoding)


def test_rows_that_are_no_dicts_are_told() -> None:
    def task(rows: object) -> Task:
        return type("Own", (CopyText,), {"rows": lambda self, split, dataset=None: rows})()

    with pytest.raises(ValueError, match=r"2 rows: a row must be a dict with 'prompt' \(row 0: 'a'; row 1: 'b'\)"):
        TextVectorEnv(1, task=task(["a", "b"]))
    words = r"^Own\.rows\('train', None\) must return a list of rows, each a dict with 'prompt', got "
    for given_rows, shown in (
        ("text", "'text'"),
        (None, "None"),
        ({"prompt": ["a"]}, "{'prompt'"),
        (range(3), "0 as the f"),
    ):
        with pytest.raises(ValueError, match=words + shown):
            TextVectorEnv(1, task=task(given_rows))


def test_a_tasks_own_reading_of_files_follows_the_setting(bad_file: str) -> None:
    class Mine(TLDRSummarize):
        def rows(self, split: str, dataset: str | None = None) -> Any:
            return prompts.load_rows(bad_file, split)

    with pytest.raises(ValueError, match="3 of 33 rows"):
        TextVectorEnv(1, task=Mine)
    assert len(TextVectorEnv(1, task=Mine, bad_rows="skip").source) < 31


TOKENIZER = train_tokenizer(["Anna broke my lamp on Monday, and my cat steals socks."], 300)


@given(
    texts=st.lists(
        st.tuples(
            st.sampled_from(["", "POST:", "SUBREDDIT: r/a\n\nPOST:", "ü\nPOST: <|endoftext|>"]),
            st.text(st.characters(codec="utf-8"), max_size=60),
            st.sampled_from(["", SUFFIX]),
        ).map("".join),
        max_size=5,
    ),
    budget=st.integers(1, 60),
    suffix=st.sampled_from(["", SUFFIX]),
)
def test_what_is_said_to_be_uncuttable_is_what_cannot_be_encoded(texts: list[str], budget: int, suffix: str) -> None:
    for text, fault in zip(texts, prompts.uncuttable(texts, TOKENIZER, budget, suffix), strict=True):
        try:
            prompts.encode_prompt(text, TOKENIZER, budget, suffix)
            error = None
        except ValueError as raised:
            error = str(raised)
        assert error == (fault and fault.detail)


def test_few_prompts_are_encoded_to_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    plain = prompts.encode_prompt

    def encode_prompt(text: str, *args: Any) -> list[int]:
        encoded.append(text)
        return plain(text, *args)

    monkeypatch.setattr(prompts, "encode_prompt", encode_prompt)
    texts = [post(0, words)["prompt"] for words in (1, 10, 100, 1000)]
    # 78 bytes before the body at most, 9 tokens behind: what is longer than the budget can be cut.
    assert prompts.uncuttable([*texts, LONG["prompt"]], TOKENIZER, 100, SUFFIX)[:4] == [None] * 4
    assert encoded == [LONG["prompt"]]


# -- the pipeline -----------------------------------------------------------------------------------------------------


def test_the_pipeline_does_the_same(bad_file: str, tmp_path: Path) -> None:
    tiny = sft.SFTConfig(
        steps=1, batch_size=2, copy_steps=0, hidden_size=16, intermediate_size=32, layers=2, eval_rows=2
    )
    pairs = PreferenceConfig(n=2, batch_size=2, label="regex:a", device="cpu")
    stop = EnvSettings(dataset=bad_file, max_prompt_tokens=40, max_new_tokens=4)
    skip = dataclasses.replace(stop, bad_rows="skip")
    with pytest.raises(ValueError, match=r"rows cannot be used.*line 1[123]"):
        sft.sft(TLDR, tiny, tmp_path / "sft", stop)
    with pytest.raises(ValueError, match=r"rows cannot be used.*line 1[123]"):
        make_preferences(TLDR, pairs, tmp_path / "pairs.jsonl", stop)
    sft.sft(TLDR, tiny, tmp_path / "sft", skip)
    make_preferences(TLDR, pairs, tmp_path / "pairs.jsonl", skip)


def test_sft_names_what_cannot_be_cut_when_the_rows_are_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*map(post, range(20)), LONG])
    config = sft.SFTConfig(steps=1, copy_steps=0, hidden_size=16, intermediate_size=32, layers=2)
    with pytest.raises(ValueError, match=r"1 of 21 rows.*line 21: the prompt 'steals"):
        sft.sft(TLDR, config, tmp_path / "out", EnvSettings(dataset=path))


def pair(number: int) -> dict[str, Any]:
    return {"prompt": post(number)["prompt"], "chosen": " good", "rejected": " bad"}


def test_preferences_leave_out_rows_with_their_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [*map(pair, range(4)), pair(4) | {"chosen": None}, pair(5) | {"chosen": " bad"}]
    path = write(tmp_path / "a.jsonl", found)
    task = TLDRSummarize()
    with pytest.raises(ValueError, match=r"1 of 6 rows cannot be used: 1 row: .*line 5: "):
        read_preferences(path, "train", task, task.load_tokenizer(), whole=True)
    ranked = read_preferences(path, "train", task, task.load_tokenizer(), whole=True, bad_rows="skip")
    assert len(ranked) == 4
    said = capsys.readouterr().err
    assert "1 of 6 rows cannot be used" in said
    assert f"of 6 rows dropped 1 ties ({path!r}, line 6)" in said
    config = RewardModelConfig(dataset=(path,))
    with pytest.raises(ValueError, match="1 of 6 rows cannot be used"):
        gather(TLDR, config)
    data = gather(TLDR, config, EnvSettings(bad_rows="skip"))
    assert (data.total, len(data.heldout[path])) == (3, 1)


def test_too_few_pairs_says_why(tmp_path: Path) -> None:
    found = [pair(0), pair(1) | {"chosen": " bad"}, pair(2) | {"rejected": " good"}, pair(3) | {"chosen": None}]
    path = write(tmp_path / "a.jsonl", found)
    with pytest.raises(ValueError) as caught:
        read_preferences(path, "train", TLDRSummarize(), TOKENIZER, bad_rows="skip")
    words = str(caught.value)
    assert "too few pairs" in words
    assert "of its 4 rows could not be used 1 row: neither a text nor a list of turns" in words
    assert f"2 rows: ties ({path!r}, line 2; {path!r}, line 3)" in words


# -- going on with earlier runs ---------------------------------------------------------------------------------------


def test_a_run_from_before_the_setting_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", "grpo", "CopyText-v0", "--total-timesteps", "60", "--out", str(tmp_path), "--eval-every", "0"]
    args += ["--eval-episodes", "2", "--rollout-episodes", "16", "--on-bad-health", "warn", "--device", "cpu"]
    assert main.main(args) == 0
    for name in ("run.json", "agent.json"):
        file = tmp_path / name
        record = json.loads(file.read_text())
        settings = record["settings"]["env"] if name == "run.json" else record["env"]
        assert settings.pop("bad_rows") == "stop"
        file.write_text(json.dumps(record))
    capsys.readouterr()
    assert main.main(args) == 0
    assert "is finished" in capsys.readouterr().out
    assert main.main([*args, "--env.bad-rows", "skip"]) == 2
    assert "with env.bad_rows='stop', not 'skip'" in " ".join(capsys.readouterr().err.split())


# -- rows where they lie ----------------------------------------------------------------------------------------------


def test_large_files_are_read_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 100)
    plain = tmp_path / "train.jsonl"
    write(plain, [*map(post, range(50))])
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    wide = tmp_path / "wide.jsonl"
    wide.write_text(plain.read_text(), encoding="utf-16")
    for path in (plain, packed, wide):
        every = [row for split in sources.SPLITS for row in prompts.load_rows(path, split)]
        assert sorted(row["completion"] for row in every) == sorted(f" cat {i}" for i in range(50))
    found = prompts.load_rows(plain, "train")
    with plain.open("a") as file:
        file.write(json.dumps(post(50)) + "\n")
    with pytest.raises(ValueError, match=r"train\.jsonl' has changed since its rows were checked"):
        found[0]
    plain.unlink()
    with pytest.raises(ValueError, match=r"train\.jsonl' cannot be read any more"):
        found[0]


def test_rows_are_a_sequence(tmp_path: Path) -> None:
    found = prompts.load_rows(write(tmp_path / "a.jsonl", [*map(post, range(50))]), "train")
    assert found[-1] == list(found)[-1] == found[len(found) - 1 :][0]
    assert found.where(0).startswith(f"{str(tmp_path / 'a.jsonl')!r}, line ")
    with pytest.raises(IndexError):
        found[len(found)]


def test_the_check_is_asked_of_the_same_objects_only() -> None:
    task: Task = CopyText()
    tokenizer = task.load_tokenizer()
    assert PromptReader(task, tokenizer, 2) == PromptReader(task, tokenizer, 2)
    assert PromptReader(task, tokenizer, 2) != PromptReader(task, tokenizer, 3)
    assert PromptReader(task, tokenizer, 2) != PromptReader(CopyText(), tokenizer, 2)
    assert checked_rows(task, "train", None, reader=PromptReader(task, tokenizer, 2))[3] == task.rows("train")[3]
