import shutil
from pathlib import Path

import pytest

from retro_ray.building.edit import DatabaseEditor
from tests.unit.building.editing import NAMES, HashEmbedder, document, write_database


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("template")
    write_database(home, [document(name) for name in NAMES], validation=[document("v0"), document("v1")])
    return home


@pytest.fixture
def home(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "home")


@pytest.fixture
def editor(home: Path) -> DatabaseEditor:
    return DatabaseEditor(home, embedder=HashEmbedder())
