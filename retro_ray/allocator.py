"""Environment variables that make glibc's allocator keep what it has been given.

By default it returns every large tensor to the kernel and faults its pages in again at the next
allocation, which costs a third of the time of training and embedding on a CPU. Threads but the first
take from arenas of their own, which are returned whatever is set: Ray Train's, in which a worker
trains, would lose a tenth to it. The variables are read when a process starts, so they are given to
the processes that Ray starts.
"""

from __future__ import annotations

import sys

FAST_ALLOCATOR_ENV: dict[str, str] = (
    {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "100000000000",
        "MALLOC_TOP_PAD_": "500000000",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    if sys.platform == "linux"
    else {}
)
"""For `runtime_env={"env_vars": ...}`; empty where there is no glibc."""
