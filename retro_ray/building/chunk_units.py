"""The first of the two stages that Ray Data runs over the input: units to pages.

A plain callable over batches (dicts of numpy arrays), as `map_batches` calls it. Without torch, which would take its
worker seconds and a third of a gigabyte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from retro_ray.building.exclusion import without_near, write_left_out
from retro_ray.building.pages import Page, PageMaker, contents_path, page_path, write_contents
from retro_ray.building.reading import chosen_records
from retro_ray.config import CorpusConfig
from retro_ray.database.split import Split
from retro_ray.text.chunking import ChunkedDocument, chunk_document
from retro_ray.text.corpus import ReadUnit, SkippedRecord
from retro_ray.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from retro_ray.text.near_duplicates import NearDocuments

Batch = dict[str, np.ndarray]


def unit_is_finished(pages: Path, unit: int) -> bool:
    """Whether a unit was chunked and each of its pages is on disk."""
    path = contents_path(pages, unit)
    if not path.exists():
        return False
    num_pages: dict[str, int] = json.loads(path.read_text())
    return all(
        page_path(pages, unit, partition, number).exists()
        for partition, count in num_pages.items()
        for number in range(count)
    )


def chunk_units(
    batch: Batch,
    pages: Path,
    corpus: CorpusConfig,
    split: Split,
    tokenizer_folder: Path,
    chunk_length: int,
    excluded: NearDocuments | None = None,
) -> Iterator[Batch]:
    """Read units and yield their pages, leaving out the pages that an earlier run finished.

    Documents near to one of `excluded` are in no page, and listed.
    """
    tokenizer = TextTokenizer.load(tokenizer_folder)
    for content in batch["unit"]:
        unit = ReadUnit.from_dict(json.loads(str(content)))
        maker = PageMaker(unit.index, split, tokenizer.vocab_size)
        documents = _chunked_documents(unit, corpus, tokenizer, chunk_length)
        left_out: list[SkippedRecord] = []
        if excluded is not None:
            documents = without_near(documents, excluded, left_out)
        for page in maker.pages(documents):
            if not page.path(pages).exists():
                yield _page_to_batch(page)
        write_left_out(pages, unit.index, left_out)
        write_contents(pages, unit.index, maker.contents)


def _chunked_documents(
    unit: ReadUnit, corpus: CorpusConfig, tokenizer: TextTokenizer, chunk_length: int
) -> Iterator[ChunkedDocument]:
    for record in chosen_records(unit, corpus):
        if not isinstance(record, SkippedRecord):  # the survey has counted these
            yield chunk_document(record, tokenizer, chunk_length)


def _page_to_batch(page: Page) -> Batch:
    """A batch of one row. A row is never divided, so a page stays whole however blocks are cut."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, page.chunks.schema) as writer:
        writer.write_table(page.chunks)
    chunks = np.empty(1, object)
    chunks[0] = sink.getvalue().to_pybytes()
    return {
        "unit": np.array([page.unit]),
        "partition": np.array([page.partition]),
        "number": np.array([page.number]),
        "chunks": chunks,
    }
