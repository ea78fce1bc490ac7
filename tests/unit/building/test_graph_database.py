"""A database whose segments are graphs: built, edited and compacted; small segments among them have none."""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retro_ray.building import build, compact
from retro_ray.building.build import DatabaseBuilder
from retro_ray.building.edit import DatabaseEditor
from retro_ray.building.index_choice import IndexAims, IndexChoice, choose_search
from retro_ray.config import CorpusConfig, DatabaseConfig, RetrievalConfig
from retro_ray.database.store import Database
from retro_ray.database.summary import describe
from retro_ray.errors import DatabaseError
from retro_ray.index import graph as graph_module
from retro_ray.index import tune
from retro_ray.index.graph import bytes_per_row
from retro_ray.index.spec import IndexSpec
from retro_ray.retrieval.answering import ServedShard
from retro_ray.retrieval.local import LocalRetriever
from tests.unit.building.editing import NUM_NEIGHBOURS, HashEmbedder, document, write_database
from tests.unit.building.partitions import write_partition

DIM = 64
SPEC = IndexSpec(factory="SymphonyQG32")
MIN_ROWS = 150


@pytest.fixture(autouse=True)
def graphs_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "MIN_ROWS", MIN_ROWS)
    monkeypatch.setattr(graph_module, "_EXACT_FROM", 4)
    monkeypatch.setattr(HashEmbedder, "dim", DIM)
    monkeypatch.setattr(compact, "is_searched_exactly", lambda *_: False)
    monkeypatch.setattr(build, "is_searched_exactly", lambda *_: False)
    monkeypatch.setattr(tune, "families", lambda num_chunks, dim: [SPEC.factory])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Two shards with a graph each, as compacting leaves them."""
    documents = [document(f"d{number}", f"d{number} " + "alpha beta gamma " * 3) for number in range(160)]
    write_database(
        tmp_path, documents, validation=[document(f"v{number}") for number in range(6)], bytes_per_chunk=1000
    )
    DatabaseEditor(tmp_path, embedder=HashEmbedder()).compact()
    return tmp_path


@pytest.fixture
def editor(home: Path) -> DatabaseEditor:
    return DatabaseEditor(home, embedder=HashEmbedder())


def with_graph(home: Path) -> list[bool]:
    """Of every segment, whether it has one; and no file of FAISS's is there."""
    manifest = Database.open(home).manifest
    assert manifest.index.is_graph
    assert manifest.codec is None
    assert not any(path.endswith(".faiss") for path in manifest.files)
    return [segment.index(manifest.index) in manifest.files for segment in manifest.segments]


def check_search(home: Path, retriever: LocalRetriever) -> None:
    """Nothing deleted is found, all that lives can be, and most of what is nearest is."""
    database = Database.open(home)
    database.check_files(*database.manifest.files)
    keys = np.full((database.manifest.next_chunk_id, DIM), np.inf, np.float32)
    for store in database.segments:
        keys[store.chunk_id_base : store.chunk_id_base + store.num_chunks] = store.keys
    keys[database.is_deleted(np.arange(len(keys)))] = np.inf
    live = np.flatnonzero(np.isfinite(keys[:, 0]))
    queries = keys[live[::17]]
    distances, ids = retriever.search_ids(queries, 10)
    np.testing.assert_array_equal(distances[:, 0], 0)
    assert np.isin(ids, live).all()
    assert all(len(set(row)) == 10 for row in ids)
    np.testing.assert_allclose(distances, ((keys[ids] - queries[:, None]) ** 2).sum(-1), rtol=1e-4, atol=1e-4)
    exact = np.sort(((queries[:, None] - keys[live]) ** 2).sum(-1), axis=1)[:, :10]
    assert (distances <= exact[:, -1:] * (1 + 1e-5)).mean() > 0.8
    _, everything = retriever.search_ids(queries[:2], len(live) + 5)
    assert [sorted(row[row >= 0]) for row in everything] == [live.tolist()] * 2
    for store in database.segments:
        neighbours = store.neighbours.gather("chunk_ids", np.arange(store.num_chunks))
        assert neighbours.shape == (store.num_chunks, NUM_NEIGHBOURS)


def test_edits_and_compaction(home: Path, editor: DatabaseEditor) -> None:
    retriever = LocalRetriever.open(Database.open(home))  # goes on through all edits
    assert with_graph(home) == [True, True]
    assert Database.open(home).manifest.index.nprobe >= 1
    check_search(home, retriever)
    editor.add([document("small", "kappa " * 20)])
    assert with_graph(home) == [True, True, False], "few chunks are compared as they are"
    check_search(home, retriever)
    editor.add([document(f"large {number}", f"large {number} sigma tau " * 4) for number in range(80)])
    assert with_graph(home) == [True, True, True], "merged with the small one, in a graph of its own"
    check_search(home, retriever)
    editor.delete([f"d{number}" for number in range(0, 160, 2)])
    check_search(home, retriever)
    before = set(Database.open(home).manifest.files)
    editor.compact(3)
    assert with_graph(home) == [True, True, True]
    assert not before & {path for path in Database.open(home).manifest.files if path.endswith(".symqg")}
    check_search(home, retriever)
    sizes = describe(home, Database.open(home).manifest)["size_bytes"]
    num_chunks = Database.open(home).manifest.num_chunks
    assert sizes["index"] == pytest.approx(num_chunks * bytes_per_row(SPEC, DIM), rel=0.1)


def test_left_on_the_disk_it_answers_the_same(home: Path) -> None:
    database = Database.open(home)
    in_memory, mapped = (LocalRetriever.open(database, RetrievalConfig(mmap=mmap)) for mmap in (False, True))
    queries = np.concatenate([store.keys[::9] for store in database.segments])
    for found, expected in zip(mapped.search_ids(queries, 7), in_memory.search_ids(queries, 7), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_damaged_graph_is_named(home: Path) -> None:
    database = Database.open(home)
    path = database.directory / database.manifest.segments[1].index(SPEC)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DatabaseError, match=r"shard-00001/graph.symqg has SHA-256"):
        LocalRetriever.open(database)
    path.write_bytes(content[:-1])
    with pytest.raises(DatabaseError, match=r"shard-00001/graph.symqg has .* bytes"):
        ServedShard(database.directory, mmap=True)


# Building. ------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a build runs as Ray tasks is done here."""

    def run_tasks(task: Callable, arguments: Iterable[tuple], *_: Any) -> Iterator[Any]:
        return (task(*one) for one in arguments)

    monkeypatch.setattr(build, "run_tasks", run_tasks)
    monkeypatch.setattr(build.ray, "remote", lambda function: function)


@pytest.mark.usefixtures("in_this_process")
def test_a_build_goes_on_with_the_graphs_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two of the same keys are the same: what is finished stays, and the rest is built."""
    keys = np.random.default_rng(0).standard_normal((1000, DIM)).astype(np.float32)
    builder = DatabaseBuilder(tmp_path, CorpusConfig(), DatabaseConfig(target_recall=0.8, bytes_per_chunk=1000))
    builder._build_id, builder._key_dim = "built", DIM
    directory = tmp_path / "database"
    sizes = np.cumsum([0, 400, 100, 500])
    shards = tuple(
        write_partition(directory, f"s{number}", int(start), keys[start:stop])
        for number, (start, stop) in enumerate(pairwise(sizes))
    )
    (directory / "built" / "work").mkdir(parents=True)
    choice = builder._build_indexes(shards, None)
    assert choice.spec.factory == SPEC.factory
    assert best_reached(choice) >= 0.8
    paths = [directory / shard.index(choice.spec) for shard in shards]
    assert [path.exists() for path in paths] == [True, False, True]
    assert not list(directory.rglob("*.faiss"))
    kept = paths[0].read_bytes()
    paths[2].unlink()
    (directory / "built" / "work" / "index.json").unlink()
    again = builder._build_indexes(shards, None)
    assert paths[0].read_bytes() == kept
    assert paths[2].exists()
    assert best_reached(again) >= 0.8


def best_reached(choice: IndexChoice) -> float:
    return [point.recall for point in choice.curve if point.nprobe == choice.spec.nprobe][-1]


def test_choosing_the_search_of_segments_with_and_without_graphs(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).standard_normal((700, DIM)).astype(np.float32)
    segments = [write_partition(tmp_path, "a", 0, keys[:600]), write_partition(tmp_path, "b", 600, keys[600:])]
    for segment in segments:
        wrote = build.index_segment(SPEC, None, tmp_path / segment.keys, tmp_path / segment.index(SPEC))
        assert wrote == (segment.name == "a")
    choice = choose_search(
        tmp_path, segments, None, IndexAims(0.8, None, 0), tmp_path / "codec.faiss", IndexChoice(SPEC)
    )
    assert choice.spec.refine_factor == 1
    assert best_reached(choice) >= 0.8
    expected = 600 * bytes_per_row(SPEC, DIM) / 700
    assert choice.curve[0].bytes_per_chunk == pytest.approx(expected, rel=0.02)
