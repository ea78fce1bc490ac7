"""Planning: which files, in which units, and one-line errors for what cannot be read."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retro_ray.config import CorpusConfig
from retro_ray.errors import InputError
from retro_ray.text import python_docs
from retro_ray.text.corpus import Document, ReadUnit, file_format, plan_units
from retro_ray.text.readers import read_unit


def config(*given: Path | str, **settings: object) -> CorpusConfig:
    return CorpusConfig(input=tuple(str(path) for path in given), **settings)  # type: ignore[arg-type]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def files_of(units: list[ReadUnit]) -> list[str]:
    return [path for unit in units for path in unit.files]


def ids_of(corpus: CorpusConfig) -> list[str]:
    records = [record for unit in plan_units(corpus) for record in read_unit(unit, corpus)]
    return [record.id for record in records if isinstance(record, Document)]


def test_folder_is_searched_deeply_in_a_fixed_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["b/z.txt", "a.md", "b/c/y.rst", "k.jsonl.gz", "l.json"]
    for name in [*names, "image.png", ".git/config.txt", "b/.hidden.md"]:
        write(tmp_path / name, "x")
    with caplog.at_level(logging.WARNING):
        units = plan_units(config(tmp_path))
    text = [str(tmp_path / name) for name in ("a.md", "b/c/y.rst", "b/z.txt")]
    assert [(unit.format, list(unit.files)) for unit in units] == [
        ("json", [str(tmp_path / "l.json")]),
        ("jsonl", [str(tmp_path / "k.jsonl.gz")]),
        ("text", text),
    ]
    assert [unit.index for unit in units] == [0, 1, 2]
    assert "1 of 6 files are of no known kind" in caplog.text
    assert plan_units(config(tmp_path)) == units


def test_glob_matches_files_and_folders_and_files_are_read_once(tmp_path: Path) -> None:
    for name in ("docs/a.txt", "docs/sub/b.txt", "docs/c.md"):
        write(tmp_path / name, "x")
    assert files_of(plan_units(config(tmp_path / "docs" / "*.txt"))) == [str(tmp_path / "docs/a.txt")]
    everything = config(tmp_path / "docs/*", tmp_path / "docs", tmp_path / "docs/c.md")
    assert files_of(plan_units(everything)) == [
        str(tmp_path / "docs" / name) for name in ("a.txt", "c.md", "sub/b.txt")
    ]


def test_file_whose_name_looks_like_a_glob_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a[1]*.txt", "brackets")
    corpus = config(path)
    assert files_of(plan_units(corpus)) == [str(path)]
    assert ids_of(corpus) == ["a[1]*.txt"]


def test_units_have_about_the_size_asked_for(tmp_path: Path) -> None:
    for number in range(10):
        write(tmp_path / f"{number}.txt", "x" * 100)
    write(tmp_path / "4large.txt", "x" * 1000)
    units = plan_units(config(tmp_path), unit_bytes=300)
    assert [len(unit.files) for unit in units] == [3, 2, 1, 3, 2]
    assert [unit.size_bytes for unit in units] == [300, 200, 1000, 300, 200]


def test_unit_survives_json(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["x" * 50] * 100, row_group_size=10)
    for unit in [*plan_units(config(tmp_path), unit_bytes=1000), *plan_units(CorpusConfig())[:2]]:
        assert ReadUnit.from_dict(json.loads(json.dumps(unit.to_dict()))) == unit


def write_parquet(path: Path, texts: list[str], row_group_size: int = 1000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), path, row_group_size=row_group_size, compression="none")
    return path


def test_large_parquet_file_is_divided_by_row_groups(tmp_path: Path) -> None:
    texts = [f"{number:04} " * 50 for number in range(100)]
    path = write_parquet(tmp_path / "a.parquet", texts, row_group_size=10)
    write_parquet(tmp_path / "b.parquet", ["small"])
    write_parquet(tmp_path / "c.parquet", ["small too"])
    corpus = config(tmp_path)
    units = plan_units(corpus, unit_bytes=7000)
    divided = [unit for unit in units if unit.row_groups]
    assert len(divided) > 2
    assert [unit.files for unit in divided] == [(str(path),)] * len(divided)
    borders = [unit.row_groups or (0, 0) for unit in divided]
    assert borders[0][0] == 0
    assert borders[-1][1] == 10
    assert [first for first, _ in borders[1:]] == [end for _, end in borders[:-1]]
    assert [unit.files for unit in units if not unit.row_groups] == [
        (str(tmp_path / "b.parquet"), str(tmp_path / "c.parquet"))
    ]
    in_parts = [record for unit in units for record in read_unit(unit, corpus)]
    whole = [record for unit in plan_units(corpus) for record in read_unit(unit, corpus)]
    assert in_parts == whole
    assert [record.text for record in in_parts if isinstance(record, Document)] == [*texts, "small", "small too"]


def test_ids_do_not_depend_on_where_the_input_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for place in ("here", "over/there"):
        folder = tmp_path / place / "docs"
        write(folder / "a.txt", "a")
        write(folder / "sub" / "b.jsonl", '{"text": "b"}\n\n{"text": "c"}\n')
        seen.append(ids_of(config(folder)))
        seen.append(ids_of(config(folder / "**" / "*.*")))
        monkeypatch.chdir(folder.parent)
        seen.append(ids_of(config("docs")))
        monkeypatch.chdir(folder)
        assert sorted(ids_of(config("."))) == ["a.txt", "sub/b.jsonl#1", "sub/b.jsonl#3"]
        assert ids_of(config("*.txt")) == ["a.txt"]
    assert seen == [["docs/sub/b.jsonl#1", "docs/sub/b.jsonl#3", "docs/a.txt"]] * 6


def test_folders_of_one_name_keep_their_ids_apart(tmp_path: Path) -> None:
    for version in ("v1", "v2"):
        write(tmp_path / version / "docs" / "a.txt", version)
    write(tmp_path / "v2" / "docs" / "b.txt", "only here")
    first, second = tmp_path / "v1/docs", tmp_path / "v2/docs"
    assert sorted(ids_of(config(first, second))) == sorted([f"{first}/a.txt", f"{second}/a.txt", "docs/b.txt"])


@pytest.mark.parametrize(
    ("arrange", "given", "message"),
    [
        (lambda folder: None, "missing.txt", r"--input .*missing.txt does not exist"),
        (lambda folder: None, "*.txt", r"--input .*\*.txt matches nothing"),
        (lambda folder: None, "", r"holds no file that can be read: give Parquet, JSON lines"),
        (lambda folder: write(folder / "a.pdf", "x"), "", r"holds no file that can be read: give Parquet"),
        (lambda folder: write(folder / "a.pdf", "x"), "*.pdf", r"\*.pdf holds no file that can be read"),
        (lambda folder: write(folder / "a.pdf", "x"), "a.pdf", r"a.pdf is of no known kind: give Parquet"),
        (lambda folder: write(folder / "a.parquet.gz", "x"), "a.parquet.gz", r"is of no known kind"),
        (lambda folder: write(folder / "a\udcff.txt", "x"), "", r"a\\udcff.txt' is not UTF-8: rename it"),
    ],
)
def test_input_that_cannot_be_read_is_one_line(
    tmp_path: Path, arrange: Callable[[Path], object], given: str, message: str
) -> None:
    arrange(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        plan_units(config(tmp_path / given))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "--input is empty"),
        (("",), "--input holds an empty name"),
        (("nosuch://bucket/a.txt",), r"cannot list --input nosuch://bucket/a.txt \(Protocol not known"),
    ],
)
def test_input_that_means_nothing_is_one_line(given: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_units(CorpusConfig(input=given))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_column": "body"}, r"has no column 'body' \(--text-column\); its columns are: text, number"),
        ({"id_column": "key"}, r"has no column 'key' \(--id-column\); its columns are: text, number"),
        ({"text_column": "number"}, r"column 'number' of .*a.parquet holds int64, not text: name another"),
    ],
)
def test_wrong_column_of_a_parquet_file_is_one_line(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    pq.write_table(pa.table({"text": ["x"], "number": [1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        plan_units(config(tmp_path, **settings))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all, whatever its name says", b"x" * 50 + b"PAR1"])
def test_file_that_is_not_parquet_ends_the_plan_only_if_asked(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "a.parquet", content)
    with pytest.raises(InputError, match=r"a.parquet is not a Parquet file .*--on-error skip") as caught:
        plan_units(config(tmp_path, on_error="fail"))
    assert "\n" not in str(caught.value)
    (record,) = read_unit(plan_units(config(path))[0], config(path))
    assert not isinstance(record, Document)
    assert (record.category, record.source, record.line) == ("not a Parquet file", str(path), None)


def test_any_fsspec_address_can_be_read() -> None:
    root = f"memory://{uuid.uuid4()}/docs"
    with fsspec.open(f"{root}/sub/a.jsonl.gz", "wt", compression="gzip") as file:
        file.write('{"text": "from memory"}\n')  # type: ignore[union-attr]
    with fsspec.open(f"{root}/b.md", "wt") as file:
        file.write("# Title\n")  # type: ignore[union-attr]
    for given in (root, f"{root}/**", f"{root}/sub/a.jsonl.gz"):
        corpus = config(given)
        units = plan_units(corpus)
        records = [record for unit in units for record in read_unit(unit, corpus)]
        assert all(path.startswith("memory://") for path in files_of(units))
        first = records[0]
        assert isinstance(first, Document)
        assert first.text == "from memory"
        assert first.source == files_of(units)[0]
        assert first.id.removeprefix("docs/sub/") == "a.jsonl.gz#1"
        assert len(records) == (1 if given.endswith("gz") else 2)


def test_python_docs_stand_beside_files(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "x")
    units = plan_units(config("python-docs", tmp_path))
    assert units[0].format == "text"
    assert {unit.format for unit in units[1:]} == {python_docs.NAME}
    assert [unit.index for unit in units] == list(range(len(units)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.PARQUET", "parquet"),
        ("a.jsonl", "jsonl"),
        ("a.jsonl.zst", "jsonl"),
        ("a.json.gz", "json"),
        ("a.md.gz", "text"),
        ("a.tar.gz", None),
        ("a.gz", None),
        ("jsonl", None),
    ],
)
def test_format_follows_from_the_name(name: str, expected: str | None) -> None:
    assert file_format(name) == expected
