"""Data files as they are found: encodings, compression, CSV of other programs, folders of the Hub, and limits."""

import csv
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from textrl_gym.data import preferences, prompts, sources, text_files

ROWS = [{"prompt": f"post {i}\n\nTL;DR:", "completion": f" café {i}"} for i in range(12)]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path: Path | str, split: str | None = None) -> list[str]:
    """The completions of a split, or of all, in order."""
    splits = sources.SPLITS if split is None else (split,)
    return sorted(row["completion"] for s in splits for row in prompts.load_rows(path, s))


EVERY = sorted(row["completion"] for row in ROWS)


# -- encodings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "jsonl.gz", "json.gz", "csv.gz"])
def test_byte_order_marks_and_gzip(tmp_path: Path, encoding: str, extension: str) -> None:
    text = lines(ROWS)
    if extension.startswith("json."):
        text = json.dumps(ROWS)
    elif extension == "json":
        text = json.dumps(ROWS, indent=1)
    elif extension.startswith("csv"):
        text = "prompt,completion\r\n" + "".join(f'"{row["prompt"]}",{row["completion"]}\r\n' for row in ROWS)
    data = text.encode(encoding)
    path = tmp_path / f"a.{extension}"
    path.write_bytes(gzip.compress(data) if extension.endswith(".gz") else data)
    assert read(path) == EVERY


def test_other_encodings_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"prompt": "a", "completion": "b"}]).encode() + lines(ROWS).encode("latin-1"))
    with pytest.raises(ValueError, match=r"12 rows: is no UTF-8 \(.*a\.jsonl', line 2: byte 0xe9 at place 5\d: save"):
        prompts.load_rows(path, "train")
    path = tmp_path / "a.csv"
    path.write_bytes("prompt,completion\na,b\nc,é\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.csv', line 3 is no UTF-8: byte 0xe9"):
        prompts.load_rows(path, "train")
    path = tmp_path / "b.json"
    path.write_bytes(json.dumps(ROWS, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(ValueError, match=r"b\.json' is no UTF-8: byte 0xe9"):
        prompts.load_rows(path, "train")
    path = tmp_path / "b.jsonl"
    path.write_bytes(lines(ROWS).encode("utf-16-le"))  # without the mark
    with pytest.raises(ValueError, match=r"b\.jsonl', line 1 is no UTF-8 but UTF-16"):
        prompts.load_rows(path, "train")
    path.write_bytes("\ufeff".encode("utf-16-le") + b"a\x00\x00\xd8a")
    with pytest.raises(ValueError, match=r"b\.jsonl' is no utf-16"):
        prompts.load_rows(path, "train")


def test_json_lines_are_read_whatever_their_file_is_called(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(lines(ROWS).replace("\n", "\r\n\r\n"), encoding="utf-8")
    assert read(path) == EVERY


# -- CSV --------------------------------------------------------------------------------------------------------------


def test_csv_of_pandas_and_of_long_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    before = csv.field_size_limit()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["", "prompt", "completion"])  # pandas' index has no name
        for i, row in enumerate(ROWS):
            writer.writerow([i, row["prompt"] + "x" * 200_000 * (i == 3), row["completion"]])
    assert read(path) == EVERY
    longest = max((row for s in sources.SPLITS for row in prompts.load_rows(path, s)), key=lambda r: len(r["prompt"]))
    assert (len(longest["prompt"]), set(longest)) == (200_000 + len(ROWS[3]["prompt"]), {"prompt", "completion"})
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prompt,completion,prompt\na,b,c\n", "the header has the column 'prompt' twice"),
        (",\n1,2\n", "the header has no column with a name"),
        ('prompt,completion\na,b\nc,"d\ne,f\n', "line 3 is no CSV: unexpected end of data"),
        ('prompt,completion\na,b\n\n"c\nc",d,e\n', r"has more fields than the header \(.*line 4: \['e'\]\)"),
        ("prompt,completion\n", "is empty"),
        ("", "is empty"),
    ],
)
def test_broken_csv_is_named_with_its_line(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=named):
        prompts.load_rows(path, "train")


# -- folders ----------------------------------------------------------------------------------------------------------


def parquet(path: Path, rows: list[Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    "layout",
    [
        "{split}-00000-of-00001.parquet",
        "data/{split}-00000-of-00001-1a2b3c4d5e6f7a8b.parquet",
        "{split}-00000-of-00001-1a2b3c4d5e6f7a8b.parquet",
        "{split}/0000.parquet",
        "data/{split}/part-0.parquet",
        "default/{split}/0000.parquet",
    ],
)
def test_layouts_of_the_hub(tmp_path: Path, layout: str) -> None:
    parquet(tmp_path / layout.format(split="train"), ROWS[:7])
    parquet(tmp_path / layout.format(split="test"), ROWS[7:])
    (tmp_path / "README.md").write_text("a data card")
    assert read(tmp_path, "train") == sorted(row["completion"] for row in ROWS[:7])
    assert read(tmp_path, "test") == read(tmp_path, "validation") == sorted(row["completion"] for row in ROWS[7:])


def test_a_folder_with_one_split_is_parted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train-00000-of-00002.jsonl").write_text(lines(ROWS[:5]), encoding="utf-8")
    (tmp_path / "train-00001-of-00002.jsonl").write_text(lines(ROWS[5:]), encoding="utf-8")
    assert read(tmp_path) == EVERY
    assert "has one split, parted by a hash of the prompts" in capsys.readouterr().err
    (tmp_path / "test.jsonl").write_text(lines(ROWS[:1]), encoding="utf-8")
    assert read(tmp_path, "train") == EVERY


def test_a_folder_of_configurations_names_them(tmp_path: Path) -> None:
    parquet(tmp_path / "main" / "train-00000-of-00001.parquet", ROWS)
    with pytest.raises(ValueError, match=r"it has no data file; data are in its folders main"):
        prompts.load_rows(tmp_path, "train")


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == EVERY
    splits = {"train": datasets.Dataset.from_list(ROWS[:7]), "test": datasets.Dataset.from_list(ROWS[7:])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "two", "train") == sorted(row["completion"] for row in ROWS[:7])
    assert read(tmp_path / "two", "validation") == sorted(row["completion"] for row in ROWS[7:])
    bad = [*ROWS, {"prompt": None, "completion": "x"}]
    datasets.Dataset.from_list(bad).save_to_disk(tmp_path / "three")
    with pytest.raises(ValueError, match=r"column 'prompt' is not a text \(.*three', row 12: None\)"):
        prompts.load_rows(tmp_path / "three", "train")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as a data set that save_to_disk wrote"):
        prompts.load_rows(tmp_path / "one", "train")


def test_large_parquet_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 10)
    parquet(tmp_path / "a.parquet", ROWS)
    found = prompts.load_rows(tmp_path / "a.parquet", "train")
    assert isinstance(found.raw, sources.ArrowRows)
    assert read(tmp_path / "a.parquet") == EVERY


def test_preferences_are_found_in_the_same_layouts(tmp_path: Path) -> None:
    pairs = [{"prompt": f"p {i}", "chosen": " a", "rejected": " b"} for i in range(20)]
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", pairs)
    train, held_out = (preferences.load_preferences(str(tmp_path), s).rows for s in ("train", "validation"))
    assert (len(train), len(held_out)) == (18, 2)  # nothing else is held out


# -- limits -----------------------------------------------------------------------------------------------------------


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MOST_LINE_BYTES", 2**20)
    for name, start in (("a.jsonl", lines(ROWS)), ("a.csv", "prompt,completion\na,b\n")):
        path = tmp_path / name
        path.write_text(start + "x" * (2**20 + 1), encoding="utf-8")
        last = 12 if name == "a.jsonl" else 2
        with pytest.raises(ValueError, match=rf"{name}': the line after line {last} is longer than 1 MB"):
            prompts.load_rows(path, "train")


def test_a_gzip_bomb_is_refused_before_it_fills_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "IN_MEMORY_BYTES", 2**20)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(ROWS).encode() + b" " * 50 * 2**20))
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz' grows to more than 200 times its size"):
        prompts.load_rows(path, "train")


@pytest.mark.parametrize("extension", ["jsonl", "json"])
def test_hostile_json_is_refused(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a.{extension}"
    for text, named in (("[" * 200_000, "nested too deeply|recursion"), ("1" * 5000, "digits|has no rows")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=named):
            prompts.load_rows(path, "train")


def test_gzip_that_is_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(lines(ROWS).encode())
    for data in (whole[:-20], b"no gzip", whole[:20] + b"xxxx" + whole[24:]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz' is no whole gzip file"):
            prompts.load_rows(path, "train")


def test_a_large_json_list_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MOST_JSON_BYTES", 100)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    with pytest.raises(ValueError, match=r"write so large a list as \.jsonl"):
        prompts.load_rows(path, "train")
    path.write_text(lines(ROWS), encoding="utf-8")
    assert read(path) == EVERY


@pytest.mark.slow
def test_two_hundred_thousand_rows_take_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for i in range(200_000):
            file.write(json.dumps({"prompt": f"post {i} " + "x" * 800, "completion": "y"}) + "\n")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    found = prompts.load_rows(path, "train")
    assert found[0]["completion"] == "y"
    # 170 MB of text; as a list of dicts they took 300 MB. 16 bytes of places, 8 of hashes a row, and their copies.
    assert resident() - before < 40 * 2**20
