"""Chunk stores of documents given as token ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from retro_ray.database.arrow_rows import fixed_size_lists, write_rows
from retro_ray.database.format import DOCUMENTS_SCHEMA, Partition, chunks_schema
from retro_ray.database.store import ChunkStore
from retro_ray.index.keys import write_keys

M = 4


def write_store(
    folder: Path,
    document_tokens: list[list[int]],
    *,
    name: str = "p",
    base: int = 0,
    keys: np.ndarray | None = None,
    first_document: int = 0,
) -> ChunkStore:
    """A store in `folder`/`name`; documents are numbered from `first_document` in their ids."""
    (folder / name).mkdir()
    rows: dict[str, list] = {"tokens": [], "length": [], "num_bytes": [], "document": []}
    documents = []
    for document, tokens in enumerate(document_tokens):
        first_row = len(rows["length"])
        for start in range(0, len(tokens), M):
            real = tokens[start : start + M]
            # What stands in the padding must not matter.
            rows["tokens"].append(real + [99] * (M - len(real)))
            rows["length"].append(len(real))
            rows["num_bytes"].append(2 * len(real))
            rows["document"].append(document)
        number = first_document + document
        documents.append(
            {
                "id": f"id {number}",
                "title": f"title {number}",
                "source": f"source {number}",
                "first_row": first_row,
                "num_chunks": len(rows["length"]) - first_row,
                "num_bytes": 2 * len(tokens),
            }
        )
    schema = chunks_schema(M, 300)
    columns = {
        "tokens": fixed_size_lists(np.array(rows["tokens"]).reshape(-1, M), pa.uint16()),
        **{column: pa.array(rows[column]) for column in ("length", "num_bytes", "document")},
    }
    num_chunks = write_rows(folder / name / "chunks.arrow", schema, [pa.table(columns)])
    write_rows(folder / name / "documents.arrow", DOCUMENTS_SCHEMA, [pa.Table.from_pylist(documents)])
    if keys is not None:
        write_keys(folder / name / "keys.npy", [keys], *keys.shape)
    partition = Partition(
        name=name,
        chunk_id_base=base,
        num_documents=len(documents),
        num_chunks=num_chunks,
        num_tokens=sum(map(len, document_tokens)),
        num_bytes=2 * sum(map(len, document_tokens)),
        folder=name,
    )
    return ChunkStore(folder, partition, M)
