"""Prompts: cutting under a token budget, and rows from files and the Hub in the published schemas."""

import csv
import gzip
import hashlib
import importlib.util
import json
import os
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from textrl_gym.data import prompts, rows, sources

DATA = os.environ.get("TEXTRL_GYM_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="TEXTRL_GYM_DATA names no folder of real data")
SUFFIX = "\n\nTL;DR:"
TEXTS = [
    "SUBREDDIT: r/pets\n\nTITLE: My cat, the thief\n\nPOST: My cat steals socks. What can I do about it?\n\nTL;DR:",
    "Was für ein schöner Tag, 3 € für einen Käse und ein Stück Brot.",
]


def bpe(*, before: str = "", after: str = "") -> Any:
    """A small byte-level BPE; `before` and `after` are special tokens put around every text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<eos>", "<bos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS, trainer)
    if before or after:
        pairs = [(token, inner.token_to_id(token)) for token in (before, after) if token]
        inner.post_processor = processors.TemplateProcessing(
            single=" ".join([before, "$A", after]).strip(), special_tokens=pairs
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", bos_token="<bos>")


PLAIN, WITH_BOS = bpe(), bpe(before="<bos>")
line = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=20)
body = st.text(st.characters(codec="utf-8"), max_size=80)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# -- cutting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS], ids=["plain", "bos"])
@given(title=line, post=body, budget=st.integers(1, 120))
def test_a_prompt_keeps_its_head_and_suffix_under_any_budget(
    tokenizer: Any, title: str, post: str, budget: int
) -> None:
    head = f"SUBREDDIT: r/pets\n\nTITLE: {title}\n\nPOST:"
    text = f"{head} {post}{SUFFIX}"
    whole = tokenizer(text)["input_ids"]
    suffix = ids_of(tokenizer, SUFFIX)
    # What is kept, and one token of the body. (GPT-2's pre-tokenizer lets no token span the colon.)
    least = len(tokenizer(head)["input_ids"]) + 1 + len(suffix)
    if len(whole) > budget and budget < least:
        with pytest.raises(ValueError, match="no room for the body"):
            prompts.encode_prompt(text, tokenizer, budget, SUFFIX)
        return
    ids = prompts.encode_prompt(text, tokenizer, budget, SUFFIX)
    assert len(ids) <= budget
    if len(whole) <= budget:
        assert ids == whole
        return
    # at most 3 places stay empty: a character of 4 bytes is never cut inside
    assert len(ids) >= budget - 3
    assert ids[-len(suffix) :] == suffix
    kept = ids[: -len(suffix)]
    assert kept == tokenizer(text.removesuffix(SUFFIX))["input_ids"][: len(kept)]
    decoded = tokenizer.decode(kept, skip_special_tokens=False)
    assert decoded.removeprefix("<bos>").startswith(head)
    assert ids.count(tokenizer.bos_token_id) == whole.count(tokenizer.bos_token_id)


def test_the_body_is_cut_at_its_end() -> None:
    text = f"SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: {'one two three four ' * 20}{SUFFIX}"
    budget = len(PLAIN(text)["input_ids"]) - 30
    cut = PLAIN.decode(prompts.encode_prompt(text, PLAIN, budget, SUFFIX))
    assert cut.endswith(SUFFIX)
    shown = cut.removesuffix(SUFFIX)
    assert text.startswith(shown)
    assert shown.startswith("SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: one two")


def test_a_character_is_never_cut_inside() -> None:
    # "𝄞" has 4 bytes, each a token here. "A " and 10 of them: 2 + 40 tokens; 2 + 4 n fit, so 7 to 9 places give 6.
    text = "A " + "𝄞" * 10
    assert len(PLAIN(text)["input_ids"]) == 42
    for budget, kept in [(6, 6), (7, 6), (8, 6), (9, 6), (10, 10), (41, 38)]:
        ids = prompts.encode_prompt(text, PLAIN, budget)
        assert len(ids) == kept
        assert "\ufffd" not in PLAIN.decode(ids)


def test_a_prompt_without_head_or_suffix_is_cut_at_its_end() -> None:
    text = "steals socks " * 30
    assert prompts.encode_prompt(text, WITH_BOS, 9) == WITH_BOS(text)["input_ids"][:9]
    assert prompts.encode_prompt(text, WITH_BOS, 2)[0] == WITH_BOS.bos_token_id
    with pytest.raises(ValueError, match=r"1 tokens before the body.*no room"):  # a BOS alone is no prompt
        prompts.encode_prompt(text, WITH_BOS, 1)


def test_a_prompt_that_just_fits_is_not_touched() -> None:
    text = "no suffix, so that cutting would raise"
    assert prompts.encode_prompt(text, PLAIN, len(PLAIN(text)["input_ids"]), SUFFIX) == PLAIN(text)["input_ids"]


def test_a_title_that_says_post_is_no_body() -> None:
    text = f"SUBREDDIT: r/a\n\nTITLE: My POST: why\n\nPOST: {'socks ' * 50}{SUFFIX}"
    head = text[: text.index("\n\nPOST:") + len("\n\nPOST:")]
    smallest = len(ids_of(PLAIN, head)) + len(ids_of(PLAIN, SUFFIX)) + 1
    assert PLAIN.decode(prompts.encode_prompt(text, PLAIN, smallest, SUFFIX)).startswith(head)
    with pytest.raises(ValueError, match="leaves no room for the body"):
        prompts.encode_prompt(text, PLAIN, smallest - 1, SUFFIX)


def test_a_bos_in_the_text_is_not_doubled() -> None:
    ids = prompts.encode_prompt("<bos>My cat", WITH_BOS, 50)
    assert ids == [WITH_BOS.bos_token_id, *ids_of(WITH_BOS, "My cat")]
    cut = prompts.encode_prompt("<bos>" + "My cat " * 30, WITH_BOS, 9)
    assert cut.count(WITH_BOS.bos_token_id) == 1


def test_a_prompt_that_cannot_be_cut_names_itself_and_the_numbers() -> None:
    text = f"SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: {'socks ' * 50}{SUFFIX}"
    count = len(PLAIN(text)["input_ids"])
    with pytest.raises(ValueError, match=rf"SUBREDDIT: r/a.* has {count} tokens, max_prompt_tokens is 5.*no room"):
        prompts.encode_prompt(text, PLAIN, 5, SUFFIX)
    with pytest.raises(ValueError, match="it does not end in"):
        prompts.encode_prompt("socks " * 50, PLAIN, 5, SUFFIX)
    # A body of nothing: the head and the suffix alone are too long.
    with pytest.raises(ValueError, match="no room for the body"):
        prompts.encode_prompt(f"SUBREDDIT: r/a\n\nPOST:{SUFFIX}", PLAIN, 5, SUFFIX)


def test_what_cannot_be_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="encodes to no tokens"):
        prompts.encode_prompt("", PLAIN, 5)
    with pytest.raises(ValueError, match="add_eos_token=False"):
        prompts.encode_prompt("My cat", bpe(after="<eos>"), 50)


# -- rows -------------------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": f'SUBREDDIT: r/a\n\nTITLE: {i}\n\nPOST: ü, "b"\nc{SUFFIX}', "completion": f" s{i}"} for i in range(3)
]
FILTERED = {"id": None, "subreddit": "a", "title": "0", "post": 'ü, "b"\nc', "summary": "s0"}


def write(path: Path, rows: list[Any]) -> Path:
    """A file of the format that its name says."""
    if path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("extension", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_a_single_file_of_any_format_is_parted(tmp_path: Path, extension: str) -> None:
    path = write(tmp_path / f"data.{extension}", ROWS)
    parts = [prompts.load_rows(path, split) for split in sources.SPLITS]
    assert [len(part) for part in parts] == [1, 1, 1]
    assert sorted(str(row) for part in parts for row in part) == sorted(map(str, ROWS))
    assert list(prompts.load_rows(str(path), "train")) == list(parts[0])


def digests(texts: list[str]) -> Any:
    return np.frombuffer(b"".join(map(rows.digest, texts)), ">u8").astype(np.uint64)


def posts(number: int) -> list[dict[str, Any]]:
    return [{"prompt": f"post {i}", "completion": f"summary {i}"} for i in range(number)]


def test_a_single_file_is_its_own_held_out_set_no_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Two rows a prompt, apart from each other: both are in one split.
    path = write(tmp_path / "posts.jsonl", [*posts(1000), *posts(1000)])
    parts = {split: prompts.load_rows(path, split) for split in sources.SPLITS}
    texts = {split: {row["prompt"] for row in part} for split, part in parts.items()}
    assert sum(len(part) for part in parts.values()) == 2000
    assert (
        not texts["train"] & texts["validation"] | texts["train"] & texts["test"] | texts["validation"] & texts["test"]
    )
    # Binomial(1000, 0.1): a standard deviation of 9.5.
    assert all(70 < len(texts[split]) < 130 for split in ("validation", "test"))
    assert len(parts["train"]) == 2 * len(texts["train"])
    said = capsys.readouterr().err
    assert said.count("has one split, parted by a hash of the prompts") == 1
    assert (
        f"{len(parts['train']):,} train, {len(parts['validation']):,} validation, {len(parts['test']):,} test" in said
    )
    # Other rows beside it change no prompt's split, and the hash is that of every machine.
    names = [f"post {i}" for i in reversed(range(3000))]
    more = prompts.part_by_prompt(digests(names))
    for split in sources.SPLITS:
        assert {names[i] for i in more[split]} & {f"post {i}" for i in range(1000)} == texts[split]
    digest = hashlib.blake2b(b"post 0", digest_size=8).hexdigest()
    share = int(digest, 16) / 16**16
    assert ("post 0" in texts["train"]) == (share < 0.8)


@pytest.mark.parametrize("number", [3, 4, 5, 12])
def test_no_split_of_a_small_file_is_empty(number: int) -> None:
    parts = prompts.part_by_prompt(digests([f"post {i}" for i in range(number)]))
    assert all(map(len, parts.values()))
    assert sum(map(len, parts.values())) == number


def test_too_few_prompts_to_hold_any_out_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "two.jsonl", ROWS[:2])
    assert all(list(prompts.load_rows(path, split)) == ROWS[:2] for split in sources.SPLITS)
    assert "evaluations are on the prompts that are trained on" in capsys.readouterr().err


def test_a_folder_without_validation_takes_test(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS[:1])
    write(tmp_path / "test.jsonl", ROWS[1:])
    assert list(prompts.load_rows(tmp_path, "validation")) == list(prompts.load_rows(tmp_path, "test")) == ROWS[1:]


def test_the_filtered_schema_gives_the_published_prompt_and_keeps_its_columns(tmp_path: Path) -> None:
    assert list(prompts.load_rows(write(tmp_path / "a.jsonl", [FILTERED]), "train")) == [FILTERED | ROWS[0]]


def test_every_row_has_every_column(tmp_path: Path) -> None:
    found = prompts.load_rows(write(tmp_path / "a.jsonl", [ROWS[0], ROWS[1] | {"source": "x"}]), "train")
    assert [row["source"] for row in found] == [None, "x"]


def test_a_folder_has_a_file_for_each_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS[:1])
    write(tmp_path / "validation-00001-of-00002.parquet", ROWS[2:])
    write(tmp_path / "validation-00000-of-00002.parquet", ROWS[1:2])
    (tmp_path / "README.md").write_text("no data")
    assert list(prompts.load_rows(tmp_path, "train")) == ROWS[:1]
    assert list(prompts.load_rows(tmp_path, "validation")) == ROWS[1:]
    with pytest.raises(ValueError, match=r"no file for split 'test'.*it has train\.jsonl, validation-00000"):
        prompts.load_rows(tmp_path, "test")
    for other in ["train.csv", "train-00000-of-00001.jsonl"]:
        path = write(tmp_path / other, ROWS)
        with pytest.raises(ValueError, match=rf"more than one file for split 'train': {other}, train\.jsonl"):
            prompts.load_rows(tmp_path, "train")
        path.unlink()


def test_a_wrong_schema_names_the_columns_found_and_expected(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"header": "?", "body": "!"}])
    with pytest.raises(ValueError) as caught:
        prompts.load_rows(path, "train")
    for part in ["header, body", "prompt, completion", "trl-lib/tldr", "subreddit, title, post, summary"]:
        assert part in str(caught.value)


@pytest.mark.parametrize("extension", ["jsonl", "json", "parquet"])
def test_an_empty_dataset_is_an_error(tmp_path: Path, extension: str) -> None:
    with pytest.raises(ValueError, match=r"a\.\w+' is empty"):
        prompts.load_rows(write(tmp_path / f"a.{extension}", []), "train")


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (ROWS[0] | {"prompt": None}, r"column 'prompt' is not a text \(.*a\.jsonl', line 2: None\)"),
        (ROWS[0] | {"prompt": 3}, r"column 'prompt' is not a text \(.*, line 2: 3\)"),
        ({"prompt": "x"}, r"column 'completion' is not a text \(.*, line 2: None\)"),
        ("a text", r"is no object with columns \(.*, line 2: 'a text'\)"),
        (FILTERED, r"column 'prompt' is not a text \(.*, line 2: None\)"),
        (
            ROWS[0] | {"prompt": "half \ud83d"},
            r"column 'prompt' holds half of a character \(.*\) \(.*, line 2: U\+D83D at character 6\)",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, named: str) -> None:
    path = write(tmp_path / "a.jsonl", [ROWS[0], row, *ROWS[1:]])
    with pytest.raises(ValueError, match=f"1 of 4 rows cannot be used: 1 row: {named}"):
        prompts.load_rows(path, "train")
    with rows.row_rules(rows.RowRules("skip")):
        assert sum(len(prompts.load_rows(path, split)) for split in sources.SPLITS) == 3


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        (
            "a.jsonl",
            '{"prompt": "x", "completion": "y"}\n{"prompt"',
            r"line 2: Expecting ':' delimiter at column 10",
        ),
        ("a.json", "{", "is no JSON"),
        ("a.json", '{"data": []}', "must hold a list of objects, not dict"),
        ("a.csv", "prompt,completion\nx,y,z\n", "has more fields than the header \\(.*line 2: .'z'"),
        ("a.csv", "prompt,completion\nx\n", "column 'completion' is not a text \\(.*line 2: None"),
        ("a.csv", 'prompt,completion\nx,"y" z\n', "line 2 is no CSV"),
        ("a.parquet", "none", "is no parquet file"),
        ("a.txt", "none", "of no known format"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, text: str, named: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=named) as caught:
        prompts.load_rows(path, "train")
    assert str(path) in str(caught.value)


def test_what_is_nowhere_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown split 'dev'; allowed: train, validation, test"):
        prompts.load_rows(tmp_path, "dev")
    places: list[str | Path] = [tmp_path / "nothing.jsonl", "nothing.csv", "./nothing", "a/b/c"]
    for missing in places:
        with pytest.raises(ValueError, match="no such file or folder"):
            prompts.load_rows(missing, "train")
    with pytest.raises(ValueError, match=r"no-one/nothing.*the Hub gave none.*a local file works"):
        prompts.load_rows("no-one/nothing", "train")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the package datasets: pip install 'datasets"):
        prompts.load_rows("no-one/nothing", "train")
    with pytest.raises(ImportError, match=r"a\.parquet needs the package pyarrow"):
        prompts.load_rows(write(tmp_path / "a.parquet", ROWS), "train")


def test_a_hub_id_is_loaded_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(path: str, name: Any = None, data_dir: Any = None, streaming: bool = False) -> Any:
        asked.append((path, name, data_dir, streaming))
        splits = {"train": ROWS[:1], "test": ROWS}
        if streaming:
            return {split: datasets.Dataset.from_list(some).to_iterable_dataset() for split, some in splits.items()}
        return {split: datasets.Dataset.from_list(some) for split, some in splits.items()}

    builder = types.SimpleNamespace(info=datasets.DatasetInfo(download_size=10, dataset_size=None))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(prompts.load_rows("trl-lib/tldr", "validation")) == ROWS  # its test split: it has no validation
    assert list(prompts.load_rows("openai/gsm8k:part", "train")) == ROWS[:1]
    assert asked == [("trl-lib/tldr", None, None, False), ("openai/gsm8k", "main", "part", False)]
    builder.info.dataset_size = 10**18  # larger than any disk
    assert list(prompts.load_rows("trl-lib/larger", "test")) == ROWS
    assert asked[-1][-1]
    builder.info.dataset_size = 0
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"validation": []})
    with pytest.raises(ValueError, match="the Hub gave none: it has the splits validation; known are test"):
        prompts.load_rows("a/b", "test")


@needs_data
@pytest.mark.data
def test_both_published_forms_of_real_posts_give_the_same_prompts() -> None:
    assert DATA is not None
    files = [f"{DATA}/tldr/{name}.jsonl" for name in ("tldr", "tldr_3_filtered")]
    plain, filtered = ([row for s in sources.SPLITS for row in prompts.load_rows(file, s)] for file in files)
    assert len(plain) == 1500
    assert {row["prompt"]: row["completion"] for row in plain} == {row["prompt"]: row["completion"] for row in filtered}


@needs_data
@pytest.mark.data
def test_real_posts_are_cut_to_any_budget() -> None:
    assert DATA is not None
    for row in prompts.load_rows(f"{DATA}/tldr/tldr.jsonl", "train")[:200]:
        ids = prompts.encode_prompt(row["prompt"], PLAIN, 500, SUFFIX)  # a title has up to 300 bytes
        text = PLAIN.decode(ids)
        title = row["prompt"].split("\n\nPOST:")[0]
        assert len(ids) <= 500
        assert text.startswith(f"{title}\n\nPOST:")
        assert text.endswith(SUFFIX)
        assert "\ufffd" not in text
