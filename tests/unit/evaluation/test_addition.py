"""What an addition brings, counted where every copy is known: chunks of equal text have equal keys."""

import json
import sys
from pathlib import Path

import pytest

from retro_ray.__main__ import main
from retro_ray.commands.assess import addition_as_text, describe_addition
from retro_ray.database.store import Database
from retro_ray.errors import InputError
from retro_ray.evaluation.addition import Addition, Reading, assess_addition
from tests.fakes import WORDS
from tests.unit.building.editing import CHUNK_LENGTH, HashEmbedder, document, write_database

HELD_OUT = document("held-out", " ".join(WORDS))
KNOWN = document("known", " ".join(reversed(WORDS)))
UNRELATED = document("unrelated", " ".join(map(str, range(1000, 1040))))


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return write_database(tmp_path, [KNOWN, UNRELATED], validation=[HELD_OUT])


def num_next_tokens(database: Database, text: str) -> int:
    """With the document's start token, without its first chunk."""
    return len(database.tokenizer.encode(text)) + 1 - CHUNK_LENGTH


def test_known_copies(database: Database) -> None:
    """The new version of the held-out document supplies all of it; a copy of a known one brings nothing."""
    newer, copy = document("newer", HELD_OUT.text), document("copy", KNOWN.text)
    addition = assess_addition(database, [newer, copy], HashEmbedder().embed)
    of_held_out, of_known = (num_next_tokens(database, one.text) for one in (HELD_OUT, KNOWN))
    assert addition.held_out == Reading(1, of_held_out, num_without=0, num_with=of_held_out)
    assert addition.new == Reading(2, of_held_out + of_known, num_without=of_known, num_with=of_known)
    assert addition.verdict.startswith("Much to gain: in its held-out documents, 100.0% of the next tokens would stand")
    assert "0.0% without" in addition.verdict


def test_documents_that_share_nothing_bring_nothing(database: Database) -> None:
    addition = assess_addition(database, [document("new", " ".join(map(str, range(50))))], HashEmbedder().embed)
    assert (addition.held_out.num_with, addition.new.num_with) == (0, 0)
    assert addition.verdict.startswith("Little to gain")


def test_new_documents_supply_each_other(database: Database) -> None:
    text = " ".join(map(str, range(50)))
    addition = assess_addition(database, [document("one", text), document("two", text)], HashEmbedder().embed)
    assert addition.new.num_with == addition.new.num_tokens == 2 * num_next_tokens(database, text)
    assert addition.new.num_without == 0
    assert "texts like the new ones" in addition.verdict


def test_a_database_without_held_out_documents(tmp_path: Path) -> None:
    database = write_database(tmp_path, [KNOWN, UNRELATED])
    addition = assess_addition(database, [document("copy", KNOWN.text)], HashEmbedder().embed)
    assert addition.held_out == Reading(0, 0, 0, 0)
    text = addition_as_text(describe_addition(addition, 1, 1.0))
    assert "held-out documents of the database" not in text
    assert "the new documents themselves" in text
    with pytest.raises(InputError, match="no documents"):
        assess_addition(database, [], HashEmbedder().embed)


def test_the_verdict_names_the_size() -> None:
    nothing = Reading(1, 100, 0, 0)
    assert Addition(8, Reading(1, 100, 5, 8), nothing).verdict.startswith("Some gain: in its held-out documents, 8.0%")


def test_the_command_takes_new_versions_first(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("retro_ray.retrieval.retriever.open_embedder", lambda database: HashEmbedder())
    others = [(f"other-{number}", " ".join(map(str, range(number, number + 300)))) for number in range(20)]
    rows = [*others, (HELD_OUT.id, HELD_OUT.text)]
    file = tmp_path / "new.jsonl"
    file.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in rows))
    flags = ["--home", str(tmp_path), "--max-chunks", "2", "--json"]
    monkeypatch.setattr(sys, "argv", ["retro_ray", "assess", str(file), *flags])
    main()
    told = json.loads(capsys.readouterr().out)
    assert told["sampled_documents"] < len(rows)
    assert told["held_out"]["new_copyable_share_with"] == 1.0
