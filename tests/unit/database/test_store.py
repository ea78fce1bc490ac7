"""Rule 2: a neighbour is the chunk and the next chunk of the same document, never another's text."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_ray.database.format import Partition
from retro_ray.database.store import ChunkStore, Database
from retro_ray.errors import DatabaseError
from tests.fakes import write_tiny_database
from tests.unit.database.stores import M, write_store


def naive_neighbours(document_tokens: list[list[int]], rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of [N, F], token by token from the documents."""
    place = [(d, start) for d, tokens in enumerate(document_tokens) for start in range(0, len(tokens), M)]
    tokens, mask = np.zeros((len(rows), 2 * M), np.int64), np.zeros((len(rows), 2 * M), bool)
    for i, row in enumerate(rows):
        if row < 0:
            continue
        document, start = place[row]
        for offset, token in enumerate(document_tokens[document][start : start + 2 * M]):
            tokens[i, offset], mask[i, offset] = token, True
    return tokens, mask


documents_strategy = st.lists(st.lists(st.integers(1, 98), min_size=1, max_size=14), min_size=1, max_size=8)


@settings(max_examples=60)
@given(documents=documents_strategy, data=st.data())
def test_neighbour_tokens_equal_a_naive_loop(documents: list[list[int]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder), documents)
        rows = data.draw(st.lists(st.integers(-1, store.num_chunks - 1), max_size=12))
        tokens, mask = store.neighbour_tokens(np.array(rows, np.int64))
        expected_tokens, expected_mask = naive_neighbours(documents, rows)
        np.testing.assert_array_equal(tokens, expected_tokens)
        np.testing.assert_array_equal(mask, expected_mask)
        assert (tokens.dtype, mask.dtype) == (np.int64, bool)


def test_what_a_store_says_of_its_rows(tmp_path: Path) -> None:
    store = write_store(tmp_path, [[1, 2, 3, 4, 5], [6], [7, 8, 9, 10]])
    rows = np.array([3, 0, 1])
    assert store.tokens(rows)[:2].tolist() == [[7, 8, 9, 10], [1, 2, 3, 4]]
    assert store.lengths(rows).tolist() == [4, 4, 1]
    assert store.num_bytes(rows).tolist() == [8, 8, 2]
    assert store.document_of(rows).tolist() == [2, 0, 0]
    assert [store.document_rows(document) for document in range(3)] == [(0, 2), (2, 3), (3, 4)]
    assert (store.document_ref(1).id, store.document_ref(1).source) == ("id 1", "source 1")
    assert store.document_num_bytes.tolist() == [10, 2, 8]


def test_a_store_that_is_not_what_the_manifest_says(tmp_path: Path) -> None:
    store = write_store(tmp_path, [[1, 2, 3, 4, 5]])
    wrong = Partition(**{**vars(store.partition), "num_chunks": 3})
    with pytest.raises(DatabaseError, match=r"has 2 chunks, the manifest says 3"):
        ChunkStore(tmp_path, wrong, M)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_neighbours_across_shards(tmp_path: Path, num_shards: int) -> None:
    database = write_tiny_database(tmp_path, num_shards=num_shards)
    ends = [shard.chunk_id_base + shard.num_chunks for shard in database.segments]
    borders = [-1, 0, *(end - 1 for end in ends), *ends[:-1]]
    chunk_ids = np.array([borders, list(np.random.default_rng(0).integers(-1, ends[-1], len(borders)))])
    tokens, mask = database.neighbour_tokens(chunk_ids)
    assert tokens.shape == mask.shape == (*chunk_ids.shape, 2 * database.chunk_length)
    for place in np.ndindex(chunk_ids.shape):
        chunk_id = int(chunk_ids[place])
        if chunk_id < 0:
            assert not mask[place].any()
            assert not tokens[place].any()
            continue
        shard = next(s for s in database.segments if s.chunk_id_base <= chunk_id < s.chunk_id_base + s.num_chunks)
        expected = shard.neighbour_tokens(np.array([chunk_id - shard.chunk_id_base]))
        np.testing.assert_array_equal(tokens[place], expected[0][0])
        np.testing.assert_array_equal(mask[place], expected[1][0])


def test_a_shard_ends_its_last_document(tmp_path: Path) -> None:
    """The first chunk of the next shard has the next chunk_id, and is no continuation."""
    database = write_tiny_database(tmp_path, num_shards=2)
    last = database.segments[1].chunk_id_base - 1
    _, mask = database.neighbour_tokens(np.array([last]))
    assert not mask[0, database.chunk_length :].any()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    database = write_tiny_database(tmp_path)
    shard = database.manifest.segments[0]
    database.check_files(*database.manifest.files)
    path = database.directory / shard.documents
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DatabaseError, match=rf"{path} has SHA-256"):
        database.check_files(shard.chunks, shard.documents)
    (database.directory / shard.chunks).unlink()
    with pytest.raises(DatabaseError, match=r"chunks\.arrow is missing"):
        database.check_files(shard.chunks, shard.documents)


def test_the_error_of_a_home_without_database(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match=r"build one with jobs/index\.py"):
        Database.open(tmp_path)
