"""`verify` names the file in which one byte is off; `inspect` says what the manifest says."""

import json
import sys
from pathlib import Path

import pytest

from retro_ray.__main__ import main
from retro_ray.building.edit import DatabaseEditor
from retro_ray.commands.verify import verify
from retro_ray.database.format import database_directory, read_manifest
from retro_ray.errors import DatabaseError
from tests.fakes import write_tiny_database
from tests.unit.building.editing import HashEmbedder, document, write_database


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit status of `python -m retro_ray ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["retro_ray", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def files_of(home: Path) -> list[str]:
    write_tiny_database(home)
    return sorted(read_manifest(database_directory(home)).files)


def test_every_file_is_checked(tmp_path: Path) -> None:
    """Whatever file is damaged, in whichever byte, it is named, and no other."""
    names = files_of(tmp_path)
    directory = database_directory(tmp_path)
    assert verify(tmp_path) == (len(names), [])
    for number, name in enumerate(names):
        path = directory / name
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[number * 7919 % len(damaged)] ^= 1
        path.write_bytes(damaged)
        num_files, found = verify(tmp_path)
        assert num_files == len(names)
        assert [entry["file"] for entry in found] == [str(path)]
        path.write_bytes(whole)


def test_exit_status_and_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = database_directory(tmp_path) / files_of(tmp_path)[0]
    assert run_command(monkeypatch, "verify", "--home", str(tmp_path)) == 0
    assert "0 damaged" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-1])
    assert run_command(monkeypatch, "verify", "--home", str(tmp_path)) == 1
    assert str(path) in capsys.readouterr().out
    path.unlink()
    assert run_command(monkeypatch, "verify", "--home", str(tmp_path), "--json") == 1
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] is False
    assert result["damaged"] == [{"file": str(path), "reason": "is missing"}]


def test_a_damaged_manifest_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files_of(tmp_path)
    manifest = database_directory(tmp_path) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"num_neighbours": 4', '"num_neighbours": 5'))
    with pytest.raises(DatabaseError, match="damaged"):
        verify(tmp_path)
    assert run_command(monkeypatch, "verify", "--home", str(tmp_path)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


def test_inspect_says_what_the_manifest_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files_of(tmp_path)
    manifest = read_manifest(database_directory(tmp_path))
    assert run_command(monkeypatch, "inspect", "--home", str(tmp_path), "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert described["documents"] == manifest.num_documents
    assert described["chunks"] == manifest.num_chunks
    assert described["shards"] == manifest.num_shards
    assert manifest.tokenizer_fingerprint in described["tokenizer"]
    assert described["size_bytes"]["chunks"] == sum(
        record.size_bytes for path, record in manifest.files.items() if path.endswith("chunks.arrow")
    )
    assert run_command(monkeypatch, "inspect", "--home", str(tmp_path)) == 0
    assert f"{manifest.num_chunks:,}" in capsys.readouterr().out


def test_an_edited_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Deleted documents are counted apart, and every file of an edit is checked."""
    built = write_database(tmp_path, [document(f"d{number}") for number in range(5)]).manifest
    editor = DatabaseEditor(tmp_path, embedder=HashEmbedder())
    editor.delete(["d1"])
    report = editor.update([document("d2", "alpha " * 20), document("new")])
    assert run_command(monkeypatch, "inspect", "--home", str(tmp_path), "--json") == 0
    described = json.loads(capsys.readouterr().out)
    manifest = read_manifest(database_directory(tmp_path))
    assert (described["documents"], described["deleted_documents"]) == (5, 2)
    assert described["chunks"] == built.num_chunks + report.chunks_added - described["deleted_chunks"]
    assert (described["generation"], described["edits_since_built"], described["segments"]) == (3, 2, 3)
    texts = [document(name).text for name in ("d0", "d3", "d4", "new")] + ["alpha " * 20]
    assert described["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert verify(tmp_path) == (len(manifest.files), [])
    for name in [manifest.deleted, *(path for path in manifest.files if path.startswith("edit-00000003/added"))]:
        path = database_directory(tmp_path) / str(name)
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert [entry["file"] for entry in verify(tmp_path)[1]] == [str(path)]
        path.write_bytes(whole)


@pytest.mark.parametrize("command", [("inspect",), ("verify",), ("search", "text"), ("generate", "text")])
def test_a_home_without_database_is_one_line(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, *command, "--home", str(tmp_path)) == 1
    error = capsys.readouterr().err
    assert "no retrieval database in" in error
    assert "jobs/index.py" in error
    assert len(error.splitlines()) == 1
