"""Recorded passes compute what others do. Only a GPU records; for a CPU, here, a recording is done again, into the
tensors that it gave at first.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from retro_ray.model.pass_graph import PassGraphs
from tests.unit.generation.fakes import CHUNK_LENGTH, make_model

VOCAB, NUM_NEIGHBOURS, MOST_TOKENS = 50, 2, 100
WIDTHS = ([1, 1, 1], [1, 2, 1], [1, 0, 1], [0, 1, 1])
MODELS = [
    {},
    {"pointer": False},
    {"cca_start": "paper"},
    {"num_kv_heads": 1},
    {"cca_layers": ()},
    {"rope_frequencies": (1.0, 0.5, 0.1, 0.01)},
]
each_model = pytest.mark.parametrize("changes", MODELS, ids=str)


def tensors_of(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, tuple):
        for part in result:
            yield from tensors_of(part)
    elif dataclasses.is_dataclass(result):
        yield from tensors_of(tuple(getattr(result, field.name) for field in dataclasses.fields(result)))


class NothingFromTheMachine(TorchDispatchMode):
    """No number of Python's is made a tensor: to copy it to a GPU cannot be recorded."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


class DoneAgain:
    def __init__(self, work: Callable[[], Any], pool: Any) -> None:
        assert pool is None
        self._work, self._result = work, work()

    def replay(self) -> Any:
        with NothingFromTheMachine():
            again = self._work()
        for recorded, new in zip(tensors_of(self._result), tensors_of(again), strict=True):
            recorded.copy_(new)
        return self._result


def decoded(device: str, changes: dict, graphs: PassGraphs | None) -> list[torch.Tensor]:
    """Logits of many passes over three slots: some pause, some have drafts, neighbours come and fail to."""
    generator = torch.Generator().manual_seed(7)
    model = make_model(VOCAB, num_chunks=MOST_TOKENS // CHUNK_LENGTH, pointer_max_ngram=4, **changes).to(device)
    tokens_BT = torch.randint(1, VOCAB, (3, 9), generator=generator)
    lengths_B, cache = torch.tensor([9, 5, 2]), model.new_cache(3, MOST_TOKENS, num_neighbours=NUM_NEIGHBOURS)
    cache.pass_graphs = graphs

    def neighbours(*shape: int) -> torch.Tensor:
        shape = (*shape, NUM_NEIGHBOURS, 2 * CHUNK_LENGTH)
        return torch.randint(1, VOCAB, shape, generator=generator).to(device)

    logits = [model.prefill(tokens_BT.to(device), lengths_B, cache, neighbours(3, 2)).cpu()]
    for step in range(96):
        num_new = [
            min(width, model.most_new_tokens(length), MOST_TOKENS - length)
            for width, length in zip(WIDTHS[step % 4], cache.lengths.tolist(), strict=True)
        ]
        tokens_N = torch.randint(1, VOCAB, (sum(num_new),), generator=generator).to(device)
        arrived_B = torch.rand(3, generator=generator) < 0.8
        logits.append(model.decode_tokens(tokens_N, num_new, cache, neighbours(3), None, arrived_B).cpu())
    assert MOST_TOKENS in cache.lengths.tolist(), "a full slot pauses, too"
    return logits


def assert_same_as_a_cpu(device: str, changes: dict, graphs: PassGraphs) -> None:
    expected, found = decoded("cpu", changes, None), decoded(device, changes, graphs)
    assert graphs.num_recorded >= 2
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@each_model
def test_passes_done_again_with_other_numbers_compute_what_others_do(changes: dict) -> None:
    assert_same_as_a_cpu("cpu", changes, PassGraphs(DoneAgain))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@each_model
def test_recorded_passes_compute_what_a_cpu_does(changes: dict) -> None:
    assert_same_as_a_cpu("cuda", changes, PassGraphs())


def test_a_shape_is_recorded_when_it_has_come_back_and_forgotten_with_the_cache() -> None:
    graphs, cpu, work = PassGraphs(DoneAgain), torch.device("cpu"), []

    def do(number: int) -> int:
        stages = graphs.stages("shape", [number], cpu)
        return int(stages.do("twice", lambda: work.append(number) or stages.numbers_X * 2))

    assert [do(1), do(2), graphs.num_recorded] == [2, 4, 0]
    assert [do(3), do(4), graphs.num_recorded] == [6, 8, 1]
    assert work == [1, 2, 3, 3, 3], "the recording is that of the third time"
    graphs.clear()
    assert [do(5), graphs.num_recorded] == [10, 0]
