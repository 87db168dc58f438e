"""What is wrong with a data file is said in full: source, line, what is there, what is allowed."""

import csv
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_trainer.data import records
from finetune_trainer.data.records import Record, Wanted, read_records
from finetune_trainer.errors import BadData

LABELLED = Wanted(text="text", label="label")
GOOD_LINE = b'{"text": "fine", "label": "positive"}\n'

# id: (file name, content, message after the source)
WRONG = {
    "an empty file": ("d.jsonl", b"", ": holds no records"),
    "a file of blank lines": ("d.jsonl", b"\n  \n", ": holds no records"),
    "a CSV with nothing but a header": ("d.csv", b"text,label\n", ": holds no records"),
    "a line that is no JSON": (
        "d.jsonl",
        GOOD_LINE * 16 + b'{"text": "x", "label" "y"}\n',
        " line 17: not valid JSON: Expecting ':' delimiter at character 23",
    ),
    "a line cut off": (
        "d.jsonl",
        b'{"text": "x',
        " line 1: not valid JSON: Unterminated string starting at at character 10",
    ),
    "JSON nested too deeply": (
        "d.jsonl",
        b"[" * 100_000 + b"\n",
        " line 1: not valid JSON: nested too deeply, or a number too long",
    ),
    "a number too long to read": (
        "d.jsonl",
        b'{"text": ' + b"1" * 5000 + b"}\n",
        " line 1: not valid JSON: nested too deeply, or a number too long",
    ),
    "JSON that is no object": (
        "d.jsonl",
        b'["fine", "positive"]\n',
        ' line 1: must be a JSON object with the columns "text", "label", is ["fine", "positive"]',
    ),
    "a column that is not there": (
        "d.jsonl",
        GOOD_LINE + b'{"review": "x", "label": "positive"}\n',
        ' line 2: no column "text"; the columns there are: "review", "label"',
    ),
    "an object without any column": ("d.jsonl", b"{}\n", ' line 1: no column "text"; the columns there are: none'),
    "a CSV column that is not there": (
        "d.csv",
        b"review,label\nx,positive\n",
        ' line 1: no column "text"; the columns there are: "review", "label"',
    ),
    "bytes that are not UTF-8": (
        "d.jsonl",
        GOOD_LINE + b'{"text": "caf\xe9", "label": "positive"}\n',
        " line 2: not UTF-8: byte 0xe9 at offset 51 of the file",
    ),
    "UTF-16": ("d.jsonl", '{"text": "x"}'.encode("utf-16"), " line 1: not UTF-8: byte 0xff at offset 0 of the file"),
    "an empty text": ("d.jsonl", b'{"text": " ", "label": "positive"}\n', ' line 1: column "text" is empty'),
    "a text that is a number": (
        "d.jsonl",
        b'{"text": 17, "label": "positive"}\n',
        ' line 1: column "text" must be text, is 17',
    ),
    "a text that is null": (
        "d.jsonl",
        b'{"text": null, "label": "positive"}\n',
        ' line 1: column "text" must be text, is null',
    ),
    "half a character": (
        "d.jsonl",
        b'{"text": "\\ud83d", "label": "positive"}\n',
        ' line 1: column "text" holds half of a surrogate pair, which is no character',
    ),
    "a label that is a fraction": (
        "d.jsonl",
        b'{"text": "x", "label": 0.5}\n',
        ' line 1: column "label" must be a label, is 0.5',
    ),
    "a label that is a truth value": (
        "d.jsonl",
        b'{"text": "x", "label": true}\n',
        ' line 1: column "label" must be a label, is true',
    ),
    "a CSV row of another width": (
        "d.csv",
        b"text,label\nfine,positive,again\n",
        " line 2: has 3 values, but the header has 2 columns",
    ),
    "a CSV quote that never ends": (
        "d.csv",
        b'text,label\n"fine,positive\n',
        " line 2: not valid CSV: unexpected end of data",
    ),
    "a Parquet file that is none": ("d.parquet", b"PAR1 and no more", ": not a readable Parquet file: "),
}


@pytest.mark.parametrize(("name", "content", "message"), WRONG.values(), ids=WRONG.keys())
def test_refuses(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    source = f"s3://datasets/{name}"
    with pytest.raises(BadData) as refused:
        list(read_records(tmp_path / name, source, LABELLED))
    if message.endswith(": "):
        assert str(refused.value).startswith(source + message)
    else:
        assert str(refused.value) == source + message


def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LINE_BYTES_LIMIT", 2 * 2**20)
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD_LINE + b"x" * (3 * 2**20))
    with pytest.raises(BadData, match=r"^s3://d/d\.jsonl line 2: is longer than 2 MiB$"):
        list(read_records(path, "s3://d/d.jsonl", LABELLED))


def test_a_csv_record_that_spans_too_many_lines_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = csv.field_size_limit()
    monkeypatch.setattr(records, "LINE_BYTES_LIMIT", 1000)
    path = tmp_path / "d.csv"
    path.write_bytes(b'text,label\n"' + b"x\n" * 1000)
    try:
        with pytest.raises(
            BadData, match=r"^s3://d/d\.csv line \d+: not valid CSV: field larger than field limit \(1000\)$"
        ):
            list(read_records(path, "s3://d/d.csv", LABELLED))
    finally:
        csv.field_size_limit(limit)


RIGHT = {
    "jsonl": ("d.jsonl", b'{"text": "fine", "label": "positive", "more": [1]}\n\n{"text": "\\u00fc", "label": 0}'),
    "jsonl with a byte order mark and Windows line ends": (
        "d.jsonl",
        b'\xef\xbb\xbf{"text": "fine", "label": "positive"}\r\n\r\n{"text": "\xc3\xbc", "label": "0"}\r\n',
    ),
    "csv": ("d.csv", 'label,text\npositive,fine\n\n0,"ü"\n'.encode()),
}


@pytest.mark.parametrize(("name", "content"), RIGHT.values(), ids=RIGHT.keys())
def test_reads(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(read_records(tmp_path / name, "s3://d/f", LABELLED)) == [
        Record("s3://d/f line " + ("2" if name == "d.csv" else "1"), "fine", "positive"),
        Record("s3://d/f line " + ("4" if name == "d.csv" else "3"), "ü", "0"),
    ]


def test_a_csv_record_over_several_lines_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(b'text,label\n"two\nlines, one ""record""",positive\n')
    read = list(read_records(tmp_path / "d.csv", "s3://d/d.csv", LABELLED))
    assert read == [Record("s3://d/d.csv line 3", 'two\nlines, one "record"', "positive")]


def test_reads_parquet_and_names_rows(tmp_path: Path) -> None:
    table = pa.table({"text": ["fine", "dull", None], "label": [2, 0, 1], "extra": [1.0, 2.0, 3.0]})
    pq.write_table(table, tmp_path / "d.parquet")
    read = read_records(tmp_path / "d.parquet", "s3://d/d.parquet", LABELLED)
    assert [next(read), next(read)] == [
        Record("s3://d/d.parquet row 1", "fine", "2"),
        Record("s3://d/d.parquet row 2", "dull", "0"),
    ]
    with pytest.raises(BadData, match=r'^s3://d/d\.parquet row 3: column "text" must be text, is null$'):
        next(read)


def test_one_long_text_that_stands_for_many_rows_is_not_blown_up(tmp_path: Path) -> None:
    """A kilobyte of file, eight gigabytes as a list of rows. In a process of its own, for its peak of memory."""
    row = pa.array(["x" * (8 << 20)]).dictionary_encode().take(pa.array([0] * 1024))
    pq.write_table(pa.table({"text": row, "label": ["a"] * 1024}), tmp_path / "d.parquet", compression="zstd")
    assert (tmp_path / "d.parquet").stat().st_size < 10_000
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from finetune_trainer.data.records import Wanted, read_records\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "count = sum(len(r.text) == 8 << 20 for r in read_records(Path(sys.argv[1]), 'd', Wanted('text', 'label')))\n"
        "print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    said = subprocess.check_output([sys.executable, "-c", script, str(tmp_path / "d.parquet")], text=True)
    count, kibibytes = map(int, said.split())
    assert count == 1024
    assert kibibytes < 500_000


def test_a_parquet_column_that_unpacks_to_far_more_than_text_does_is_refused(tmp_path: Path) -> None:
    texts = pa.array(["x" * (12 << 20)] * 24)
    pq.write_table(
        pa.table({"text": texts, "label": ["a"] * 24}), tmp_path / "d.parquet", compression="zstd", use_dictionary=False
    )
    with pytest.raises(
        BadData,
        match=r'^s3://d row group 1: column "text" is \d+ bytes that unpack to \d+: no text compresses so well$',
    ):
        list(read_records(tmp_path / "d.parquet", "s3://d", LABELLED))


def test_a_text_of_parquet_is_as_bounded_as_a_line(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x" * (17 << 20)], "label": ["a"]}), tmp_path / "d.parquet")
    with pytest.raises(BadData, match=r'^s3://d row 1: column "text" is longer than 16 MiB$'):
        list(read_records(tmp_path / "d.parquet", "s3://d", LABELLED))


def test_a_parquet_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"review": ["x"]}), tmp_path / "d.parquet")
    with pytest.raises(BadData, match=r'^s3://d/d\.parquet: no column "text"; the columns there are: "review"$'):
        list(read_records(tmp_path / "d.parquet", "s3://d/d.parquet", LABELLED))


def test_text_without_labels_needs_no_label_column(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "fine"}')
    assert list(read_records(tmp_path / "d.jsonl", "s3://d/f", Wanted("text", None))) == [
        Record("s3://d/f line 1", "fine")
    ]


def test_what_is_quoted_is_short_and_on_one_line() -> None:
    assert records.quote("a\nb") == '"a\\nb"'
    assert len(records.quote("x" * 1000)) == records.QUOTED_CHARACTERS
