"""How the page is sent; what it does is tested in a browser, in tests/browser/."""

import re
from importlib import resources

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from retro_ray.serve.playground import mount_playground

FILES = {file.name: file for file in resources.files("retro_ray.serve.playground").iterdir()}


@pytest.fixture
def client() -> TestClient:
    api = FastAPI()
    mount_playground(api)
    return TestClient(api)


def test_the_page_may_run_and_load_nothing_but_its_own_files(client: TestClient) -> None:
    for path in ("/", "/playground/app.js", "/playground/style.css"):
        headers = client.get(path).headers
        policy = {words[0]: words[1:] for words in map(str.split, headers["content-security-policy"].split(";"))}
        assert policy == {
            "default-src": ["'none'"],
            "script-src": ["'self'"],
            "style-src": ["'self'"],
            "img-src": ["'self'", "data:"],
            "connect-src": ["'self'"],
            "base-uri": ["'none'"],
            "form-action": ["'none'"],
            "frame-ancestors": ["'none'"],
        }
        assert headers["x-content-type-options"] == "nosniff"


def test_all_that_the_page_names_is_there_and_nothing_is_elsewhere(client: TestClient) -> None:
    page = client.get("/").text
    names = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(names) >= 5
    for name in names:
        assert client.get(f"/{name}").status_code == 200, name
    for name in FILES.keys() - {"__init__.py", "__pycache__"}:
        text = FILES[name].read_text()
        assert set(re.findall(r"\w+://[^\"'\s>]*", text)) <= {"http://www.w3.org/2000/svg"}
        for imported in re.findall(r'from "\./([^"]+)"', text):
            assert client.get(f"/playground/{imported}").status_code == 200, imported


@pytest.mark.parametrize("name", ["app.js", "style.css", "icon.svg"])
def test_files_are_sent_with_their_type_and_again_only_when_they_changed(client: TestClient, name: str) -> None:
    answer = client.get(f"/playground/{name}")
    assert answer.content == FILES[name].read_bytes()
    kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}[name.partition(".")[2]]
    assert answer.headers["content-type"].partition(";")[0] == kind
    assert answer.headers["cache-control"] == "no-cache"
    again = client.get(f"/playground/{name}", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert "content-security-policy" in again.headers
    assert client.head(f"/playground/{name}").status_code == 200


@pytest.mark.parametrize("name", ["__init__.py", "..%2fapi.py", "%2e%2e/api.py", "%2fetc%2fpasswd", "no.js", ""])
def test_nothing_else_can_be_read(client: TestClient, name: str) -> None:
    assert client.get(f"/playground/{name}").status_code == 404


def test_the_page_is_small() -> None:
    size_bytes = sum(len(file.read_bytes()) for name, file in FILES.items() if name != "__pycache__")
    assert size_bytes < 64_000
