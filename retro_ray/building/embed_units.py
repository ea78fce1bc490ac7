"""Chunking and embedding the input of a build with Ray Data: units in, pages with keys on the disk."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.data

from retro_ray.allocator import FAST_ALLOCATOR_ENV
from retro_ray.building.chunk_units import chunk_units
from retro_ray.building.embed_pages import PageEmbedder
from retro_ray.config import CorpusConfig, DatabaseConfig
from retro_ray.database.split import Split
from retro_ray.progress import progress_bar
from retro_ray.ray_session import num_cluster_gpus, num_free_cpus
from retro_ray.text.corpus import ReadUnit

if TYPE_CHECKING:
    from retro_ray.text.near_duplicates import NearDocuments

# Ray Data cuts blocks at this size. A page is larger, so every page is a block and all embedders get some.
_BLOCK_BYTES = 1 << 15
# An embedder actor and a chunking task that feeds it share a CPU, so that both run where there is only one.
_CPUS_PER_EMBEDDER = 0.75
_CPUS_PER_CHUNKER = 0.25
_CHUNKS_WORTH_AN_EMBEDDER = 1000
"""A CPU embeds as many in about the time in which an embedder starts."""


def embed_units(
    units: Sequence[ReadUnit],
    corpus: CorpusConfig,
    config: DatabaseConfig,
    split: Split,
    *,
    pages: Path,
    tokenizer_folder: Path,
    num_chunks: int,
    excluded: NearDocuments | None = None,
) -> None:
    """Write the pages of units; those that are there already are not made again.

    Args:
        units: what to read.
        corpus: how.
        config: chunk length and embedder.
        split: which partition each document belongs to.
        pages: folder of the pages.
        tokenizer_folder: of the database's tokenizer.
        num_chunks: about how many there will be: a few need few embedders, and the progress bar shows it.
        excluded: documents near to one of these are left out.
    """
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = _BLOCK_BYTES
    # One bar of ours, in chunks, in place of Ray Data's bars and its lines about each stage.
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # Ray Data's own hides what failed: a full disk, say
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    num_cpus, num_gpus = num_free_cpus(), num_cluster_gpus()
    num_embedders = min(num_gpus or num_cpus, math.ceil(max(1, num_chunks) / _CHUNKS_WORTH_AN_EMBEDDER))
    embedder_resources: dict[str, Any] = {"num_gpus": 1} if num_gpus else {"num_cpus": _CPUS_PER_EMBEDDER}
    receipts = (
        ray.data.from_items([{"unit": json.dumps(unit.to_dict())} for unit in units], override_num_blocks=len(units))
        .map_batches(
            chunk_units,  # pyright: ignore[reportArgumentType] (generators are accepted, but not declared)
            fn_kwargs={
                "pages": pages,
                "corpus": corpus,
                "split": split,
                "tokenizer_folder": tokenizer_folder,
                "chunk_length": config.chunk_length,
                "excluded": excluded,
            },
            batch_size=1,
            compute=ray.data.TaskPoolStrategy(size=max(1, num_cpus // 4)),
            num_cpus=_CPUS_PER_CHUNKER,
            runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false"}},
        )
        .map_batches(
            PageEmbedder,
            fn_constructor_args=(pages, tokenizer_folder, config.embedder, 1),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=num_embedders),
            runtime_env={"env_vars": {**FAST_ALLOCATOR_ENV, "TOKENIZERS_PARALLELISM": "false"}},
            **embedder_resources,
        )
    )
    with progress_bar(num_chunks, "embed", " chunks") as bar, warnings.catch_warnings():
        # A small corpus has fewer pages than there are embedders.
        warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")
        for batch in receipts.iter_batches(batch_size=None):
            bar.update(int(np.sum(batch["num_chunks"])))
        bar.total = bar.n
