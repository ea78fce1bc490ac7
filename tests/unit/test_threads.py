"""What all other tests show with one thread, with two: what is computed does not depend on their number."""

import threading
from collections.abc import Iterator

import faiss
import numba
import numpy as np
import pytest
import torch
from numba.np.ufunc.parallel import get_thread_count

from retro_ray.embedding import ChunkEmbedder
from retro_ray.index.shard import IndexShard
from retro_ray.model.layers import FeedForward
from retro_ray.model.pointer import DecoderOutput
from retro_ray.model.row_attention import read_rows
from retro_ray.openmp import computing_alone
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.training.vocabulary_loss import vocabulary_loss
from tests.unit import test_embedding
from tests.unit.index import test_shard
from tests.unit.model import test_compiled_rows, test_information_flow
from tests.unit.retrieval.homes import write_home

NUM_THREADS = 2


@pytest.fixture(scope="module", autouse=True)
def several_threads() -> Iterator[None]:
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(NUM_THREADS)
    faiss.omp_set_num_threads(NUM_THREADS)
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


def test_there_are_several() -> None:
    assert torch.get_num_threads() == faiss.omp_get_max_threads() == NUM_THREADS


test_exact_search_is_brute_force = test_shard.test_exact_search_is_brute_force
test_ties_far_beyond_the_margin = test_shard.test_ties_far_beyond_the_margin
test_long_keys_in_large_batches = test_shard.test_long_keys_in_large_batches
test_an_answer_does_not_depend_on_the_batch = test_shard.test_an_answer_does_not_depend_on_the_batch

clustered, codec = test_shard.clustered, test_shard.codec
test_a_compressed_index_respects_exclusions_and_refills = (
    test_shard.test_a_compressed_index_respects_exclusions_and_refills
)

fp32, reference = test_embedding.fp32, test_embedding.reference
test_equal_calls_are_equal_to_the_bit = test_embedding.test_equal_calls_are_equal_to_the_bit
test_a_key_belongs_to_its_text_in_any_order = test_embedding.test_a_key_belongs_to_its_text_in_any_order

_kernel = test_information_flow._kernel
test_no_neighbours_none_left_and_all_masked_are_bitwise_alike = (
    test_information_flow.test_no_neighbours_none_left_and_all_masked_are_bitwise_alike
)


def test_batches_of_texts_have_keys_that_no_number_of_threads_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are divided among threads; what one of them meets is told."""
    embedder = ChunkEmbedder(batch_size=2)
    texts = [text + str(n) for n in range(3) for text in test_embedding.TEXTS]
    by_several = embedder.embed(texts)
    with computing_alone():
        assert np.array_equal(embedder.embed(texts), by_several)
    threads = set()

    def broken(encoded: list[list[int]], lengths: np.ndarray) -> np.ndarray:
        threads.add(threading.current_thread().name)
        raise MemoryError("no room")

    monkeypatch.setattr(embedder, "_embed_batch", broken)
    with pytest.raises(MemoryError, match="no room"):
        embedder.embed(texts)
    assert threads
    assert all(name.startswith("embed") for name in threads)


def test_batches_of_queries_have_neighbours_that_no_number_of_threads_changes(tmp_path, monkeypatch) -> None:
    """They are divided among threads, each of which computes alone."""
    rng = np.random.default_rng(0)
    (tmp_path / "database").mkdir()
    keys = rng.standard_normal((30, 8)).astype(np.float32)
    home = write_home(tmp_path / "database", [[d] * 9 for d in range(30)], keys, [11, 20], [0, 1, 0])
    retriever = LocalRetriever.open(home.database)
    queries = rng.standard_normal((5 * 64, 8)).astype(np.float32)
    with computing_alone():
        expected = retriever.search_ids(queries, 4)
    threads, candidates = set(), IndexShard.candidates

    def noted(*arguments):
        threads.add((threading.current_thread().name, faiss.omp_get_max_threads()))
        return candidates(*arguments)

    monkeypatch.setattr(IndexShard, "candidates", noted)
    found = retriever.search_ids(queries, 4)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert threads
    assert all(name.startswith("retro-ray-asking") and num_threads == 1 for name, num_threads in threads)


test_a_token_reads_what_a_softmax_over_its_rows_gives = (
    test_compiled_rows.test_a_token_reads_what_a_softmax_over_its_rows_gives
)


def test_a_token_reads_the_same_to_the_bit_with_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(3, 8, 200, 64, generator=generator).bfloat16() for _ in range(2))
    q_NHE = torch.randn(3, 8, 64, generator=generator)
    where = torch.arange(3), torch.tensor([199, 3, 120])
    with_several = read_rows(q_NHE, keys, values, *where)
    assert numba.get_num_threads() == min(NUM_THREADS, get_thread_count())
    torch.set_num_threads(1)
    try:
        alone = read_rows(q_NHE, keys, values, *where)
    finally:
        torch.set_num_threads(NUM_THREADS)
    assert numba.get_num_threads() == 1
    assert torch.equal(with_several, alone)


def test_a_step_in_eight_bits_is_the_same_to_the_bit_with_any_number_of_threads() -> None:
    """Sums over rows that are divided among threads are taken of parts that are not."""
    torch.manual_seed(0)
    block, h = FeedForward(384, 512, 1e-5), torch.randn(300, 384, requires_grad=True)
    block.initialise(1)
    for linear in (block.up, block.down):
        linear.trains_in_int8 = True

    def results() -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(h)
            nats, _ = vocabulary_loss(DecoderOutput(y), block.up.weight, torch.arange(300), in_int8=True)
        return nats, *torch.autograd.grad(nats, (h, *block.parameters()))

    with_several = results()
    torch.set_num_threads(1)
    try:
        alone = results()
    finally:
        torch.set_num_threads(NUM_THREADS)
    for a, b in zip(alone, with_several, strict=True):
        assert torch.equal(a, b)
