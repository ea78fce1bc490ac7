"""The report of an evaluation of documents whose names and texts try to break the page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from retro_ray.building.edit import DatabaseEditor
from retro_ray.database.store import Database
from retro_ray.evaluation.evaluate import evaluate
from retro_ray.evaluation.examples import choose_chunks, find_examples, shared_places
from retro_ray.evaluation.page import render
from retro_ray.evaluation.report import collect, is_current, write_report
from retro_ray.evaluation.results import read_result, write_result
from retro_ray.evaluation.subject import open_subject
from retro_ray.evaluation.sweeps import sweep
from retro_ray.evaluation.update import as_built, compare
from tests.unit.building.editing import HashEmbedder, document, write_database
from tests.unit.evaluation.trained import save_run

pytestmark = pytest.mark.usefixtures("in_this_process")
EVIL = '<script>alert("alpha")</script> & <b>beta</b> '


class Page(HTMLParser):
    """Tags, attributes that load something, and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.ids.add(values.get("id") or "")
        if tag == "a":
            self.links.add((values.get("href") or "").removeprefix("#"))
        elif tag not in ("use", "g", "path"):
            self.loaded += [value for name in ("src", "href") if (value := values.get(name))]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    held_out = [document("<script>evil()</script>", EVIL * 6), document("v1"), document("v2")]
    stored = [document(f"<img src=x>{number}") for number in range(8)]
    save_run(tmp_path, write_database(tmp_path, stored, validation=held_out))
    return tmp_path


def recorded(home: Path) -> Path:
    """Everything that an evaluation keeps; returns the run."""
    with open_subject(home) as subject:
        evaluation = evaluate(subject, baseline=subject.checkpoint)
        scores = evaluation.to_dict()
        write_result(subject.run, "scores", scores)
        write_result(subject.run, "examples", find_examples(evaluation))
        write_result(subject.run, "sweep", sweep(subject, ["k", "share", "nprobe", "parts"]))
        pair = {"document": EVIL, "title": "", "near": EVIL, "near_title": "", "near_source": "", "jaccard": 0.9}
        near = {**scores, "min_jaccard": 0.8, "documents_with": 1, "pairs": [pair] * 20}
        write_result(subject.run, "near_duplicates", near)
        return subject.run


def test_the_page_holds_everything_and_loads_nothing(home: Path) -> None:
    run = recorded(home)
    DatabaseEditor(home, embedder=HashEmbedder()).add([document("<i>new</i>", EVIL * 6)])
    after = Database.open(home)
    before = as_built(after)
    with open_subject(home, database=before) as subject:
        write_result(run, "update", compare(subject, before, after))
    output = home / "out" / "report.html"
    beside = write_report(collect(run, before), before, output)
    text = output.read_text()
    page = Page(text)
    assert page.tags.count("svg") == 2 + 3, "scores, leakage, three axes; the run has no metrics"
    assert {"scores", "leakage", "near", "sweeps", "update", "examples", "training", "settings"} <= page.ids
    assert page.links <= page.ids
    assert page.loaded == []
    assert not re.search(r"url\((?!#)", text)
    assert not {"script", "b", "i", "img"} & set(page.tags), "texts are escaped"
    assert "&lt;script&gt;evil()" in text
    assert "and 5 more, in the JSON file" in text
    assert "the index of this database is exact" in text
    assert "Of another checkpoint" not in text
    facts = json.loads(beside.read_text())
    assert facts["scores"]["bits_per_byte"].keys() == {"on", "off", "random", "baseline"}
    assert f"{facts['scores']['bits_per_byte']['on']:.4f}" in text
    assert facts["model"]["chunk_length"] == 8


def test_results_of_other_states_are_told(home: Path) -> None:
    run = recorded(home)
    database = Database.open(home)
    assert is_current(read_result(run, "scores"), run, database)
    assert read_result(run, "update") is None
    assert not is_current(None, run, database)
    sweep_before = read_result(run, "sweep")
    assert sweep_before is not None
    write_result(run, "sweep", {**sweep_before, "database_version": "another"})
    assert not is_current(read_result(run, "sweep"), run, database)
    assert "Of another checkpoint, database or text than the scores: sweep." in render(collect(run, database))


def test_a_page_of_scores_alone(home: Path) -> None:
    with open_subject(home, max_chunks=1) as subject:
        write_result(subject.run, "scores", evaluate(subject).to_dict())
        facts = collect(subject.run, subject.database)
    facts["metrics"] = [{"step": 1, "loss": 2.0}, {"step": 1, "validation_bpb_on": 1.0, "validation_bpb_off": 1.5}]
    page = Page(render(facts))
    assert page.tags.count("svg") == 3
    assert page.links <= page.ids


def test_chunks_are_chosen_for_what_they_show() -> None:
    saved = np.array([99.0, 5, 1, -3, 2, 50, 4])
    overlaps = np.array([0.0, 0.9, 0.1, 0.5, 0.2, 0.9, 0.9])
    owner = np.array([0, 0, 0, 0, 0, 1, 1])
    chosen = choose_chunks(saved, overlaps, owner)  # 0 and 5 begin a document
    assert chosen == {"gained most": 1, "gained with little to copy": 4, "typical": 2, "lost most": 3}
    assert choose_chunks(saved[:1], overlaps[:1], owner[:1]) == {}


def test_shared_places_are_runs_of_five() -> None:
    own = np.arange(12)
    other = np.array([[90, 3, 4, 5, 6, 7, 91, -1, -1, 0, 1, 2]])
    assert np.flatnonzero(shared_places(own, other)).tolist() == [3, 4, 5, 6, 7]
    assert not shared_places(np.arange(4), other).any()
    assert not shared_places(np.full(6, -1), np.full((1, 6), -1)).any()
