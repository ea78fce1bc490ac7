"""Pairs of evaluated and stored documents; and builds that leave the latter out."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from retro_ray.building.build_plan import excluded_corpus, plan_build
from retro_ray.building.chunk_units import chunk_units
from retro_ray.building.edit import DatabaseEditor
from retro_ray.building.exclusion import NEAR_DUPLICATE, read_excluded, read_left_out
from retro_ray.config import CorpusConfig, DatabaseConfig
from retro_ray.database.split import Split, document_hash
from retro_ray.database.store import Database
from retro_ray.errors import InputError
from retro_ray.evaluation.near_duplicates import document_shingles, near_in_segment
from retro_ray.text.corpus import plan_units
from retro_ray.text.near_duplicates import NearDocuments
from tests.unit.building.editing import document, write_database

LONG = " ".join(f"{word} {number}" for number in range(30) for word in ("alpha", "beta"))
NEARLY = LONG.replace("alpha 29", "gamma 29")


def test_pairs_are_found_in_every_segment_but_not_among_deleted_documents(tmp_path: Path) -> None:
    stored = [
        document("a"),
        document("near", NEARLY),
        document("same", LONG),
        document("b"),
        document("far", LONG[:90]),
    ]
    database = write_database(tmp_path, stored, validation=[document("v"), document("text", LONG)])
    evaluated = NearDocuments((str(d), document_shingles(database.validation, d)) for d in range(2))

    def pairs(database: Database) -> set[tuple[int, str]]:
        found = [
            pair
            for segment, store in enumerate(database.segments)
            for pair in near_in_segment(
                evaluated, database.directory, database.manifest, segment, (0, store.num_documents)
            )
        ]
        return {(document, database.segments[segment].document_ref(row).id) for document, segment, row, _ in found}

    assert pairs(database) == {(1, "near"), (1, "same")}
    DatabaseEditor(tmp_path).delete(["same"])
    assert pairs(Database.open(tmp_path)) == {(1, "near")}


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusConfig:
    documents = {"near": NEARLY, "same": LONG, "other": "zeta eta theta " * 9, "short": "alpha"}
    lines = [json.dumps({"id": name, "text": text}) for name, text in documents.items()]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    (tmp_path / "test.jsonl").write_text(json.dumps({"id": "held out", "text": LONG}))
    return CorpusConfig(input=(str(tmp_path / "in.jsonl"),))


def test_a_build_leaves_out_what_is_near_and_lists_it(corpus: CorpusConfig, tmp_path: Path) -> None:
    config = DatabaseConfig(exclude_near=(str(tmp_path / "test.jsonl"),))
    database = write_database(tmp_path / "home", [document("any")])
    tokenizer = database.tokenizer
    excluded = read_excluded(excluded_corpus(corpus, config), tokenizer)
    [unit] = plan_units(corpus)
    split = Split.of(np.array([document_hash(name) for name in ("near", "same", "other", "short")], np.uint64), 1, 0, 0)
    batch = {"unit": np.array([json.dumps(unit.to_dict())])}
    pages = tmp_path / "pages"
    pages.mkdir()
    folder = database.directory / database.manifest.build / "tokenizer"
    list(chunk_units(batch, pages, corpus, split, folder, 8, excluded))
    left_out = read_left_out(pages, [0])
    assert {record.category for record in left_out} == {NEAR_DUPLICATE}
    assert left_out[1].detail == "same is 100% the same as held out"
    assert left_out[0].detail.startswith("near is 9")
    [listed] = (pages / split.partitions[0]).glob("*documents.parquet")
    import pyarrow.parquet as pq

    assert pq.read_table(listed)["id"].to_pylist() == ["other", "short"]


def test_a_build_without_exclusions_keeps_its_name_and_one_with_them_has_another(
    corpus: CorpusConfig, tmp_path: Path
) -> None:
    config = DatabaseConfig(exclude_near=(str(tmp_path / "test.jsonl"),))
    names = {plan_build(corpus, DatabaseConfig()).build_id, plan_build(corpus, config).build_id}
    (tmp_path / "test.jsonl").write_text(json.dumps({"id": "held out", "text": LONG + " more"}))
    names.add(plan_build(corpus, config).build_id)
    assert len(names) == 3
    with pytest.raises(InputError, match="nowhere"):
        plan_build(corpus, dataclasses.replace(config, exclude_near=(str(tmp_path / "nowhere"),)))
