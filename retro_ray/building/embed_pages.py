"""The second of the two stages that Ray Data runs over the input: pages to pages with keys.

A plain callable over batches (dicts of numpy arrays), as `map_batches` calls it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from retro_ray.building.chunk_units import Batch
from retro_ray.building.pages import Page, write_page
from retro_ray.embedding import ChunkEmbedder
from retro_ray.text.tokenizer import TextTokenizer


class PageEmbedder:
    """Embeds pages and writes them; yields how many chunks each had."""

    def __init__(self, pages: Path, tokenizer: Path, embedder: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._pages = pages
        self._tokenizer = TextTokenizer.load(tokenizer)
        self._embedder = ChunkEmbedder(embedder)

    def __call__(self, batch: Batch) -> Batch:
        pages = [_page_from_row(batch, row) for row in range(len(batch["unit"]))]
        for page in pages:
            write_page(self._pages, page, self._embedder.embed(self._texts(page)))
        return {"num_chunks": np.array([page.chunks.num_rows for page in pages])}

    def _texts(self, page: Page) -> list[str]:
        """The text form of chunks: their real tokens decoded, without the start token."""
        column = page.chunks["tokens"].combine_chunks()
        tokens = column.flatten().to_numpy().reshape(page.chunks.num_rows, -1)
        lengths = page.chunks["length"].to_pylist()
        return self._tokenizer.decode_batch([row[:length] for row, length in zip(tokens, lengths, strict=True)])


def _page_from_row(batch: Batch, row: int) -> Page:
    chunks = pa.ipc.open_stream(batch["chunks"][row]).read_all()
    return Page(int(batch["unit"][row]), str(batch["partition"][row]), int(batch["number"][row]), chunks)
