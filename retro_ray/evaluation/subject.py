"""What is evaluated: a checkpoint, the database it reads, and the documents that it is scored on."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from retro_ray.building.reading import CorpusReader
from retro_ray.config import CorpusConfig, RetrievalConfig
from retro_ray.database.format import Manifest, database_directory, fingerprint
from retro_ray.database.store import ChunkStore, Database
from retro_ray.errors import CheckpointError
from retro_ray.evaluation.bits_per_byte import NeighbourParts, choose_documents
from retro_ray.evaluation.current_neighbours import validation_text
from retro_ray.evaluation.own_text import NeighbourSearch, ScoredText, count_document_words, write_own_text
from retro_ray.evaluation.passes import Pass
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.retrieval.neighbours import write_neighbours
from retro_ray.retrieval.retriever import open_embedder
from retro_ray.text.chunking import chunk_document
from retro_ray.training.checkpoint import MODEL_NAME, CheckpointMeta, find_checkpoint, require_match
from retro_ray.training.run_folder import run_directory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """One checkpoint, one database, some documents; and the passes that can be made over them."""

    run: Path
    """Folder of the training run."""
    checkpoint: Path
    meta: CheckpointMeta
    database: Database
    input: tuple[str, ...] | None
    """What the documents were read from; None: the validation split."""
    text: ScoredText
    documents: np.ndarray
    """int64 [d], ascending: those of the text that are scored."""
    num_neighbours: int
    """Per chunk, unless a pass says otherwise."""
    num_stored: int
    """Neighbours per chunk in the text's file."""
    scratch: Path
    """Folder for neighbours that are searched in other ways."""

    @cached_property
    def store(self) -> ChunkStore:
        """The text's chunks."""
        return self.text.open(self.database.chunk_length)

    @cached_property
    def rows(self) -> np.ndarray:
        """int64 [n], ascending: the chunks that are scored."""
        spans = [np.arange(*self.store.document_rows(int(document))) for document in self.documents]
        return np.concatenate([np.empty(0, np.int64), *spans])

    @cached_property
    def num_words(self) -> int:
        """Of the documents' text."""
        return count_document_words(self.database, self.store, self.documents)

    @property
    def weights(self) -> str:
        """SHA-256 of the checkpoint's weights."""
        return self.meta.files[MODEL_NAME].sha256

    @property
    def score_cache(self) -> Path:
        """Folder for scores of this run's checkpoints."""
        return self.run.parents[1] / "cache" / "scores" / self.run.name

    def on(
        self, num_neighbours: int | None = None, *, manifest: Manifest | None = None, parts: NeighbourParts = "NF"
    ) -> Pass:
        """RETRO[ON].

        Args:
            num_neighbours: per chunk.
            manifest: search the neighbours in this variant of the database.
            parts: what of them is shown.
        """
        count = self.num_neighbours if num_neighbours is None else num_neighbours
        return dataclasses.replace(
            self.off(), mode="on", num_neighbours=count, neighbours=self.neighbours(count, manifest), parts=parts
        )

    def off(self) -> Pass:
        """RETRO[OFF]."""
        return Pass(
            checkpoint=self.checkpoint,
            weights=self.weights,
            directory=self.database.directory,
            manifest=self.database.manifest,
            mode="off",
        )

    def random(self) -> Pass:
        """Random chunks of the database in the place of neighbours."""
        return dataclasses.replace(self.off(), mode="random", num_neighbours=self.num_neighbours)

    def baseline(self, path: Path) -> Pass:
        """Another model, without retrieval.

        Args:
            path: folder of a checkpoint, of a run, or of a home whose run `default` is meant.

        Raises:
            CheckpointError: there is none.
            MismatchError: it has another tokenizer, so that its bits are of other tokens.
        """
        path = path.expanduser().absolute()
        if not path.is_dir():
            raise CheckpointError(f"--baseline {path} does not exist: give the folder of a checkpoint, a run or a home")
        folder, meta = find_checkpoint(run_directory(path, "default") if (path / "runs").is_dir() else path)
        require_match(meta, self.database.manifest)
        return dataclasses.replace(self.off(), checkpoint=folder, weights=meta.files[MODEL_NAME].sha256)

    def neighbours(self, num_neighbours: int, manifest: Manifest | None = None) -> Path:
        """File of at least so many neighbours of every chunk of the text, searched now if they are not there.

        Args:
            num_neighbours: per chunk.
            manifest: of a variant of the database: searched in another way, or with fewer documents.
        """
        own = self.database.manifest
        if (manifest is None or manifest == own) and num_neighbours <= self.num_stored and self.text.neighbours:
            return self.text.neighbours
        manifest = manifest or own
        named = fingerprint([manifest.version, dataclasses.asdict(manifest.index), manifest.rerank, manifest.deleted])
        path = self.scratch / f"neighbours-{named}-{num_neighbours}.arrow"
        if not path.exists():
            database = Database(self.database.directory, manifest)
            retriever = LocalRetriever.open(database, RetrievalConfig(mmap=True), pinned=True)
            write_neighbours(self.store, retriever, num_neighbours, path, database)
        return path


@contextmanager
def open_subject(
    home: Path,
    run: str = "default",
    *,
    corpus: CorpusConfig | None = None,
    num_neighbours: int | None = None,
    max_chunks: int | None = None,
    database: Database | None = None,
) -> Iterator[Subject]:
    """The newest checkpoint of a run, and documents with their neighbours in the database as it is now.

    Args:
        home: of the database and the run.
        run: its name.
        corpus: documents to score, which need not be in any database. Default: the validation split.
        num_neighbours: per chunk. Default: as many as in training.
        max_chunks: score about so many chunks, of documents chosen at random. Default: all.
        database: in place of that of `home`.

    Raises:
        DatabaseError: the database has no validation split.
        InputError: the corpus does not exist, or holds no document.
        CheckpointError: the run has no checkpoint.
        ConfigError: fewer neighbours are stored with the validation split.
        MismatchError: checkpoint and database, or embedder and database, do not belong together.
    """
    database = database or Database.open(home)
    checkpoint, meta = find_checkpoint(run_directory(home, run))
    require_match(meta, database.manifest)
    count = meta.config.model.num_neighbours if num_neighbours is None else num_neighbours
    cache = database_directory(home).parent / "cache"
    cache.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="evaluation-", dir=cache) as scratch:
        text = _scored_text(Path(scratch), database, corpus, count)
        store = text.open(database.chunk_length)
        yield Subject(
            run=run_directory(home, run),
            checkpoint=checkpoint,
            meta=meta,
            database=database,
            input=None if corpus is None else corpus.input,
            text=text,
            documents=choose_documents(store, max_chunks if max_chunks is not None else store.num_chunks),
            num_neighbours=count,
            num_stored=database.manifest.num_neighbours
            if corpus is None
            else max(count, database.manifest.num_neighbours),
            scratch=Path(scratch),
        )


def _scored_text(folder: Path, database: Database, corpus: CorpusConfig | None, num_neighbours: int) -> ScoredText:
    """The documents to score, where every worker can read them."""
    if corpus is None:
        return validation_text(database, num_neighbours)
    reader = CorpusReader(corpus)
    chunked = (chunk_document(document, database.tokenizer, database.chunk_length) for document in reader)
    search = NeighbourSearch(database, open_embedder(database))
    text = write_own_text(folder, chunked, database, search, num_neighbours)
    if reader.skipped:
        first = reader.skipped[0]
        logger.warning("%d records skipped; first: %s: %s", len(reader.skipped), first.source, first.reason)
    return text
