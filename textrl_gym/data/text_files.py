"""Text files of rows, JSON lines and CSV: read once from start to end, then row by row where they lie.

A row costs 16 bytes of memory, however long it is. Limits keep a hostile or broken file from filling memory or disk.
"""

from __future__ import annotations

import abc
import codecs
import contextlib
import csv
import gzip
import io
import json
import os
import tempfile
import weakref
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from textrl_gym.data.rows import BadRow

MOST_LINE_BYTES = 64 * 2**20
"""The longest line that is read: the longest real documents have a few MB."""
MOST_JSON_BYTES = 2**30
"""The largest .json file: a list has to be read as a whole, and takes several times its size."""
IN_MEMORY_BYTES = 64 * 2**20
"""Files up to this size are kept in memory, so that a run does not care what becomes of them."""
MOST_RATIO = 200
"""A compressed file that grows by more is refused, above IN_MEMORY_BYTES: texts shrink to a tenth at best."""
_BOMS = (  # UTF-32's first, which begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_CHUNK = 2**20


class TextRows(Sequence[object], abc.ABC):
    """The rows of a text file. `read()` has to come to its end before rows are asked for by their number."""

    def __init__(self, path: Path, keep: bool = True) -> None:
        """keep: hold the bytes in memory where they are few.

        Raises:
            ValueError: the file cannot be read or decoded, or grows beyond what is allowed.
        """
        self.path = path
        self._bytes = _open(path, keep)
        self._starts, self._lengths, self._lines = array("Q"), array("I"), array("I")

    def read(self) -> Iterator[object]:
        """Every row from first to last, a BadRow in the place of what is none."""
        self._starts, self._lengths, self._lines = array("Q"), array("I"), array("I")
        with self._bytes.open() as stream:
            yield from self._read(stream)

    def share_read(self) -> float:
        """How much of the file read() has passed, from 0 to 1."""
        return self._starts[-1] / max(self._bytes.size, 1) if self._starts else 0.0

    def where(self, index: int) -> str:
        """A row's place in words."""
        return f"{str(self.path)!r}, line {self._lines[index]}"

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any, /) -> Any:
        """The row, a BadRow where it is none."""
        return self._row(self._bytes.read(self._starts[index], self._lengths[index]))

    @abc.abstractmethod
    def _read(self, stream: BinaryIO) -> Iterator[object]:
        """Every row from first to last, each noted with `_add`."""

    @abc.abstractmethod
    def _row(self, record: bytes) -> object:
        """The row that some bytes of the file hold."""

    def _add(self, start: int, end: int, line: int) -> None:
        self._starts.append(start)
        self._lengths.append(end - start)
        self._lines.append(line)

    def _lines_of(self, stream: BinaryIO) -> Iterator[bytes]:
        """Lines with their ends, each of a length that fits memory."""
        while line := stream.readline(MOST_LINE_BYTES + 1):
            if len(line) > MOST_LINE_BYTES:
                last = self._lines[-1] if self._lines else 0
                raise ValueError(
                    f"{str(self.path)!r}: the line after line {last} is longer than {MOST_LINE_BYTES / 2**20:.0f} MB"
                )
            yield line


class JsonLines(TextRows):
    """A file with a JSON object in each line; blank lines are left out."""

    def _read(self, stream: BinaryIO) -> Iterator[object]:
        start = stream.tell()
        for number, line in enumerate(self._lines_of(stream), start=1):
            end = start + len(line)
            if not line.isspace():
                self._add(start, end, number)
                yield self._row(line)
            start = end

    def _row(self, record: bytes) -> object:
        try:
            return json.loads(record.decode())
        except UnicodeDecodeError as error:
            return not_utf8(error)
        except (ValueError, RecursionError) as error:
            return not_json(error)


class CsvRows(TextRows):
    """A CSV file with a header; rows are mappings of its names to texts, blank lines are left out.

    A column without a name, as pandas writes its index, is left out.
    """

    def __init__(self, path: Path, keep: bool = True) -> None:
        super().__init__(path, keep)
        self.header: list[str] = []

    def _read(self, stream: BinaryIO) -> Iterator[object]:
        self.header = []
        place = _Place(stream.tell())
        with _long_fields():
            reader = csv.reader(self._texts(stream, place), strict=True)
            start, line = place.end, 1
            try:
                for fields in reader:
                    if fields and not self.header:
                        self.header = self._checked_header(fields)
                    elif fields:
                        self._add(start, place.end, line)
                        yield self._mapping(fields)
                    start, line = place.end, place.line + 1
            except csv.Error as error:
                raise ValueError(f"{str(self.path)!r}, line {line} is no CSV: {error}") from error

    def _texts(self, stream: BinaryIO, place: _Place) -> Iterator[str]:
        """Lines as texts; `place` says how far the reader has come."""
        for line in self._lines_of(stream):
            place.end += len(line)
            place.line += 1
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                # What a quote opened may reach over lines, so that one line cannot be left out.
                raise ValueError(f"{str(self.path)!r}, line {place.line} {not_utf8(error)}") from error

    def _checked_header(self, fields: list[str]) -> list[str]:
        named = [name for name in fields if name]
        double = {name for name in named if named.count(name) > 1}
        if double or not named:
            what = f"has the column {min(double)!r} twice" if double else "has no column with a name"
            raise ValueError(f"{str(self.path)!r}: the header {what}")
        return fields

    def _row(self, record: bytes) -> object:
        with _long_fields():
            return self._mapping(next(csv.reader(io.StringIO(record.decode(), newline=""), strict=True)))

    def _mapping(self, fields: list[str]) -> object:
        if len(fields) > len(self.header):
            return BadRow("has more fields than the header", repr(fields[len(self.header) :]))
        missing: list[str | None] = [None] * (len(self.header) - len(fields))
        return {name: field for name, field in zip(self.header, [*fields, *missing], strict=True) if name}


class _Place:
    """How far a file has been read."""

    def __init__(self, start: int) -> None:
        self.end, self.line = start, 0


class ListRows(Sequence[object]):
    """Rows in memory, of a file whose format has no lines."""

    def __init__(self, rows: list[Any], name: str) -> None:
        self.rows, self.name = rows, name

    def read(self) -> Iterator[object]:
        """Every row."""
        return iter(self.rows)

    def share_read(self) -> float:
        """All of them are there."""
        return 1.0

    def where(self, index: int) -> str:
        """A row's place in words."""
        return f"{self.name}, row {index}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any, /) -> Any:
        return self.rows[index]


def read_json(path: Path, keep: bool = True) -> ListRows | JsonLines:
    """The rows of a .json file: a list, or an object in each line, as some give their JSON lines that name.

    Raises:
        ValueError: it holds neither, or is too large to be read as a whole.
    """
    source = _open(path, keep)
    with source.open() as stream:
        first = stream.read(_CHUNK).lstrip()[:1]
    if source.size > MOST_JSON_BYTES:
        if first == b"{":
            return JsonLines(path, keep)
        raise ValueError(f"{str(path)!r} has {source.size / 2**30:.1f} GB: write so large a list as .jsonl, row by row")
    try:
        with source.open() as stream:
            data = json.loads(stream.read().decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} {not_utf8(error)}") from error
    except (ValueError, RecursionError) as error:
        if first == b"{" and isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return JsonLines(path, keep)
        raise ValueError(f"{str(path)!r} is no JSON: {error}") from error
    if not isinstance(data, list):
        raise ValueError(f"{str(path)!r} must hold a list of objects, not {type(data).__name__}")
    return ListRows(data, repr(str(path)))


def not_utf8(error: UnicodeDecodeError) -> BadRow:
    """What a decoder found, and what helps."""
    byte = error.object[error.start]
    return BadRow("is no UTF-8", f"byte 0x{byte:02x} at place {error.start + 1}: save the file as UTF-8")


def not_json(error: ValueError | RecursionError) -> BadRow:
    """What the JSON parser found."""
    if isinstance(error, json.JSONDecodeError):
        return BadRow("is no JSON", f"{error.msg} at column {error.colno}")
    return BadRow("is no JSON", "nested too deeply" if isinstance(error, RecursionError) else str(error))


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Let the csv module read fields as long as a line may be; its own limit is 131,072 characters."""
    before = csv.field_size_limit(MOST_LINE_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)


# -- bytes ------------------------------------------------------------------------------------------------------------


class _Bytes:
    """UTF-8 text: in memory, in a temporary file, or in the file where it was found."""

    def __init__(self, path: Path, skip: int, data: bytes | None = None, temporary: BinaryIO | None = None) -> None:
        self.path, self.skip, self.data, self.temporary = path, skip, data, temporary
        self.stat = path.stat()
        self.size = self.stat.st_size
        if data is not None:
            self.size = len(data)
        elif temporary is not None:
            self.size = temporary.seek(0, os.SEEK_END)
            weakref.finalize(self, temporary.close)

    def open(self) -> BinaryIO:
        """From the start, behind a byte order mark."""
        stream: BinaryIO
        if self.data is not None:
            stream = io.BytesIO(self.data)
        elif self.temporary is not None:
            stream = io.BufferedReader(_At(self.temporary.fileno()), _CHUNK)
        else:
            stream = self._unchanged()
        stream.seek(self.skip)
        return stream

    def read(self, start: int, length: int) -> bytes:
        """Some of the bytes; also of many processes at a time."""
        if self.data is not None:
            return self.data[start : start + length]
        if self.temporary is not None:
            return os.pread(self.temporary.fileno(), length, start)
        with self._unchanged() as file:
            return os.pread(file.fileno(), length, start)

    def _unchanged(self) -> BinaryIO:
        """The file, if it is still what was read."""
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise ValueError(f"{str(self.path)!r} cannot be read any more: {error.strerror}") from error
        now = os.fstat(file.fileno())
        if (now.st_mtime_ns, now.st_size) != (self.stat.st_mtime_ns, self.stat.st_size):
            file.close()
            raise ValueError(f"{str(self.path)!r} has changed since its rows were checked: start again")
        return file


class _At(io.RawIOBase):
    """A reader with a place of its own in an open file that others read too."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.place = descriptor, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + (self.place if whence == os.SEEK_CUR else 0)
        return self.place

    def readinto(self, buffer: Any, /) -> int:
        chunk = os.pread(self.descriptor, len(buffer), self.place)
        buffer[: len(chunk)] = chunk
        self.place += len(chunk)
        return len(chunk)


def _open(path: Path, keep: bool) -> _Bytes:
    """A file's text as UTF-8, whatever its compression and its encoding by a byte order mark."""
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            start = stream.read(4)
            encoding = next((name for bom, name in _BOMS if start.startswith(bom)), "utf-8")
            skip = len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0
            if b"\0" in start and encoding == "utf-8":
                raise ValueError(f"{str(path)!r}, line 1 is no UTF-8 but UTF-16 or binary: save it as UTF-8")
            stream.seek(0)
            small = path.stat().st_size <= IN_MEMORY_BYTES
            if not packed and encoding.startswith("utf-8"):
                return _Bytes(path, skip, data=stream.read() if keep and small else None)
            return _unpacked(path, cast(BinaryIO, stream), encoding, skip)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{str(path)!r} is no whole gzip file: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is no {error.encoding}, which its first bytes say: {error.reason}") from error
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error


def _unpacked(path: Path, stream: BinaryIO, encoding: str, skip: int) -> _Bytes:
    """The text of a stream that cannot be read from any place: in memory, or in a temporary file."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile())
        for chunk in _decoded(path, stream, encoding):
            file.write(chunk)
        if file.tell() <= IN_MEMORY_BYTES:
            file.seek(0)
            return _Bytes(path, skip, data=file.read())
        file.flush()
        stack.pop_all()  # it stays open as long as the rows are in use
        return _Bytes(path, skip, temporary=cast(BinaryIO, file))


def _decoded(path: Path, stream: BinaryIO, encoding: str) -> Iterator[bytes]:
    """The stream as UTF-8, as long as it does not grow beyond all measure."""
    decoder = None if encoding.startswith("utf-8") else codecs.getincrementaldecoder(encoding)()
    most = max(MOST_RATIO * path.stat().st_size, IN_MEMORY_BYTES)
    total = 0
    while chunk := stream.read(_CHUNK):
        total += len(chunk)
        if total > most:
            raise ValueError(
                f"{str(path)!r} grows to more than {MOST_RATIO} times its size when it is decompressed: no text does "
                "that; decompress it yourself if you trust it"
            )
        yield chunk if decoder is None else decoder.decode(chunk).encode("utf-8", errors="surrogatepass")
    if decoder is not None:
        yield decoder.decode(b"", final=True).encode()
