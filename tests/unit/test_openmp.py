from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import faiss
import pytest
import torch

from retro_ray.openmp import computing_alone


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before, faiss_before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(3)
    faiss.omp_set_num_threads(3)
    yield
    torch.set_num_threads(before)
    faiss.omp_set_num_threads(faiss_before)


def numbers() -> tuple[int, int]:
    """Threads that torch and FAISS compute with in this thread, after torch has computed something."""
    torch.ones(300, 300) @ torch.ones(300, 300)
    return torch.get_num_threads(), faiss.omp_get_max_threads()


def test_only_this_thread_computes_alone_and_only_meanwhile() -> None:
    assert numbers() == (3, 3)
    with computing_alone():
        assert numbers() == (1, 1)
        with ThreadPoolExecutor(1) as other:
            assert other.submit(numbers).result()[0] == 3
    assert numbers() == (3, 3)


def test_a_thread_that_has_never_computed_does_so_alone() -> None:
    with ThreadPoolExecutor(1) as fresh:
        assert fresh.submit(computing_alone()(numbers)).result() == (1, 1)
        assert fresh.submit(numbers).result()[0] == 3
