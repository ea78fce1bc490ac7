"""What a retrieval database is on disk: Arrow schemas, the manifest, checksums.

    HOME/database/
      manifest.json              the database *is* what this lists; replaced last, atomically
      <build>/                   one folder per build, immutable once the manifest names it
        tokenizer/               tokenizer.json, tokenizer_meta.json
        codec.faiss              the trained, empty index that every segment's index was made from
        shard-00000/             chunks.arrow  documents.arrow  ids.npy  keys.npy  neighbours.arrow, and of what is
                                 searched index.faiss or graph.symqg; neither where all keys are compared
        validation/              chunks.arrow  documents.arrow  ids.npy  keys.npy  neighbours.arrow
        skipped.jsonl            what could not be read: file, line, reason
      edit-<generation>/         one folder per later edit: the segments it added, `deleted.arrow`

The database is a list of *segments*, immutable sets of documents: one per shard after a build, more
after additions. A shard is what one actor serves: the segments that name it. Deleted documents stay
in their segments, listed in `deleted.arrow`, until the database is compacted.

Rows of `chunks`, `keys` and `neighbours` of one partition (a segment, or the validation split) are
aligned: row i is one chunk. `chunk_id` of a segment's row is `chunk_id_base + row`; rows of one
document are consecutive; a build numbers its chunks from 0, and no edit after it gives a chunk_id a
second time. Chunks of the validation split have no chunk_id: they are in no database.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from retro_ray.config import RerankMethod
from retro_ray.errors import DatabaseError
from retro_ray.index.spec import IndexSpec, OperatingPoint

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
NEIGHBOURS_NAME = "neighbours.arrow"

DOCUMENTS_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "title": pa.string(),
        "source": pa.string(),
        "first_row": pa.int64(),
        "num_chunks": pa.int64(),
        "num_bytes": pa.int64(),  # UTF-8 bytes of the document's text
    }
)


def token_type(vocab_size: int) -> pa.DataType:
    """The smallest unsigned type that holds every token id."""
    return pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()


def chunks_schema(chunk_length: int, vocab_size: int) -> pa.Schema:
    """One row per chunk: its tokens padded to `chunk_length`, and what of them is real."""
    return pa.schema(
        {
            "tokens": pa.list_(token_type(vocab_size), chunk_length),
            "length": pa.uint16(),  # real tokens; the rest of the row is padding
            "num_bytes": pa.int32(),  # UTF-8 bytes of the text the real tokens stand for
            "document": pa.int32(),  # row in documents.arrow of the same partition
        }
    )


DELETED_SCHEMA = pa.schema(
    {
        "id": pa.string(),  # of the deleted document
        "first_chunk_id": pa.int64(),
        "last_chunk_id": pa.int64(),
    }
)


def neighbours_schema(num_neighbours: int) -> pa.Schema:
    """One row per chunk: its nearest neighbours, -1 and infinity where there is none."""
    return pa.schema(
        {
            "chunk_ids": pa.list_(pa.int64(), num_neighbours),
            "distances": pa.list_(pa.float32(), num_neighbours),
        }
    )


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of a database, as the manifest vouches for it."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A segment of the database, or the validation split. Paths are relative to HOME/database."""

    name: str
    """`shard-00000`, ... or `validation`; unique in a database."""
    shard: int = -1
    """The shard that serves it; -1 for the validation split."""
    chunk_id_base: int
    """chunk_id of row 0; -1 for the validation split."""
    num_documents: int
    num_chunks: int
    num_tokens: int
    """Real tokens, the document-start tokens included."""
    num_bytes: int
    """UTF-8 bytes of text."""
    folder: str
    """Folder of the partition's files."""
    neighbours_generation: int = 0
    """Generation of the database in which its stored neighbours were searched."""
    neighbours_folder: str | None = None
    """Folder of the stored neighbours, where they were searched again after the rest was written."""

    @property
    def chunks(self) -> str:
        return f"{self.folder}/chunks.arrow"

    @property
    def documents(self) -> str:
        return f"{self.folder}/documents.arrow"

    @property
    def ids(self) -> str:
        return f"{self.folder}/ids.npy"

    @property
    def keys(self) -> str:
        return f"{self.folder}/keys.npy"

    @property
    def neighbours(self) -> str:
        return f"{self.neighbours_folder or self.folder}/{NEIGHBOURS_NAME}"

    def index(self, spec: IndexSpec) -> str:
        """What is searched; a partition that is searched exactly does not have it."""
        return f"{self.folder}/{spec.file_name}"

    def paths(self, spec: IndexSpec) -> tuple[str, ...]:
        """All files that it may have."""
        return self.chunks, self.documents, self.ids, self.keys, self.index(spec), self.neighbours


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The one file that makes a folder a database."""

    format_version: int = FORMAT_VERSION
    build: str
    """Folder of this build under HOME/database."""
    chunk_length: int
    tokenizer_name: str
    tokenizer_fingerprint: str
    vocab_size: int
    embedder_name: str
    embedder_fingerprint: str
    key_dim: int
    index: IndexSpec
    index_curve: tuple[OperatingPoint, ...] = ()
    """What was measured to choose `index`; none for an exact one."""
    num_neighbours: int
    """Neighbours stored per chunk."""
    rerank: RerankMethod = "none"
    """How the stored neighbours were reordered, and those of a search are, unless told otherwise."""
    num_rerank_candidates: int = 50
    """Nearest chunks from which reranking chooses."""
    token_statistics: str | None = None
    """File that says in how many chunks each token occurs (token_statistics.py); reranking needs it."""
    num_shards: int
    segments: tuple[Partition, ...]
    """Ascending by chunk_id_base; which shard serves one is `segment.shard`."""
    validation: Partition | None
    generation: int = 0
    """Counts the commits of a home: every build and every edit has a higher one than the last."""
    built_generation: int = 0
    """Generation that its build was committed as; a higher `generation` is that of an edit since."""
    next_chunk_id: int = 0
    """chunk_id_base of the next segment; above every chunk_id ever given."""
    deleted: str | None = None
    """File that lists the deleted documents (DELETED_SCHEMA), if there are any."""
    num_deleted_documents: int = 0
    """Documents of the segments that are deleted; the next three are what they held."""
    num_deleted_chunks: int = 0
    num_deleted_tokens: int = 0
    num_deleted_bytes: int = 0
    codec: str | None = None
    """File of the trained, empty index from which added segments get theirs; None for an exact index and a graph."""
    files: dict[str, FileRecord]
    settings: dict[str, Any] = field(default_factory=dict)
    """What the builder was asked for: inputs, columns, split; for people, not for programs."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Records that were skipped, by reason."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    created: str = ""
    """UTC time of the commit, ISO 8601."""

    @property
    def version(self) -> str:
        """16 hex digits of what the database holds: equal contents, equal version.

        The stored neighbours are left out. They follow from the rest, and are found through shard
        actors that already bear the version's name.
        """
        content = self.to_dict()
        history = ("stage_seconds", "created", "build", "settings", "generation", "built_generation")
        for volatile in (*history, "index_curve", "codec", "deleted", "token_statistics"):
            content.pop(volatile)
        content["files"] = sorted(
            record["sha256"] for path, record in content["files"].items() if not path.endswith(NEIGHBOURS_NAME)
        )
        # Where a segment lies, and when its neighbours were searched, is not what it holds.
        placeless = {"folder": "", "neighbours_generation": 0, "neighbours_folder": None}
        content["segments"] = [{**segment, **placeless} for segment in content["segments"]]
        if content["validation"] is not None:
            content["validation"] = {**content["validation"], **placeless}
        return fingerprint(content)

    @property
    def num_chunks(self) -> int:
        """Of all segments, deleted documents' chunks among them."""
        return sum(segment.num_chunks for segment in self.segments)

    @property
    def num_documents(self) -> int:
        """Of all segments, deleted ones among them."""
        return sum(segment.num_documents for segment in self.segments)

    @property
    def num_edits(self) -> int:
        """Edits since the database was built."""
        return self.generation - self.built_generation

    @property
    def num_live_chunks(self) -> int:
        """Of all segments, but for deleted documents: what can be found."""
        return self.num_chunks - self.num_deleted_chunks

    @property
    def num_live_documents(self) -> int:
        return self.num_documents - self.num_deleted_documents

    def segments_of(self, shard: int) -> tuple[Partition, ...]:
        """The segments that one shard serves; none where the shard is empty."""
        return tuple(segment for segment in self.segments if segment.shard == shard)

    @property
    def chunking_fingerprint(self) -> str:
        return fingerprint({"chunk_length": self.chunk_length, "starts_with": "bos"})

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Manifest:
        content = dict(content)
        content.pop("version", None)
        content["index"] = IndexSpec(**content["index"])
        content["index_curve"] = tuple(OperatingPoint(**point) for point in content["index_curve"])
        content["segments"] = tuple(Partition(**segment) for segment in content["segments"])
        if content["validation"] is not None:
            content["validation"] = Partition(**content["validation"])
        content["files"] = {path: FileRecord(**rec) for path, rec in content["files"].items()}
        return cls(**content)


def fingerprint(content: Any) -> str:
    """16 hex digits that stand for a JSON value."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def file_record(path: Path) -> FileRecord:
    """Checksum and size of a file, read in blocks."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(sha256=digest, size_bytes=path.stat().st_size)


def file_problem(path: Path, record: FileRecord, *, sizes_only: bool = False) -> str | None:
    """What is wrong with a file; None where it is as recorded, or at least of that size."""
    if not path.exists():
        return "is missing"
    if (size_bytes := path.stat().st_size) != record.size_bytes:
        return f"has {size_bytes} bytes, the manifest says {record.size_bytes}"
    if not sizes_only and (sha256 := file_record(path).sha256) != record.sha256:
        return f"has SHA-256 {sha256[:16]}..., the manifest says {record.sha256[:16]}..."
    return None


def database_directory(home: Path) -> Path:
    """Where the database of a home lives."""
    return Path(home) / "database"


def write_json_atomically(path: Path, content: Any) -> None:
    """Replace `path` by `content` as readable JSON; a reader sees the old file or the new one."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Commit a database: from here on, `directory` holds what `manifest` lists."""
    write_json_atomically(directory / MANIFEST_NAME, {"version": manifest.version, **manifest.to_dict()})


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the database in `directory`.

    Raises:
        DatabaseError: there is none, it is torn, or it has another format version.
    """
    path = Path(directory) / MANIFEST_NAME
    if not path.exists():
        raise DatabaseError(f"no retrieval database in {directory}: build one with jobs/index.py, or pass --home")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format_version"]
        if found != FORMAT_VERSION:
            raise DatabaseError(
                f"{path} has format version {found}, this program reads {FORMAT_VERSION}: "
                "rebuild the database with jobs/index.py"
            )
        manifest = Manifest.from_dict(content)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DatabaseError(f"{path} is damaged ({error}): rebuild the database with jobs/index.py") from error
    if content.get("version") != manifest.version:
        raise DatabaseError(
            f"{path} is damaged (it says version {content.get('version')}, its contents have "
            f"{manifest.version}): rebuild the database with jobs/index.py"
        )
    return manifest
