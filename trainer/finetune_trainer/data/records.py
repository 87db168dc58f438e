"""Reads a data file record by record, in bounded memory, and says exactly what is wrong with it.

A line of JSON or CSV is read whole, so its length is bounded; Parquet is read in small batches, and a file that is small because one long text
stands for many rows is not blown up. Every complaint is a BadData that
names the source as the user wrote it and the line (Parquet: the row), since the one who reads it has only that to go by.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.contract import MESSAGE_LIMIT
from finetune_trainer.errors import BadData

LINE_BYTES_LIMIT = 16 * 1024 * 1024
PARQUET_BATCH_ROWS = 1024
BOMB_BYTES = 256 * 1024 * 1024
BOMB_RATIO = 200
QUOTED_CHARACTERS = 60

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Record:
    """One example as the user wrote it: ``where`` is ``<source> line <n>``, ``label`` is None when the task has none."""

    where: str
    text: str
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """The names of the columns to read."""

    text: str
    label: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """All columns that must be there."""
        return (self.text,) if self.label is None else (self.text, self.label)


def read_records(path: Path, source: str, wanted: Wanted) -> Iterator[Record]:
    """Yield the records of a ``.jsonl``, ``.csv`` or ``.parquet`` file.

    Raises:
        BadData: at the first thing that is wrong, or at the end when there was no record at all.
    """
    rows = _READERS[path.suffix](path, source, wanted)
    empty = True
    for where, row in rows:
        empty = False
        yield _make_record(where, row, wanted)
    if empty:
        raise BadData(f"{source}: holds no records")


def quote(value: object) -> str:
    """Return a value of the user's as it may stand in a message: short, on one line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= QUOTED_CHARACTERS else text[: QUOTED_CHARACTERS - 1] + "…"


def _read_jsonl(path: Path, source: str, wanted: Wanted) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for where, line in _read_lines(path, source):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadData(f"{where}: not valid JSON: {error.msg} at character {error.pos + 1}") from None
        except (ValueError, RecursionError):
            raise BadData(f"{where}: not valid JSON: nested too deeply, or a number too long") from None
        if not isinstance(row, dict):
            raise BadData(f"{where}: must be a JSON object with the columns {_listed(wanted.names)}, is {quote(row)}")
        _require_columns(where, tuple(row), wanted)
        yield where, row


def _read_csv(path: Path, source: str, wanted: Wanted) -> Iterator[tuple[str, Mapping[str, Any]]]:
    csv.field_size_limit(LINE_BYTES_LIMIT)
    reader = csv.reader((line for _, line in _read_lines(path, source)), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        _require_columns(f"{source} line 1", tuple(header), wanted)
        for values in reader:
            where = f"{source} line {reader.line_num}"
            if not values:
                continue
            if len(values) != len(header):
                raise BadData(f"{where}: has {len(values)} values, but the header has {len(header)} columns")
            yield where, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise BadData(f"{source} line {reader.line_num}: not valid CSV: {error}") from None


def _read_parquet(path: Path, source: str, wanted: Wanted) -> Iterator[tuple[str, Mapping[str, Any]]]:
    names = list(dict.fromkeys(wanted.names))
    try:
        metadata = pq.read_metadata(path)
        _require_columns(source, tuple(metadata.schema.to_arrow_schema().names), wanted)
        _refuse_bombs(metadata, source, names)
        # As dictionaries, a text that is written once and meant a thousand times stays one.
        file = pq.ParquetFile(path, metadata=metadata, read_dictionary=names)
        row_number = 0
        for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=names):
            for row in range(batch.num_rows):
                row_number += 1
                where = f"{source} row {row_number}"
                yield where, {name: _read_value(batch.column(name)[row], where, name) for name in names}
    except (pa.ArrowException, OSError) as error:
        raise BadData(f"{source}: not a readable Parquet file: {str(error).splitlines()[0][:MESSAGE_LIMIT]}") from None


def _refuse_bombs(metadata: pq.FileMetaData, source: str, names: list[str]) -> None:
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            packed, size = chunk.total_compressed_size, chunk.total_uncompressed_size
            if chunk.path_in_schema in names and size > max(BOMB_BYTES, BOMB_RATIO * packed):
                raise BadData(
                    f"{source} row group {group + 1}: column {quote(chunk.path_in_schema)} is {packed} bytes that unpack to {size}: "
                    "no text compresses so well"
                )


def _read_value(scalar: pa.Scalar, where: str, column: str) -> object:
    value = scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar
    if isinstance(value, pa.StringScalar | pa.LargeStringScalar | pa.BinaryScalar) and value.is_valid:
        size = value.as_buffer().size
        if size > LINE_BYTES_LIMIT:
            raise BadData(f"{where}: column {quote(column)} is longer than {LINE_BYTES_LIMIT // 2**20} MiB")
    return value.as_py()


_READERS: dict[str, Callable[[Path, str, Wanted], Iterator[tuple[str, Mapping[str, Any]]]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_lines(path: Path, source: str) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        if file.read(len(BYTE_ORDER_MARK)) != BYTE_ORDER_MARK:
            file.seek(0)
        number = 0
        while line := _read_line(file, f"{source} line {number + 1}"):
            number += 1
            where = f"{source} line {number}"
            yield where, _decode(line, where, file.tell() - len(line))


def _read_line(file: BinaryIO, where: str) -> bytes:
    line = file.readline(LINE_BYTES_LIMIT + 1)
    if len(line) > LINE_BYTES_LIMIT:
        raise BadData(f"{where}: is longer than {LINE_BYTES_LIMIT // 2**20} MiB")
    return line


def _decode(line: bytes, where: str, offset: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise BadData(f"{where}: not UTF-8: byte 0x{byte:02x} at offset {offset + error.start} of the file") from None


def _require_columns(where: str, present: tuple[str, ...], wanted: Wanted) -> None:
    for name in wanted.names:
        if name not in present:
            listed = _listed(present) or "none"
            raise BadData(f"{where}: no column {quote(name)}; the columns there are: {listed}")


def _listed(names: tuple[str, ...]) -> str:
    text = ", ".join(quote(name) for name in names[:20])
    return text + (", …" if len(names) > 20 else "")


def _make_record(where: str, row: Mapping[str, Any], wanted: Wanted) -> Record:
    text = row[wanted.text]
    if not isinstance(text, str):
        raise BadData(f"{where}: column {quote(wanted.text)} must be text, is {quote(text)}")
    if not text.strip():
        raise BadData(f"{where}: column {quote(wanted.text)} is empty")
    if not _is_unicode(text):
        raise BadData(f"{where}: column {quote(wanted.text)} holds half of a surrogate pair, which is no character")
    return Record(where, text, None if wanted.label is None else _read_label(where, row[wanted.label], wanted.label))


def _read_label(where: str, value: object, column: str) -> str:
    """Return a label as text; whole numbers are taken as they are written, since many data sets number their classes."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadData(f"{where}: column {quote(column)} must be a label, is {quote(value)}")
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
