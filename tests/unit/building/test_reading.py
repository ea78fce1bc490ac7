"""A share of a corpus: the same documents every time, and a larger share holds a smaller one."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_ray.building.reading import chosen_records, is_chosen
from retro_ray.building.survey import survey_unit
from retro_ray.config import CorpusConfig
from retro_ray.errors import ConfigError
from retro_ray.text.corpus import plan_units


@given(st.text(max_size=20), st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_larger_share_holds_a_smaller_one(document_id: str, one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert is_chosen(document_id, large) or not is_chosen(document_id, small)
    assert is_chosen(document_id, 1.0)


def test_a_share_is_about_that_share_of_the_documents() -> None:
    chosen = sum(is_chosen(f"document {number}", 0.3) for number in range(10_000))
    assert 2_800 < chosen < 3_200


def test_survey_and_chunking_see_the_same_share(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    config = CorpusConfig(input=(str(tmp_path),), share=0.5)
    (unit,) = plan_units(config)
    chosen = list(chosen_records(unit, config))
    assert 15 < len(chosen) < 45
    assert survey_unit(unit, config, 0.0).num_documents == len(chosen)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="--share"):
        CorpusConfig(share=share)
