"""A first reading of one unit of the input: what is in it, before anything costly is done.

It counts, finds what cannot be read, collects document ids (to refuse doubled ones before hours of
embedding) and keeps a random sample of texts (to train the tokenizer on).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retro_ray.building.reading import chosen_records, refuse_empty_corpus
from retro_ray.config import CorpusConfig
from retro_ray.database.format import write_json_atomically
from retro_ray.database.split import document_hash
from retro_ray.errors import InputError
from retro_ray.text.corpus import ReadUnit, SkippedRecord
from retro_ray.text.tokenizer import TextTokenizer

MAX_SAMPLE_BYTES = 32 << 20
"""Text that the tokenizer is trained on, over all units; more does not change its entries much."""
_MAX_SAMPLE_TEXT = 1 << 20
_MAX_ESTIMATE_TEXT = 100_000


@dataclass
class UnitSurvey:
    """What one unit holds."""

    unit: int
    num_documents: int = 0
    num_bytes: int = 0
    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """uint64 [num_documents], in reading order."""
    skipped: list[SkippedRecord] = field(default_factory=list)
    sample: list[str] = field(default_factory=list)
    """Texts for the tokenizer; long ones cut."""


def survey_unit(unit: ReadUnit, config: CorpusConfig, sample_share: float) -> UnitSurvey:
    """Read a unit through; `sample_share` of its documents, by hash, go into the sample."""
    survey = UnitSurvey(unit=unit.index)
    hashes: list[int] = []
    for record in chosen_records(unit, config):
        if isinstance(record, SkippedRecord):
            survey.skipped.append(record)
            continue
        hashes.append(document_hash(record.id))
        survey.num_documents += 1
        survey.num_bytes += len(record.text.encode())
        if (hashes[-1] % 9973) / 9973 < sample_share:
            survey.sample.append(record.text[:_MAX_SAMPLE_TEXT])
    survey.hashes = np.array(hashes, np.uint64)
    return survey


def write_survey(survey: UnitSurvey, directory: Path) -> None:
    """Two files per unit; the JSON one is last and marks the unit as surveyed."""
    table = pa.table({"text": pa.array(survey.sample, pa.large_string())})
    pq.write_table(table, directory / f"unit-{survey.unit:06d}.sample.parquet")
    pq.write_table(pa.table({"hash": survey.hashes}), directory / f"unit-{survey.unit:06d}.ids.parquet")
    write_json_atomically(
        survey_path(directory, survey.unit),
        {
            "num_documents": survey.num_documents,
            "num_bytes": survey.num_bytes,
            "skipped": [vars(record) for record in survey.skipped],
        },
    )


def survey_path(directory: Path, unit: int) -> Path:
    """The file that marks a unit as surveyed, with its counts."""
    return directory / f"unit-{unit:06d}.json"


def read_hashes(directory: Path, unit: int) -> np.ndarray:
    """uint64 [num_documents] of a surveyed unit."""
    return pq.read_table(directory / f"unit-{unit:06d}.ids.parquet")["hash"].to_numpy()


def read_sample(directory: Path, unit: int) -> list[str]:
    """Texts of a surveyed unit to train the tokenizer on."""
    return pq.read_table(directory / f"unit-{unit:06d}.sample.parquet")["text"].to_pylist()


@dataclass
class CorpusSurvey:
    """What the surveys of all units say together."""

    hashes: np.ndarray
    """uint64 [num_documents], of all ids."""
    skipped: list[SkippedRecord]
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of text."""
    _folder: Path
    _num_units: int

    @classmethod
    def read(cls, folder: Path, units: list[ReadUnit], config: CorpusConfig) -> CorpusSurvey:
        """From the files of all units.

        Raises:
            InputError: there are no documents, or two have the same id.
        """
        summaries = [json.loads(survey_path(folder, unit.index).read_text()) for unit in units]
        skipped = [SkippedRecord(**record) for summary in summaries for record in summary["skipped"]]
        num_documents = sum(summary["num_documents"] for summary in summaries)
        refuse_empty_corpus(skipped, num_documents, config)
        hashes = [read_hashes(folder, unit.index) for unit in units]
        refuse_doubled_ids(hashes, units, config)
        num_bytes = sum(summary["num_bytes"] for summary in summaries)
        return cls(np.concatenate(hashes), skipped, num_documents, num_bytes, folder, len(units))

    def sample(self) -> Iterator[str]:
        """Texts to train the tokenizer on."""
        num_bytes = 0
        for unit in range(self._num_units):
            for text in read_sample(self._folder, unit):
                num_bytes += len(text.encode())
                if num_bytes > MAX_SAMPLE_BYTES:
                    return
                yield text

    def estimate_chunks(self, tokenizer: TextTokenizer, chunk_length: int) -> int:
        """About how many chunks there will be, from a little of the text."""
        text = next(self.sample(), "")[:_MAX_ESTIMATE_TEXT]
        bytes_per_token = len(text.encode()) / max(1, len(tokenizer.encode(text))) if text else 4.0
        return int(self.num_bytes / (chunk_length * bytes_per_token))


def refuse_doubled_ids(hashes_by_unit: list[np.ndarray], units: list[ReadUnit], config: CorpusConfig) -> None:
    """Every document has an id of its own.

    Raises:
        InputError: two have the same; names it, both places and the way out.
    """
    hashes = np.concatenate(hashes_by_unit)
    ordered = np.sort(hashes)
    doubled = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not doubled:
        return
    seen: dict[str, str] = {}
    for unit, unit_hashes in zip(units, hashes_by_unit, strict=True):
        if not doubled.intersection(unit_hashes.tolist()):
            continue
        for record in chosen_records(unit, config):
            if isinstance(record, SkippedRecord) or document_hash(record.id) not in doubled:
                continue
            if record.id in seen:
                raise InputError(
                    f"two documents have the id {record.id!r} (in {seen[record.id]} and in {record.source}): "
                    "make the ids unique, or name another column with --id-column"
                )
            seen[record.id] = record.source
    raise InputError(f"the 64-bit hashes of two of {len(hashes)} document ids are equal: change one of {sorted(seen)}")
