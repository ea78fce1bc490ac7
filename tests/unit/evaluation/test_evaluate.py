"""An evaluation from passes to figures, on texts whose overlaps and probabilities are known; without Ray."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from retro_ray.database.store import Database
from retro_ray.errors import CheckpointError, MismatchError
from retro_ray.evaluation.evaluate import Evaluation, chunk_overlaps, evaluate
from retro_ray.evaluation.passes import PassScorer
from retro_ray.evaluation.results import as_json
from retro_ray.evaluation.scores import PassScores
from retro_ray.evaluation.subject import open_subject
from retro_ray.evaluation.tables import leakage_table, scores_table
from tests.unit.building.editing import CHUNK_LENGTH, document, write_database
from tests.unit.evaluation.trained import save_run

WORDS = [f" {a}{b}" for a in ("al", "be", "ga", "de", "ep") for b in "abcdefghijklmnopqrst"]
STORED = "".join(WORDS[:40])
HALF = "".join([*WORDS[:20], *WORDS[60:90]])
NEW = "".join(WORDS[60:100])


pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    held_out = [document("copy", STORED), document("half", HALF), document("new", NEW)]
    database = write_database(home, [document("stored", STORED), document("other")], validation=held_out)
    save_run(home, database)
    return home


def evaluated(home: Path, **settings) -> Evaluation:
    with open_subject(home, max_chunks=settings.pop("max_chunks", None)) as subject:
        return evaluate(subject, **settings)


def test_overlaps_of_texts_that_are_stored_half_stored_and_new(home: Path) -> None:
    with open_subject(home) as subject:
        overlaps, owner = chunk_overlaps(subject), subject.store.document_of(subject.rows)
        longest = [overlaps[owner == number].max() for number in range(3)]
        lengths = subject.store.lengths(subject.rows)
    assert (overlaps[owner == 0] == 1).all(), "a copy"
    assert longest[1] == 1
    assert overlaps[owner == 1].min() < 0.5, "the second half is new"
    # Words of two letters behind a space share pieces; a run of a chunk is never shared.
    assert longest[2] < 1
    assert len(lengths) == len(overlaps)


def test_a_uniform_model_has_log2_of_the_vocabulary_per_token_at_every_alpha(tmp_path: Path) -> None:
    database = write_database(tmp_path, [document("stored", STORED)], validation=[document("half", HALF)])
    save_run(tmp_path, database, uniform=True, pointer=False)
    found = evaluated(tmp_path)
    with open_subject(tmp_path) as subject:
        store, rows = subject.store, subject.rows
        num_tokens, num_bytes = store.lengths(rows) - (np.arange(len(rows)) == 0), store.num_bytes(rows)
    bits = math.log2(database.manifest.vocab_size)
    for point in found.leakage:
        kept = found.overlaps <= point.alpha
        assert point.num_chunks == kept.sum()
        for score in point.scores.values():
            if kept.any():
                assert score.value == pytest.approx(bits * num_tokens[kept].sum() / num_bytes[kept].sum(), rel=1e-5)
    assert found.leakage[-1].scores["on"].value == found.scores["on"].value
    assert 0 < found.leakage[4].num_chunks < found.leakage[-1].num_chunks == len(rows)


def test_alpha_one_is_the_full_score_and_documents_add_up(home: Path) -> None:
    found = evaluated(home)
    scores, by_document = found.scores, found.by_document
    assert set(scores) == {"on", "off", "random"}
    assert len({score.value for score in scores.values()}) == 3
    for name in ("on", "off"):
        full = found.leakage[-1].scores[name]
        assert (full.nats, full.num_tokens, full.num_bytes) == (
            scores[name].nats,
            scores[name].num_tokens,
            scores[name].num_bytes,
        )
        assert by_document[name].nats.sum() == pytest.approx(scores[name].nats)
        assert by_document[name].num_bytes.tolist() == [len(text) for text in (STORED, HALF, NEW)]
        one = found.passes[name]
        assert one.place_nats.sum() == pytest.approx(scores[name].nats)
        assert one.place_num_tokens.sum() == scores[name].num_tokens
        assert one.place_num_tokens[0] == len(found.subject.rows) - 3, "the first place of a document is its start"
        assert len(one.nats_by_place) == CHUNK_LENGTH


def test_the_result_and_its_tables(home: Path) -> None:
    found = evaluated(home)
    result = found.to_dict()
    low, high = result["bits_per_byte_interval"]["on"]
    assert low <= result["bits_per_byte"]["on"] <= high
    low, high = result["gain_on_over_off_interval"]
    assert low <= result["gain_on_over_off"] <= high
    assert result["documents"] == 3
    assert as_json({"a": (math.nan, 1)}) == {"a": [None, 1]}
    assert "retrieval lowers bits per byte by" in scores_table(result)
    assert len(leakage_table(result).splitlines()) == 3 + len(found.leakage)
    alone = evaluated(home, max_chunks=1).to_dict()
    assert alone["documents"] == 1
    assert all(math.isnan(bound) for bound in alone["gain_on_over_off_interval"])
    assert "95 %:" not in scores_table(alone)


def test_a_baseline_is_scored_on_the_same_chunks(home: Path, tmp_path: Path) -> None:
    database = Database.open(home)
    save_run(tmp_path, database, seed=5, cca_layers=(), num_chunks=2)
    found = evaluated(home, baseline=tmp_path)
    result = found.to_dict()
    assert result["gain_on_over_baseline"] == 1 - result["bits_per_byte"]["on"] / result["bits_per_byte"]["baseline"]
    assert "against the baseline" in scores_table(result)
    for point in found.leakage:
        assert len({(score.num_tokens, score.num_bytes) for score in point.scores.values()}) == 1
    same = evaluated(home, baseline=home / "runs" / "default")
    assert same.scores["baseline"] == same.scores["off"]


def test_a_baseline_that_is_none(home: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist: give the folder"):
        evaluated(home, baseline=tmp_path / "nowhere")
    database = Database.open(home)
    save_run(tmp_path, database, meta={"tokenizer_fingerprint": "another"})
    with pytest.raises(MismatchError, match="another"):
        evaluated(home, baseline=tmp_path)


def test_parts_of_neighbours(home: Path) -> None:
    """With both parts masked a pass is RETRO[OFF]; with one of them it is neither."""
    with open_subject(home) as subject:
        passes = {
            "off": subject.off(),
            "on": subject.on(),
            "N": subject.on(parts="N"),
            "F": subject.on(parts="F"),
            "none": subject.on(0),
        }
        scorer = PassScorer(subject.text, passes)
        nats = {name: scorer.score(name, subject.documents).total.nats for name in passes}
        assert nats["none"] == pytest.approx(nats["off"], rel=1e-6)
        assert len({round(nats[name], 3) for name in ("off", "on", "N", "F")}) == 4
        tokens = scorer.score_tokens("on", subject.documents)
        assert tokens.nats.sum() == pytest.approx(nats["on"])


def test_scores_are_kept_by_what_they_depend_on(home: Path, tmp_path: Path) -> None:
    with open_subject(home) as subject:
        passes = [
            subject.off(),
            subject.on(),
            subject.on(1),
            subject.on(parts="N"),
            subject.random(),
            dataclasses.replace(subject.off(), weights="other"),
        ]
        identities = [one.identity(subject.text) for one in passes]
        assert len(set(identities)) == len(passes)
        assert [one.identity(subject.text) for one in passes] == identities
        scores = PassScorer(subject.text, {"on": subject.on()}).score("on", subject.documents)
    scores.write(tmp_path / "scores.npz")
    read = PassScores.read(tmp_path / "scores.npz")
    assert read.total == scores.total
    torch.testing.assert_close(read.place_nats, scores.place_nats)
