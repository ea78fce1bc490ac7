"""What was added to a database shows in the neighbours that the validation split is scored with."""

import logging
from pathlib import Path

import numpy as np
import pytest

from retro_ray.building.edit import DatabaseEditor
from retro_ray.database.store import Database
from retro_ray.errors import ConfigError, DatabaseError
from retro_ray.evaluation.current_neighbours import validation_text
from retro_ray.evaluation.own_text import first_neighbours
from tests.unit.building.editing import NUM_NEIGHBOURS, HashEmbedder, document, write_database

HELD_OUT = document("held out")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_database(tmp_path, [document(f"d{number}") for number in range(6)], validation=[HELD_OUT])
    return tmp_path


def opened(home: Path) -> tuple[Database, Path, np.ndarray]:
    """The database now, the file of its validation neighbours, and what it says."""
    database = Database.open(home)
    assert database.validation is not None
    path = validation_text(database, 2).neighbours
    assert path is not None
    return database, path, first_neighbours(path, 2)(np.arange(database.validation.num_chunks))


def test_without_edits_the_stored_ones_are_used(home: Path) -> None:
    database, path, found = opened(home)
    assert database.validation is not None
    assert path == database.directory / database.validation.partition.neighbours
    np.testing.assert_array_equal(found, database.validation.neighbours.column("chunk_ids")[:, :2])
    assert not (home / "cache").exists()


def test_after_edits_they_are_searched_again_once_per_generation(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    editor = DatabaseEditor(home, embedder=HashEmbedder())
    editor.add([document("same text", HELD_OUT.text)])
    database, path, found = opened(home)
    store, row = database.find_document("same text") or (None, -1)
    assert store is not None
    first, stop = store.document_rows(row)
    assert found[:, 0].tolist() == (store.chunk_id_base + np.arange(first, stop)).tolist()
    assert "generation 1" in caplog.text
    assert "generation 2" in caplog.text
    written = path.stat().st_mtime_ns
    assert opened(home)[1] == path
    assert path.stat().st_mtime_ns == written

    editor.delete(["same text"])
    database, later, found = opened(home)
    assert later != path
    assert not path.exists()
    assert not database.is_deleted(found).any()
    assert (found >= 0).all()

    editor.compact()
    database, path, _ = opened(home)
    assert database.validation is not None
    assert path == database.directory / database.validation.partition.neighbours


def test_no_more_neighbours_than_stored(home: Path) -> None:
    with pytest.raises(ConfigError, match=f"the database stores {NUM_NEIGHBOURS}"):
        validation_text(Database.open(home), NUM_NEIGHBOURS + 1)


def test_a_database_without_a_validation_split_says_how_to_get_one(tmp_path: Path) -> None:
    database = write_database(tmp_path, [document("only")])
    with pytest.raises(DatabaseError, match="--validation-share"):
        validation_text(database, 1)
