"""Flags of jobs that stand for settings take what these take."""

import dataclasses
from typing import Any, get_type_hints

import pytest

from jobs.train import _MODEL_FIELDS, _TRAINING_FIELDS, TrainFlags
from retro_ray.config import ModelConfig, TrainingConfig


@pytest.mark.parametrize(("settings", "names"), [(ModelConfig, _MODEL_FIELDS), (TrainingConfig, _TRAINING_FIELDS)])
def test_a_flag_in_place_of_a_recipes_setting_takes_its_values(settings: Any, names: tuple[str, ...]) -> None:
    flags, types = get_type_hints(TrainFlags), get_type_hints(settings)
    assert set(names) <= {field.name for field in dataclasses.fields(settings)}
    for name in names:
        assert flags[name] == types[name] | None, name
