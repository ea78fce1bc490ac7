"""A database in figures, for people and for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retro_ray.database.format import Manifest, database_directory


def describe_build(home: Path, manifest: Manifest, seconds: float) -> dict[str, Any]:
    """What a build made, and how long each stage took."""
    description = describe(home, manifest)
    description["skipped_records"] = manifest.skipped
    description["stage_seconds"] = manifest.stage_seconds
    description["seconds"] = round(seconds, 1)
    return description


def describe(home: Path, manifest: Manifest) -> dict[str, Any]:
    """Documents, chunks, tokens, shards, index, sizes in bytes and fingerprints of a database.

    What is deleted is counted apart; in the shards and on the disk it still takes its place.
    """
    sizes = {
        kind: sum(record.size_bytes for path, record in manifest.files.items() if path.endswith(name))
        for kind, name in (
            ("chunks", "chunks.arrow"),
            ("documents", "documents.arrow"),
            ("ids", "ids.npy"),
            ("keys", "keys.npy"),
            ("index", manifest.index.file_name),
            ("neighbours", "neighbours.arrow"),
        )
    }
    validation = manifest.validation
    return {
        "home": str(home),
        "directory": str(database_directory(home)),
        "version": manifest.version,
        "created": manifest.created,
        "documents": manifest.num_live_documents,
        "chunks": manifest.num_live_chunks,
        "tokens": sum(segment.num_tokens for segment in manifest.segments) - manifest.num_deleted_tokens,
        "text_bytes": sum(segment.num_bytes for segment in manifest.segments) - manifest.num_deleted_bytes,
        "validation_documents": validation.num_documents if validation else 0,
        "validation_chunks": validation.num_chunks if validation else 0,
        "validation_text_bytes": validation.num_bytes if validation else 0,
        "deleted_documents": manifest.num_deleted_documents,
        "deleted_chunks": manifest.num_deleted_chunks,
        "generation": manifest.generation,
        "edits_since_built": manifest.num_edits,
        "segments": len(manifest.segments),
        "shards": manifest.num_shards,
        "shard_chunks": [
            sum(segment.num_chunks for segment in manifest.segments_of(shard)) for shard in range(manifest.num_shards)
        ],
        "index": manifest.index.factory,
        "neighbours_per_chunk": manifest.num_neighbours,
        "chunk_length": manifest.chunk_length,
        "vocab_size": manifest.vocab_size,
        "tokenizer": f"{manifest.tokenizer_name} ({manifest.tokenizer_fingerprint})",
        "embedder": f"{manifest.embedder_name} ({manifest.embedder_fingerprint})",
        "chunking": manifest.chunking_fingerprint,
        "size_bytes": sizes,
    }


def as_lines(description: dict[str, Any]) -> str:
    """A description for people: one name and value per line."""
    return "\n".join(f"{name:>20}  {_readable(value)}" for name, value in description.items())


def _readable(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_readable(inner)}" for name, inner in value.items()) or "none"
    return str(value)
