"""The first reading: counts, a sample, and the errors that must come before hours of embedding."""

import json
from pathlib import Path

import numpy as np
import pytest

from retro_ray.building.reading import refuse_empty_corpus
from retro_ray.building.survey import (
    read_hashes,
    read_sample,
    refuse_doubled_ids,
    survey_path,
    survey_unit,
    write_survey,
)
from retro_ray.config import CorpusConfig
from retro_ray.database.split import document_hash
from retro_ray.errors import InputError
from retro_ray.text.corpus import ReadUnit, SkippedRecord, plan_units


def write_lines(path: Path, records: list[dict | str]) -> None:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")


def planned(folder: Path, **settings) -> tuple[CorpusConfig, list[ReadUnit]]:
    """Every file is a unit of its own."""
    config = CorpusConfig(input=(str(folder),), **settings)
    return config, plan_units(config, unit_bytes=1)


def test_a_survey_survives_the_disk(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    texts = ["first", "zweite \N{LATIN SMALL LETTER A WITH DIAERESIS}"]
    write_lines(tmp_path / "in" / "a.jsonl", [{"id": "x", "text": texts[0]}, "{broken", {"id": "y", "text": texts[1]}])
    config, units = planned(tmp_path / "in")
    survey = survey_unit(units[0], config, sample_share=1.0)
    assert (survey.num_documents, survey.num_bytes) == (2, sum(len(text.encode()) for text in texts))
    write_survey(survey, tmp_path)
    content = json.loads(survey_path(tmp_path, 0).read_text())
    assert [SkippedRecord(**record).line for record in content["skipped"]] == [2]
    assert read_hashes(tmp_path, 0).tolist() == [document_hash("x"), document_hash("y")]
    assert read_sample(tmp_path, 0) == texts


def test_the_sample_is_a_share_of_the_documents(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": f"text {number}"} for number in range(2000)])
    config, units = planned(tmp_path)
    assert len(survey_unit(units[0], config, 0.25).sample) == pytest.approx(500, abs=60)
    assert survey_unit(units[0], config, 0.0).sample == []


@pytest.mark.parametrize("files", [("a", "a"), ("a", "b")])
def test_doubled_ids_are_named_with_both_places(tmp_path: Path, files: tuple[str, str]) -> None:
    records: dict[str, list[dict | str]] = {"a": [{"id": "only", "text": "t"}], "b": [{"id": "other", "text": "t"}]}
    for file in files:
        records[file].append({"id": "the doubled one", "text": f"in {file}"})
    for file, lines in records.items():
        write_lines(tmp_path / f"{file}.jsonl", lines)
    config, units = planned(tmp_path)
    hashes = [survey_unit(unit, config, 0.0).hashes for unit in units]
    with pytest.raises(InputError) as caught:
        refuse_doubled_ids(hashes, units, config)
    message = str(caught.value)
    assert "'the doubled one'" in message
    assert "--id-column" in message
    assert "\n" not in message
    for file in files:
        assert str(tmp_path / f"{file}.jsonl") in message


def test_ids_of_their_own_are_fine(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"id": str(number), "text": "t"} for number in range(50)])
    config, units = planned(tmp_path)
    hashes = survey_unit(units[0], config, 0.0).hashes
    assert len(hashes) == 50
    refuse_doubled_ids([hashes], units, config)
    refuse_doubled_ids([np.empty(0, np.uint64)], units, config)


@pytest.mark.parametrize(
    ("records", "settings", "expected"),
    [
        ([], {}, ["no documents in", "pass files"]),
        (["{broken", {"text": ""}], {}, ["2 records skipped", "1 malformed line", "1 empty document", "a.jsonl:1"]),
        ([{"body": "b"}], {}, ["missing column", "--text-column", "body"]),
    ],
)
def test_a_corpus_without_documents(tmp_path: Path, records: list, settings: dict, expected: list[str]) -> None:
    write_lines(tmp_path / "a.jsonl", records)
    config, units = planned(tmp_path, **settings)
    survey = survey_unit(units[0], config, 0.0)
    with pytest.raises(InputError) as caught:
        refuse_empty_corpus(survey.skipped, survey.num_documents, config)
    assert all(part in str(caught.value) for part in expected), str(caught.value)
    assert "\n" not in str(caught.value)
