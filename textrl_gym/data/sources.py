"""Sources of rows: local files, folders with files for each split, and the Hub. Rows are returned as they are written.

Which columns mean what is said by `textrl_gym.data.prompts` and `textrl_gym.data.preferences`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from textrl_gym.data.rows import Joined, RawRows, remembered
from textrl_gym.data.text_files import IN_MEMORY_BYTES, CsvRows, JsonLines, ListRows, read_json
from textrl_gym.extras import install
from textrl_gym.files import STATE_FILE

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "validation", "test")
FORMATS = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet")
_DATASET_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# train-00001-of-00002, or with the hash that older uploads have: train-00000-of-00001-1a2b3c4d5e6f7a8b
_SHARD = re.compile(r"(?P<split>.+?)-\d+(-of-\d+)?(-[0-9a-f]{8,})?")
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "test"), "test": ("test",)}
"""Where a split of prompts is found: "test" stands in for "validation" where there is no other held-out split."""
PREFERENCE_SPLITS = {
    "train": ("train", "train_prefs", "preference"),
    "validation": ("validation", "test", "test_prefs", "eval"),
}
"""What data sets of preferences call a split; the first that is there is taken."""
CONFIGS = {
    "openai/summarize_from_feedback": "comparisons",
    "tatsu-lab/alpaca_farm": "alpaca_human_preference",
    "openai/gsm8k": "main",
}
"""The configuration of data sets that have several."""
MOST_STREAMED_ROWS = 1_000_000
"""Of a data set that is larger than the disk."""
SAVED = ("state.json", "dataset_dict.json")
"""What datasets' save_to_disk writes into a folder."""
PARQUET = "refs/convert/parquet"
"""The Hub's branch with the data of a data set's script as parquet files."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows of a split as they are written."""

    open: Callable[[], RawRows]
    """Where they are decompressed, if they have to be."""
    words: str
    """The data in the words of an error."""
    whole: bool
    """Whether nothing says which rows are held out, as in a single file."""
    key: Hashable
    """Equal for two that hold the same."""


def check_split(split: str) -> None:
    """Raise ValueError for a name that is no split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")


def open_rows(dataset: str | Path, split: str, names: Mapping[str, tuple[str, ...]] = SPLIT_NAMES) -> Source:
    """A split's rows as they are written; arguments and errors as `prompts.load_rows`.

    Args:
        names: split -> what it may be called; the first that is there is taken.
    """
    check_split(split)
    # What is on the disk comes first: a folder named owner/name must not be looked for on the Hub.
    path = Path(dataset).expanduser()
    if path.is_file():
        keep = path.stat().st_size <= IN_MEMORY_BYTES
        read = functools.partial(_read_file, path, keep)
        return Source(read, f"dataset {str(dataset)!r}", True, _stamp([path]))
    if path.is_dir():
        return _open_folder(path, split, names)
    name, _, part = str(dataset).partition(":")
    if path.name.endswith(FORMATS) or _DATASET_ID.fullmatch(name) is None:
        raise ValueError(f"dataset {str(dataset)!r}: there is no such file or folder, and it is no Hub id (owner/name)")
    with hub_errors(str(dataset), split):
        key = (str(dataset), split, names[split])
        raw, whole = remembered(("hub", key), lambda: _open_hub(name, part, split, names))
    return Source(lambda: raw, f"dataset {str(dataset)!r}, split {split!r}", whole, key)


def _stamp(files: Sequence[Path]) -> Hashable:
    """Of files as they are now."""
    return tuple((str(file.absolute()), file.stat().st_mtime_ns, file.stat().st_size) for file in files)


def located(dataset: str, folder: Path) -> str:
    """Where the data are that a run's folder names; the name itself where nothing is called so.

    A relative path was right in the working folder where it was written, which nothing tells. It is looked for in the
    working folder, then beside the folder, and then in those above it.
    """
    path = Path(dataset).expanduser()
    if path.exists():
        return dataset
    candidates = [Path(os.path.normpath(place / path)) for place in folder.resolve().parents]
    fits = _holds_data if _DATASET_ID.fullmatch(dataset) else Path.exists
    return next((str(there) for there in candidates if there != folder.resolve() and fits(there)), dataset)


def _holds_data(path: Path) -> bool:
    """Whether this is surely a data set, where a Hub id has the same name as a file, a folder or another run."""
    if path.is_file():
        return path.name.endswith(FORMATS)
    if not path.is_dir() or (path / STATE_FILE).is_file():
        return False
    return any((path / name).is_file() for name in SAVED) or bool(_files_by_split(path))


# -- folders ----------------------------------------------------------------------------------------------------------


def _open_folder(folder: Path, split: str, names: Mapping[str, tuple[str, ...]]) -> Source:
    if any((folder / name).is_file() for name in SAVED):
        return _open_saved(folder, split, names)
    files_by_split = _files_by_split(folder)
    chosen, whole = _choose(split, names, files_by_split)
    if chosen is None:
        there = ", ".join(sorted(_shown(files_by_split))) or "no data file"
        inside = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and _files_by_split(path)]
        also = f"; data are in its folders {', '.join(inside)}" if inside and not files_by_split else ""
        raise ValueError(
            f"folder {str(folder)!r} has no file for split {split!r} ({split}.jsonl, ...); it has {there}{also}"
        )
    files = files_by_split[chosen]
    if len(files) > 1 and any(file.name.split(".")[0] == chosen for file in files):  # else they are shards
        conflict = ", ".join(file.name for file in files)
        raise ValueError(f"folder {str(folder)!r} has more than one file for split {chosen!r}: {conflict}")
    keep = sum(file.stat().st_size for file in files) <= IN_MEMORY_BYTES

    def read() -> RawRows:
        parts = [_read_file(file, keep) for file in files]
        return parts[0] if len(parts) == 1 else Joined(parts)

    return Source(read, f"dataset {str(folder)!r}, split {split!r}", whole, _stamp(files))


def _choose(split: str, names: Mapping[str, tuple[str, ...]], there: Mapping[str, object]) -> tuple[str | None, bool]:
    """What a split is called where these are there, and whether it is all there is, so that nothing is held out."""
    own = next((name for name in names[split] if name in there), None)
    training = next((name for name in names["train"] if name in there), None)
    held_out = {name for kind, known in names.items() if kind != "train" for name in known}
    whole = training is not None and not held_out & set(there)
    return (training if whole else own), whole


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """The data files of a folder by the names of their splits: its own, or those of data/, or a folder for each."""
    for base in (folder, folder / "data", folder / "default"):
        files_by_split: dict[str, list[Path]] = {}
        if not base.is_dir():
            continue
        for file in sorted(base.iterdir()):
            if file.is_file() and file.name.endswith(FORMATS):
                stem = file.name.split(".")[0]
                shard = _SHARD.fullmatch(stem)
                files_by_split.setdefault(shard["split"] if shard else stem, []).append(file)
        if not files_by_split:
            for inner in sorted(path for path in base.iterdir() if path.is_dir() and _known(path.name)):
                files = [file for file in sorted(inner.iterdir()) if file.name.endswith(FORMATS)]
                if files:
                    files_by_split[inner.name] = files
        if files_by_split:
            return files_by_split
    return {}


def _known(name: str) -> bool:
    return any(name in known for names in (SPLIT_NAMES, PREFERENCE_SPLITS) for known in names.values())


def _shown(found: Mapping[str, list[Path]]) -> list[str]:
    return [file.name for files in found.values() for file in files]


def _open_saved(folder: Path, split: str, names: Mapping[str, tuple[str, ...]]) -> Source:
    """What datasets' save_to_disk wrote: a data set, or one for each split."""
    _require("datasets", f"reading what save_to_disk wrote in {str(folder)!r}")
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder), keep_in_memory=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(folder)!r} cannot be read as a data set that save_to_disk wrote: {error}") from error
    there = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    chosen, whole = _choose(split, names, there)
    if chosen is None:
        raise ValueError(f"folder {str(folder)!r} has no split {split!r}; it has {', '.join(there)}")
    rows = ArrowRows(there[chosen], repr(str(folder)))
    files = [file for file in sorted(folder.rglob("*.arrow")) if file.is_file()]
    return Source(lambda: rows, f"dataset {str(folder)!r}, split {split!r}", whole, (chosen, _stamp(files)))


# -- files ------------------------------------------------------------------------------------------------------------


def _read_file(path: Path, keep: bool) -> RawRows:
    """The rows of a file; keep: in memory."""
    if not path.name.endswith(FORMATS):
        raise ValueError(f"{str(path)!r} is of no known format; allowed: {', '.join(FORMATS)}")
    kind = path.name.removesuffix(".gz")
    if kind.endswith(".jsonl"):
        return JsonLines(path, keep)
    if kind.endswith(".json"):
        return read_json(path, keep)
    if kind.endswith(".csv"):
        return CsvRows(path, keep)
    return _read_parquet(path, keep)


def _read_parquet(path: Path, keep: bool) -> RawRows:
    _require("pyarrow", f"reading {path.name}")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            large = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
            if keep and large <= IN_MEMORY_BYTES and file.metadata.num_rows <= IN_MEMORY_BYTES // 100:
                return ListRows(file.read().to_pylist(), repr(str(path)))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{str(path)!r} is no parquet file: {error}") from error
    _require("datasets", f"reading {path.name} of {large / 2**20:.0f} MB")
    import datasets

    # As an Arrow file in datasets' cache, mapped into memory: what is not looked at takes none.
    return ArrowRows(datasets.Dataset.from_parquet(str(path), keep_in_memory=False), repr(str(path)))


class ArrowRows(Sequence[object]):
    """Rows of a data set of the library datasets, mapped into memory."""

    def __init__(self, dataset: datasets.Dataset, name: str) -> None:
        self.dataset, self.name = dataset, name
        self._passed = 0

    def read(self) -> Iterator[object]:
        """Every row."""
        self._passed = 0
        for batch in self._batches():  # a thirtieth of the time of row by row
            rows = batch.to_pylist()
            yield from rows
            self._passed += len(rows)

    def _batches(self) -> Iterator[Any]:
        """Some rows at a time, as Arrow has them."""
        import pyarrow

        files = [entry["filename"] for entry in self.dataset.cache_files]
        # Read and not mapped where the files hold these rows and no others: pages that were looked at stay in memory as
        # long as there is room, a million rows of 1.6 KB.
        if sum(map(_arrow_rows, files)) != len(self.dataset):
            yield from self.dataset.with_format("arrow").iter(1000)
            return
        for name in files:
            with pyarrow.OSFile(name) as file, pyarrow.ipc.open_stream(file) as stream:
                yield from stream

    def share_read(self) -> float:
        """How many of the rows were read."""
        return self._passed / max(len(self.dataset), 1)

    def where(self, index: int) -> str:
        """A row's place in words."""
        return f"{self.name}, row {index}"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any, /) -> Any:
        return self.dataset[index]


def _arrow_rows(name: str) -> int:
    """How many rows a file of Arrow's stream format has, by its batches' heads."""
    import pyarrow

    with pyarrow.memory_map(name) as file, pyarrow.ipc.open_stream(file) as stream:
        return sum(batch.num_rows for batch in stream)


# -- the Hub ----------------------------------------------------------------------------------------------------------


def _open_hub(name: str, part: str, split: str, names: Mapping[str, tuple[str, ...]]) -> tuple[RawRows, bool]:
    """A split of a Hub data set, or of a folder in it, and whether it has no held-out one."""
    import datasets

    splits = _load_hub(name, part)
    chosen, whole = _choose(split, names, splits)
    if chosen is None:
        raise ValueError(f"it has the splits {', '.join(splits)}; known are {', '.join(names[split])}")
    rows = splits[chosen]
    words = f"{name}:{part}" if part else name
    if isinstance(rows, datasets.IterableDataset):
        return _Streamed(rows, words), whole
    return ArrowRows(rows, f"{words}, split {chosen!r}"), whole


def _load_hub(name: str, part: str) -> Mapping[str, Any]:
    """All splits, since which there are decides what is held out."""
    import datasets

    where: dict[str, Any] = {"name": CONFIGS.get(name), "data_dir": part or None}
    try:
        size = _size(datasets.load_dataset_builder(name, **where))
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        # The Hub keeps what such a script gives as parquet files on a branch of its own.
        where = {"data_dir": part or CONFIGS.get(name, "default"), "revision": PARQUET}
        size = _size(datasets.load_dataset_builder(name, **where))
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    return datasets.load_dataset(name, **where, streaming=size > shutil.disk_usage(cache).free)


def _size(builder: datasets.DatasetBuilder) -> int:
    """Bytes on the disk, as far as the Hub says: of what is downloaded and of what it becomes."""
    return (builder.info.download_size or 0) + (builder.info.dataset_size or 0)


class _Streamed(JsonLines):
    """The first rows of a data set that is larger than the disk."""

    def __init__(self, rows: datasets.IterableDataset, name: str) -> None:
        # Kept open as long as the rows are in use, and removed with them.
        self._file = tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8")  # noqa: SIM115
        most = shutil.disk_usage(tempfile.gettempdir()).free // 2
        for number, row in enumerate(rows.take(MOST_STREAMED_ROWS)):
            if number % 1000 == 0 and self._file.tell() > most:
                break
            self._file.write(json.dumps(row, default=str) + "\n")
        self._file.flush()
        print(f"dataset {name!r} is larger than the disk: its first {number + 1:,} rows are used", file=sys.stderr)
        super().__init__(Path(self._file.name))


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
        raise ImportError(f"{what} needs the package {package}: {install('hub')}")


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
