"""Reading every format, and every kind of bad record: skipped and told, or one line that ends it."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from retro_ray.config import CorpusConfig
from retro_ray.errors import InputError
from retro_ray.text import readers
from retro_ray.text.corpus import Document, SkippedRecord, plan_units
from retro_ray.text.readers import read_unit

GOOD = b'{"text": "good"}\n'


def read(path: Path, **settings: object) -> list[Document | SkippedRecord]:
    corpus = CorpusConfig(input=(str(path),), **settings)  # type: ignore[arg-type]
    return [record for unit in plan_units(corpus) for record in read_unit(unit, corpus)]


def texts(records: list[Document | SkippedRecord]) -> list[str]:
    return [record.text for record in records if isinstance(record, Document)]


def skipped(records: list[Document | SkippedRecord]) -> list[SkippedRecord]:
    return [record for record in records if isinstance(record, SkippedRecord)]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def compress(content: bytes, extension: str) -> bytes:
    if extension == ".gz":
        return gzip.compress(content)
    return zstandard.ZstdCompressor().compress(content) if extension == ".zst" else content


@pytest.mark.parametrize("extension", ["", ".gz", ".zst"])
def test_json_lines(tmp_path: Path, extension: str) -> None:
    lines = [
        {"text": "one", "id": "first", "title": "The first"},
        {"text": "two", "id": 2, "other": [1, 2]},
        {"text": "three", "title": " "},
    ]
    content = b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(line).encode() for line in lines)
    path = write(tmp_path / f"a.jsonl{extension}", compress(content, extension))
    name = path.name
    assert read(path) == [
        Document("first", "The first", str(path), "one"),
        Document("2", "2", str(path), "two"),
        Document(f"{name}#3", f"{name}#3", str(path), "three"),
    ]


@pytest.mark.parametrize("extension", ["", ".gz", ".zst"])
def test_text_file_is_one_document(tmp_path: Path, extension: str) -> None:
    path = write(tmp_path / f"a.txt{extension}", compress(b"\xef\xbb\xbf# no heading\r\nfianc\xc3\xa9\n", extension))
    assert read(path) == [Document(path.name, path.name, str(path), "# no heading\r\nfianc\u00e9\n")]


@pytest.mark.parametrize(
    ("content", "title"),
    [
        ("# Retro  \ntext", "Retro"),
        ("intro\n\n## Second level ##\n# First", "Second level"),
        ("no heading #1\n#tag\n", "a.md"),
        ("#\n# \n### C#\n", "C"),
    ],
)
def test_title_of_markdown_is_its_first_heading(tmp_path: Path, content: str, title: str) -> None:
    (record,) = read(write(tmp_path / "a.md", content.encode()))
    assert isinstance(record, Document)
    assert record.title == title
    assert record.text == content


@pytest.mark.parametrize(
    "text_type", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet(tmp_path: Path, text_type: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    columns = {
        "text": pa.array(["one", None, "tw\u00f6", "three"]).cast(text_type),
        "id": pa.array([7, 8, 9, None]),
        "title": ["T", "U", None, "V"],
        "unused": [[0.0]] * 4,
    }
    pq.write_table(pa.table(columns), path, row_group_size=2)
    assert read(path) == [
        Document("7", "T", str(path), "one"),
        SkippedRecord(str(path), 2, "empty document", ""),
        Document("9", "9", str(path), "tw\u00f6"),
        Document("a.parquet#4", "V", str(path), "three"),
    ]


def test_columns_are_those_of_the_settings(tmp_path: Path) -> None:
    row = {"body": "text", "key": "k", "name": "n", "id": "not this", "title": "nor this"}
    settings = {"text_column": "body", "id_column": "key", "title_column": "name"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    lines = write(tmp_path / "a.jsonl", json.dumps(row).encode())
    for path in (tmp_path / "a.parquet", lines):
        assert read(path, **settings) == [Document("k", "n", str(path), "text")]


BAD_LINES = [
    (b'{"text": "cut', "malformed line", "not JSON"),
    (b"[" * 100_000, "malformed line", "not JSON"),
    (b'{"text": ' + b"9" * 5000 + b"}", "malformed line", "not JSON"),
    (b'["text"]', "malformed line", "a JSON list, not an object"),
    (b"null", "malformed line", "a JSON NoneType, not an object"),
    (b'{"text": "fianc\xe9"}', "invalid UTF-8", "byte 0xe9"),
    (b"\x00\x01\xfe\xff", "invalid UTF-8", "byte 0xfe"),
    (b'{"body": "x", "n": 1}', "missing column", "no value for 'text'; the keys are: body, n"),
    (b'{"\\ud800": "x"}', "missing column", "no value for 'text'; the keys are: \\ud800"),
    (b'{"text": 5}', "malformed text", "'text' holds a value of type int, not a string"),
    (b'{"text": {"a": "b"}}', "malformed text", "'text' holds a value of type dict"),
    (b'{"text": "a\\ud800b"}', "malformed text", "lone surrogate U+D800 in the text"),
    (b'{"text": "a", "id": "\\udfff"}', "malformed text", "lone surrogate U+DFFF in the id"),
    (b'{"text": "a", "title": "\\udfff"}', "malformed text", "lone surrogate U+DFFF in the title"),
]


@pytest.mark.parametrize(("line", "category", "detail"), BAD_LINES)
def test_bad_line_is_skipped_with_file_and_line_or_ends_it(
    tmp_path: Path, line: bytes, category: str, detail: str
) -> None:
    path = write(tmp_path / "a.jsonl", GOOD + b"\n" + line + b"\n" + GOOD)
    records = read(path)
    assert texts(records) == ["good", "good"]
    (record,) = skipped(records)
    assert (record.source, record.line, record.category) == (str(path), 3, category)
    assert record.detail.startswith(detail)
    assert record.reason == f"{category}: {record.detail}"
    record.reason.encode()
    with pytest.raises(InputError, match=rf"a.jsonl, line 3: {category}.*--on-error skip") as caught:
        read(path, on_error="fail")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "  \\n\\t\\u00a0"])
def test_empty_document_is_skipped_and_ends_nothing(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.jsonl", GOOD + f'{{"text": "{text}"}}\n'.encode() + b'{"text": null}\n')
    for on_error in ("skip", "fail"):
        records = read(path, on_error=on_error)
        assert texts(records) == ["good"]
        assert [(record.line, record.reason) for record in skipped(records)] == [
            (2, "empty document"),
            (3, "empty document"),
        ]
    assert skipped(read(write(tmp_path / "b.txt", b" \n"))) == [
        SkippedRecord(str(tmp_path / "b.txt"), None, "empty document", "b.txt")
    ]


def test_document_of_one_character_is_kept(tmp_path: Path) -> None:
    assert texts(read(write(tmp_path / "a.txt", b"x"))) == ["x"]


def test_text_that_is_not_utf8_is_skipped_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one\ntwo\nthr\xe9e\n")
    assert read(path) == [SkippedRecord(str(path), 3, "invalid UTF-8", "byte 0xe9")]
    with pytest.raises(InputError, match=r"a.txt, line 3: invalid UTF-8: byte 0xe9; mend it"):
        read(path, on_error="fail")


def test_given_id_column_is_required_of_every_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD + b'{"text": "x", "key": "k"}\n{"text": "x", "key": null}\n')
    records = read(path, id_column="key")
    assert [record.id for record in records if isinstance(record, Document)] == ["k"]
    assert [(record.line, record.category) for record in skipped(records)] == [
        (1, "missing column"),
        (3, "missing column"),
    ]


def test_parquet_row_that_is_not_utf8_is_skipped_with_its_row(tmp_path: Path) -> None:
    raw = pa.array([b"one", b"fianc\xe9", b"three"])
    text = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    records = read(tmp_path / "a.parquet")
    assert texts(records) == ["one", "three"]
    assert skipped(records) == [SkippedRecord(str(tmp_path / "a.parquet"), 2, "invalid UTF-8", "byte 0xe9")]
    with pytest.raises(InputError, match=r"a.parquet, line 2: invalid UTF-8"):
        read(tmp_path / "a.parquet", on_error="fail")


def test_damaged_parquet_data_keeps_the_rows_before(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [f"{number} " * 100 for number in range(600)]
    pq.write_table(pa.table({"text": rows}), path, row_group_size=300, compression="zstd", use_dictionary=False)
    second = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    middle = second.data_page_offset + second.total_compressed_size // 2
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)
    records = read(path)
    assert texts(records)[:256] == rows[:256]
    (record,) = skipped(records)
    assert record.category == "damaged file"
    assert record.line == len(texts(records)) + 1
    with pytest.raises(InputError, match=r"a.parquet, line \d+: damaged file"):
        read(path, on_error="fail")


@pytest.mark.parametrize("extension", [".gz", ".zst"])
def test_truncated_file_keeps_the_lines_before(tmp_path: Path, extension: str) -> None:
    rng = random.Random(0)
    lines = [json.dumps({"text": rng.randbytes(60).hex()}) for _ in range(5000)]
    whole = compress("\n".join(lines).encode(), extension)
    path = write(tmp_path / f"a.jsonl{extension}", whole[: len(whole) * 2 // 3])
    records = read(path)
    kept = texts(records)
    assert 1000 < len(kept) < 5000
    assert kept == [json.loads(line)["text"] for line in lines[: len(kept)]]
    (record,) = skipped(records)
    assert record == records[-1]
    assert (record.source, record.line, record.category) == (str(path), len(kept) + 1, "damaged file")
    with pytest.raises(InputError, match=rf"a.jsonl{extension}, line {len(kept) + 1}: damaged file"):
        read(path, on_error="fail")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.md.zst"])
def test_file_that_is_not_compressed_as_its_name_says_is_skipped(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, GOOD * 3)
    (record,) = read(path)
    assert isinstance(record, SkippedRecord)
    assert record.category == "damaged file"
    assert f"damaged {'gzip' if name.endswith('gz') else 'zstd'} data" in record.detail
    with pytest.raises(InputError, match=rf"{name}.*damaged file"):
        read(path, on_error="fail")


def test_json_file_may_be_lines_or_one_array(tmp_path: Path) -> None:
    values = [{"text": "one"}, {"text": ""}, 5, {"text": "two", "id": "x"}]
    array = write(tmp_path / "a.json", b"\n " + json.dumps(values, indent=2).encode())
    assert texts(read(array)) == ["one", "two"]
    assert [(record.line, record.category) for record in skipped(read(array))] == [
        (2, "empty document"),
        (3, "malformed line"),
    ]
    assert [record.id for record in read(array) if isinstance(record, Document)] == ["a.json#1", "x"]
    assert texts(read(write(tmp_path / "b.json", GOOD * 2))) == ["good", "good"]


@pytest.mark.parametrize(
    ("content", "line", "category"),
    [
        (b'[{"text": "one"},\n{"text": "two"', 2, "malformed line"),
        (b'[\n"fianc\xe9"]', 2, "invalid UTF-8"),
        (b"[" * 100_000, None, "malformed line"),
    ],
)
def test_broken_json_array_is_skipped(tmp_path: Path, content: bytes, line: int | None, category: str) -> None:
    (record,) = skipped(read(write(tmp_path / "a.json", content)))
    assert (record.line, record.category) == (line, category)


def test_json_array_too_large_to_hold_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_ARRAY_BYTES", 100)
    (record,) = skipped(read(write(tmp_path / "a.json", json.dumps([{"text": "x" * 200}]).encode())))
    assert "write one record per line" in record.detail


def test_file_that_vanishes_after_the_plan_is_one_line(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", GOOD), ("b.txt", b"x")):
        path = write(tmp_path / name, content)
        corpus = CorpusConfig(input=(str(path),))
        (unit,) = plan_units(corpus)
        path.unlink()
        with pytest.raises(InputError, match=rf"cannot open .*{name}"):
            list(read_unit(unit, corpus))
