"""Sources of rows: local files, folders with a file for each split, and the Hub. Rows are returned as they are written.

Which columns mean what is said by `textrl_gym.data.prompts` and `textrl_gym.data.preferences`.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

SPLITS = ("train", "validation", "test")
FORMATS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
_DATASET_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
PREFERENCE_SPLITS = {
    "train": ("train", "train_prefs", "preference"),
    "validation": ("validation", "test", "test_prefs", "eval"),
}
"""What the Hub's data sets call a split; the first that is there is taken."""
CONFIGS = {"openai/summarize_from_feedback": "comparisons", "tatsu-lab/alpaca_farm": "alpaca_human_preference"}
"""The configuration of data sets that have several, where the preferences are."""
PARQUET = "refs/convert/parquet"
"""The Hub's branch with the data of a data set's script as parquet files."""


def check_split(split: str) -> None:
    """Raise ValueError for a name that is no split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")


def read_rows(dataset: str | Path, split: str, hub: Callable[[str, str], list[Any]] | None = None) -> list[Any]:
    """A split's rows as they are written; arguments and errors as `prompts.load_rows`.

    Args:
        hub: reads a Hub id: f(name, split) -> rows; None: by `datasets.load_dataset`.
    """
    check_split(split)
    # What is on the disk comes first: a folder named owner/name must not be looked for on the Hub.
    path = Path(dataset).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return [row for file in _split_files(path, split) for row in _read_file(file)]
    if path.name.endswith(FORMATS) or _DATASET_ID.fullmatch(str(dataset)) is None:
        raise ValueError(f"dataset {str(dataset)!r}: there is no such file or folder, and it is no Hub id (owner/name)")
    return (hub or _read_hub_split)(str(dataset), split)


def held_out_split(folder: Path, split: str) -> str:
    """The split of a folder to read: "test" stands in for "validation" where it has no other held-out split."""
    names = {file.name.split(".")[0].split("-")[0] for file in folder.iterdir()}
    return "test" if split == "validation" and "validation" not in names and "test" in names else split


# -- files -------------------------------------------------------------------------------------------------------------


def _split_files(folder: Path, split: str) -> list[Path]:
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and f.name.endswith(FORMATS)]
    matching = [f for f in files if re.fullmatch(rf"{split}(-\d+(-of-\d+)?)?", f.name.split(".")[0])]
    if not matching:
        names = ", ".join(f.name for f in files) or "no data file"
        raise ValueError(f"folder {str(folder)!r} has no file for split {split!r} ({split}.jsonl, ...); it has {names}")
    if len(matching) > 1 and any(f.name.split(".")[0] == split for f in matching):  # else they are shards
        names = ", ".join(f.name for f in matching)
        raise ValueError(f"folder {str(folder)!r} has more than one file for split {split!r}: {names}")
    return matching


def _read_file(path: Path) -> list[Any]:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_jsonl(path)
    if path.suffix == ".json":
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{str(path)!r} is no JSON: {error}") from error
        if not isinstance(data, list):
            raise ValueError(f"{str(path)!r} must hold a list of objects, not {type(data).__name__}")
        return data
    if path.suffix == ".csv":
        return _read_csv(path)
    if path.suffix == ".parquet":
        _require("pyarrow", f"reading {path.name}")
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{str(path)!r} is no parquet file: {error}") from error
    raise ValueError(f"{str(path)!r} is of no known format; allowed: {', '.join(FORMATS)}")


def _read_csv(path: Path) -> list[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets put a byte order mark first
        try:
            # restkey: fields beyond the header would be dropped in silence. strict: so would a quote that never ends.
            rows = list(csv.DictReader(file, restkey="", strict=True))
        except csv.Error as error:
            raise ValueError(f"{str(path)!r} is no CSV: {error}") from error
    for number, row in enumerate(rows):
        if "" in row:  # the restkey above
            raise ValueError(f"{str(path)!r}, row {number} has more fields than the header: {row['']}")
    return rows


def _read_jsonl(path: Path) -> list[Any]:
    rows = []
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{str(path)!r}, line {number} is no JSON: {error}") from error
    return rows


# -- the Hub ----------------------------------------------------------------------------------------------------------


def _read_hub_split(name: str, split: str) -> list[Any]:
    with hub_errors(name, split):
        import datasets

        return datasets.load_dataset(name, split=split).to_list()


def read_preference_rows(dataset: str, split: str) -> tuple[list[Any], bool]:
    """A split of preference data as it is written, and whether the data set has held-out rows of its own."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        return read_rows(dataset, held_out_split(path, split)), True
    if path.is_file():
        return read_rows(dataset, split), False
    has_held_out: list[bool] = []

    def hub(name: str, split: str) -> list[Any]:
        rows, held_out = _read_hub_preferences(name, part, split)
        has_held_out.append(held_out)
        return rows

    # A Hub id holds no colon, so that what comes after one is a folder of the data set.
    name, _, part = dataset.partition(":")
    return read_rows(name, split, hub), all(has_held_out)


def _read_hub_preferences(name: str, part: str, split: str) -> tuple[list[Any], bool]:
    """A split of a Hub data set, and whether it has a held-out split."""
    with hub_errors(f"{name}:{part}" if part else name, split):
        import datasets

        try:
            dataset = datasets.load_dataset(name, CONFIGS.get(name), data_dir=part or None)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # The Hub keeps what such a script gives as parquet files on a branch of its own.
            folder = part or CONFIGS.get(name, "default")
            dataset = datasets.load_dataset(name, data_dir=folder, revision=PARQUET)
        # All of them are loaded and one is taken, because which splits there are decides what is held out.
        own = [n for n in PREFERENCE_SPLITS[split] if n in dataset]
        names = own or [n for n in PREFERENCE_SPLITS["train"] if n in dataset]
        if not names:
            raise ValueError(f"it has the splits {', '.join(dataset)}; known are {', '.join(PREFERENCE_SPLITS[split])}")
        has_held_out = any(n in dataset for n in PREFERENCE_SPLITS["validation"])
        return dataset[names[0]].to_list(), has_held_out


@contextlib.contextmanager
def hub_errors(name: str, split: str) -> Iterator[None]:
    """Around what asks the Hub: its errors in words that say what else works."""
    _require("datasets", f"dataset {name!r} (no such file or folder, so a Hub id)")
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        # The first line: the Hub's errors go on with a page of advice about tokens.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"dataset {name!r}, split {split!r}: there is no such file or folder, and the Hub gave none: {reason}. "
            "Without a network a local file works."
        ) from error


def _require(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{what} needs the package {package}: pip install textrl-gym[hub]")


class Schema(Protocol):
    """A published form of rows: its name, and the columns that tell it."""

    @property
    def name(self) -> str: ...

    @property
    def columns(self) -> Sequence[str]: ...


S = TypeVar("S", bound=Schema)


def match_schema(schemas: Sequence[S], columns: Sequence[str], where: str) -> S:
    """The first schema all of whose columns are there.

    Args:
        where: the data, in the words of the error.

    Raises:
        ValueError: none fits; the error names the columns and those of each schema.
    """
    schema = next((s for s in schemas if set(s.columns) <= set(columns)), None)
    if schema is None:
        expected = "; or ".join(f"{', '.join(s.columns)} (as {s.name})" for s in schemas)
        raise ValueError(f"{where} has the columns {', '.join(map(str, columns))}; expected: {expected}")
    return schema
