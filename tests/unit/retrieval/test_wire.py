"""What crosses as bytes is what went in: every array, to the bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_ray.index.encoder import PreparedQueries
from retro_ray.index.merge import Candidates
from retro_ray.index.search import Wanted
from retro_ray.retrieval.following import CommitId
from retro_ray.retrieval.messages import CandidateAnswer, CandidateRequest
from retro_ray.retrieval.wire import answer_from_bytes, answer_to_bytes, request_from_bytes, request_to_bytes

SIZES = st.integers(0, 5)


def assert_same(found: object, expected: object) -> None:
    """Equal fields, arrays by their bits, whatever is nested in what."""
    if isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray)
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert found.tobytes() == expected.tobytes()
    elif hasattr(expected, "__dict__"):
        assert type(found) is type(expected)
        for name, value in vars(expected).items():
            assert_same(getattr(found, name), value)
    else:
        assert found == expected


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    values = rng.standard_normal(shape).astype(np.float32)
    values[rng.random(shape) < 0.2] = np.inf
    values[rng.random(shape) < 0.1] = -0.0
    return values


@given(SIZES, SIZES, SIZES, st.booleans(), st.integers(0, 1 << 40), st.integers(0, 100))
def test_requests(num_queries: int, dim: int, nprobe: int, excludes: bool, generation: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    request = CandidateRequest(
        CommitId(generation, "ab" * 8),
        PreparedQueries(
            floats(rng, num_queries, dim),
            floats(rng, num_queries, dim // 2),
            rng.integers(-1, 1 << 40, (num_queries, nprobe)),
            floats(rng, num_queries, nprobe),
        ),
        Wanted(17, 4),
        rng.integers(-1, 1 << 40, (num_queries, 2)) if excludes else None,
    )
    assert_same(request_from_bytes(request_to_bytes(request)), request)


@given(SIZES, SIZES, st.booleans(), st.integers(0, 100))
def test_answers(num_queries: int, num_candidates: int, is_of_another_commit: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    candidates = Candidates(
        floats(rng, num_queries, num_candidates),
        floats(rng, num_queries, num_candidates),
        rng.integers(-1, 1 << 40, (num_queries, num_candidates)),
        floats(rng, num_queries),
    )
    answer = CandidateAnswer(CommitId(3, "cd"), None if is_of_another_commit else candidates, 5)
    assert_same(answer_from_bytes(answer_to_bytes(answer)), answer)


def test_what_is_no_array_is_refused() -> None:
    with pytest.raises(AttributeError):
        answer_to_bytes(CandidateAnswer(CommitId(3, "cd"), None, object()))  # pyright: ignore[reportArgumentType]
