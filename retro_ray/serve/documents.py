"""/v1/documents: the documents of the database, added, looked up and deleted while the service runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from fastapi import APIRouter
from pydantic import BaseModel, Field, StringConstraints

from retro_ray.serve.completion_request import StrictModel
from retro_ray.serve.errors import ApiError
from retro_ray.serve.limits import MAX_DOCUMENTS, MAX_ID_CHARACTERS

DocumentId = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARACTERS)]
Label = Annotated[str, StringConstraints(max_length=MAX_ID_CHARACTERS)]


@dataclass(frozen=True, kw_only=True)
class StoredDocument:
    """A document as the database has it."""

    id: str
    title: str
    source: str
    text: str


class DocumentEditor(Protocol):
    """What the routes below stand in front of.

    All of it raises RetroRayError for what a client can mend.
    """

    async def add(self, documents: Sequence[StoredDocument]) -> list[str]:
        """Put documents into the database, each in place of what has its id; returns the ids."""
        ...

    async def get(self, document_id: str) -> StoredDocument | None: ...

    async def delete(self, document_ids: Sequence[str]) -> list[str]:
        """Take documents out of the database; returns the ids of those that were there."""
        ...


class NewDocument(StrictModel):
    """A document to add."""

    id: DocumentId
    """A document that has it already is replaced."""
    text: str = Field(min_length=1)
    title: Label = ""
    source: Label = ""
    """Where it comes from; shown in citations, never opened."""


class AddRequest(StrictModel):
    """Body of POST /v1/documents."""

    documents: Annotated[list[NewDocument], Field(min_length=1, max_length=MAX_DOCUMENTS)]


class DocumentName(BaseModel):
    """A document, by its id."""

    object: Literal["document"] = "document"
    id: str


class AddReply(BaseModel):
    """Answer of POST /v1/documents."""

    object: Literal["list"] = "list"
    data: list[DocumentName]


class Document(DocumentName):
    """Answer of GET /v1/documents/ID."""

    title: str
    source: str
    text: str


class DeleteReply(DocumentName):
    """Answer of DELETE /v1/documents/ID."""

    deleted: Literal[True] = True


def add_documents(router: APIRouter, editor: DocumentEditor) -> None:
    """The routes of documents. An id may contain slashes."""

    @router.post("/v1/documents")
    async def add(body: AddRequest) -> AddReply:
        """Add documents, or replace those that have their ids; searched from the answer on."""
        ids = [document.id for document in body.documents]
        if len(set(ids)) < len(ids):
            twice = next(one for one in ids if ids.count(one) > 1)
            raise ApiError(400, f"documents has the id {twice!r} twice", param="documents", code="invalid_value")
        added = await editor.add([StoredDocument(**document.model_dump()) for document in body.documents])
        return AddReply(data=[DocumentName(id=one) for one in added])

    @router.get("/v1/documents/{document_id:path}")
    async def get(document_id: DocumentId) -> Document:
        """A document with its text."""
        document = await editor.get(document_id)
        if document is None:
            raise _not_there(document_id)
        return Document(id=document.id, title=document.title, source=document.source, text=document.text)

    @router.delete("/v1/documents/{document_id:path}")
    async def delete(document_id: DocumentId) -> DeleteReply:
        """Take a document out of the database; it is found no more from the answer on."""
        if not await editor.delete([document_id]):
            raise _not_there(document_id)
        return DeleteReply(id=document_id)


def _not_there(document_id: str) -> ApiError:
    return ApiError(404, f"the database has no document {document_id!r}", param="id", code="document_not_found")
