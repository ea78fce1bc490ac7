"""One thread of a process computes with all processors, the others alone.

OpenMP keeps a team of waiting threads for every thread that has ever computed with several. When
all teams together have more threads than there are processors, libgomp lets none of them wait
awake any longer: in decoding, whose products are short, to wake them takes a third of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import ThreadpoolController


@contextmanager
def computing_alone() -> Iterator[None]:
    """What this thread computes meanwhile, with torch or FAISS, is done by it alone; others do as they did."""
    torch.get_num_threads()  # where a thread has never computed, torch would set its number over ours later
    with ThreadpoolController().limit(limits=1, user_api="openmp"):
        yield
