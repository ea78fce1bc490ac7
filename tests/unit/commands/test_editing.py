"""add, delete, update and compact as their user sees them."""

import json
import sys
from pathlib import Path

import pytest

from retro_ray.__main__ import main
from retro_ray.database.format import database_directory
from retro_ray.database.store import Database
from tests.unit.building.editing import HashEmbedder, document, write_database


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Databases whose actors were told; the embedder is one of hashes."""
    told: list[Path] = []
    monkeypatch.setattr("retro_ray.retrieval.announce.announce_commit", told.append)
    monkeypatch.setattr("retro_ray.embedding.ChunkEmbedder", lambda name: HashEmbedder())
    return told


@pytest.fixture
def home(tmp_path: Path, announced: list[Path]) -> Path:
    write_database(tmp_path / "home", [document(f"d{number}") for number in range(4)])
    return tmp_path / "home"


def run_command(monkeypatch: pytest.MonkeyPatch, home: Path, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["retro_ray", *arguments, "--home", str(home)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_four_commands(
    home: Path,
    announced: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [{"name": "new", "body": "alpha beta"}, {"name": "d1", "body": "gamma"}, {"name": "x"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = ["--text-column", "body", "--id-column", "name"]
    assert run_command(monkeypatch, home, "add", str(tmp_path / "in.jsonl"), *columns) == 1
    error = capsys.readouterr().err
    assert "'d1' is in the database already" in error
    assert len(error.splitlines()) == 1
    assert announced == []

    assert run_command(monkeypatch, home, "update", str(tmp_path / "in.jsonl"), *columns, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result.pop("seconds") >= 0
    assert result == {
        "generation": 2,
        "documents_added": 2,
        "documents_deleted": 1,
        "documents_unchanged": 0,
        "chunks_added": 2,
        "skipped_records": {"missing column": 1},
        "advice": None,
    }

    (tmp_path / "page.md").write_text("# A page\n\ndelta epsilon")
    assert run_command(monkeypatch, home, "add", str(tmp_path / "page.md")) == 0
    assert "generation 3: 1 documents added" in capsys.readouterr().out
    assert run_command(monkeypatch, home, "delete", "--document", "page.md", "d3") == 0
    assert "2 deleted" in capsys.readouterr().out
    assert run_command(monkeypatch, home, "compact", "--num-shards", "1") == 0
    database = Database.open(home)
    assert database.manifest.num_documents == 4
    assert database.manifest.num_shards == 1
    assert announced == [database_directory(home)] * 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("delete", "--document", "nowhere"), "not in the database: 'nowhere'"),
        (("compact", "--num-shards", "0"), "--num-shards is 0"),
        (("add", "{tmp}/empty"), "no documents in {tmp}/empty: 1 records skipped (1 empty document)"),
        (("update", "{tmp}/nowhere.txt"), "{tmp}/nowhere.txt does not exist"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: tuple[str, ...],
    expected: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file.txt").write_text(" ")
    assert run_command(monkeypatch, home, *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected.replace("{tmp}", str(tmp_path)) in error
    assert len(error.splitlines()) == 1
    assert Database.open(home).manifest.generation == 1
