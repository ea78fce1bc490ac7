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
    """Tell, before any training, how much of the documents retrieval could supply; or, with --home, what adding them to
    a database would bring.
    """

    paths: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders and globs of documents; see jobs/index.py --input."""
    home: Path | None = None
    """Tell what the documents would bring to the database of this home: how much they could supply of its held-out
    documents, and what it and they together could supply of themselves. New versions of held-out documents are in the
    sample first."""
    max_chunks: int = 16_000
    """Assess a random sample of the documents with about so many chunks; embedding them takes most of the time."""
    text_column: str = "text"
    """Column or key that holds a document's text."""
    seed: int = 0
    """Of the sample."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        if self.max_chunks < 2:
            raise ConfigError(f"--max-chunks is {self.max_chunks}; it must be at least 2")
        if self.home is None:
            description, as_text = self._assessment(), assessment_as_text
        else:
            description, as_text = self._addition(self.home), addition_as_text
        print(json.dumps(description, indent=2, ensure_ascii=False) if self.json else as_text(description))

    def _assessment(self) -> dict[str, Any]:
        from retro_ray.embedding import ChunkEmbedder
        from retro_ray.evaluation.assess import assess
        from retro_ray.text.tokenizer import train_tokenizer

        documents, share = self._sample(frozenset())
        texts = (document.text for document in documents)
        tokenizer = train_tokenizer(texts, _VOCAB_SIZE, f"train:{_VOCAB_SIZE}")
        result = assess(
            documents,
            tokenizer,
            _in_pages(ChunkEmbedder()),
            chunk_length=_CHUNK_LENGTH,
            group_of=lambda document: document.source,
            seed=self.seed,
        )
        return describe(result, share)

    def _addition(self, home: Path) -> dict[str, Any]:
        from retro_ray.database.store import Database
        from retro_ray.evaluation.addition import assess_addition
        from retro_ray.retrieval.retriever import open_embedder

        database = Database.open(home)
        store = database.validation
        held_out = () if store is None else (store.document_ref(number).id for number in range(store.num_documents))
        documents, share = self._sample(frozenset(held_out))
        addition = assess_addition(database, documents, _in_pages(open_embedder(database)), seed=self.seed)
        return describe_addition(addition, len(documents), share)

    def _sample(self, first: frozenset[str]) -> tuple[list[Any], float]:
        """Documents in random order, those with the ids `first` before the others, until there are enough; and which
        share of the text they are.
        """
        from retro_ray.text.corpus import Document, plan_units
        from retro_ray.text.readers import read_unit

        corpus = CorpusConfig(input=self.paths, text_column=self.text_column)
        records = itertools.chain.from_iterable(read_unit(unit, corpus) for unit in plan_units(corpus))
        documents = [record for record in records if isinstance(record, Document)]
        if not documents:
            raise ConfigError(f"{', '.join(self.paths)}: no documents could be read; check the paths and --text-column")
        sizes = np.array([len(document.text) for document in documents])
        order = np.random.default_rng(self.seed).permutation(len(documents))
        order = order[np.argsort([documents[number].id not in first for number in order], kind="stable")]
        before = np.cumsum(sizes[order]) - sizes[order]
        chosen = order[before < self.max_chunks * _CHARACTERS_PER_CHUNK]
        return [documents[number] for number in np.sort(chosen)], float(sizes[chosen].sum() / sizes.sum())


_VOCAB_SIZE = 16_384
_CHUNK_LENGTH = 64
_TEXTS_PER_PAGE = 1024
_CHARACTERS_PER_CHUNK = 250


def _in_pages(embedder: Any) -> Any:
    """The embedder's `embed` for many texts, with a progress bar."""
    from retro_ray.progress import progress_bar

    def embed(texts: Sequence[str]) -> np.ndarray:
        starts = progress_bar(None, "embed", " pages", iterable=range(0, len(texts), _TEXTS_PER_PAGE))
        return np.concatenate([embedder.embed(texts[start : start + _TEXTS_PER_PAGE]) for start in starts])

    return embed


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
        "near_duplicates": [list(pair) for pair in assessment.near_duplicates],
    }


def describe_addition(addition: Any, num_documents: int, share: float) -> dict[str, Any]:
    """What --json prints of an addition."""

    def figures(reading: Any) -> dict[str, Any]:
        return {
            "documents": reading.num_documents,
            "tokens": reading.num_tokens,
            "new_copyable_share_without": reading.share_without,
            "new_copyable_share_with": reading.share_with,
        }

    return {
        "verdict": addition.verdict,
        "sampled_share_of_text": share,
        "sampled_documents": num_documents,
        "sampled_chunks": addition.num_chunks,
        "held_out": figures(addition.held_out),
        "new": figures(addition.new),
    }


def assessment_as_text(description: dict[str, Any]) -> str:
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
    if pairs := description["near_duplicates"]:
        lines += [
            "",
            f"Pairs of documents that are nearly the same: {len(pairs):,}, first {pairs[0][0]} and {pairs[0][1]}.",
        ]
    for example in description["examples"]:
        lines += [
            "",
            f"{example['document']} can copy from {example['neighbour']}:",
            f"    {_shortened(example['text'], 200)}",
        ]
    return "\n".join(lines)


def addition_as_text(description: dict[str, Any]) -> str:
    """The assessment of an addition for people."""
    lines = [
        description["verdict"],
        "",
        f"With {description['sampled_documents']:,} of the new documents ({description['sampled_share_of_text']:.0%} "
        f"of their text, {description['sampled_chunks']:,} chunks), copyable of the next tokens:",
        f"{'text that is read':<40} {'documents':>9} {'tokens':>10} {'without':>9} {'with':>9}",
    ]
    for name, title in (("held_out", "held-out documents of the database"), ("new", "the new documents themselves")):
        read = description[name]
        if read["documents"]:
            lines.append(
                f"{title:<40} {read['documents']:>9,} {read['tokens']:>10,} "
                f"{read['new_copyable_share_without']:>9.1%} {read['new_copyable_share_with']:>9.1%}"
            )
    return "\n".join(lines)


_MAX_GROUPS = 12


def _shortened(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."
