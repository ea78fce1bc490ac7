"""The records that a build or an edit takes in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from retro_ray.config import CorpusConfig
from retro_ray.database.split import document_hash
from retro_ray.errors import InputError
from retro_ray.text.corpus import Document, ReadUnit, SkippedRecord, plan_units
from retro_ray.text.readers import read_unit


def chosen_records(unit: ReadUnit, corpus: CorpusConfig) -> Iterator[Document | SkippedRecord]:
    """What a unit holds, but for the documents that are not in the share asked for."""
    for record in read_unit(unit, corpus):
        if isinstance(record, SkippedRecord) or is_chosen(record.id, corpus.share):
            yield record


class CorpusReader:
    """The documents of a corpus, one after another in this process; what cannot be read is kept in `skipped`.

    Raises (when it is iterated):
        InputError: the input does not exist, or holds no document.
    """

    def __init__(self, corpus: CorpusConfig) -> None:
        self._corpus = corpus
        self.skipped: list[SkippedRecord] = []

    def __iter__(self) -> Iterator[Document]:
        num_documents = 0
        for unit in plan_units(self._corpus):
            for record in chosen_records(unit, self._corpus):
                if isinstance(record, SkippedRecord):
                    self.skipped.append(record)
                    continue
                num_documents += 1
                yield record
        refuse_empty_corpus(self.skipped, num_documents, self._corpus)


def refuse_empty_corpus(skipped: list[SkippedRecord], num_documents: int, config: CorpusConfig) -> None:
    """There are documents.

    Raises:
        InputError: there are none; says what was found instead.
    """
    if num_documents:
        return
    where = " ".join(config.input)
    if not skipped:
        raise InputError(f"no documents in {where}: pass files that hold some")
    counts = Counter(record.category for record in skipped)
    first = skipped[0]
    place = first.source if first.line is None else f"{first.source}:{first.line}"
    listing = ", ".join(f"{count} {category}" for category, count in counts.most_common())
    way_out = "name the column with --text-column" if "missing column" in counts else "mend them"
    raise InputError(
        f"no documents in {where}: {len(skipped)} records skipped ({listing}); first: {place}: "
        f"{first.category}, {first.detail}; {way_out}, or pass other files"
    )


def is_chosen(document_id: str, share: float) -> bool:
    """Whether a document is in a share of the corpus: by its id, so that a larger share holds a smaller one."""
    return document_hash(document_id) < share * 2**64
