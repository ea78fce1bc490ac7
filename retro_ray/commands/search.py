"""`python -m retro_ray search`: the chunks nearest to a text."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from retro_ray.config import RerankMethod, RetrievalConfig, RetrievalPolicy, default_home
from retro_ray.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Search:
    """Find the chunks of the database that are nearest to a text."""

    text: tyro.conf.Positional[str]
    """What to search for."""
    home: Path = field(default_factory=default_home)
    """Folder of the database. $RETRO_RAY_HOME, or ~/.retro_ray."""
    k: int = 5
    """Chunks to find."""
    rerank: RerankMethod | None = None
    """How hits are reordered; default: as the neighbours that the database stores."""
    policy: RetrievalPolicy = "wait"
    """Where a shard does not answer: wait for it, do without it and say so (partial), or fail."""
    json: bool = False
    """Print a JSON list of hits."""

    def run(self) -> None:
        if self.k < 1:
            raise ConfigError(f"--k is {self.k}; it must be at least 1")
        hits = search(self.home, self.text, self.k, RetrievalConfig(rerank=self.rerank, policy=self.policy))
        if self.json:
            print(json.dumps(hits, indent=2, ensure_ascii=False))
            return
        for rank, hit in enumerate(hits, 1):
            print(f"{rank}. {hit['title']}  [{hit['document']}]  distance {hit['distance']:.4f}")
            print("   " + " ".join(hit["text"].split()) + "\n")


def search(home: Path, text: str, k: int, config: RetrievalConfig | None = None) -> list[dict[str, Any]]:
    """The `k` nearest chunks, nearest first, as --json prints them."""
    from retro_ray.database.store import Database
    from retro_ray.retrieval.open import open_retriever

    database = Database.open(home)
    found = open_retriever(database, config).retrieve_texts([text], k)
    if found.missing_shards:
        logger.warning("shards %s did not answer: their chunks may be nearer", list(found.missing_shards))
    m = database.chunk_length
    hits = []
    for column, document in enumerate(found.documents[0]):
        if document is None:
            break  # the database holds fewer than k chunks
        tokens, mask = found.tokens[0, column], found.mask[0, column]
        chunk, continuation = tokens[:m][mask[:m]], tokens[m:][mask[m:]]
        hits.append(
            {
                "document": document.id,
                "title": document.title,
                "source": document.source,
                "distance": float(found.distances[0, column]),
                "chunk_id": int(found.chunk_ids[0, column]),
                "text": database.tokenizer.decode(chunk),
                "continuation": database.tokenizer.decode(continuation),
            }
        )
    return hits
