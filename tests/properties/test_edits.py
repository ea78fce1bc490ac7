"""Any sequence of edits against a plain dict of documents: every search and every reader agrees with the dict."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from retro_ray.building.edit import DatabaseEditor
from retro_ray.database.store import Database
from retro_ray.errors import DatabaseError, InputError
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.text.chunking import chunk_document, chunk_texts
from retro_ray.text.corpus import Document
from retro_ray.training.batches import TrainingBatches
from retro_ray.training.windows import ChunkTable, WindowReader, stored_neighbours
from tests.unit.building.editing import CHUNK_LENGTH, NUM_NEIGHBOURS, HashEmbedder, document, write_database

TEXTS = ["pi", "alpha beta gamma " * 6, "kappa " * 40, "pi rho sigma tau " * 5]
names = st.sampled_from([f"d{number}" for number in range(7)])
new_documents = st.dictionaries(names, st.sampled_from(TEXTS), min_size=1, max_size=3)

# One chunk of one document: its id, its place in it, its distance to a query.
Hit = tuple[float, str, int]


class Edits(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self._folder = Path(tempfile.mkdtemp())
        self._home = self._folder / "home"

    def teardown(self) -> None:
        shutil.rmtree(self._folder)

    @initialize(chosen=new_documents, num_shards=st.integers(1, 2))
    def build(self, chosen: dict[str, str], num_shards: int) -> None:
        self._documents = {name: document(name, text) for name, text in chosen.items()}
        database = write_database(
            self._home, list(self._documents.values()), num_shards=num_shards, validation=[document("v")]
        )
        self._tokenizer = database.tokenizer
        self._editor = DatabaseEditor(self._home, embedder=HashEmbedder())
        self._retriever = LocalRetriever.open(database)  # goes on through all edits
        self._generation = 1
        self._deleted_texts = 0

    @rule(chosen=new_documents)
    def add(self, chosen: dict[str, str]) -> None:
        new = {name: document(name, text) for name, text in chosen.items()}
        if self._documents.keys() & new.keys():
            with pytest.raises(InputError, match="already"):
                self._editor.add(new.values())
            return
        assert self._editor.add(new.values()).documents_added == len(new)
        self._documents |= new
        self._generation += 1

    @rule(chosen=new_documents)
    def update(self, chosen: dict[str, str]) -> None:
        new = {name: document(name, text) for name, text in chosen.items()}
        report = self._editor.update(new.values())
        same = [name for name, one in new.items() if self._documents.get(name) == one]
        assert report.documents_unchanged == len(same)
        assert report.documents_added == len(new) - len(same)
        assert report.documents_deleted == len(self._documents.keys() & new.keys()) - len(same)
        self._documents |= new
        self._generation += len(same) < len(new)

    @rule(chosen=st.sets(names, min_size=1, max_size=3))
    def delete(self, chosen: set[str]) -> None:
        if chosen - self._documents.keys():
            with pytest.raises(InputError, match="not in the database"):
                self._editor.delete(sorted(chosen))
            return
        assert self._editor.delete(chosen).documents_deleted == len(chosen)
        self._documents = {name: one for name, one in self._documents.items() if name not in chosen}
        self._generation += 1

    @rule(num_shards=st.integers(1, 3))
    def compact(self, num_shards: int) -> None:
        if not self._documents:
            with pytest.raises(DatabaseError, match="every document"):
                self._editor.compact(num_shards)
            return
        self._editor.compact(num_shards)
        self._generation += 1
        manifest = Database.open(self._home).manifest
        assert manifest.num_deleted_documents == 0
        assert manifest.num_documents == len(self._documents)

    @invariant()
    def the_manifest_counts_what_is_there(self) -> None:
        manifest = Database.open(self._home).manifest
        assert manifest.generation == self._generation
        assert manifest.num_live_documents == len(self._documents)
        assert manifest.num_live_chunks == len(self._all_chunks())
        ends = [segment.chunk_id_base + segment.num_chunks for segment in manifest.segments]
        assert all(
            base >= end for base, end in zip([s.chunk_id_base for s in manifest.segments[1:]], ends, strict=False)
        )
        assert manifest.next_chunk_id >= ends[-1]

    @invariant()
    def searches_find_what_a_fresh_database_would(self) -> None:
        """All chunks of all live documents, at their distances; and nothing else."""
        chunks = self._all_chunks()
        queries = np.stack([*[key for _, _, key in chunks[:2]], np.zeros(HashEmbedder.dim, np.float32)])
        found = self._retriever.search(queries, len(chunks) + 2)
        few = self._retriever.search(queries, 2)
        for row, query in enumerate(queries):
            expected = sorted((_distance(query, key), name, place) for name, place, key in chunks)
            hits = [hit for hit in self._hits(found, row) if hit is not None]
            assert [(name, place) for _, name, place in sorted(hits)] == [(name, place) for _, name, place in expected]
            np.testing.assert_allclose([distance for distance, _, _ in hits], [e[0] for e in expected], rtol=1e-5)
            np.testing.assert_array_equal(few.distances[row], found.distances[row, :2])

    @invariant()
    def stored_neighbours_and_training_know_no_deleted_chunk(self) -> None:
        database = Database.open(self._home)
        table = ChunkTable(database.segments, database.deleted)
        assert table.num_chunks == len(self._all_chunks())
        if not table.num_chunks:
            return
        neighbours = stored_neighbours(table, database, NUM_NEIGHBOURS)
        reader = WindowReader(table, database, neighbours=neighbours, end_target=self._tokenizer.eos_id)
        batches = TrainingBatches(reader, num_chunks=3, batch_size=1, seed=self._generation)
        epoch = np.concatenate([batches.global_chunks(step)[0] for step in range(batches.num_windows_per_epoch)])
        seen = epoch[epoch >= 0]
        assert len(seen) == len(set(seen.tolist())) == table.num_chunks
        texts = sorted(self._decoded(table.tokens(seen), table.lengths(seen)))
        expected = [text for one in self._documents.values() for text in self._chunk_texts(one)]
        assert texts == sorted(expected)
        assert neighbours is not None
        found = neighbours(seen)
        assert not database.is_deleted(found[found >= 0]).any()
        tokens, mask = database.neighbour_tokens(found)
        assert mask[..., 0].tolist() == (found >= 0).tolist()
        halves = [
            (tokens[..., start : start + CHUNK_LENGTH], mask[..., start : start + CHUNK_LENGTH]) for start in (0, 8)
        ]
        shown = {
            text for half, real in halves for text in self._decoded(half[real.any(-1)], real[real.any(-1)].sum(-1))
        }
        assert shown <= set(expected)

    @precondition(lambda self: self._documents)
    @rule()
    def compare_with_a_database_built_from_the_same_documents(self) -> None:
        """Distances and documents of every stored neighbour, after a compaction."""
        self.compact(2)
        fresh = write_database(self._folder / f"fresh {self._generation}", list(self._documents.values()))
        assert self._stored(Database.open(self._home)) == self._stored(fresh)

    # ------------------------------------------------------------------------------------------------------------

    def _stored(self, database: Database) -> dict[tuple[str, int], list[float]]:
        """Distances of the stored neighbours of every chunk."""
        found = {}
        for store in database.segments:
            distances = store.neighbours.column("distances")
            for document_row in range(store.num_documents):
                first, stop = store.document_rows(document_row)
                for row in range(first, stop):
                    found[store.document_ref(document_row).id, row - first] = distances[row].round(4).tolist()
        return found

    def _all_chunks(self) -> list[tuple[str, int, np.ndarray]]:
        """Document, place and key of every chunk that there should be."""
        return [
            (name, place, key)
            for name, one in self._documents.items()
            for place, key in enumerate(HashEmbedder().embed(self._chunk_texts(one)))
        ]

    def _chunk_texts(self, one: Document) -> list[str]:
        return chunk_texts(chunk_document(one, self._tokenizer, CHUNK_LENGTH), self._tokenizer)

    def _decoded(self, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
        return self._tokenizer.decode_batch([row[:n] for row, n in zip(tokens, lengths, strict=True)])

    def _hits(self, found, row: int) -> list[Hit | None]:
        """What a query found, with each chunk's place in its document told by its text."""
        hits: list[Hit | None] = []
        taken: set[tuple[str, int]] = set()
        for column, ref in enumerate(found.documents[row]):
            if ref is None:
                assert found.chunk_ids[row, column] == -1
                assert not found.mask[row, column].any()
                hits.append(None)
                continue
            tokens, mask = found.tokens[row, column], found.mask[row, column]
            [text, after] = [
                self._tokenizer.decode(tokens[start : start + CHUNK_LENGTH][mask[start : start + CHUNK_LENGTH]])
                for start in (0, CHUNK_LENGTH)
            ]
            texts = [*self._chunk_texts(self._documents[ref.id]), ""]
            places = [p for p in range(len(texts) - 1) if (texts[p], texts[p + 1]) == (text, after)]
            place = next(p for p in places if (ref.id, p) not in taken)
            taken.add((ref.id, place))
            hits.append((float(found.distances[row, column]), ref.id, place))
        return hits


def _distance(query: np.ndarray, key: np.ndarray) -> float:
    return float(((query - key).astype(np.float64) ** 2).sum())


TestEdits = Edits.TestCase
TestEdits.settings = settings(max_examples=6, stateful_step_count=8, deadline=None)
