"""Which partition a document belongs to: a shard, or the held-out validation split.

Decided by a hash of the document's id alone, so that it depends neither on the order of reading nor
on the other documents, and every task decides alike without asking.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

VALIDATION = "validation"
_SHARE_BITS = 20


def document_hash(document_id: str) -> int:
    """64 bits that stand for a document's id."""
    return int.from_bytes(hashlib.blake2b(document_id.encode("utf-8", "replace"), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Split:
    """The split of a corpus: a share for validation, the rest over shards that are none of them empty."""

    validation_share: float
    num_raw_shards: int
    seed: int
    shard_numbers: tuple[int, ...]
    """Raw shards that hold documents, ascending; the i-th is shard i of the database."""

    @classmethod
    def of(cls, document_hashes: np.ndarray, num_shards: int, validation_share: float, seed: int) -> Split:
        """The split of documents with these hashes, uint64 [n]; shards that would be empty are left out.

        A corpus so small that the hash would hold all of it out keeps all of it in the database.
        """
        split = cls(validation_share, num_shards, seed, ())
        held_out, raw = split._places(document_hashes)
        if held_out.all():
            split, held_out = cls(0.0, num_shards, seed, ()), np.zeros_like(held_out)
        used = tuple(int(shard) for shard in np.unique(raw[~held_out]))
        return cls(split.validation_share, num_shards, seed, used)

    @property
    def partitions(self) -> tuple[str, ...]:
        """Names of the shards, then of the validation split."""
        return (*(shard_name(shard) for shard in range(len(self.shard_numbers))), VALIDATION)

    def partition_of(self, document_id: str) -> str:
        """`validation`, or the name of the shard."""
        held_out, raw = self._places(np.array([document_hash(document_id)], np.uint64))
        return VALIDATION if held_out[0] else shard_name(self.shard_numbers.index(int(raw[0])))

    def _places(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whether held out bool [n], and raw shard int64 [n]."""
        # The mix of SplitMix64, so that the choices of any two seeds are independent.
        mixed = hashes + np.array([self.seed], np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
        share = (mixed >> np.uint64(64 - _SHARE_BITS)).astype(np.float64) / (1 << _SHARE_BITS)
        low = mixed & np.uint64((1 << (64 - _SHARE_BITS)) - 1)
        return share < self.validation_share, (low % np.uint64(self.num_raw_shards)).astype(np.int64)


def shard_name(shard: int) -> str:
    """Name of a shard's partition and folder."""
    return f"shard-{shard:05d}"
