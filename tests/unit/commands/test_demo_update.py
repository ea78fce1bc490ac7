"""What the demo adds is what was held out, and its home stays as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retro_ray.building import edit
from retro_ray.commands import demo_update
from retro_ray.commands.demo_update import choose_documents, held_out_document, update_as_text, update_database
from retro_ray.database.store import Database
from tests.unit.building.editing import HashEmbedder, document, write_database
from tests.unit.evaluation.conftest import in_this_process  # noqa: F401
from tests.unit.evaluation.trained import save_run

HELD_OUT = [document("v0", "alpha beta " * 40), document("v1", "gamma")]


@pytest.mark.usefixtures("in_this_process")
def test_a_copy_is_updated_and_the_home_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = write_database(tmp_path, [document(f"d{number}") for number in range(8)], validation=HELD_OUT)
    save_run(tmp_path, database)
    monkeypatch.setattr(edit.DatabaseEditor, "_embedder", lambda self, manifest: HashEmbedder())
    monkeypatch.setattr(demo_update, "_generate", lambda home, database, prompt: f"{database.manifest.generation}")
    update = update_database(tmp_path)
    assert (update.before, update.after) == ("1", "2")
    assert HELD_OUT[0].text.startswith(update.prompt + update.written)
    assert update.result["after"]["documents"] == 9
    assert update.result["documents"] == 1
    assert Database.open(tmp_path).manifest == database.manifest
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith("demo-")] == []
    shown = update_as_text(update)
    assert "copy of the database: 1 held-out documents" in shown
    assert "Before, the model goes on:\n    1" in shown


def test_held_out_documents_are_as_they_were_read(tmp_path: Path) -> None:
    database = write_database(tmp_path, [document("d")], validation=HELD_OUT)
    assert [held_out_document(database, number) for number in range(2)] == HELD_OUT
    assert choose_documents(np.array([1, 6, 50, 5, 40, 41])).tolist() == [1, 3, 4]
    assert choose_documents(np.array([1, 2])).tolist() == [0, 1]
