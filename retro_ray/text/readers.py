"""Reading a unit of the corpus, record by record.

A record that cannot be read becomes a `SkippedRecord` with file and line, or, with `on_error="fail"`,
ends the reading. An empty document can be read and holds nothing: it is skipped and counted in
either case.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from typing import Any

from retro_ray.config import CorpusConfig
from retro_ray.errors import InputError
from retro_ray.text import parquet_files, python_docs
from retro_ray.text.byte_stream import DamagedFileError, read_blocks, read_lines
from retro_ray.text.corpus import Document, ReadUnit, SkippedRecord

EMPTY = "empty document"
INVALID_UTF8 = "invalid UTF-8"
MALFORMED_LINE = "malformed line"
MALFORMED_TEXT = "malformed text"
MISSING_COLUMN = "missing column"
NOT_PARQUET = "not a Parquet file"
DAMAGED = "damaged file"
UNPARSED = "unparsable source"
# A JSON array can only be read whole.
MAX_ARRAY_BYTES = 256 * 1024**2
KEYS_SHOWN = 20
HEADING = re.compile(r"^#{1,6}[ \t]+(\S.*?)[ \t]*#*[ \t]*$", re.MULTILINE)
HEADING_WITHIN = 1 << 16


def read_unit(unit: ReadUnit, config: CorpusConfig) -> Iterator[Document | SkippedRecord]:
    """The documents of a unit, in order, and what could not be read in their place.

    Raises:
        InputError: a record cannot be read, and `on_error` is "fail" (names file and line); or a file
            is gone or closed to us, which no setting passes over.
    """
    for record in _read_files(unit, config):
        if isinstance(record, SkippedRecord) and record.category != EMPTY and config.on_error == "fail":
            line = "" if record.line is None else f", line {record.line}"
            raise InputError(f"{record.source}{line}: {record.reason}; mend it, or pass --on-error skip")
        yield record


def _read_files(unit: ReadUnit, config: CorpusConfig) -> Iterator[Document | SkippedRecord]:
    if unit.format == python_docs.NAME:
        yield from _read_python_docs(unit.files)
        return
    for path, label in zip(unit.files, unit.labels or unit.files, strict=True):
        try:
            if unit.format == "parquet":
                yield from _read_parquet(path, label, unit.row_groups, config)
            elif unit.format == "text":
                yield _read_text(path, label)
            else:
                yield from _read_json(path, label, config, may_be_array=unit.format == "json")
        except (FileNotFoundError, PermissionError) as error:
            raise InputError(f"cannot open {path} ({error}): restore it or its permissions, and start again") from error


def _read_python_docs(entries: tuple[str, ...]) -> Iterator[Document | SkippedRecord]:
    for entry in entries:
        docs = python_docs.read_docs(entry)
        if docs is None:
            continue
        if docs.problem:
            yield SkippedRecord(entry, None, UNPARSED, docs.problem)
        else:
            yield _document(f"{python_docs.NAME}/{docs.name}", docs.name, python_docs.NAME, None, docs.text)


def _read_text(path: str, label: str) -> Document | SkippedRecord:
    """A whole file as one document."""
    try:
        content = b"".join(read_blocks(path)).removeprefix(b"\xef\xbb\xbf")
        text = content.decode("utf-8")
    except DamagedFileError as error:
        return SkippedRecord(path, None, DAMAGED, str(error))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        return SkippedRecord(path, line, INVALID_UTF8, f"byte 0x{error.object[error.start]:02x}")
    title = posixpath.basename(path)
    if re.search(r"\.(md|markdown)(\.gz|\.zst)?$", path.lower()):
        heading = HEADING.search(text, 0, HEADING_WITHIN)
        title = heading.group(1) if heading else title
    return _document(label, title, path, None, text)


def _read_parquet(
    path: str, label: str, row_groups: tuple[int, int] | None, config: CorpusConfig
) -> Iterator[Document | SkippedRecord]:
    row = None
    try:
        for row, values in parquet_files.iter_rows(path, row_groups, config):
            try:
                decoded = {
                    name: value.decode("utf-8") if isinstance(value, bytes) else value for name, value in values.items()
                }
            except UnicodeDecodeError as error:
                yield SkippedRecord(path, row, INVALID_UTF8, f"byte 0x{error.object[error.start]:02x}")
                continue
            yield _record(decoded, path, label, row, config)
    except DamagedFileError as error:
        if row is None and row_groups is None:
            yield SkippedRecord(path, None, NOT_PARQUET, str(error))
        else:
            yield SkippedRecord(path, (row or 0) + 1, DAMAGED, str(error))


def _read_json(
    path: str, label: str, config: CorpusConfig, *, may_be_array: bool
) -> Iterator[Document | SkippedRecord]:
    number = 0
    try:
        for number, line in enumerate(read_lines(path), start=1):
            if not line or line.isspace():
                continue
            if may_be_array and line.lstrip().startswith(b"["):
                yield from _read_array(path, label, config)
                return
            may_be_array = False
            yield _json_record(line, path, label, number, config)
    except DamagedFileError as error:
        yield SkippedRecord(path, number + 1, DAMAGED, str(error))


def _json_record(line: bytes, path: str, label: str, number: int, config: CorpusConfig) -> Document | SkippedRecord:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return SkippedRecord(path, number, INVALID_UTF8, f"byte 0x{line[error.start]:02x}")
    except (ValueError, RecursionError) as error:
        return SkippedRecord(path, number, MALFORMED_LINE, f"not JSON ({error}); each line must be one JSON object")
    return _record(value, path, label, number, config)


def _read_array(path: str, label: str, config: CorpusConfig) -> Iterator[Document | SkippedRecord]:
    """A .json file that is one array of records."""
    content = bytearray()
    for block in read_blocks(path):
        content += block
        if len(content) > MAX_ARRAY_BYTES:
            detail = f"a JSON array of more than {MAX_ARRAY_BYTES:,} bytes; write one record per line (.jsonl)"
            yield SkippedRecord(path, None, MALFORMED_LINE, detail)
            return
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        yield SkippedRecord(path, line, INVALID_UTF8, f"byte 0x{error.object[error.start]:02x}")
    except json.JSONDecodeError as error:
        yield SkippedRecord(path, error.lineno, MALFORMED_LINE, f"not a JSON array ({error.msg})")
    except (ValueError, RecursionError) as error:
        yield SkippedRecord(path, None, MALFORMED_LINE, f"not a JSON array ({error})")
    else:
        for number, value in enumerate(values, start=1):
            yield _record(value, path, label, number, config)


def _record(value: Any, path: str, label: str, number: int, config: CorpusConfig) -> Document | SkippedRecord:
    """A row or JSON value as a document."""
    if not isinstance(value, dict):
        return SkippedRecord(path, number, MALFORMED_LINE, f"a JSON {type(value).__name__}, not an object")
    if config.text_column not in value:
        return SkippedRecord(path, number, MISSING_COLUMN, _missing(config.text_column, value))
    text = value[config.text_column]
    if text is not None and not isinstance(text, str):
        detail = f"{config.text_column!r} holds a value of type {type(text).__name__}, not a string"
        return SkippedRecord(path, number, MALFORMED_TEXT, detail)
    document_id = _name(value.get(config.id_column or "id"))
    if document_id is None and config.id_column is not None:
        return SkippedRecord(path, number, MISSING_COLUMN, _missing(config.id_column, value))
    document_id = document_id or f"{label}#{number}"
    return _document(document_id, _name(value.get(config.title_column)) or document_id, path, number, text or "")


def _document(document_id: str, title: str, source: str, line: int | None, text: str) -> Document | SkippedRecord:
    if not text or text.isspace():
        return SkippedRecord(source, line, EMPTY, "" if line else document_id)
    for what, string in (("text", text), ("id", document_id), ("title", title)):
        try:
            string.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell what UTF-8 cannot hold
            code = ord(string[error.start])
            return SkippedRecord(source, line, MALFORMED_TEXT, f"lone surrogate U+{code:04X} in the {what}")
    return Document(document_id, title, source, text)


def _name(value: Any) -> str | None:
    """An id or title as text; None where there is none."""
    if isinstance(value, str):
        return value.strip() or None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _missing(column: str, value: dict[str, Any]) -> str:
    # A key may hold a lone surrogate, and a report of skipped records must be writable.
    keys = [str(key).encode("utf-8", "backslashreplace").decode("utf-8") for key in value]
    more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
    return f"no value for {column!r}; the keys are: {', '.join(keys[:KEYS_SHOWN])}{more}"
