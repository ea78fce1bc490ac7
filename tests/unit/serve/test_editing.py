"""/v1/documents over a real database that is edited in this process."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from retro_ray.building.edit import DatabaseEditor
from retro_ray.building.transaction import transaction
from retro_ray.database.format import database_directory
from retro_ray.database.store import Database
from retro_ray.serve.api import build_api
from retro_ray.serve.editing import HomeDocuments
from retro_ray.text.corpus import Document
from tests.unit.building.editing import HashEmbedder, document, write_database
from tests.unit.serve.conftest import HERE
from tests.unit.serve.fakes import EchoService

TEXT = "alpha \u00e9\u4e2d\U0001f600 <b>beta</b>\r\n\ttwo  spaces " * 9


class LocalEdits:
    """Edits in a thread; may be held up before each."""

    def __init__(self, home: Path) -> None:
        self._editor = DatabaseEditor(home, embedder=HashEmbedder())
        self.may_begin = asyncio.Event()
        self.may_begin.set()
        self.num_running = self.most_running = 0

    async def update(self, documents: Sequence[Document]) -> None:
        await self._edit(self._editor.update, documents)

    async def delete(self, document_ids: Sequence[str]) -> None:
        await self._edit(self._editor.delete, document_ids)

    async def _edit(self, edit, what) -> None:
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        await self.may_begin.wait()
        await asyncio.to_thread(edit, what)
        self.num_running -= 1


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_database(tmp_path, [document(f"d{i}") for i in range(6)])
    return tmp_path


@pytest.fixture
def client(home: Path) -> TestClient:
    api = build_api(EchoService(), HomeDocuments(home, LocalEdits(home)))
    return TestClient(api, base_url="http://127.0.0.1:8000", client=HERE)


def generation(home: Path) -> int:
    return Database.open(home).manifest.generation


def test_documents_are_read_as_they_were_written(client: TestClient) -> None:
    for one in (document(f"d{i}") for i in range(6)):
        answer = client.get(f"/v1/documents/{one.id}").json()
        assert answer == {
            "object": "document",
            "id": one.id,
            "title": one.title,
            "source": one.source,
            "text": one.text,
        }


def test_documents_are_added_replaced_and_deleted(client: TestClient, home: Path) -> None:
    new = {"id": "a/new one", "title": "New", "source": "http://example.com/", "text": TEXT}
    changed = {"id": "d3", "title": "Changed", "source": "", "text": "other words"}
    added = client.post("/v1/documents", json={"documents": [new, changed]})
    assert [one["id"] for one in added.json()["data"]] == ["a/new one", "d3"]
    assert generation(home) == 2  # both or neither: one commit
    for one in (new, changed):
        assert client.get(f"/v1/documents/{one['id']}").json() == {"object": "document", **one}
    assert client.delete("/v1/documents/d3").status_code == 200
    for answer in (client.get("/v1/documents/d3"), client.delete("/v1/documents/d3")):
        assert answer.status_code == 404
    assert generation(home) == 3


def test_a_database_that_something_else_changes_is_to_be_tried_again(client: TestClient, home: Path) -> None:
    with transaction(database_directory(home), "compacting"):
        answer = client.delete("/v1/documents/d3")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert answer.json()["error"]["code"] == "database_busy"
    assert client.delete("/v1/documents/d3").status_code == 200


def test_edits_take_turns_and_not_more_than_a_few_may_wait(home: Path) -> None:
    async def run() -> None:
        edits = LocalEdits(home)
        documents = HomeDocuments(home, edits)
        edits.may_begin.clear()
        waiting = [asyncio.create_task(documents.delete([f"d{i % 6}"])) for i in range(17)]
        [refused], _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert "16 edits wait already" in str(refused.exception())
        edits.may_begin.set()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [one for one in outcomes if one] == [*([f"d{i}"] for i in range(6)), refused.exception()]
        assert edits.most_running == 1

    asyncio.run(run())
