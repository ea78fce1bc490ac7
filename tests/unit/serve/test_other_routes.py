"""/v1/retrieve, /v1/documents, /v1/models, the probes, the OpenAPI page, and the service's own life."""

import base64
import dataclasses
import hashlib
import re

import pytest
from fastapi.testclient import TestClient

from retro_ray.errors import DatabaseError, OverloadedError
from retro_ray.serve.api import build_api
from retro_ray.serve.documents import StoredDocument
from retro_ray.serve.limits import MAX_DOCUMENTS, MAX_TEXTS
from tests.unit.serve.fakes import NEIGHBOUR, DictEditor, EchoService


def test_texts_are_searched_for(client: TestClient, service: EchoService) -> None:
    answer = client.post("/v1/retrieve", json={"text": "what is it"})
    found = {"neighbours": [dataclasses.asdict(NEIGHBOUR)] * 2, "missing_shards": [3]}
    assert answer.json() == {"object": "list", "data": [found]}
    body = {"text": ["a", "b"], "num_neighbours": 1, "rerank": "overlap"}
    assert [len(one["neighbours"]) for one in client.post("/v1/retrieve", json=body).json()["data"]] == [1, 1]
    assert service.searched == [(["what is it"], None, None), (["a", "b"], 1, "overlap")]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": 5},
        {"text": []},
        {"text": ["a"] * (MAX_TEXTS + 1)},
        {"text": "a", "num_neighbours": 0},
        {"text": "a", "num_neighbours": 65},
        {"text": "a", "rerank": "better"},
        {"text": "a", "k": 5},
    ],
)
def test_a_wrong_search_is_refused(client: TestClient, service: EchoService, body: dict) -> None:
    response = client.post("/v1/retrieve", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == (list(body) or ["text"])[-1]
    assert service.searched == []


def test_a_search_that_fails_has_its_status(client: TestClient, service: EchoService) -> None:
    service.error = OverloadedError("64 retrievals wait")
    response = client.post("/v1/retrieve", json={"text": "a"})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


def test_documents_are_added_replaced_shown_and_deleted(client: TestClient, editor: DictEditor) -> None:
    documents = [
        {"id": "a/b.txt", "text": "<script>alert(1)</script>", "title": "T", "source": "S"},
        {"id": "c", "text": "x"},
    ]
    added = client.post("/v1/documents", json={"documents": documents})
    assert added.json() == {
        "object": "list",
        "data": [{"object": "document", "id": "a/b.txt"}, {"object": "document", "id": "c"}],
    }
    assert editor.documents["c"] == StoredDocument(id="c", title="", source="", text="x")
    for path in ("/v1/documents/a/b.txt", "/v1/documents/a%2Fb.txt"):
        assert client.get(path).json() == {"object": "document", **documents[0]}
    assert client.delete("/v1/documents/a/b.txt").json() == {"object": "document", "id": "a/b.txt", "deleted": True}
    assert set(editor.documents) == {"c"}


def test_a_document_that_is_not_there_is_a_404(client: TestClient) -> None:
    for answer in (client.get("/v1/documents/nope"), client.delete("/v1/documents/nope")):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "document_not_found"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"documents": []},
        {"documents": [{"id": "", "text": "x"}]},
        {"documents": [{"id": "a", "text": ""}]},
        {"documents": [{"id": "a"}]},
        {"documents": [{"id": "a", "text": "x", "url": "http://169.254.169.254/"}]},
        {"documents": [{"id": "a", "text": "x"}, {"id": "a", "text": "y"}]},
        {"documents": [{"id": str(i), "text": "x"} for i in range(MAX_DOCUMENTS + 1)]},
    ],
)
def test_a_wrong_document_is_refused(client: TestClient, editor: DictEditor, body: dict) -> None:
    response = client.post("/v1/documents", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("documents")
    assert editor.documents == {}


def test_an_edit_that_fails_says_why(client: TestClient, editor: DictEditor) -> None:
    editor.error = DatabaseError("no space left")
    response = client.post("/v1/documents", json={"documents": [{"id": "a", "text": "x"}]})
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "no space left"


def test_without_an_editor_there_are_no_documents(service: EchoService) -> None:
    client = TestClient(build_api(service))
    assert client.get("/v1/documents/a").status_code == 404
    assert "/v1/documents" not in client.get("/openapi.json").json()["paths"]


def test_the_model_says_what_it_is(client: TestClient) -> None:
    [model] = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("tiny", "model", "retro_ray")
    assert (model["checkpoint_step"], model["database_version"]) == (12, "0123456789abcdef")
    assert (model["context_length"], model["chunk_length"], model["num_neighbours"]) == (2048, 64, 2)


def test_alive_is_not_ready(client: TestClient, service: EchoService) -> None:
    assert client.get("/readyz").json() == {"status": "ready", "problems": []}
    service.problem = "shard 1 did not answer"
    assert client.get("/healthz").json() == {"status": "ok"}
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json() == {"status": "not ready", "problems": ["shard 1 did not answer"]}


def test_the_openapi_page_needs_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert len(addresses) == 3
    for address in addresses:
        assert address.startswith("/docs/")
        assert client.get(address).status_code == 200
    assert client.get("/docs/nothing.js").status_code == 404
    # The one inline script may run, by its digest, and no other.
    [script] = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'self' 'sha256-{digest}';" in page.headers["content-security-policy"]


def test_the_openapi_description_tells_of_keys_errors_and_streams(client: TestClient) -> None:
    description = client.get("/openapi.json").json()
    completions = description["paths"]["/v1/completions"]["post"]
    assert completions["security"] == [{"HTTPBearer": []}]
    assert set(completions["responses"]) == {"200", "4XX", "5XX"}
    assert set(completions["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "security" not in description["paths"]["/readyz"]["get"]


def test_the_service_starts_and_ends_with_the_server(service: EchoService) -> None:
    with TestClient(build_api(service)):
        assert service.lifecycle == ["start"]
    assert service.lifecycle == ["start", "close"]
