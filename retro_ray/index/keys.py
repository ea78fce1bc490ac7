"""Keys on disk: one float32 array per partition, memory-mapped, row i the embedding of chunk i.

One contiguous array, so that FAISS can compute distances to any of its rows without a copy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from retro_ray.errors import DatabaseError

_KEYS_PER_BLOCK = 1 << 14


def write_keys(path: Path, blocks: Iterable[np.ndarray], num_rows: int, dim: int) -> None:
    """Write blocks of keys, float32 [n, dim], as one array of `num_rows` that appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, dim)}
            np.lib.format.write_array_header_1_0(file, header)
            written = 0
            for block in blocks:
                file.write(np.ascontiguousarray(block, "<f4").data)
                written += len(block)
            if written != num_rows:
                raise ValueError(f"{num_rows} keys were announced for {path}, {written} came")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_keys(path: Path) -> np.ndarray:
    """The keys in `path`, float32 [n, D], read-only and memory-mapped.

    Raises:
        DatabaseError: the file is missing or damaged.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DatabaseError(f"cannot read {path} ({error}): check it with `python -m retro_ray verify`") from error


def key_blocks(path: Path) -> Iterator[np.ndarray]:
    """The keys of a partition, float32 [<= 16384, D] at a time."""
    keys = read_keys(path)
    for start in range(0, len(keys), _KEYS_PER_BLOCK):
        yield keys[start : start + _KEYS_PER_BLOCK]


def sample_keys(paths: Sequence[Path], num_keys: int, seed: int) -> np.ndarray:
    """A random sample of the keys of several files, float32 [n, D]: every key is as likely as any other."""
    files = [read_keys(path) for path in paths]
    ends = np.cumsum([len(keys) for keys in files])
    total = int(ends[-1])
    chosen = np.sort(np.random.default_rng(seed).choice(total, size=min(num_keys, total), replace=False))
    starts = np.concatenate([[0], ends[:-1]])
    parts = [
        keys[chosen[(chosen >= start) & (chosen < end)] - start]
        for keys, start, end in zip(files, starts, ends, strict=True)
    ]
    return np.concatenate(parts)
