import inspect
import pickle

import pytest

from retro_ray import errors

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", CLASSES)
def test_errors_cross_processes_unchanged(kind: type[Exception]) -> None:
    error = pickle.loads(pickle.dumps(kind("what, where, and the way out")))
    assert type(error) is kind
    assert str(error) == "what, where, and the way out"


def test_an_overload_says_when_to_come_again() -> None:
    error = pickle.loads(pickle.dumps(errors.OverloadedError("full", retry_after_s=7.5)))
    assert (str(error), error.retry_after_s) == ("full", 7.5)
