"""The three commands of the README, as a user types them, on a cluster of its own; then the service over HTTP."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TIMEOUT_S = 150

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    """Return once `url` answers, if only to ask for a token; fail with the log when its process ends."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except urllib.error.HTTPError as error:
            if error.code == 401:
                return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.3)
    pytest.fail(f"{url} did not answer within {TIMEOUT_S} s: {log.read_text()[-3000:]}")


@contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen]:
    """A process in a group of its own, ended with the group."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


class Cluster:
    """A Ray head node on loopback, and what a user has in the shell beside it."""

    def __init__(self, environment: dict[str, str], http_port: int, folder: Path) -> None:
        self.environment = environment
        self.http = f"http://127.0.0.1:{http_port}"
        self.folder = folder

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        program = str(BIN / command[0])
        return subprocess.run(
            [program, *command[1:]], env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=300
        )

    def submit(self, *job: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit`, once the cluster has an agent that takes jobs: a busy machine starts it late."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            done = self.run("ray", "job", "submit", "--", *job)
            if "No available agent to submit job" not in done.stdout + done.stderr or time.monotonic() > deadline:
                return done

    def post(self, content: dict, path: str = "/v1/completions") -> tuple[int, dict]:
        request = urllib.request.Request(
            f"{self.http}{path}", json.dumps(content).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that repeat each other in part, so that neighbours are near."""
    folder = tmp_path_factory.mktemp("corpus")
    with (folder / "animals.jsonl").open("w") as file:
        for number in range(48):
            food = ("grass", "fish", "seeds")[number % 3]
            lines = [
                f"The animal number {number} lives in region {number % 7} and eats {food}. "
                f"Observation {line}: it was seen near the river at hour {line}, weighing {number * 3 + line} grams."
                for line in range(12)
            ]
            file.write(
                json.dumps({"id": f"animal-{number}", "title": f"Animal {number}", "text": "\n".join(lines)}) + "\n"
            )
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    gcs_port, dashboard_port, agent_port, http_port = free_ports(4)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RETRO_RAY_HOME": str(folder / "home"),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_ADDRESS": f"127.0.0.1:{gcs_port}",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray takes the machine's address for 127.0.0.1
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard_port}",
    }
    head = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address", "127.0.0.1"]
    head += ["--port", str(gcs_port), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard_port)]
    head += ["--dashboard-agent-listen-port", str(agent_port)]  # another Ray of this machine may have the usual one
    head += ["--num-cpus", "2", "--object-store-memory", str(200 << 20)]
    starting = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
    log = folder / "ray.log"
    with running(head, starting, log) as process:
        wait_for(f"http://127.0.0.1:{dashboard_port}/api/version", process, log)
        yield Cluster(environment, http_port, folder)


@pytest.fixture(scope="module")
def trained(cluster: Cluster, corpus: Path) -> Cluster:
    """The cluster after the index and the training job."""
    index = cluster.submit(
        "jobs/index.py", "--input", str(corpus), "--tokenizer", "train:600",
        "--num-shards", "2", "--validation-share", "0.1",
    )  # fmt: skip
    assert index.returncode == 0, index.stdout[-3000:] + index.stderr[-3000:]
    train = cluster.submit("jobs/train.py", "--steps", "12", "--num-workers", "2")
    assert train.returncode == 0, train.stdout[-3000:] + train.stderr[-3000:]
    assert "validation bits per byte" in train.stdout
    return cluster


@pytest.fixture(scope="module")
def service(trained: Cluster) -> Iterator[Cluster]:
    started = trained.run("serve", "start", "--http-host", "127.0.0.1", "--http-port", trained.http.rsplit(":", 1)[1])
    assert started.returncode == 0, started.stderr[-3000:]
    log = trained.folder / "serve.log"
    with running([str(BIN / "serve"), "run", "retro_ray.serve:app"], trained.environment, log) as process:
        wait_for(f"{trained.http}/healthz", process, log)
        yield trained


def test_evaluation_reports_all_modes(trained: Cluster) -> None:
    report = trained.folder / "evaluation.json"
    done = trained.submit("jobs/evaluate.py", "--json", str(report))
    assert done.returncode == 0, done.stdout[-3000:]
    scores = json.loads(report.read_text())["bits_per_byte"]
    assert set(scores) == {"on", "off", "random"}
    assert all(0 < value < 8 for value in scores.values())


def test_citations_are_what_search_finds(service: Cluster) -> None:
    prompt = "The animal number 5 lives in region 5 and eats seeds. Observation 3: it was seen near the river. " * 4
    status, answer = service.post({"model": "default", "prompt": prompt, "max_tokens": 80, "temperature": 0})
    assert status == 200
    citations = answer["choices"][0]["citations"]
    assert len(citations) >= 2  # of the prompt's last whole chunk, and of the first that was generated
    for citation in citations:
        neighbours = citation["neighbours"]
        done = service.run(
            "python", "-m", "retro_ray", "search", citation["query"], "--k", str(len(neighbours)), "--json"
        )
        assert done.returncode == 0, done.stderr[-3000:]
        hits = json.loads(done.stdout)
        assert [hit["chunk_id"] for hit in hits] == [neighbour["chunk_id"] for neighbour in neighbours]
        assert [hit["document"] for hit in hits] == [neighbour["document_id"] for neighbour in neighbours]
        assert [hit["text"] for hit in hits] == [neighbour["text"] for neighbour in neighbours]
        assert [hit["distance"] for hit in hits] == pytest.approx(
            [n["distance"] for n in neighbours], rel=1e-3, abs=1e-3
        )


def test_retrieval_can_be_turned_off(service: Cluster) -> None:
    prompt = "The animal number 5 lives in region 5. " * 12
    status, answer = service.post(
        {"prompt": prompt, "max_tokens": 8, "temperature": 0, "retrieval": {"enabled": False}}
    )
    assert status == 200
    assert answer["choices"][0]["citations"] == []


def test_prompts_of_any_length(service: Cluster) -> None:
    for prompt in ("", "short"):
        status, answer = service.post({"prompt": prompt, "max_tokens": 4, "temperature": 0})
        assert status == 200
        assert answer["choices"][0]["citations"] == []
    status, answer = service.post({"prompt": "long " * 5000, "max_tokens": 4})
    assert status == 400
    assert "512" in answer["error"]["message"]  # the limit


def test_the_same_from_the_command_line(service: Cluster) -> None:
    prompt = "The animal number 5 lives in region 5 and eats seeds. " * 6
    _, answer = service.post({"prompt": prompt, "max_tokens": 40, "temperature": 0})
    done = service.run("python", "-m", "retro_ray", "generate", prompt, "--max-tokens", "40", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    generated = json.loads(done.stdout)
    assert generated["text"] == answer["choices"][0]["text"]
    assert [c["query"] for c in generated["citations"]] == [c["query"] for c in answer["choices"][0]["citations"]]


def test_the_openai_package_streams_what_it_gets_whole(service: Cluster) -> None:
    client = openai.OpenAI(base_url=f"{service.http}/v1", api_key="-", max_retries=0)
    asked = {"model": "default", "prompt": "The animal number 5 lives", "max_tokens": 30, "temperature": 0}
    whole = client.completions.with_raw_response.create(**asked)
    assert whole.headers.get_list("x-request-id") == [whole.request_id]  # one, though Serve's proxy has a hand in it
    chunks = list(client.completions.create(**asked, stream=True))
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == whole.parse().choices[0].text
    assert len([chunk for chunk in chunks if chunk.choices[0].text]) > 5
    with pytest.raises(openai.BadRequestError, match="the model's context holds 512"):
        client.completions.create(**{**asked, "max_tokens": 600})


def test_a_document_added_over_http_is_found_at_once(service: Cluster) -> None:
    new = {"id": "zoo/1", "title": "Zoo", "source": "", "text": "A purple elephant sings an opera about cabbages."}

    def nearest() -> str:
        status, answer = service.post({"text": new["text"], "num_neighbours": 1}, "/v1/retrieve")
        assert status == 200
        return answer["data"][0]["neighbours"][0]["document_id"]

    assert service.post({"documents": [new]}, "/v1/documents")[0] == 200
    assert nearest() == "zoo/1"
    done = service.run("python", "-m", "retro_ray", "search", new["text"], "--k", "1", "--json")
    assert json.loads(done.stdout)[0]["document"] == "zoo/1"
    request = urllib.request.Request(f"{service.http}/v1/documents/zoo/1", method="DELETE")
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert json.load(answer)["deleted"] is True
    assert nearest() != "zoo/1"


def test_verify_names_the_damaged_file(trained: Cluster) -> None:
    assert trained.run("python", "-m", "retro_ray", "verify").returncode == 0
    home = Path(trained.environment["RETRO_RAY_HOME"])
    chunks = next((home / "database").rglob("chunks.arrow"))
    content = bytearray(chunks.read_bytes())
    content[len(content) // 2] ^= 1
    copy = trained.folder / "damaged"
    subprocess.run(["cp", "-r", str(home), str(copy)], check=True)
    damaged = copy / chunks.relative_to(home)
    damaged.write_bytes(content)
    done = trained.run("python", "-m", "retro_ray", "verify", "--home", str(copy), "--json")
    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert [entry["file"] for entry in result["damaged"]] == [str(damaged)]
