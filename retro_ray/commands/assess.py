"""`python -m retro_ray assess`: will retrieval help on these documents?"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from retro_ray.config import CorpusConfig
from retro_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Assess:
    """Tell, before any training, how much of the documents retrieval could supply."""

    paths: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders and globs of documents; see jobs/index.py --input."""
    home: Path | None = None
    """Assess with the tokenizer, chunk length and embedder of this home's database. Default: those of a new one."""
    max_chunks: int = 16_000
    """Assess a random sample of the documents with about so many chunks; embedding them takes most of the time."""
    text_column: str = "text"
    """Column or key that holds a document's text."""
    seed: int = 0
    """Of the sample."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        from retro_ray.database.store import Database
        from retro_ray.embedding import ChunkEmbedder
        from retro_ray.evaluation.assess import assess
        from retro_ray.progress import progress_bar
        from retro_ray.retrieval.retriever import open_embedder
        from retro_ray.text.tokenizer import train_tokenizer

        if self.max_chunks < 2:
            raise ConfigError(f"--max-chunks is {self.max_chunks}; it must be at least 2")
        documents, share = self._sample()
        if self.home is not None:
            database = Database.open(self.home)
            tokenizer, chunk_length = database.tokenizer, database.chunk_length
            embedder = open_embedder(database)
        else:
            texts = (document.text for document in documents)
            tokenizer, chunk_length = train_tokenizer(texts, _VOCAB_SIZE, f"train:{_VOCAB_SIZE}"), _CHUNK_LENGTH
            embedder = ChunkEmbedder()

        def embed(texts: Sequence[str]) -> np.ndarray:
            starts = progress_bar(None, "embed", " pages", iterable=range(0, len(texts), _TEXTS_PER_PAGE))
            return np.concatenate([embedder.embed(texts[start : start + _TEXTS_PER_PAGE]) for start in starts])

        result = assess(
            documents,
            tokenizer,
            embed,
            chunk_length=chunk_length,
            group_of=lambda document: document.source,
            seed=self.seed,
        )
        description = describe(result, share)
        print(json.dumps(description, indent=2, ensure_ascii=False) if self.json else as_text(description))

    def _sample(self) -> tuple[list[Any], float]:
        """Documents in random order until there are enough, and which share of the text they are."""
        from retro_ray.text.corpus import Document, plan_units
        from retro_ray.text.readers import read_unit

        corpus = CorpusConfig(input=self.paths, text_column=self.text_column)
        records = itertools.chain.from_iterable(read_unit(unit, corpus) for unit in plan_units(corpus))
        documents = [record for record in records if isinstance(record, Document)]
        if not documents:
            raise ConfigError(f"{', '.join(self.paths)}: no documents could be read; check the paths and --text-column")
        sizes = np.array([len(document.text) for document in documents])
        order = np.random.default_rng(self.seed).permutation(len(documents))
        before = np.cumsum(sizes[order]) - sizes[order]
        chosen = order[before < self.max_chunks * _CHARACTERS_PER_CHUNK]
        return [documents[number] for number in np.sort(chosen)], float(sizes[chosen].sum() / sizes.sum())


_VOCAB_SIZE = 16_384
_CHUNK_LENGTH = 64
_TEXTS_PER_PAGE = 1024
_CHARACTERS_PER_CHUNK = 250


def describe(assessment: Any, share: float) -> dict[str, Any]:
    """What --json prints."""

    def figures(share: Any) -> dict[str, Any]:
        return {
            "documents": share.num_documents,
            "tokens": share.num_tokens,
            "new_copyable_share": share.share,
            "new_copyable_share_random": share.random_share,
        }

    return {
        "verdict": assessment.verdict,
        **figures(assessment.total),
        "sampled_share_of_text": share,
        "sampled_documents": assessment.num_documents,
        "sampled_chunks": assessment.num_chunks,
        "groups": {name: figures(group) for name, group in assessment.groups.items()},
        "examples": [dataclasses.asdict(example) for example in assessment.examples],
    }


def as_text(description: dict[str, Any]) -> str:
    """An assessment for people."""
    lines = [
        description["verdict"],
        "",
        f"Of {description['sampled_documents']:,} documents ({description['sampled_share_of_text']:.0%} of the text, "
        f"{description['sampled_chunks']:,} chunks), {description['documents']:,} were looked at:",
        f"{'group':<40} {'documents':>9} {'tokens':>10} {'copyable':>9} {'by chance':>9}",
    ]
    for name, group in [("all", description), *list(description["groups"].items())[:_MAX_GROUPS]]:
        lines.append(
            f"{_shortened(name, 40):<40} {group['documents']:>9,} {group['tokens']:>10,} "
            f"{group['new_copyable_share']:>9.1%} {group['new_copyable_share_random']:>9.1%}"
        )
    if len(description["groups"]) > _MAX_GROUPS:
        lines.append(f"and {len(description['groups']) - _MAX_GROUPS:,} smaller groups (--json lists them)")
    for example in description["examples"]:
        lines += [
            "",
            f"{example['document']} can copy from {example['neighbour']}:",
            f"    {_shortened(example['text'], 200)}",
        ]
    return "\n".join(lines)


_MAX_GROUPS = 12


def _shortened(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."
