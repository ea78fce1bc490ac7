"""Passes spread over Ray actors: the same sums whoever makes them, and nothing is made twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retro_ray.evaluation import workers
from retro_ray.evaluation.near_duplicates import find_near_duplicates
from retro_ray.evaluation.passes import PassScorer
from retro_ray.evaluation.subject import open_subject
from retro_ray.evaluation.workers import forget_other_models, run_passes
from tests.unit.building.editing import document, write_database
from tests.unit.evaluation.trained import save_run

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
TEXT = " ".join(f"alpha {number}" for number in range(30))


def test_sums_do_not_depend_on_the_workers_and_an_evaluation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = [document(f"v{number}") for number in range(7)] + [document("twin", TEXT)]
    stored = [*(document(f"d{number}") for number in range(9)), document("of twin", TEXT + " beta")]
    save_run(tmp_path, write_database(tmp_path, stored, validation=held_out))
    monkeypatch.setattr(workers, "document_groups", lambda documents, _: [documents[i : i + 2] for i in (0, 2, 4, 6)])
    with open_subject(tmp_path) as subject:
        passes = {"on": subject.on(), "off": subject.off(), "the same": subject.on()}
        found = {
            count: run_passes(passes, subject.text, subject.documents, tmp_path / str(count), count) for count in (1, 2)
        }
        assert {name: one.total for name, one in found[1].items()} == {
            name: one.total for name, one in found[2].items()
        }
        np.testing.assert_array_equal(found[1]["on"].place_nats, found[2]["on"].place_nats)
        alone = PassScorer(subject.text, passes).score("on", subject.documents)
        assert found[2]["on"].total.nats == pytest.approx(alone.total.nats, rel=1e-5)
        np.testing.assert_array_equal(found[2]["on"].chunks.rows, subject.rows)

        files = sorted((tmp_path / "2").rglob("*.npz"))
        assert len(files) == 2 * 4, "passes that are the same are made once"
        files[3].unlink()
        written = {file: file.stat().st_mtime_ns for file in files if file.exists()}
        again = run_passes(passes, subject.text, subject.documents, tmp_path / "2", 1)
        assert again["on"].total == found[2]["on"].total
        assert {file: file.stat().st_mtime_ns for file in written} == written
        assert files[3].exists()

        near = find_near_duplicates(subject)
        assert [(pair["document"], pair["near"]) for pair in near["pairs"]] == [("twin", "of twin")]

    one, other = forget_other_models(tmp_path / "scores", "a" * 64), forget_other_models(tmp_path / "scores", "b" * 64)
    assert other.exists()
    assert not one.exists()
