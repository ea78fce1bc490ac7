"""Test doubles and small real artefacts that several test suites share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from retro_ray.building.segment_writer import SegmentWriter
from retro_ray.config import ModelConfig, RunConfig, TrainingConfig
from retro_ray.database.arrow_rows import fixed_size_lists, write_rows
from retro_ray.database.format import (
    Manifest,
    Partition,
    database_directory,
    file_record,
    neighbours_schema,
    token_type,
    write_manifest,
)
from retro_ray.database.store import Database
from retro_ray.index.keys import write_keys
from retro_ray.index.spec import IndexSpec
from retro_ray.text.tokenizer import TextTokenizer, train_tokenizer

KEY_DIM = 8
WORDS = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota"),
    *("kappa", "lambda", "mu", "nu", "xi", "omicron", "pi", "rho", "sigma"),
)


def tiny_texts(num_documents: int, seed: int, max_words: int = 120) -> list[str]:
    """ASCII documents of very different lengths, the first of them a single word.

    Each document repeats a few words of its own, so that a tiny model has something to learn.
    """
    rng = np.random.default_rng(seed)
    texts = []
    for document in range(num_documents):
        num_words = 1 if document == 0 else int(rng.integers(1, max_words))
        own = rng.choice(WORDS, size=4, replace=False)
        texts.append(" ".join(rng.choice(own, size=num_words)))
    return texts


def write_tiny_database(
    home: Path,
    *,
    num_documents: int = 24,
    num_validation_documents: int = 5,
    num_shards: int = 2,
    chunk_length: int = 8,
    num_neighbours: int = 4,
    vocab_size: int = 300,
    max_words: int = 120,
    seed: int = 0,
    tokenizer: TextTokenizer | None = None,
) -> Database:
    """A small valid database under `home`, written without Ray, FAISS or an embedder.

    Real text through a real tokenizer; random keys; random stored neighbours that keep the
    same-document rule, some of them missing (-1). There is no index file.
    """
    texts = tiny_texts(num_documents + num_validation_documents, seed, max_words)
    directory = database_directory(home)
    build = directory / "tiny"
    tokenizer = tokenizer or train_tokenizer(texts, vocab_size, f"train:{vocab_size}")
    build.mkdir(parents=True)
    tokenizer.save(build / "tokenizer")
    rng = np.random.default_rng(seed)
    parts = [(f"shard-{i:05d}", texts[i:num_documents:num_shards]) for i in range(num_shards)]
    chunked = [_chunk(tokenizer, documents, chunk_length) for _, documents in parts]
    bases = np.concatenate([[0], np.cumsum([len(chunks["length"]) for chunks in chunked])])
    shards = [
        _write_partition(build, name, documents, chunks, int(base), tokenizer, chunk_length)
        for (name, documents), chunks, base in zip(parts, chunked, bases, strict=False)
    ]
    validation_texts = texts[num_documents:]
    validation_chunks = _chunk(tokenizer, validation_texts, chunk_length)
    validation = _write_partition(build, "validation", validation_texts, validation_chunks, -1, tokenizer, chunk_length)
    owner = np.concatenate([chunks["document"] + 1000 * i for i, chunks in enumerate(chunked)])
    for i, chunks in enumerate(chunked):
        _write_neighbours(build / f"shard-{i:05d}", chunks["document"] + 1000 * i, owner, num_neighbours, rng)
    _write_neighbours(build / "validation", np.full(len(validation_chunks["length"]), -1), owner, num_neighbours, rng)
    files = {str(path.relative_to(directory)): file_record(path) for path in sorted(build.rglob("*")) if path.is_file()}
    manifest = Manifest(
        build="tiny",
        chunk_length=chunk_length,
        tokenizer_name=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        embedder_name="none",
        embedder_fingerprint="none",
        key_dim=KEY_DIM,
        index=IndexSpec(factory="Flat"),
        num_neighbours=num_neighbours,
        num_shards=len(shards),
        segments=tuple(shards),
        next_chunk_id=sum(shard.num_chunks for shard in shards),
        validation=validation if num_validation_documents else None,
        files=files,
    )
    write_manifest(directory, manifest)
    return Database.open(home)


def tiny_run_config(database: Database, **training: Any) -> RunConfig:
    """A model of some ten thousand weights for a tiny database, with settings of its training replaced."""
    model = ModelConfig(
        vocab_size=database.manifest.vocab_size,
        chunk_length=database.chunk_length,
        num_chunks=4,
        hidden_dim=16,
        num_layers=2,
        num_heads=2,
        head_dim=8,
        ffn_dim=32,
        cca_layers=(2,),
        encoder_dim=16,
        encoder_layers=1,
        encoder_heads=2,
        encoder_ffn_dim=32,
        encoder_ca_layers=(1,),
        share_encoder_embedding=True,
        cca_start="copy",
        pointer=True,
    )
    settings = {
        "num_steps": 12,
        "batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 1e-2,
        "num_warmup_steps": 2,
        "retrieval_dropout": 0.2,
        "precision": "fp32",
        "checkpoint_every": 4,
        "evaluate_every": 6,
        "num_evaluation_chunks": 30,
    }
    return RunConfig(recipe="test", model=model, training=TrainingConfig(**{**settings, **training}))


def _chunk(tokenizer: TextTokenizer, texts: list[str], chunk_length: int) -> dict[str, np.ndarray]:
    rows, lengths, sizes, owners = [], [], [], []
    for document, text in enumerate(texts):
        tokens = [tokenizer.bos_id, *tokenizer.encode(text)]
        for start in range(0, len(tokens), chunk_length):
            real = tokens[start : start + chunk_length]
            rows.append(real + [0] * (chunk_length - len(real)))
            lengths.append(len(real))
            sizes.append(len(tokenizer.decode([t for t in real if t != tokenizer.bos_id]).encode()))
            owners.append(document)
    return {
        "tokens": np.array(rows, np.int64).reshape(-1, chunk_length),
        "length": np.array(lengths, np.int64),
        "num_bytes": np.array(sizes, np.int64),
        "document": np.array(owners, np.int64),
    }


def _write_partition(
    build: Path,
    name: str,
    texts: list[str],
    chunks: dict[str, np.ndarray],
    base: int,
    tokenizer: TextTokenizer,
    chunk_length: int,
) -> Partition:
    folder = build / name
    per_document = np.bincount(chunks["document"], minlength=len(texts))
    documents = {
        "id": [f"{name}/{i}" for i in range(len(texts))],
        "title": [f"Document {i} of {name}" for i in range(len(texts))],
        "source": [f"{name}.txt"] * len(texts),
        "num_chunks": per_document,
        "num_bytes": [len(text.encode()) for text in texts],
    }
    columns = {
        "tokens": fixed_size_lists(chunks["tokens"], token_type(tokenizer.vocab_size)),
        "length": pa.array(chunks["length"]),
        "num_bytes": pa.array(chunks["num_bytes"]),
    }
    with SegmentWriter(folder, chunk_length, tokenizer.vocab_size) as writer:
        writer.add(pa.table(documents), [pa.table(columns)])
    keys = np.random.default_rng(abs(base)).standard_normal((writer.num_chunks, KEY_DIM)).astype(np.float32)
    write_keys(folder / "keys.npy", [keys], *keys.shape)
    return writer.partition(name, base, -1 if base < 0 else int(name.removeprefix("shard-")))


def _write_neighbours(
    folder: Path, own: np.ndarray, owner: np.ndarray, num_neighbours: int, rng: np.random.Generator
) -> None:
    """`own` [n]: the document of each row; `owner` [num_chunks]: the document of each chunk_id."""
    chunk_ids = np.full((len(own), num_neighbours), -1, np.int64)
    for row, document in enumerate(own):
        allowed = np.flatnonzero(owner != document)
        count = min(int(rng.integers(num_neighbours // 2, num_neighbours + 1)), len(allowed))
        found = rng.choice(allowed, size=count, replace=False) if count else allowed[:0]
        chunk_ids[row, : len(found)] = found
    distances = np.sort(rng.random((len(own), num_neighbours)).astype(np.float32), axis=1)
    distances[chunk_ids < 0] = np.inf
    table = pa.table(
        {
            "chunk_ids": fixed_size_lists(chunk_ids, pa.int64()),
            "distances": fixed_size_lists(distances, pa.float32()),
        }
    )
    write_rows(folder / "neighbours.arrow", neighbours_schema(num_neighbours), [table])
