"""Databases of keys alone, made with the product's own parts: enough to be searched, without texts."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import ray

from benchmarks.chunks import read_documents
from benchmarks.embedders import EmbedderPool
from retro_ray.building.index_choice import IndexAims, IndexChoice, choose_search, is_searched_exactly, train_codec
from retro_ray.database.format import Manifest, Partition, file_record, fingerprint, write_manifest
from retro_ray.database.store import Database
from retro_ray.index.build import index_segment
from retro_ray.index.keys import read_keys, write_keys
from retro_ray.index.spec import IndexSpec
from retro_ray.ray_session import connect
from retro_ray.text.chunking import chunk_document, chunk_texts
from retro_ray.text.tokenizer import train_tokenizer

_VOCAB_SIZE = 16_384
_HELD_OUT_EVERY = 20
"""One document in so many is held out: its chunks are the queries."""
_TEXTS_PER_CALL = 16_384


def cached_keys(inputs: tuple[str, ...], home: Path | None, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and held-out queries, float32 [n, D] each: of a database, or of a corpus that is embedded once."""
    if home is not None:
        database = Database.open(home)
        if database.validation is None:
            raise SystemExit(f"the database of {home} has no validation split to take queries from")
        return np.concatenate([segment.keys for segment in database.segments]), np.array(database.validation.keys)
    folder = cache / fingerprint(list(inputs))
    if not (folder / "queries.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        keys, queries = _embed(inputs)
        np.save(folder / "keys.npy", keys)
        np.save(folder / "queries.npy", queries)  # last: the folder is complete
    return np.load(folder / "keys.npy"), np.load(folder / "queries.npy")


def _embed(inputs: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    documents = list(read_documents(inputs))
    tokenizer = train_tokenizer((document.text for document in documents), _VOCAB_SIZE, f"train:{_VOCAB_SIZE}")
    texts: tuple[list[str], list[str]] = ([], [])
    for number, document in enumerate(documents):
        texts[number % _HELD_OUT_EVERY == 0].extend(chunk_texts(chunk_document(document, tokenizer, 64), tokenizer))
    connect()
    pool = EmbedderPool()
    found = []
    for some in texts:
        parts = []
        for start in range(0, len(some), _TEXTS_PER_CALL):
            parts.append(pool.embed(some[start : start + _TEXTS_PER_CALL]))
            print(f"embedded {start + len(parts[-1]):,} of {len(some):,} chunks", flush=True)
        found.append(np.concatenate(parts))
    pool.close()
    ray.shutdown()
    return found[0], found[1]


@dataclass
class KeyDatabase:
    """A database in a temporary folder."""

    folder: Path
    database: Database
    held_out: np.ndarray
    """float32 [n, D]: by which its index was chosen."""
    target_recall: float

    @classmethod
    def build(
        cls,
        keys: np.ndarray,
        held_out: np.ndarray,
        target_recall: float,
        num_shards: int,
        bytes_per_chunk: int | None = None,
    ) -> KeyDatabase:
        """Write keys, choose the index as a build does, fill it."""
        folder = Path(tempfile.mkdtemp(prefix="retro-ray-keys-"))
        directory = folder / "database"
        segments = _write_segments(directory, keys, num_shards)
        validation = _write_partition(directory, "validation", -1, -1, held_out)
        aims = IndexAims(target_recall, bytes_per_chunk, 0)
        codec = directory / "bench" / "codec.faiss"
        choice = IndexChoice(IndexSpec(factory="Flat"))
        if not is_searched_exactly(len(keys), keys.shape[1], target_recall):
            family = train_codec(directory, segments, validation, aims, codec)
            _fill(directory, segments, family.spec)
            choice = choose_search(directory, segments, validation, aims, codec, family)
        return cls(folder, _commit(directory, segments, choice, keys.shape[1]), held_out, target_recall)

    def divided(self, num_shards: int) -> KeyDatabase:
        """The same keys in another number of shards: under the same codec and search parameters, or as a graph whose
        parameter is chosen anew, as each segment's graph is its own.
        """
        folder = Path(tempfile.mkdtemp(prefix="retro-ray-keys-"))
        directory = folder / "database"
        manifest = self.database.manifest
        keys = np.concatenate([read_keys(self.database.directory / segment.keys) for segment in manifest.segments])
        segments = _write_segments(directory, keys, num_shards)
        codec = directory / "bench" / "codec.faiss"
        if manifest.codec is not None:
            shutil.copy(self.database.directory / manifest.codec, codec)
        _fill(directory, segments, manifest.index)
        choice = IndexChoice(manifest.index, manifest.index_curve)
        if manifest.index.is_graph:
            validation = _write_partition(directory, "validation", -1, -1, self.held_out)
            aims = IndexAims(self.target_recall, None, 0)  # of which the search needs the first
            choice = choose_search(directory, segments, validation, aims, codec, choice)
        database = _commit(directory, segments, choice, keys.shape[1])
        return KeyDatabase(folder, database, self.held_out, self.target_recall)

    @property
    def index_bytes_per_chunk(self) -> float:
        """Bytes that the indexes take per chunk; those of the keys, where they are searched exactly."""
        manifest = self.database.manifest
        if manifest.index.is_exact:
            return 4.0 * manifest.key_dim
        indexes = [segment.index(manifest.index) for segment in manifest.segments]
        return sum(manifest.files[path].size_bytes for path in indexes if path in manifest.files) / manifest.num_chunks

    def __enter__(self) -> KeyDatabase:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder)


def _write_segments(directory: Path, keys: np.ndarray, num_shards: int) -> list[Partition]:
    bounds = np.linspace(0, len(keys), num_shards + 1).astype(int).tolist()
    return [
        _write_partition(directory, f"shard-{shard:05d}", shard, bounds[shard], keys[bounds[shard] : bounds[shard + 1]])
        for shard in range(num_shards)
    ]


def _write_partition(directory: Path, name: str, shard: int, base: int, keys: np.ndarray) -> Partition:
    folder = directory / "bench" / name
    folder.mkdir(parents=True)
    write_keys(folder / "keys.npy", [keys], *keys.shape)
    return Partition(
        name=name,
        shard=shard,
        chunk_id_base=base,
        num_documents=1,
        num_chunks=len(keys),
        num_tokens=64 * len(keys),
        num_bytes=0,
        folder=f"bench/{name}",
    )


def _fill(directory: Path, segments: list[Partition], spec: IndexSpec) -> None:
    codec = directory / "bench" / "codec.faiss" if spec.has_codec else None
    for segment in segments:
        index_segment(spec, codec, directory / segment.keys, directory / segment.index(spec))


def _commit(directory: Path, segments: list[Partition], choice: IndexChoice, key_dim: int) -> Database:
    codec = "bench/codec.faiss" if choice.spec.has_codec else None
    indexes = [segment.index(choice.spec) for segment in segments]
    paths = [segment.keys for segment in segments] + [path for path in indexes if (directory / path).exists()]
    if codec is not None:
        paths.append(codec)
    manifest = Manifest(
        build="bench",
        chunk_length=64,
        tokenizer_name="none",
        tokenizer_fingerprint="none",
        vocab_size=_VOCAB_SIZE,
        embedder_name="none",
        embedder_fingerprint="none",
        key_dim=key_dim,
        index=choice.spec,
        index_curve=choice.curve,
        num_neighbours=1,
        num_shards=len(segments),
        segments=tuple(segments),
        validation=None,
        next_chunk_id=sum(segment.num_chunks for segment in segments),
        codec=codec,
        files={path: file_record(directory / path) for path in paths},
        generation=1,
    )
    write_manifest(directory, dataclasses.replace(manifest, built_generation=1))
    return Database.open(directory.parent)
