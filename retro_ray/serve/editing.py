"""A DocumentEditor over the database of a home; who does the editing is another's business. Knows no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from retro_ray.database.store import Database
from retro_ray.errors import OverloadedError
from retro_ray.serve.documents import StoredDocument
from retro_ray.text.corpus import Document

_MAX_WAITING = 16
"""Edits in progress and waiting."""
_RETRY_AFTER_S = 5.0

T = TypeVar("T")


class Edits(Protocol):
    """Changes a database, one edit at a time."""

    async def update(self, documents: Sequence[Document]) -> None:
        """Put documents in place of those with their ids; add those whose ids are new."""
        ...

    async def delete(self, document_ids: Sequence[str]) -> None:
        """Delete documents that are there."""
        ...


class HomeDocuments:
    """The documents of a home's database; edits of this replica wait for each other.

    Args:
        home: of the database.
        edits: changes it.
    """

    def __init__(self, home: Path, edits: Edits) -> None:
        self._home = home
        self._edits = edits
        self._one_at_a_time = asyncio.Lock()
        self._num_waiting = 0

    async def add(self, documents: Sequence[StoredDocument]) -> list[str]:
        new = [Document(id=one.id, title=one.title, source=one.source, text=one.text) for one in documents]
        await self._in_turn(lambda: self._edits.update(new))
        return [one.id for one in documents]

    async def get(self, document_id: str) -> StoredDocument | None:
        return await asyncio.to_thread(self._read, document_id)

    async def delete(self, document_ids: Sequence[str]) -> list[str]:
        async def delete_those_that_are_there() -> list[str]:
            there = await asyncio.to_thread(self._those_that_are_there, document_ids)
            if there:
                await self._edits.delete(there)
            return there

        return await self._in_turn(delete_those_that_are_there)

    async def _in_turn(self, edit: Callable[[], Awaitable[T]]) -> T:
        if self._num_waiting >= _MAX_WAITING:
            raise OverloadedError(f"{self._num_waiting} edits wait already: ask again later", _RETRY_AFTER_S)
        self._num_waiting += 1
        try:
            async with self._one_at_a_time:
                return await edit()
        finally:
            self._num_waiting -= 1

    def _those_that_are_there(self, document_ids: Sequence[str]) -> list[str]:
        database = Database.open(self._home)
        return [one for one in document_ids if database.find_document(one) is not None]

    def _read(self, document_id: str) -> StoredDocument | None:
        database = Database.open(self._home)
        place = database.find_document(document_id)
        if place is None:
            return None
        store, document = place
        rows = np.arange(*store.document_rows(document))
        is_real = np.arange(database.chunk_length)[None, :] < store.lengths(rows)[:, None]
        ref = store.document_ref(document)
        text = database.tokenizer.decode(store.tokens(rows)[is_real])
        return StoredDocument(id=ref.id, title=ref.title, source=ref.source, text=text)
