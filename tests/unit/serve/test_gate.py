import json

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from retro_ray.serve.api import ApiSettings, build_api
from retro_ray.serve.keys import KeyRing, parse_keys
from retro_ray.serve.limits import MAX_BODY_BYTES, MAX_DOCUMENTS_BODY_BYTES
from tests.unit.serve.conftest import HERE
from tests.unit.serve.fakes import DictEditor, EchoService

WRITER, EDITOR, BOTH = "w" * 32, "e" * 32, "b" * 32
KEYS = KeyRing(parse_keys(f"{WRITER} generate\n{EDITOR} edit\n{BOTH} generate,edit", "keys"))
OPEN = {"/healthz", "/readyz"}
"""For probes, which have no key."""


def calls(api: FastAPI) -> list[tuple[str, str]]:
    """Every method and path of the OpenAPI description."""
    paths = api.openapi()["paths"]
    return [(method.upper(), path.replace("{document_id}", "d")) for path in paths for method in paths[path]]


def status_of(client: TestClient, method: str, path: str, key: str | None = None) -> tuple[int, str | None]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode("latin-1")}
    response = client.request(method, path, json={} if method == "POST" else None, headers=headers)
    return response.status_code, (response.json().get("error") or {}).get("code")


@pytest.fixture
def api(service: EchoService, editor: DictEditor) -> FastAPI:
    return build_api(service, editor, ApiSettings(keys=KEYS))


def test_with_keys_every_route_but_the_probes_asks_for_one(api: FastAPI) -> None:
    client = TestClient(api, base_url="http://127.0.0.1:8000", client=HERE)
    assert len(calls(api)) == 8
    for method, path in calls(api):
        expected = (200, None) if path in OPEN else (401, "invalid_api_key")
        assert status_of(client, method, path) == expected, path
        if path not in OPEN:
            assert status_of(client, method, path, "x" * 32) == expected
            assert status_of(client, method, path, "\xff") == expected
    response = client.post("/v1/completions", json={"prompt": "a"}, headers={"Authorization": f"Basic {WRITER}"})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"


def test_a_key_opens_what_it_has_the_right_for(api: FastAPI) -> None:
    client = TestClient(api, client=("203.0.113.5", 1))  # whoever has a key may be anywhere
    for method, path in calls(api):
        if path in OPEN:
            continue
        is_edit = path.startswith("/v1/documents")
        for key, may in ((WRITER, not is_edit), (EDITOR, is_edit), (BOTH, True)):
            status, code = status_of(client, method, path, key)
            assert (status == 403) is not may, (path, key)
            assert (code == "missing_right") is not may


def test_without_keys_only_this_machine_is_answered(service: EchoService, editor: DictEditor) -> None:
    api = build_api(service, editor)

    def status(peer: str | None, url: str = "http://127.0.0.1:8000", **headers: str) -> int:
        client = TestClient(api, base_url=url, client=(peer, 1) if peer else None, headers=headers)
        return client.post("/v1/completions", json={"prompt": "a"}).status_code

    for peer in ("127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"):
        assert status(peer) == 200
    for url in ("http://localhost:8000", "http://[::1]:8000", "http://127.0.0.1"):
        assert status("127.0.0.1", url) == 200
    for peer in ("192.168.1.5", "203.0.113.5", "::ffff:203.0.113.5", "2001:db8::1", "unix", None):
        assert status(peer) == 403
    # A proxy on this machine speaks for others.
    for sign in ("X-Forwarded-For", "Forwarded", "X-Real-IP"):
        assert status("127.0.0.1", **{sign: "127.0.0.1"}) == 403
    # A web page whose name was made to point here (DNS rebinding).
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "[::1", ""):
        assert status("127.0.0.1", Host=host) == 403
    for path in OPEN:
        assert TestClient(api, client=("203.0.113.5", 1)).get(path).status_code == 200


def test_who_is_turned_away_learns_how_to_set_keys(service: EchoService) -> None:
    client = TestClient(build_api(service), client=("203.0.113.5", 1))
    error = client.post("/v1/completions", json={"prompt": "a"}).json()["error"]
    assert error["code"] == "api_keys_not_set"
    assert "api_keys_file=FILE, RETRO_RAY_API_KEYS_FILE or RETRO_RAY_API_KEYS" in error["message"]


def test_where_every_peer_is_a_proxy_of_ours_nobody_is_taken_for_this_machine(service: EchoService) -> None:
    api = build_api(service, settings=ApiSettings(peer_is_known=False))
    client = TestClient(api, base_url="http://127.0.0.1:8000", client=HERE)
    assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 403


def test_who_is_not_let_in_is_not_read(api: FastAPI, service: EchoService) -> None:
    """Neither a body that is too large nor one that is no JSON is looked at."""
    client = TestClient(api)
    for body in (b"x" * (MAX_BODY_BYTES + 1), b"{"):
        response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 401


def test_each_route_has_its_own_limit(client: TestClient, editor: DictEditor) -> None:
    document = {"id": "d", "text": "x" * (2 * MAX_BODY_BYTES)}
    assert client.post("/v1/documents", json={"documents": [document]}).status_code == 200
    too_large = json.dumps({"documents": [{"id": "e", "text": "x" * MAX_DOCUMENTS_BODY_BYTES}]})
    response = client.post("/v1/documents", content=too_large, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert set(editor.documents) == {"d"}
