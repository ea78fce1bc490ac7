"""What do weights of eight bits cost? Nats of held-out documents whose tokens are read as a generation reads its own:
as new tokens, in passes from the end of one chunk up to that of the next, neighbours arriving in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from retro_ray.database.store import ChunkStore, Database
from retro_ray.evaluation.bits_per_byte import choose_documents
from retro_ray.generation.fast_model import fast_model
from retro_ray.model.retro import RetroModel
from retro_ray.training.windows import NO_CHUNK, NO_TARGET, Batch, ChunkTable, WindowReader, stored_neighbours

_NUM_CHUNKS = 1024
"""Of the documents that are read, about."""
_DOCUMENTS_TOGETHER = 8


def int8_cost(load: Callable[[], RetroModel], database: Database, store: ChunkStore) -> dict[str, Any]:
    """How many more nats with weights of eight bits than in bf16, as a share, for documents of `store`, up to the
    length of the model's context.
    """
    in_bf16, in_int8 = (_nats(fast_model(load(), int8=int8), database, store) for int8 in (False, True))
    return {"int8_cost_share": in_int8 / in_bf16 - 1}


@torch.inference_mode()
def _nats(model: RetroModel, database: Database, store: ChunkStore) -> float:
    table = ChunkTable((store,))
    neighbours = stored_neighbours(table, database, model.config.num_neighbours)
    reader = WindowReader(table, database, neighbours=neighbours, end_target=NO_TARGET)
    documents = choose_documents(store, _NUM_CHUNKS)
    num_chunks = np.minimum(store.document_num_chunks[documents], model.config.num_chunks)
    order = np.argsort(-num_chunks, kind="stable")
    total = 0.0
    for start in range(0, len(order), _DOCUMENTS_TOGETHER):
        some = order[start : start + _DOCUMENTS_TOGETHER]
        column = np.arange(int(num_chunks[some[0]]))
        chunks_BL = store.document_first_row[documents[some], None] + column
        chunks_BL[column >= num_chunks[some, None]] = NO_CHUNK
        total += _nats_of_new_tokens(model, reader.read(chunks_BL))
    return total


def _nats_of_new_tokens(model: RetroModel, batch: Batch) -> float:
    (batch_size, num_tokens), m = batch.tokens_BT.shape, model.config.chunk_length
    cache, total, start = model.new_cache(batch_size, num_tokens), 0.0, 0
    while start < num_tokens:
        stop = min(start + model.most_new_tokens(start), num_tokens)
        neighbours = mask = None
        if start > 0 and batch.neighbours_BLKR is not None and batch.neighbour_mask_BLKR is not None:
            chunk = start // m  # which the first of these tokens completes
            neighbours, mask = batch.neighbours_BLKR[:, chunk], batch.neighbour_mask_BLKR[:, chunk]
        tokens_N, num_new = batch.tokens_BT[:, start:stop].flatten(), [stop - start] * batch_size
        logits_NV = model.decode_tokens(tokens_N, num_new, cache, neighbours, mask)
        targets_N = batch.targets_BT[:, start:stop].flatten()
        total += float(F.cross_entropy(logits_NV.float(), targets_N, ignore_index=NO_TARGET, reduction="sum"))
        start = stop
    return total
