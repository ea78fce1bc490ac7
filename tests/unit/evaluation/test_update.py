"""One checkpoint before two states of a database."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retro_ray.building.edit import DatabaseEditor
from retro_ray.database.store import Database
from retro_ray.errors import DatabaseError, MismatchError
from retro_ray.evaluation.own_text import first_neighbours
from retro_ray.evaluation.subject import open_subject
from retro_ray.evaluation.tables import update_table
from retro_ray.evaluation.update import _credits, as_built, compare, reading
from tests.unit.building.editing import NUM_NEIGHBOURS, HashEmbedder, document, write_database
from tests.unit.evaluation.trained import save_run

pytestmark = pytest.mark.usefixtures("in_this_process")
HELD_OUT = [document("v0", "alpha beta gamma " * 12), document("v1")]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    database = write_database(tmp_path, [document(f"d{number}") for number in range(12)], validation=HELD_OUT)
    save_run(tmp_path, database)
    return tmp_path


def test_the_state_before_is_the_database_as_it_was_built(home: Path) -> None:
    built = Database.open(home)
    with open_subject(home) as subject:
        stored = first_neighbours(reading(subject, built).neighbours or home, NUM_NEIGHBOURS)(subject.rows)
    with pytest.raises(DatabaseError, match="was not edited"):
        as_built(built)
    editor = DatabaseEditor(home, embedder=HashEmbedder())
    editor.add([document("near", HELD_OUT[0].text)])
    editor.update([document("d3", "zeta eta theta")])
    editor.delete(["d5"])
    edited = Database.open(home)
    before = as_built(edited)
    assert before.manifest.num_live_documents == 12
    assert [before.find_document(name) is not None for name in ("d3", "d5", "near")] == [True, True, False]
    with open_subject(home, database=before) as subject:
        found = first_neighbours(reading(subject, before).neighbours or home, NUM_NEIGHBOURS)(subject.rows)
    np.testing.assert_array_equal(found, stored)
    editor.compact()
    with pytest.raises(DatabaseError, match="was compacted"):
        as_built(Database.open(home))


def test_the_gain_of_each_document_and_who_brought_it(home: Path) -> None:
    DatabaseEditor(home, embedder=HashEmbedder()).add([document("near", HELD_OUT[0].text)])
    after = Database.open(home)
    before = as_built(after)
    with open_subject(home, database=before) as subject:
        result = compare(subject, before, after)
        same = compare(subject, before, before)
    bits = result["bits_per_byte"]
    assert len({*bits.values()}) == 3
    assert result["gain"] == pytest.approx(1 - bits["after"] / bits["before"])
    by_document = {one["document"]: one for one in result["by_document"]}
    assert set(by_document) == {"v0", "v1"}
    for one in by_document.values():
        own = one["bits_per_byte"]
        assert one["saved_bits"] == pytest.approx((own["before"] - own["after"]) * one["text_bytes"])
    assert {neighbour["document"] for neighbour in by_document["v0"]["neighbours"]} <= {"near"}
    total = sum(one["saved_bits"] for one in result["by_document"])
    num_bytes = sum(one["text_bytes"] for one in result["by_document"])
    assert total == pytest.approx((bits["before"] - bits["after"]) * num_bytes)
    assert (result["before"]["documents"], result["after"]["documents"]) == (12, 13)
    assert "the update lowers them by" in update_table(result)

    assert same["gain"] == 0
    assert all(one["saved_bits"] == 0 and one["neighbours"] == [] for one in same["by_document"])


def test_databases_that_do_not_fit(home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = write_database(tmp_path_factory.mktemp("other"), [document("x")])
    fields = vars(other.manifest)
    with open_subject(home) as subject:
        strange = Database(other.directory, type(other.manifest)(**{**fields, "embedder_fingerprint": "another"}))
        with pytest.raises(MismatchError, match="another"):
            reading(subject, strange)
        cut = Database(other.directory, type(other.manifest)(**{**fields, "chunk_length": 16}))
        with pytest.raises(MismatchError, match="chunking"):
            reading(subject, cut)


def test_what_a_chunk_saved_goes_to_the_new_neighbours_of_the_chunk_before_it(home: Path) -> None:
    """Three chunks of one document, two of another; tokens tell versions of a document apart."""
    with open_subject(home) as subject:
        rows = np.array([*range(3), *range(*subject.store.document_rows(1))][:5])
        saved = np.array([100.0, 8.0, 3.0, 100.0, 5.0])
        old, new = ("page", b"1"), ("page", b"2")
        before = [[old], [old], [], [old], []]
        after = [[new, ("other", b"x")], [old], [new], [new], []]
        credit = _credits(subject.store, rows, saved, before, after)
    assert credit == {0: {"page": 4.0, "other": 4.0}, 1: {"page": 5.0}}
