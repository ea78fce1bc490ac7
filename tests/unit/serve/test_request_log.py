import logging
import re

import pytest
from fastapi.testclient import TestClient

from retro_ray.serve.api import ApiSettings, build_api
from tests.unit.serve.conftest import HERE
from tests.unit.serve.fakes import DictEditor, EchoService

SECRET = "my-secret-words"


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


def asked(service: EchoService, **settings) -> TestClient:
    api = build_api(service, DictEditor(), ApiSettings(**settings))
    return TestClient(api, base_url="http://127.0.0.1:8000", client=HERE)


def logged(caplog: pytest.LogCaptureFixture) -> str:
    """What the service logged; the test client's own lines apart."""
    return "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("retro_ray"))


def test_a_request_is_one_line_of_sizes(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    body = f'{{"prompt": "{SECRET}"}}'
    headers = {"Content-Type": "application/json", "X-Request-ID": "mine-1"}
    response = client.post("/v1/completions?x=" + SECRET, content=body, headers=headers)
    assert response.headers["x-request-id"] == "mine-1"
    assert re.fullmatch(
        rf"request=mine-1 method=POST route=/v1/completions status=200 received_bytes={len(body)} "
        rf"sent_bytes={len(response.content)} seconds=\d+\.\d+",
        logged(caplog),
    )


def test_nothing_of_a_request_is_logged_however_it_ends(
    client: TestClient, service: EchoService, caplog: pytest.LogCaptureFixture
) -> None:
    def ask(**body) -> None:
        client.post("/v1/completions", json={"prompt": SECRET, **body})

    ask()
    ask(stream=True)
    ask(max_tokens=101)
    ask(model=SECRET)
    ask(**{SECRET: 1})
    service.late_error = KeyError(SECRET)
    ask()
    ask(stream=True)
    service.error = KeyError(SECRET)
    ask()
    ask(stream=True)
    client.get(f"/v1/documents/{SECRET}")
    client.get(f"/{SECRET}")
    client.post("/v1/retrieve", json={"text": SECRET})
    text = logged(caplog)
    assert text.count("request=") >= 12
    assert "failed with KeyError at" in text  # and where, for who has to mend it
    assert "fakes.py" in text
    assert SECRET not in text


def test_bodies_are_logged_if_asked_for(service: EchoService, caplog: pytest.LogCaptureFixture) -> None:
    asked(service, log_bodies=True).post("/v1/completions", json={"prompt": SECRET})
    assert f'"prompt":"{SECRET}"' in logged(caplog)


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\u00e9", 'a"'])
def test_an_id_that_could_spoil_a_log_is_replaced(client: TestClient, given: str) -> None:
    response = client.get("/healthz", headers={"X-Request-ID": given.encode("latin-1")})
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


def test_the_id_is_left_to_a_proxy_that_sends_it(service: EchoService) -> None:
    assert "x-request-id" not in asked(service, send_request_id=False).get("/healthz").headers


@pytest.mark.parametrize("path", ["/healthz", "/v1/models", "/nothing", "/docs", "/openapi.json", "/"])
def test_browsers_are_told_to_take_answers_for_what_they_are(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "http" not in policy  # nothing is loaded from elsewhere
    assert "'unsafe-inline'" not in policy.split("style-src")[0]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_what_nobody_foresaw_keeps_these_headers(client: TestClient, service: EchoService) -> None:
    service.error = KeyError("x")
    response = client.post("/v1/completions", json={"prompt": "a"}, headers={"X-Request-ID": "mine-2"})
    assert response.status_code == 500
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-request-id"] == "mine-2"
