"""The records of a unit that a build takes in."""

from __future__ import annotations

from collections.abc import Iterator

from retro_ray.config import CorpusConfig
from retro_ray.database.split import document_hash
from retro_ray.text.corpus import Document, ReadUnit, SkippedRecord
from retro_ray.text.readers import read_unit


def chosen_records(unit: ReadUnit, corpus: CorpusConfig) -> Iterator[Document | SkippedRecord]:
    """What a unit holds, but for the documents that are not in the share asked for."""
    for record in read_unit(unit, corpus):
        if isinstance(record, SkippedRecord) or is_chosen(record.id, corpus.share):
            yield record


def is_chosen(document_id: str, share: float) -> bool:
    """Whether a document is in a share of the corpus: by its id, so that a larger share holds a smaller one."""
    return document_hash(document_id) < share * 2**64
