"""An edit killed at any moment leaves the generation before or its own, and the next edit clears up behind it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retro_ray.building.edit import DatabaseEditor
from retro_ray.database.format import MANIFEST_NAME, database_directory
from retro_ray.database.store import Database
from tests.unit.building.editing import HashEmbedder, document, write_database
from tests.unit.building.killed_edit import EDITS

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that was edited before: what is deleted, added and replaced is there already."""
    home = tmp_path_factory.mktemp("killed") / "home"
    write_database(home, [document(f"d{number}") for number in range(6)], validation=[document("v")])
    editor = DatabaseEditor(home, embedder=HashEmbedder())
    editor.add([document("added")])
    editor.delete(["d5"])
    return home


def contents(home: Path) -> dict[str, str]:
    """Id and text of every live document, read through the store; every file of the manifest is checked."""
    database = Database.open(home)
    database.check_files(*database.manifest.files)
    found = {}
    for store in database.segments:
        for row in range(store.num_documents):
            first, stop = store.document_rows(row)
            tokens, mask = database.neighbour_tokens(np.arange(first, stop) + store.chunk_id_base)
            if mask.any():
                half = database.chunk_length
                text = database.tokenizer.decode(tokens[:, :half][mask[:, :half]])
                found[store.document_ref(row).id] = text
    return found


@pytest.fixture(scope="module")
def killed(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an edit's name / number of the operation it was killed at."""
    folder = tmp_path_factory.mktemp("copies")
    command = [sys.executable, "-m", "tests.unit.building.killed_edit", str(home), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("name", EDITS)
def test_killed_at_its_file_operations(name: str, home: Path, killed: Path) -> None:
    before = contents(home)
    generation = Database.open(home).manifest.generation
    copies = sorted((killed / name).iterdir())
    after = contents(copies[-1])
    assert (after == before) == (name == "compact")
    generations = [Database.open(copy).manifest.generation for copy in copies]
    assert generations == sorted(generations)
    assert generations[0] == generation
    assert generations[-1] == generation + 1
    assert len(copies) > 5
    for copy, now in zip(copies, generations, strict=True):
        assert contents(copy) == (after if now > generation else before)
    # The edit that comes next succeeds, and nothing is left of the killed one.
    undisturbed: set[str] = set()
    for copy in (copies[-1], *copies[: -1 : max(1, len(copies) // 3)]):
        if Database.open(copy).manifest.generation == generation:
            EDITS[name](DatabaseEditor(copy, embedder=HashEmbedder()))
        assert contents(copy) == after
        editor = DatabaseEditor(copy, embedder=HashEmbedder())
        editor.compact()
        editor.compact()
        directory = database_directory(copy)
        files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
        undisturbed = undisturbed or files
        assert files == undisturbed
        assert MANIFEST_NAME in files
        assert not any(".tmp-" in path for path in files)
