"""Small databases whose keys are made of their chunks' texts, to be edited and compared with what was put in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retro_ray.building.add_segment import embed_segment, write_documents
from retro_ray.database.format import MANIFEST_NAME, Manifest, database_directory, file_record, write_manifest
from retro_ray.database.split import document_hash
from retro_ray.database.store import ChunkStore, Database
from retro_ray.index.spec import IndexSpec
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.retrieval.neighbours import write_neighbours
from retro_ray.text.corpus import Document
from retro_ray.text.tokenizer import train_tokenizer
from tests.fakes import WORDS, tiny_texts

CHUNK_LENGTH = 8
NUM_NEIGHBOURS = 3
NAMES = [f"d{number}" for number in range(8)]


class HashEmbedder:
    """Keys drawn from a hash of the text: equal texts have equal keys, others almost surely not."""

    fingerprint = "hash"
    dim = 8

    def __init__(self) -> None:
        self.num_texts = 0

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.num_texts += len(texts)
        keys = [np.random.default_rng(document_hash(text)).standard_normal(self.dim) for text in texts]
        return np.array(keys, np.float32).reshape(-1, self.dim)


def document(name: str, text: str | None = None) -> Document:
    """A document; its text, if not given, is drawn from its name."""
    if text is None:
        rng = np.random.default_rng(document_hash(name))
        text = " ".join(rng.choice(WORDS, size=int(rng.integers(1, 40))))
    return Document(id=name, title=f"Title of {name}", source="made.txt", text=text)


def write_database(
    home: Path,
    documents: Sequence[Document],
    *,
    num_shards: int = 2,
    validation: Sequence[Document] = (),
    bytes_per_chunk: int | None = None,
) -> Database:
    """A database of these documents as a build leaves it, made without Ray; exact index, `bytes_per_chunk` for a later
    one.
    """
    directory = database_directory(home)
    build = directory / "built"
    tokenizer = train_tokenizer(tiny_texts(40, seed=0), 300, "train:300")
    tokenizer.save(build / "tokenizer")
    embedder, partitions, base = HashEmbedder(), [], 0
    for shard in range(num_shards + 1):
        is_validation = shard == num_shards
        name = "validation" if is_validation else f"shard-{shard:05d}"
        chosen = validation if is_validation else documents[shard::num_shards]
        writer = write_documents(build / name, chosen, tokenizer, CHUNK_LENGTH)
        partition = writer.partition(name, -1 if is_validation else base, -1 if is_validation else shard)
        partition = dataclasses.replace(partition, neighbours_generation=1)
        embed_segment(directory, partition, CHUNK_LENGTH, tokenizer, embedder)
        base += 0 if is_validation else writer.num_chunks
        partitions.append(partition)
    files = [path for path in build.rglob("*") if path.is_file()]
    manifest = Manifest(
        build="built",
        chunk_length=CHUNK_LENGTH,
        tokenizer_name=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        embedder_name="hash",
        embedder_fingerprint=HashEmbedder.fingerprint,
        key_dim=HashEmbedder.dim,
        index=IndexSpec(factory="Flat"),
        num_neighbours=NUM_NEIGHBOURS,
        num_shards=num_shards,
        segments=tuple(partitions[:-1]),
        validation=partitions[-1] if validation else None,
        generation=1,
        built_generation=1,
        next_chunk_id=base,
        settings={"database": {"bytes_per_chunk": bytes_per_chunk}},
        files={str(path.relative_to(directory)): file_record(path) for path in files},
    )
    return _with_neighbours(Database(directory, manifest))


def _with_neighbours(database: Database) -> Database:
    """The database, committed with the neighbours of all its chunks."""
    files = dict(database.manifest.files)
    retriever = LocalRetriever.open(database, pinned=True)
    for partition in [*database.manifest.segments, *([database.manifest.validation] if database.validation else [])]:
        store = ChunkStore(database.directory, partition, CHUNK_LENGTH)
        path = database.directory / partition.neighbours
        write_neighbours(store, retriever, NUM_NEIGHBOURS, path)
        files[partition.neighbours] = file_record(path)
    manifest = Manifest(**{**vars(database.manifest), "files": files})
    write_manifest(database.directory, manifest)
    return Database(database.directory, manifest)


def live_ids(home: Path) -> list[str]:
    """Ids of the documents that the database has, in its order."""
    database = Database.open(home)
    return [
        store.document_ref(row).id
        for store in database.segments
        for row in range(store.num_documents)
        if not database.is_deleted(np.array(store.chunk_id_base + store.document_first_row[row]))
    ]


def text_of(home: Path, name: str) -> str:
    database = Database.open(home)
    place = database.find_document(name)
    assert place is not None
    store, row = place
    rows = np.arange(*store.document_rows(row))
    tokens = [t for chunk, n in zip(store.tokens(rows), store.lengths(rows), strict=True) for t in chunk[:n]]
    return database.tokenizer.decode(tokens)


def files_of(home: Path) -> dict[str, int]:
    """Files of the database but for the manifest and the lock, with their inodes."""
    directory = database_directory(home)
    return {
        str(path.relative_to(directory)): path.stat().st_ino
        for path in directory.rglob("*")
        if path.is_file() and path.name not in (MANIFEST_NAME, ".lock")
    }


def assert_nothing_changed(home: Path, before: tuple[Database, dict[str, int]]) -> None:
    assert Database.open(home).manifest == before[0].manifest
    assert files_of(home) == before[1]


def live_ids_of(database: Database) -> list[str]:
    return [store.document_ref(row).id for store in database.segments for row in range(store.num_documents)]
