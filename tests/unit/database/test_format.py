"""The manifest: what it says survives the disk, damage to it is noticed, and its version names the contents."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_ray.database.format import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    Partition,
    file_problem,
    file_record,
    read_manifest,
    token_type,
    write_json_atomically,
    write_manifest,
)
from retro_ray.errors import DatabaseError
from retro_ray.index.spec import IndexSpec


def partition(name: str, base: int) -> Partition:
    return Partition(
        name=name,
        chunk_id_base=base,
        num_documents=3,
        num_chunks=10,
        num_tokens=600,
        num_bytes=2400,
        folder=f"b1/{name}",
    )


def manifest(**changes: Any) -> Manifest:
    files = {
        f"b1/{name}/{file}": FileRecord(sha256=f"{number:064x}", size_bytes=100 + number)
        for number, (name, file) in enumerate(
            (name, file)
            for name in ("shard-00000", "shard-00001", "validation")
            for file in ("chunks.arrow", "index.faiss", "neighbours.arrow")
        )
    }
    whole = Manifest(
        build="b1",
        chunk_length=64,
        tokenizer_name="train:300",
        tokenizer_fingerprint="t" * 16,
        vocab_size=300,
        embedder_name="all-MiniLM-L6-v2",
        embedder_fingerprint="e" * 16,
        key_dim=384,
        index=IndexSpec(factory="IVF64,PQ192x4fs,Refine(SQ8)", nprobe=16, refine_factor=10),
        num_neighbours=4,
        num_shards=2,
        segments=(partition("shard-00000", 0), partition("shard-00001", 10)),
        validation=partition("validation", -1),
        files=files,
        settings={"corpus": {"input": ["python-docs"]}},
        skipped={"malformed line": 2},
        stage_seconds={"plan": 1.5},
        created="2026-01-01T00:00:00+00:00",
    )
    return dataclasses.replace(whole, **changes)


@pytest.mark.parametrize("changes", [{}, {"validation": None}, {"files": {}, "skipped": {}}])
def test_a_manifest_survives_the_disk(tmp_path: Path, changes: dict[str, Any]) -> None:
    written = manifest(**changes)
    write_manifest(tmp_path, written)
    assert read_manifest(tmp_path) == written
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


def renamed_build(whole: Manifest, build: str) -> Manifest:
    """The same contents in another folder."""

    def moved(part: Partition) -> Partition:
        return dataclasses.replace(part, folder=part.folder.replace("b1/", f"{build}/"))

    return dataclasses.replace(
        whole,
        build=build,
        segments=tuple(moved(shard) for shard in whole.segments),
        validation=None if whole.validation is None else moved(whole.validation),
        files={path.replace("b1/", f"{build}/"): record for path, record in whole.files.items()},
    )


def with_file(whole: Manifest, name: str, record: FileRecord) -> Manifest:
    return dataclasses.replace(whole, files={**whole.files, name: record})


def test_equal_contents_have_equal_versions() -> None:
    whole = manifest()
    same = [
        renamed_build(whole, "another"),
        manifest(created="2027-02-03T00:00:00+00:00"),
        manifest(stage_seconds={}),
        manifest(settings={"corpus": {"input": ["./the/same/otherwise/spelt"]}}),
    ]
    assert {other.version for other in same} == {whole.version}


def test_the_stored_neighbours_are_not_in_the_version() -> None:
    whole = manifest()
    changed = with_file(whole, "b1/shard-00001/neighbours.arrow", FileRecord(sha256="f" * 64, size_bytes=1))
    without = dataclasses.replace(
        whole, files={path: record for path, record in whole.files.items() if "neighbours" not in path}
    )
    assert changed.version == without.version == whole.version


def test_other_contents_have_other_versions() -> None:
    whole = manifest()
    others = [
        with_file(whole, "b1/shard-00001/chunks.arrow", FileRecord(sha256="f" * 64, size_bytes=104)),
        with_file(whole, "b1/shard-00001/index.faiss", FileRecord(sha256="f" * 64, size_bytes=104)),
        manifest(chunk_length=32),
        manifest(tokenizer_fingerprint="u" * 16),
        manifest(embedder_fingerprint="u" * 16),
        manifest(index=IndexSpec(factory="Flat")),
        manifest(num_neighbours=5),
        manifest(validation=None),
        manifest(segments=whole.segments[:1]),
    ]
    assert len({whole.version, *(other.version for other in others)}) == 1 + len(others)


def one_line_error(directory: Path) -> str:
    with pytest.raises(DatabaseError) as caught:
        read_manifest(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert str(directory) in message
    return message


def test_no_manifest(tmp_path: Path) -> None:
    assert "jobs/index.py" in one_line_error(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 200, -1, -2])
def test_a_cut_manifest(tmp_path: Path, size: int) -> None:
    write_manifest(tmp_path, manifest())
    path = tmp_path / MANIFEST_NAME
    whole = path.read_bytes().rstrip()
    path.write_bytes(whole[:size])
    assert "damaged" in one_line_error(tmp_path)


@pytest.mark.parametrize("content", ["[]", "5", '"text"', "null", "{}", '{"format_version": 2}'])
def test_json_that_is_no_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(content)
    assert "damaged" in one_line_error(tmp_path)


def test_another_format_version(tmp_path: Path) -> None:
    path = tmp_path / MANIFEST_NAME
    write_manifest(tmp_path, manifest())
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": FORMAT_VERSION + 1}))
    assert f"format version {FORMAT_VERSION + 1}" in one_line_error(tmp_path)


@pytest.mark.parametrize("field", ["files", "shards", "index", "validation", "skipped"])
@pytest.mark.parametrize("value", [5, "text", [1], {"a": 1}, {"a": {}}])
def test_a_field_of_another_shape(tmp_path: Path, field: str, value: Any) -> None:
    path = tmp_path / MANIFEST_NAME
    write_manifest(tmp_path, manifest())
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    assert "damaged" in one_line_error(tmp_path)


@given(position=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed_or_harmless(tmp_path_factory, position: int, bit: int) -> None:
    directory = tmp_path_factory.getbasetemp() / "flipped"
    directory.mkdir(exist_ok=True)
    whole = manifest()
    write_manifest(directory, whole)
    path = directory / MANIFEST_NAME
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << bit
    path.write_bytes(bytes(content))
    message = ""
    try:
        read = read_manifest(directory)
    except DatabaseError as error:
        message = str(error)
    else:
        assert read.version == whole.version
        assert read.segments == tuple(
            dataclasses.replace(
                shard,
                folder=other.folder,
                neighbours_generation=other.neighbours_generation,
                neighbours_folder=other.neighbours_folder,
            )
            for shard, other in zip(whole.segments, read.segments, strict=True)
        )
    assert "\n" not in message


def test_replacing_json_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_json_atomically(path, {"old": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json_atomically(path, {"new": 2})
    with pytest.raises(TypeError):
        write_json_atomically(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    record = file_record(path)
    assert file_problem(path, record) is None
    path.write_bytes(b"c0ntent")
    assert "SHA-256" in (file_problem(path, record) or "")
    path.write_bytes(b"content and more")
    assert "16 bytes" in (file_problem(path, record) or "")
    path.unlink()
    assert file_problem(path, record) == "is missing"


@pytest.mark.parametrize(
    ("vocab_size", "kind"), [(2, pa.uint16()), (1 << 16, pa.uint16()), ((1 << 16) + 1, pa.uint32())]
)
def test_token_ids_fit_their_type(vocab_size: int, kind: pa.DataType) -> None:
    assert token_type(vocab_size) == kind
