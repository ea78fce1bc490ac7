"""Partitions of keys alone, as a build leaves them on the disk."""

from pathlib import Path

import numpy as np

from retro_ray.database.format import Partition
from retro_ray.index.keys import write_keys


def write_partition(directory: Path, name: str, base: int, keys: np.ndarray) -> Partition:
    (directory / name).mkdir(parents=True, exist_ok=True)
    write_keys(directory / name / "keys.npy", [keys], *keys.shape)
    return Partition(
        name=name,
        chunk_id_base=base,
        num_documents=1,
        num_chunks=len(keys),
        num_tokens=len(keys),
        num_bytes=0,
        folder=name,
    )
