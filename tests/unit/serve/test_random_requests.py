"""Requests made at random from the OpenAPI description: whatever comes, the answer is one that it describes."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from retro_ray.serve.api import ApiSettings, build_api
from retro_ray.serve.keys import KeyRing, parse_keys
from tests.unit.serve.fakes import DictEditor
from tests.unit.serve.tiny_replica import listening, new_replica, write_home

KEY = "k" * 32
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
ROUTES = {
    "POST /v1/completions",
    "POST /v1/retrieve",
    "GET /v1/models",
    "POST /v1/documents",
    "GET /v1/documents/{document_id}",
    "DELETE /v1/documents/{document_id}",
    "GET /healthz",
    "GET /readyz",
}


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, APIOperation]]:
    """Of a service with a real model, by method and path."""
    home = tmp_path_factory.mktemp("home")
    write_home(home)
    keys = KeyRing(parse_keys(f"{KEY} generate,edit", "keys"))
    with listening(build_api(new_replica(home), DictEditor(), ApiSettings(keys=keys))) as port:
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
        found = [result.ok() for result in schema.get_all_operations()]
        yield {operation.label: operation for operation in found}


def test_the_description_names_every_route(operations: dict[str, APIOperation]) -> None:
    assert set(operations) == ROUTES


@pytest.mark.parametrize(
    ("route", "mode"),
    [
        *((route, GenerationMode.POSITIVE) for route in sorted(ROUTES)),
        # What has neither body nor parameter cannot be asked wrongly.
        *((route, GenerationMode.NEGATIVE) for route in sorted(ROUTES) if "POST" in route or "{" in route),
    ],
    ids=lambda value: str(getattr(value, "value", value)),
)
def test_any_request_gets_a_described_answer(
    operations: dict[str, APIOperation], route: str, mode: GenerationMode
) -> None:
    """Both what fits the description and what does not."""

    @settings(max_examples=20, suppress_health_check=list(HealthCheck))
    @given(operations[route].as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        response = case.call(headers={"Authorization": f"Bearer {KEY}"})
        case.validate_response(response, checks=CHECKS)

    ask()
