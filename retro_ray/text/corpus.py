"""What a corpus is: documents, records that could not be read, and the units of work in which it is read.

`plan_units` expands the input once, on the driver; `readers.read_unit` reads one unit, anywhere.
"""

from __future__ import annotations

import dataclasses
import logging
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from retro_ray.config import CorpusConfig
from retro_ray.errors import InputError
from retro_ray.text import parquet_files, python_docs
from retro_ray.text.byte_stream import DamagedFileError

UNIT_BYTES = 64 * 1024**2
FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "text",
    ".text": "text",
    ".rst": "text",
    ".md": "text",
    ".markdown": "text",
}
COMPRESSIONS = (".gz", ".zst")
READABLE = "Parquet, JSON lines (.jsonl, .json), .txt, .md and .rst, the latter also as .gz and .zst"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """One text, and what to call it."""

    id: str
    """Unique in a database."""
    title: str
    source: str
    """File or URL that it was read from."""
    text: str
    """Not empty, and without lone surrogates: UTF-8 can hold it."""


@dataclass(frozen=True)
class SkippedRecord:
    """A record that could not be read: where it stands, and why."""

    source: str
    line: int | None
    """Line, row or item, counted from 1; None for a whole file."""
    category: str
    """One of a few fixed phrases, for counting: "malformed line", "invalid UTF-8", ..."""
    detail: str

    @property
    def reason(self) -> str:
        return f"{self.category}: {self.detail}" if self.detail else self.category


@dataclass(frozen=True)
class ReadUnit:
    """A slice of the input that one task reads."""

    index: int
    """Place in the plan, from 0."""
    files: tuple[str, ...]
    """Absolute paths and URLs; for `python-docs`, modules."""
    format: str
    """`parquet`, `jsonl`, `json`, `text` or `python-docs`."""
    row_groups: tuple[int, int] | None
    """First row group and the one after the last, of the one Parquet file; None: everything."""
    size_bytes: int
    labels: tuple[str, ...] = ()
    """Short names of the files, from which ids are made: they start at the input folder, so that they
    are the same on another machine."""

    def to_dict(self) -> dict[str, Any]:
        """The unit as JSON holds it."""
        content = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in content.items()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> ReadUnit:
        """The unit that `to_dict` (through JSON) came from."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
        }
        return cls(**values)


@dataclass(frozen=True)
class _InputFile:
    """A file of the input, or some row groups of it."""

    path: str
    label: str
    format: str
    size_bytes: int
    row_groups: tuple[int, int] | None = None


def file_format(path: str) -> str | None:
    """The format that a file's name stands for, or None."""
    stem, extension = posixpath.splitext(path.lower())
    if extension in COMPRESSIONS:
        inner = FORMATS.get(posixpath.splitext(stem)[1])
        return None if inner == "parquet" else inner
    return FORMATS.get(extension)


def plan_units(config: CorpusConfig, unit_bytes: int = UNIT_BYTES) -> list[ReadUnit]:
    """Divide the input into units of about `unit_bytes`, in an order that depends on nothing but the input.

    Large Parquet files are divided by row groups, small files are grouped. A file that is given twice
    is read once.

    Raises:
        InputError: an input does not exist, or holds nothing readable; a Parquet file lacks the text
            or the id column; a file is not Parquet, and `on_error` is "fail".
    """
    if not config.input:
        raise InputError("--input is empty: name files, folders or globs, or python-docs")
    units: list[ReadUnit] = []
    files: dict[str, _InputFile] = {}
    for given in config.input:
        if given == python_docs.NAME:
            continue
        for file in _expand(given):
            files.setdefault(file.path, file)
    by_format = sorted(_with_unique_labels(files.values()), key=lambda file: file.format)
    for group in _grouped(_row_group_slices(by_format, config, unit_bytes), unit_bytes):
        units.append(
            ReadUnit(
                index=len(units),
                files=tuple(file.path for file in group),
                format=group[0].format,
                row_groups=group[0].row_groups,
                size_bytes=sum(file.size_bytes for file in group),
                labels=tuple(file.label for file in group),
            )
        )
    if python_docs.NAME in config.input:
        for modules, size_bytes in python_docs.plan_groups(unit_bytes):
            units.append(ReadUnit(len(units), modules, python_docs.NAME, None, size_bytes))
    return units


def _expand(given: str) -> Iterator[_InputFile]:
    """The readable files of one input, sorted by path."""
    if not given:
        raise InputError("--input holds an empty name: name files, folders or globs, or python-docs")
    try:
        fs, path = url_to_fs(given)
        found, root = _list(fs, path)
    except InputError:
        raise
    except Exception as error:  # every kind of storage has its own errors: no such protocol, no credentials, ...
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot list --input {given} ({cause}): check the address and the credentials") from error
    if found is None:
        what = "matches nothing" if fsspec.core.has_magic(given) else "does not exist"
        raise InputError(f"--input {given} {what}: check the path")
    is_file = len(found) == 1 and root == path and path in found
    readable = {name: size for name, size in found.items() if file_format(name)}
    if not readable:
        what = "is of no known kind" if is_file else "holds no file that can be read"
        raise InputError(f"--input {given} {what}: give {READABLE}")
    if len(readable) < len(found):
        logger.warning("%s: %d of %d files are of no known kind", given, len(found) - len(readable), len(found))
    is_local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
    for name in sorted(readable):
        if not _is_utf8(name):
            raise InputError(f"the name of file {name!a} is not UTF-8: rename it, its name is part of ids")
        label = posixpath.basename(name) if is_file else _label(name, root, given)
        full = name if is_local else fs.unstrip_protocol(name)
        yield _InputFile(full, label, file_format(name) or "", readable[name])


def _list(fs: fsspec.AbstractFileSystem, path: str) -> tuple[dict[str, int] | None, str]:
    """(size of each file, or None if there is nothing at `path`; the folder or file that was given)."""
    if fs.isfile(path):  # before globs: a file's name may hold brackets
        return {path: int(fs.info(path)["size"])}, path
    if fs.isdir(path):
        return _list_folder(fs, path), path
    if not fsspec.core.has_magic(path):
        return None, path
    matches: dict[str, Any] = fs.glob(path, detail=True)  # pyright: ignore[reportAssignmentType]
    found: dict[str, int] = {}
    for name, info in matches.items():
        if info["type"] == "directory":
            found |= _list_folder(fs, name)
        else:
            found[name] = int(info["size"])
    fixed = path.split("/")
    root = "/".join(fixed[: next(at for at, part in enumerate(fixed) if fsspec.core.has_magic(part))])
    return found or None, root


def _list_folder(fs: fsspec.AbstractFileSystem, folder: str) -> dict[str, int]:
    """Files under a folder; hidden ones (.git, .cache) are no part of a corpus."""
    found: dict[str, Any] = fs.find(folder, detail=True)  # pyright: ignore[reportAssignmentType]
    inside = len(folder.rstrip("/"))
    return {
        name: int(info["size"])
        for name, info in found.items()
        if not any(part.startswith(".") for part in name[inside:].split("/"))
    }


def _label(path: str, root: str, given: str) -> str:
    """`docs/a/b.md` for /home/me/docs/a/b.md of input /home/me/docs or docs/**/*.md."""
    relative = posixpath.relpath(path, root) if root else path
    named = [part for part in given.split("/") if part and not fsspec.core.has_magic(part)]
    folder = posixpath.basename(root)
    # A folder given as "." or by a bare glob has a name only on this machine.
    return f"{folder}/{relative}" if folder and folder in named else relative


def _is_utf8(name: str) -> bool:
    """Whether a file's name is text; Python spells other bytes of a name as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _with_unique_labels(files: Iterable[_InputFile]) -> list[_InputFile]:
    """Two files of one label (from two folders of one name) take their whole paths as labels."""
    files = list(files)
    count = Counter(file.label for file in files)
    return [dataclasses.replace(file, label=file.path) if count[file.label] > 1 else file for file in files]


def _row_group_slices(files: list[_InputFile], config: CorpusConfig, unit_bytes: int) -> Iterator[_InputFile]:
    """The files in order, large Parquet files divided by row groups; every Parquet schema is checked."""
    parquet = [file for file in files if file.format == "parquet"]
    with ThreadPoolExecutor(16) as pool:  # one small request per file, which far storage answers slowly
        footers = dict(zip(parquet, pool.map(lambda file: _footer(file, config), parquet), strict=True))
    for file in files:
        footer = footers.get(file)
        if footer is None or file.size_bytes <= unit_bytes:
            yield file
            continue
        first, size = 0, 0
        for group in range(footer.num_row_groups):
            size += footer.row_group(group).total_byte_size
            if size >= unit_bytes or group + 1 == footer.num_row_groups:
                yield dataclasses.replace(file, row_groups=(first, group + 1), size_bytes=size)
                first, size = group + 1, 0


def _footer(file: _InputFile, config: CorpusConfig) -> Any:
    """Parquet metadata, or None for a file that is not Parquet (and is skipped when it is read)."""
    try:
        return parquet_files.checked_metadata(file.path, config)
    except DamagedFileError as error:
        if config.on_error == "fail":
            raise InputError(
                f"{file.path} is not a Parquet file ({error}): remove it, or pass --on-error skip"
            ) from error
        return None
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"cannot open {file.path} ({error}): restore it or its permissions") from error


def _grouped(files: Iterable[_InputFile], unit_bytes: int) -> Iterator[list[_InputFile]]:
    """Neighbouring files of one format, together up to `unit_bytes`; a slice of a file stays alone."""
    group: list[_InputFile] = []
    size = 0
    for file in files:
        fits = group and size + file.size_bytes <= unit_bytes
        alike = group and group[0].format == file.format and not (group[0].row_groups or file.row_groups)
        if group and not (fits and alike):
            yield group
            group, size = [], 0
        group.append(file)
        size += file.size_bytes
    if group:
        yield group
