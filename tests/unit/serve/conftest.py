from collections.abc import Callable, Iterator

import pytest
import torch
from fastapi.testclient import TestClient

from retro_ray.serve.api import build_api
from tests.unit.serve.fakes import DictEditor, EchoService

HERE = ("127.0.0.1", 50_000)
"""A client on this machine."""


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Tiny products gain nothing from threads, and on a busy machine threads wait long for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def service() -> EchoService:
    return EchoService()


@pytest.fixture
def editor() -> DictEditor:
    return DictEditor()


@pytest.fixture
def client(service: EchoService, editor: DictEditor) -> TestClient:
    """Of a service without keys, asked from this machine; what nobody foresaw must be answered too."""
    return TestClient(build_api(service, editor), base_url="http://127.0.0.1:8000", client=HERE)


@pytest.fixture
def refused(client: TestClient, service: EchoService) -> Callable[..., dict]:
    """Posts a body that must be refused with 400 before anything is generated; returns the error."""

    def post(**body) -> dict:
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 400, response.text
        assert service.requests == []
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert "\n" not in error["message"]
        return error

    return post
