"""The database that Ray builds equals one made without Ray, step by plain step; and what goes wrong says so."""

import dataclasses
import json
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jobs.index import IndexJob, explain, main
from retro_ray.building.build import DatabaseBuilder
from retro_ray.building.edit import DatabaseEditor
from retro_ray.command_line import parse, run
from retro_ray.database.format import Manifest, file_problem, read_manifest
from retro_ray.database.store import ChunkStore, Database
from retro_ray.embedding import ChunkEmbedder
from retro_ray.errors import DatabaseError
from retro_ray.text.tokenizer import train_tokenizer
from tests.integration.small_corpus import BAD_RECORDS, CONFIG, Built, M

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def stores_of(database: Database) -> list[ChunkStore]:
    assert database.validation is not None
    return [*database.segments, database.validation]


# The reference. -----------------------------------------------------------------------------------------------


def reference_chunks(text: str, database: Database) -> list[list[int]]:
    tokens = [database.tokenizer.bos_id, *database.tokenizer.encode(text).tolist()]
    return [tokens[start : start + M] for start in range(0, len(tokens), M)]


def test_the_tokenizer_is_trained_on_all_documents(built: Built) -> None:
    trained = train_tokenizer([document.text for document in built.documents], 400, "train:400")
    assert built.database.tokenizer.fingerprint == trained.fingerprint == built.manifest.tokenizer_fingerprint


def test_every_document_is_in_one_partition_in_reading_order(built: Built) -> None:
    order = {document.id: place for place, document in enumerate(built.documents)}
    seen = []
    for store in stores_of(built.database):
        refs = [store.document_ref(number) for number in range(store.num_documents)]
        places = [order[ref.id] for ref in refs]
        assert places == sorted(places)
        for ref, place in zip(refs, places, strict=True):
            assert (ref.title, ref.source) == (built.documents[place].title, built.documents[place].source)
        seen += places
    assert sorted(seen) == list(range(len(built.documents)))
    assert len(built.manifest.segments) == 3
    assert 0 < built.database.validation.num_documents < 20  # type: ignore[union-attr]


def test_chunks_equal_the_reference(built: Built) -> None:
    text_of = {document.id: document.text for document in built.documents}
    database = built.database
    next_chunk_id = 0
    for store in stores_of(database):
        row = 0
        if store is not database.validation:
            assert store.chunk_id_base == next_chunk_id
            next_chunk_id += store.num_chunks
        for number in range(store.num_documents):
            text = text_of[store.document_ref(number).id]
            chunks = reference_chunks(text, database)
            rows = np.arange(row, row + len(chunks))
            assert store.document_rows(number) == (row, row + len(chunks))
            padded = [chunk + [0] * (M - len(chunk)) for chunk in chunks]
            np.testing.assert_array_equal(store.tokens(rows), padded)
            np.testing.assert_array_equal(store.lengths(rows), [len(chunk) for chunk in chunks])
            assert store.num_bytes(rows).sum() == len(text.encode()) == store.document_num_bytes[number]
            row += len(chunks)
        assert row == store.num_chunks
    assert next_chunk_id == built.manifest.num_chunks


def test_keys_equal_the_reference(built: Built) -> None:
    embedder = ChunkEmbedder(bf16=False, device="cpu")
    assert embedder.fingerprint == built.manifest.embedder_fingerprint
    for store in stores_of(built.database):
        rows = np.arange(store.num_chunks)
        chunks = [tokens[:length] for tokens, length in zip(store.tokens(rows), store.lengths(rows), strict=True)]
        expected = embedder.embed([built.database.tokenizer.decode(chunk) for chunk in chunks])
        keys = store.keys
        cosine = (keys * expected).sum(1) / np.linalg.norm(keys, axis=1) / np.linalg.norm(expected, axis=1)
        assert cosine.min() > 0.999  # bf16 where the machine has it
        np.testing.assert_allclose(np.linalg.norm(keys, axis=1), np.linalg.norm(expected, axis=1), rtol=0.01)


def test_neighbours_equal_brute_force(built: Built) -> None:
    """Over the stored keys, in float64: nearest first, ties by chunk_id, none of the own document."""
    database = built.database
    keys = np.concatenate([store.keys for store in database.segments])
    owner = np.concatenate(
        [store.document_of(np.arange(store.num_chunks)) + 1000 * shard for shard, store in enumerate(database.segments)]
    )
    for shard, store in enumerate(stores_of(database)):
        queries = store.keys
        own = store.document_of(np.arange(store.num_chunks)) + 1000 * shard
        for row in range(store.num_chunks):
            difference = keys - queries[row]
            squares = (difference.astype(np.float64) ** 2).sum(1).astype(np.float32)
            allowed = np.arange(len(keys)) if store is database.validation else np.flatnonzero(owner != own[row])
            expected = allowed[np.lexsort((allowed, squares[allowed]))][: CONFIG.num_neighbours]
            np.testing.assert_array_equal(store.neighbours.gather("chunk_ids", np.array([row]))[0], expected)
            found = store.neighbours.gather("distances", np.array([row]))[0]
            np.testing.assert_allclose(found, squares[expected], rtol=1e-6)


def test_what_was_skipped_is_reported(built: Built) -> None:
    assert built.manifest.skipped == {category: 1 for _, _, category in BAD_RECORDS}
    lines = (built.home / "database" / built.manifest.build / "skipped.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {(Path(r["source"]).name, r["line"], r["category"]) for r in records} == set(BAD_RECORDS)


def test_the_folder_holds_what_the_manifest_lists_and_no_work(built: Built) -> None:
    directory = built.home / "database"
    present = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert present == {*built.manifest.files, "manifest.json", ".lock", f"{built.manifest.build}/skipped.jsonl"}
    for path, record in built.manifest.files.items():
        assert file_problem(directory / path, record) is None


# Again, changed, at once, damaged. ----------------------------------------------------------------------------


def stamps(home: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file() and path.name != ".lock"}


def test_again_there_is_nothing_to_do(built: Built) -> None:
    before = stamps(built.home)
    assert DatabaseBuilder(built.home, built.corpus, CONFIG).run() == built.manifest
    assert stamps(built.home) == before


@pytest.mark.usefixtures("one_cpu")
def test_a_changed_setting_makes_a_new_version_and_the_old_one_stays_readable(built: Built, tmp_path: Path) -> None:
    home = built.copy(tmp_path / "home")
    old = Database.open(home)
    changed = dataclasses.replace(CONFIG, num_neighbours=4, num_shards=1, validation_share=0.0)

    class Watched(DatabaseBuilder):
        def _commit(self, *arguments) -> Manifest:
            assert Database.open(home).manifest == built.manifest
            return super()._commit(*arguments)

    manifest = Watched(home, built.corpus, changed).run()
    new = Database.open(home)
    assert new.manifest == manifest
    assert manifest.version != built.manifest.version
    assert (len(new.segments), new.validation) == (1, None)
    assert new.manifest.num_documents == len(built.documents)
    # A service that was started with the old version goes on, until the build after this one.
    old.check_files(*old.manifest.files)
    assert len(old.segments[2].tokens(np.arange(3))) == 3


def test_what_a_killed_commit_left_is_cleared_away(built: Built, tmp_path: Path) -> None:
    """Once the manifest is there the database is whole; the run that wrote it may have come no further."""
    home = built.copy(tmp_path / "home")
    build = home / "database" / built.manifest.build
    before = stamps(home)
    (build / "work" / "pages").mkdir(parents=True)
    (build / "shard-00000" / "partition.json").write_text("{}")
    (home / "database" / "manifest.json.tmp-1").write_text("{")
    assert DatabaseBuilder(home, built.corpus, CONFIG).run() == built.manifest
    assert stamps(home) == before
    assert not (build / "work").exists()


@pytest.mark.usefixtures("one_cpu")
def test_a_damaged_database_is_built_again(built: Built, tmp_path: Path) -> None:
    home = built.copy(tmp_path / "home")
    path = home / "database" / built.manifest.segments[1].keys
    content = bytearray(path.read_bytes())
    content[-5] ^= 16
    path.write_bytes(bytes(content))
    manifest = DatabaseBuilder(home, built.corpus, CONFIG).run()
    assert (manifest.version, manifest.files) == (built.manifest.version, built.manifest.files)
    Database.open(home).check_files(*manifest.files)


@pytest.mark.usefixtures("one_cpu")
def test_a_build_does_not_discard_edits_unless_it_is_told_to(
    built: Built, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = built.copy(tmp_path / "home")
    editor = DatabaseEditor(home)
    editor.delete([built.database.segments[0].document_ref(0).id])
    editor.compact()
    edited = Database.open(home).manifest
    with caplog.at_level(logging.INFO):
        assert DatabaseBuilder(home, built.corpus, CONFIG).run() == edited
    assert "2 edits, which --discard-edits undoes" in caplog.text
    with pytest.raises(DatabaseError, match=r"was edited 2 times .* --discard-edits"):
        DatabaseBuilder(home, built.corpus, dataclasses.replace(CONFIG, num_neighbours=4)).run()
    assert Database.open(home).manifest == edited
    Database.open(home).check_files(*edited.files)

    manifest = DatabaseBuilder(home, built.corpus, CONFIG, discard_edits=True).run()
    assert (manifest.version, manifest.files) == (built.manifest.version, built.manifest.files)
    assert (manifest.generation, manifest.num_edits) == (edited.generation + 1, 0)
    Database.open(home).check_files(*manifest.files)


@pytest.mark.usefixtures("one_cpu")
def test_a_damaged_edited_database_is_not_built_again_unasked(built: Built, tmp_path: Path) -> None:
    home = built.copy(tmp_path / "home")
    DatabaseEditor(home).delete([built.database.segments[0].document_ref(0).id])
    (home / "database" / built.manifest.segments[1].keys).write_bytes(b"damaged")
    before = stamps(home)
    with pytest.raises(DatabaseError, match=r"is damaged .*keys\.npy.* --discard-edits"):
        DatabaseBuilder(home, built.corpus, CONFIG).run()
    after = stamps(home)
    assert {path: stamp for path, stamp in after.items() if "/work/" not in str(path)} == before
    manifest = DatabaseBuilder(home, built.corpus, CONFIG, discard_edits=True).run()
    assert (manifest.version, manifest.files) == (built.manifest.version, built.manifest.files)


def test_of_two_builders_at_once_the_second_is_told(built: Built, tmp_path: Path) -> None:
    class First(DatabaseBuilder):
        def _plan(self) -> list:
            with pytest.raises(DatabaseError, match=r"being changed .building it, process") as caught:
                DatabaseBuilder(tmp_path, built.corpus, CONFIG).run()
            assert "\n" not in str(caught.value)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        First(tmp_path, built.corpus, CONFIG).run()


# The job, as its user sees it. --------------------------------------------------------------------------------


def run_job(*arguments: str) -> int:
    """The job's exit status, on this module's cluster."""
    try:
        parsed = parse(IndexJob, "jobs/index.py", list(arguments))
        run(lambda: main(parsed), lambda error: explain(error, parsed.home))
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that is not of the progress."""
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error" in line.lower()]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return lines[0]


BAD_INPUT = {
    "no documents": (["--input", "{in}/empty"], ["no documents", "{in}/empty"]),
    "missing path": (["--input", "{in}/nowhere"], ["{in}/nowhere", "does not exist"]),
    "unknown column": (["--input", "{in}/good.parquet", "--text-column", "body"], ["good.parquet", "body", "text"]),
    "unknown column in lines": (["--input", "{in}/good.jsonl", "--text-column", "body"], ["'body'", "--text-column"]),
    "doubled id": (
        ["--input", "{in}/good.jsonl", "{in}/twice.jsonl"],
        ["'a'", "good.jsonl", "twice.jsonl", "--id-column"],
    ),
    "malformed line": (["--input", "{in}/bad.jsonl", "--on-error", "fail"], ["bad.jsonl, line 2", "--on-error skip"]),
    "setting": (["--chunk-length", "1"], ["--chunk-length is 1", "at least 2"]),
    "embedder": (["--input", "{in}/good.jsonl", "--embedder", "{in}"], ["--embedder {in}", "all-MiniLM-L6-v2"]),
    "tokenizer": (["--input", "{in}/good.jsonl", "--tokenizer", "{in}/no-tokenizer"], ["{in}/no-tokenizer"]),
    "home": (["--input", "{in}/good.jsonl", "--home", "{in}/good.jsonl/home"], ["--home {in}/good.jsonl/home"]),
}


@pytest.fixture
def bad_input(tmp_path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.jsonl").write_text('{"id": "a", "text": "one text"}\n{"id": "b", "text": "another"}\n')
    (folder / "twice.jsonl").write_text('{"id": "c", "text": "a third"}\n{"id": "a", "text": "doubled"}\n')
    (folder / "bad.jsonl").write_text('{"id": "a", "text": "one text"}\n{"id": \n')
    (folder / "empty").mkdir()
    (folder / "empty" / "file.txt").write_text(" \n")
    pq.write_table(pa.table({"id": ["a"], "text": ["one text"]}), folder / "good.parquet")
    return folder


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line(
    name: str, bad_input: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRO_RAY_HOME", str(tmp_path / "home"))
    arguments, expected = BAD_INPUT[name]
    assert run_job(*(argument.replace("{in}", str(bad_input)) for argument in arguments)) == 1
    message = error_line(capsys)
    for part in expected:
        assert part.replace("{in}", str(bad_input)) in message
    with pytest.raises(DatabaseError, match="no retrieval database"):
        Database.open(tmp_path / "home")


@pytest.mark.usefixtures("one_cpu")
def test_a_corpus_smaller_than_its_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer documents than shards, fewer chunks than neighbours: fewer shards, and neighbours that are masked."""
    (tmp_path / "in.jsonl").write_text('{"id": "a", "text": "one text"}\n{"id": "b", "text": "another one"}\n')
    home = tmp_path / "home"
    arguments = ["--home", str(home), "--input", str(tmp_path / "in.jsonl"), "--tokenizer", "train:300", "--json"]
    assert run_job(*arguments, "--num-shards", "8", "--validation-share", "0") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["documents"], result["chunks"], result["skipped_records"]) == (2, 2, {})
    database = Database.open(home)
    assert len(database.segments) <= 2
    found = np.concatenate([store.neighbours.column("chunk_ids") for store in database.segments])
    assert found.tolist() == [[1, *[-1] * 9], [0, *[-1] * 9]]
    _, mask = database.neighbour_tokens(found)
    assert mask[:, 0].any()
    assert not mask[:, 1:].any()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # shard actors may still hold files of it


@pytest.mark.usefixtures("one_cpu")
@pytest.mark.parametrize("free_bytes", [1_000, 150_000, 900_000])
def test_a_full_disk_is_one_line_and_the_database_before_is_whole(
    built: Built, small_disk: Path, capsys: pytest.CaptureFixture[str], free_bytes: int
) -> None:
    """Full in the survey, among the pages, and among the files of the shards."""
    home = built.copy(small_disk / "home")
    room = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes(room.f_bavail * room.f_frsize - free_bytes))
    arguments = ["--home", str(home), "--input", *built.corpus.input, "--tokenizer", "train:300"]
    capsys.readouterr()
    assert run_job(*arguments) == 1
    message = error_line(capsys)
    assert "No space left" in message
    assert "--home" in message
    database = Database.open(home)
    assert database.manifest == built.manifest
    database.check_files(*database.manifest.files)
    if free_bytes == 900_000:  # With room again, it goes on.
        (small_disk / "ballast").unlink()
        assert run_job(*arguments) == 0
        assert read_manifest(home / "database").version != built.manifest.version
