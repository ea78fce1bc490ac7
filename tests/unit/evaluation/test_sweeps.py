"""Every point of a sweep is the score that the same setting gives by itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from retro_ray.database.store import Database
from retro_ray.evaluation.bits_per_byte import score_documents
from retro_ray.evaluation.own_text import first_neighbours
from retro_ray.evaluation.subject import open_subject
from retro_ray.evaluation.sweeps import sweep, with_share_of_documents
from retro_ray.evaluation.tables import sweep_table
from retro_ray.index import graph as graph_module
from retro_ray.index.spec import IndexSpec
from retro_ray.training.checkpoint import load_model
from tests.unit.building.editing import NUM_NEIGHBOURS, HashEmbedder, document, write_database
from tests.unit.evaluation.trained import save_run
from tests.unit.retrieval.indexed import with_indexes

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    held_out = [document(f"v{number}") for number in range(4)]
    save_run(home, write_database(home, [document(f"d{number}") for number in range(30)], validation=held_out))
    return home


def test_numbers_of_neighbours_and_their_parts(home: Path) -> None:
    with open_subject(home) as subject:
        result = sweep(subject, ["k", "parts"])
        model, _, _ = load_model(subject.checkpoint)
        points = {(point["axis"], point["value"]): point["bits_per_byte"] for point in result["points"]}
        assert set(points) == {("k", "1"), ("k", "2"), ("parts", "[N, F]"), ("parts", "N"), ("parts", "F")}
        for k in (1, 2):
            alone = score_documents(
                model, subject.store, subject.database, subject.documents, mode="on", num_neighbours=k
            )
            assert points["k", str(k)] == pytest.approx(alone.value, rel=1e-3)
        assert points["parts", "[N, F]"] == points["k", "2"]
        for point in result["points"]:
            assert point["interval"].low <= point["bits_per_byte"] <= point["interval"].high
            assert point["gain_over_off"] == pytest.approx(1 - point["bits_per_byte"] / result["bits_per_byte_off"])
        assert "as in training" in sweep_table(result)


def test_a_share_of_the_documents_is_searched_exactly(home: Path) -> None:
    with open_subject(home) as subject:
        database = subject.database
        keys = np.concatenate([store.keys for store in database.segments])
        allowed_of = {}
        for share in (0.2, 0.6):
            manifest = with_share_of_documents(subject, share)
            allowed = ~Database(database.directory, manifest).is_deleted(np.arange(len(keys)))
            assert 0 < allowed.sum() == manifest.num_live_chunks < len(keys)
            found = first_neighbours(subject.neighbours(2, manifest), 2)(subject.rows)
            distances = ((subject.store.keys[:, None] - keys) ** 2).sum(-1)
            distances[:, ~allowed] = np.inf
            np.testing.assert_array_equal(found, np.argsort(distances, axis=1, kind="stable")[:, :2])
            allowed_of[share] = allowed
        assert not (allowed_of[0.2] & ~allowed_of[0.6]).any(), "a larger share holds a smaller one"
        result = sweep(subject, ["share"])
        whole = result["points"][-1]
        assert (whole["value"], whole["note"]) == ("100%", f"{len(keys):,} chunks")
        assert len({point["bits_per_byte"] for point in result["points"]}) > 2


def test_an_exact_index_and_missing_statistics_are_said(home: Path) -> None:
    with open_subject(home) as subject:
        result = sweep(subject, ["nprobe", "rerank"])
    assert result["points"] == []
    assert "the index of this database is exact" in sweep_table(result)
    assert "no token statistics" in result["notes"][1]


def test_rows_of_a_graph_in_view_up_to_an_exact_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HashEmbedder, "dim", 64)
    monkeypatch.setattr(graph_module, "MIN_ROWS", 40)
    held_out = [document(f"v{number}") for number in range(4)]
    database = write_database(tmp_path, [document(f"d{number}") for number in range(60)], validation=held_out)
    database = with_indexes(database, index=IndexSpec(factory="SymphonyQG32", nprobe=40))
    manifest = database.manifest
    assert all(segment.index(manifest.index) in manifest.files for segment in manifest.segments)
    save_run(tmp_path, database)
    with open_subject(tmp_path) as subject:
        result = sweep(subject, ["nprobe"])
    assert [point["value"] for point in result["points"]] == ["16", "32", "40", "exact"]


def test_lists_visited_up_to_an_exact_search(tmp_path: Path) -> None:
    held_out = [document(f"v{number}") for number in range(4)]
    database = write_database(tmp_path, [document(f"d{number}") for number in range(60)], validation=held_out)
    database = with_indexes(database, index=IndexSpec(factory="IVF8,Flat", nprobe=4))
    save_run(tmp_path, database)
    with open_subject(tmp_path) as subject:
        result = sweep(subject, ["nprobe"])
        assert [point["value"] for point in result["points"]] == ["1", "2", "4", "exact"]
        exact = dataclasses.replace(database.manifest, index=IndexSpec(factory="Flat"), codec=None)
        one = dataclasses.replace(database.manifest, index=IndexSpec(factory="IVF8,Flat", nprobe=1))
        all_keys = np.concatenate([store.keys for store in database.segments])
        distances = ((subject.store.keys[:, None] - all_keys) ** 2).sum(-1)
        nearest = np.argsort(distances, axis=1, kind="stable")[:, :NUM_NEIGHBOURS]
        found = [
            first_neighbours(subject.neighbours(NUM_NEIGHBOURS, manifest), NUM_NEIGHBOURS)(subject.rows)
            for manifest in (exact, one)
        ]
    np.testing.assert_array_equal(found[0], nearest)
    assert (found[1] != nearest).any(), "one list of eight finds others"
