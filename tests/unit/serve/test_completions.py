import json

import pytest
from fastapi.testclient import TestClient

from retro_ray.errors import DeadlineError, OverloadedError, RetrievalError
from retro_ray.generation.request import GenerationRequest
from retro_ray.generation.sampling import SamplingConfig
from retro_ray.serve.limits import MAX_BODY_BYTES, MAX_CHOICES, MAX_PROMPT_CHARACTERS, MAX_PROMPT_TOKENS
from tests.unit.serve.fakes import EchoService


def test_a_completion_has_openais_form_and_citations(client: TestClient) -> None:
    body = client.post("/v1/completions", json={"model": "tiny", "prompt": "ab", "seed": 5}).json()
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "text": "ab/5",
                "logprobs": None,
                "finish_reason": "length",
                "citations": [
                    {
                        "chunk": 1,
                        "query": "what was asked",
                        "first_token": 8,
                        "last_token": 9,
                        "text_start": 0,
                        "text_end": 4,
                        "neighbours": [
                            {
                                "chunk_id": 7,
                                "document_id": "d",
                                "title": "t",
                                "source": "s",
                                "distance": 0.5,
                                "text": "here",
                                "continuation": "after",
                            }
                        ],
                        "missing_shards": [3],
                    }
                ],
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
    }


def test_every_setting_reaches_the_engine(client: TestClient, service: EchoService) -> None:
    body = {
        "prompt": "p",
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "seed": 3,
        "stop": "x",
        "logprobs": 2,
        "echo": True,
        "deadline_s": 20,
        "retrieval": {"enabled": False, "num_neighbours": 5, "rerank": "overlap"},
    }
    assert client.post("/v1/completions", json=body).status_code == 200
    assert service.requests == [
        GenerationRequest(
            prompt="p",
            max_tokens=9,
            sampling=SamplingConfig(temperature=0.5, top_p=0.9, top_k=4, min_p=0.1, repetition_penalty=1.5, seed=3),
            stop=("x",),
            logprobs=2,
            echo=True,
            retrieval=False,
            num_neighbours=5,
            rerank="overlap",
            deadline_s=20,
        )
    ]


def test_defaults_are_openais(client: TestClient, service: EchoService) -> None:
    nothing_asked = {"stop": None, "seed": None, "stream": False, "logprobs": None, "echo": False, "best_of": 1}
    for extra in ({}, nothing_asked):
        assert client.post("/v1/completions", json={"prompt": "", **extra}).status_code == 200
    default = GenerationRequest(prompt="", max_tokens=16, sampling=SamplingConfig(), retrieval=True, deadline_s=600)
    assert service.requests == [default, default]


def test_choices_of_several_prompts_are_in_order_and_differently_seeded(client: TestClient) -> None:
    body = client.post("/v1/completions", json={"prompt": ["a", "bcd"], "n": 2, "seed": 7}).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "a/7"),
        (1, "a/8"),
        (2, "bcd/7"),
        (3, "bcd/8"),
    ]
    # A prompt counts once, however many completions it gets.
    assert body["usage"] == {"prompt_tokens": 2 + 4, "completion_tokens": 12, "total_tokens": 18}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("suffix", "x"),
        ("best_of", 2),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -0.5),
        ("logit_bias", {"50256": -100}),
        ("user", "someone"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(refused, name: str, value: object) -> None:
    error = refused(prompt="a", **{name: value})
    assert error["param"] == name
    assert error["code"] == "unsupported_parameter"
    assert error["message"] == f"parameter '{name}' is not supported by this service"


def test_unknown_fields_are_refused_by_name(refused) -> None:
    assert refused(prompt="a", warmth=0)["message"] == "parameter 'warmth' is unknown"
    assert refused(prompt="a", warmth=None)["param"] == "warmth"
    assert refused(prompt="a", retrieval={"k": 2})["param"] == "retrieval.k"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", 3),
        ("prompt", []),
        ("prompt", [1, "a"]),
        ("prompt", [[]]),
        ("prompt", [-1]),
        ("prompt", [True]),
        ("prompt", [0] * (MAX_PROMPT_TOKENS + 1)),
        ("prompt", "x" * (MAX_PROMPT_CHARACTERS + 1)),
        ("prompt", ["x"] * (MAX_CHOICES + 1)),
        ("prompt", None),
        ("max_tokens", -1),
        ("max_tokens", "5"),
        ("max_tokens", 1.5),
        ("temperature", -1),
        ("temperature", 2.5),
        ("top_p", 0),
        ("n", 0),
        ("n", MAX_CHOICES + 1),
        ("n", True),
        ("stop", ""),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("seed", -1),
        ("top_k", -1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("logprobs", 6),
        ("logprobs", True),
        ("echo", 1),
        ("stream", "yes"),
        ("deadline_s", 0),
        ("retrieval", False),
    ],
)
def test_a_value_out_of_range_names_the_parameter(refused, name: str, value: object) -> None:
    error = refused(**{"prompt": "a", name: value})
    assert error["param"] == name
    assert error["message"].startswith(f"{name}: ")
    assert len(error["message"]) < 300


def test_a_wrong_retrieval_option_is_named(refused) -> None:
    assert refused(prompt="a", retrieval={"num_neighbours": 0})["param"] == "retrieval.num_neighbours"


def test_too_many_choices_in_all_are_refused(refused) -> None:
    message = refused(prompt=["a"] * 8, n=8)["message"]
    assert "make 64 completions" in message
    assert f"at most {MAX_CHOICES}" in message


def test_one_bad_prompt_refuses_the_request_before_any_other_is_generated(refused) -> None:
    assert refused(prompt=["a", "b"], max_tokens=101)["message"] == "max_tokens 101 is over the limit of 100"


@pytest.mark.parametrize(
    ("body", "content_type", "message"),
    [
        (b'{"prompt": ', "application/json", "the body is not valid JSON: Expecting value at character 11"),
        (b"[1]", "application/json", "the body must be a JSON object"),
        (b"", "application/json", "the body must be a JSON object"),
        (b'{"prompt": "a"}', "text/plain", "sent with the header Content-Type: application/json"),
        (b'{"prompt": "\xff"}', "application/json", "There was an error parsing the body"),
        (b"[" * 100_000, "application/json", "There was an error parsing the body"),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", "temperature: "),
        (b'{"prompt": "a", "seed": 1e400}', "application/json", "seed: "),
        (rb'{"prompt": "\ud800"}', "application/json", "prompt: "),
    ],
)
def test_a_malformed_body_is_a_400_in_openais_form(client: TestClient, body: bytes, content_type, message) -> None:
    response = client.post("/v1/completions", content=body, headers={"Content-Type": content_type})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_limit_is_not_read(client: TestClient, service: EchoService, chunked: bool) -> None:
    body = json.dumps({"prompt": "x" * MAX_BODY_BYTES}).encode()
    response = client.post(
        "/v1/completions",
        content=iter([body[:1000], body[1000:]]) if chunked else body,
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == 413
    assert str(MAX_BODY_BYTES) in response.json()["error"]["message"]
    assert service.requests == []


def test_another_models_name_is_refused(client: TestClient) -> None:
    response = client.post("/v1/completions", json={"model": "gpt-4", "prompt": "a"})
    assert response.status_code == 404
    assert response.json()["error"]["message"] == "model 'gpt-4' is not served here; use 'tiny', or leave it out"


@pytest.mark.parametrize(
    ("error", "status", "code", "headers"),
    [
        (RetrievalError("shard 1 did not answer in 2.0 s"), 503, "retrieval_failed", {}),
        (OverloadedError("64 requests wait already", retry_after_s=2.3), 503, "overloaded", {"retry-after": "3"}),
        (DeadlineError("deadline_s = 5 passed"), 408, "deadline_exceeded", {"x-should-retry": "false"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_of_generation_have_their_status(
    client: TestClient, service: EchoService, stream: bool, error, status: int, code: str, headers: dict
) -> None:
    service.error = error
    response = client.post("/v1/completions", json={"prompt": "a", "stream": stream})
    assert response.status_code == status
    kind = "server_error" if status >= 500 else "invalid_request_error"
    assert response.json()["error"] == {"message": str(error), "type": kind, "param": None, "code": code}
    assert headers.items() <= dict(response.headers).items()


@pytest.mark.parametrize("stream", [False, True])
def test_what_nobody_foresaw_tells_the_client_no_more_than_its_kind(
    client: TestClient, service: EchoService, stream: bool
) -> None:
    service.error = KeyError("secret")
    response = client.post("/v1/completions", json={"prompt": "a", "stream": stream})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["message"] == "internal error (KeyError); the service's log has the cause"


def test_one_failing_choice_fails_the_request_and_leaves_none_running(client: TestClient, service: EchoService) -> None:
    service.never_ends = True
    service.late_error = RetrievalError("gone")
    response = client.post("/v1/completions", json={"prompt": ["a", "b", "c"]})
    assert response.status_code == 503
    assert service.num_open == 0


def test_tokens_are_prompts_too(client: TestClient, service: EchoService) -> None:
    for prompt, expected in (([5, 6], [(5, 6)]), ([[5], [6, 7]], [(5,), (6, 7)])):
        service.requests.clear()
        assert client.post("/v1/completions", json={"prompt": prompt}).status_code == 200
        assert [request.prompt_tokens for request in service.requests] == expected
        assert {request.prompt for request in service.requests} == {""}


def test_log_probabilities_have_openais_form(client: TestClient) -> None:
    def logprobs(num_top: int) -> dict:
        answer = client.post("/v1/completions", json={"prompt": "a", "logprobs": num_top}).json()
        return answer["choices"][0]["logprobs"]

    assert logprobs(3) == {
        "tokens": ["an", "swer"],
        "token_logprobs": [None, -0.5],
        # Of tokens that look alike the likeliest; and the chosen one, if it is not among the likeliest.
        "top_logprobs": [None, {"a": -0.5, "\ufffd": -1.0, "swer": -0.5}],
        "text_offset": [0, 2],
    }
    assert logprobs(0)["top_logprobs"] is None


def test_what_does_not_go_together_is_refused(refused) -> None:
    assert "together with echo" in refused(prompt="a", max_tokens=0)["message"]
    assert "without stream" in refused(prompt="a", stream_options={"include_usage": True})["message"]
    assert refused(prompt="a", deadline_s=601)["message"] == "deadline_s is 601; this service allows at most 600"


def test_unknown_routes_and_methods_answer_in_openais_form(client: TestClient) -> None:
    assert client.get("/v1/chat/completions").json()["error"]["message"] == "Not Found"
    assert client.get("/../../etc/passwd").status_code == 404
    assert client.get("/playground/..%2fapp.py").status_code == 404
    assert client.get("/v1/completions").status_code == 405
    assert "error" in client.get("/v1/completions").json()
