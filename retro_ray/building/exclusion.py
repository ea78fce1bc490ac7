"""Documents that a build leaves out because they are nearly those of a test set (`--exclude-near`)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retro_ray.building.reading import CorpusReader
from retro_ray.config import CorpusConfig
from retro_ray.database.format import write_json_atomically
from retro_ray.text.chunking import ChunkedDocument
from retro_ray.text.corpus import SkippedRecord
from retro_ray.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    # It brings SciPy, which tasks that exclude nothing need not load.
    from retro_ray.text.near_duplicates import NearDocuments

NEAR_DUPLICATE = "near duplicate"
"""Category of the skipped records."""


def read_excluded(corpus: CorpusConfig, tokenizer: TextTokenizer) -> NearDocuments:
    """The documents of a test set.

    Raises:
        InputError: there are none.
    """
    from retro_ray.text.near_duplicates import NearDocuments, shingles

    return NearDocuments((document.id, shingles(tokenizer.encode(document.text))) for document in CorpusReader(corpus))


def without_near(
    documents: Iterable[ChunkedDocument], excluded: NearDocuments, left_out: list[SkippedRecord]
) -> Iterator[ChunkedDocument]:
    """Documents that are near to none of `excluded`; the others are noted in `left_out`."""
    from retro_ray.text.near_duplicates import shingles

    for document in documents:
        real = np.arange(document.tokens.shape[1]) < document.lengths[:, None]
        near = excluded.near(shingles(document.tokens[real][1:]))
        if not near:
            yield document
            continue
        detail = f"{document.id} is {near[0].jaccard:.0%} the same as {near[0].name}"
        left_out.append(SkippedRecord(document.source, None, NEAR_DUPLICATE, detail))


def write_left_out(pages: Path, unit: int, left_out: list[SkippedRecord]) -> None:
    """Note what of a unit was left out; nothing is written where nothing was."""
    if left_out:
        write_json_atomically(_path(pages, unit), [dataclasses.asdict(record) for record in left_out])


def read_left_out(pages: Path, units: Iterable[int]) -> list[SkippedRecord]:
    """What was left out of some units."""
    paths = [_path(pages, unit) for unit in units]
    return [SkippedRecord(**one) for path in paths if path.exists() for one in json.loads(path.read_text())]


def _path(pages: Path, unit: int) -> Path:
    return pages / f"unit-{unit:06d}-left-out.json"
