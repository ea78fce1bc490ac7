"""RETRO as lm_eval sees it. Needs lm_eval, which is in an extra of its own."""

import importlib
import json
import math
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from retro_ray.database.store import Database
from retro_ray.errors import ConfigError
from retro_ray.evaluation.bits_per_byte import score_documents
from retro_ray.evaluation.text_scorer import TextScorer
from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.request import GenerationRequest
from retro_ray.generation.sampling import SamplingConfig
from retro_ray.model.retro import RetroModel
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.retrieval.retriever import ChunkRetriever
from tests.fakes import tiny_run_config, tiny_texts
from tests.unit.building.editing import HashEmbedder, document, write_database
from tests.unit.model.models import random_model
from tests.unit.serve.tiny_replica import write_run

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -c constraints.txt -e .[eval]")

ROOT = Path(__file__).parents[3]
TEXTS = tiny_texts(8, seed=5, max_words=60)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    documents = [document(f"d{number}") for number in range(12)]
    held_out = [document(f"held out {number}", text) for number, text in enumerate(TEXTS)]
    database = write_database(home, documents, validation=held_out)
    write_run(home, random_model(tiny_run_config(database).model, dtype=torch.float32), 3)
    return home


@pytest.fixture(scope="module")
def database(home: Path) -> Database:
    return Database.open(home)


@pytest.fixture(scope="module")
def model(database: Database) -> RetroModel:
    return random_model(tiny_run_config(database).model, dtype=torch.float32).eval()


@pytest.fixture(autouse=True)
def hash_embedder(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("retro_ray.evaluation.harness", "retro_ray.retrieval.retriever"):
        monkeypatch.setattr(f"{module}.open_embedder", lambda *_: HashEmbedder())


@pytest.fixture
def retro_lm(home: Path):
    from retro_ray.evaluation.harness import RetroLM

    return lambda **arguments: RetroLM(home=str(home), **{"precision": "fp32", **arguments})


def instances(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, own, number) for number, own in enumerate(arguments)]


def test_the_entry_point_names_the_model_that_lm_eval_knows_as_retro() -> None:
    from lm_eval.api.registry import get_model

    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, name = groups["lm_eval.models"]["retro"].partition(":")
    assert getattr(importlib.import_module(module), name) is get_model("retro")


@pytest.mark.parametrize("mode", ["on", "off", "random"])
def test_lm_eval_reports_the_bits_per_byte_of_the_validation_split(
    home: Path, database: Database, model: RetroModel, mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task file of the benchmark, read from the working directory, through lm_eval's own evaluation."""
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    found = lm_eval.simple_evaluate(
        model="retro",
        model_args={"home": str(home), "retrieval": mode, "precision": "fp32"},
        tasks=["own_text"],
        task_manager=TaskManager(include_path=str(ROOT / "benchmarks" / "lm_eval_tasks"), include_defaults=False),
    )["results"]["own_text"]
    store = database.validation
    assert store is not None
    want = score_documents(model, store, database, range(store.num_documents), mode=mode, precision="fp32")
    num_words = sum(len(text.split()) for text in TEXTS)
    assert found["bits_per_byte,none"] == pytest.approx(want.value, rel=1e-6)
    assert found["byte_perplexity,none"] == pytest.approx(2**want.value, rel=1e-6)
    assert found["word_perplexity,none"] == pytest.approx(want.word_perplexity(num_words), rel=1e-6)


def test_log_likelihoods_of_continuations(database: Database, model: RetroModel, retro_lm) -> None:
    pairs = [("alpha beta", " gamma delta"), ("", "alpha"), (TEXTS[3], " mu"), ("alpha beta", " mu")]
    answers = retro_lm().loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    encode = database.tokenizer.encode
    scorer = TextScorer(model, database, HashEmbedder, precision="fp32")
    want = scorer.score_continuations(
        [(encode(context), encode(context + continuation)[len(encode(context)) :]) for context, continuation in pairs]
    )
    assert [nats for nats, _ in answers] == pytest.approx([nats for nats, _ in want], rel=1e-6)
    assert [likeliest for _, likeliest in answers] == [likeliest for _, likeliest in want]
    assert all(nats < 0 for nats, _ in answers)


def test_generation_is_the_engines(database: Database, model: RetroModel, retro_lm) -> None:
    """Greedy unless told otherwise, with neighbours, cut at the first stop; of a long context the end is read."""
    long = " ".join(TEXTS)
    asked = [(TEXTS[2], {"until": ["zzz"], "max_gen_toks": 9}), (long, {"max_gen_toks": 4, "do_sample": False})]
    texts = retro_lm(batch_size=2).generate_until(instances("generate_until", *asked), disable_tqdm=True)
    engine = GenerationEngine(
        model,
        database.tokenizer,
        ChunkRetriever(database.tokenizer, HashEmbedder(), LocalRetriever.open(database)),  # pyright: ignore
    )
    room = model.config.context_length - 1 - 4
    prompts = [database.tokenizer.encode(TEXTS[2]), database.tokenizer.encode(long)[-room:]]
    requests = [
        GenerationRequest(
            prompt_tokens=tuple(prompt.tolist()), max_tokens=count, sampling=SamplingConfig(temperature=0)
        )
        for prompt, count in zip(prompts, (9, 4), strict=True)
    ]
    results = engine.generate(requests)
    assert texts == [result.text for result in results]
    stop = texts[0][3:5]
    cut = retro_lm().generate_until(instances("generate_until", (TEXTS[2], {"until": stop, "max_gen_toks": 9})))
    assert cut == [texts[0].split(stop)[0]]


def test_sampling_is_seeded_by_lm_eval_and_repetitions_differ(retro_lm) -> None:
    asked = instances("generate_until", *[("alpha", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12})] * 4)
    lm = retro_lm()

    def texts() -> list[str]:
        torch.manual_seed(7)
        return lm.generate_until(asked, disable_tqdm=True)

    first = texts()
    assert len(set(first)) > 1
    assert texts() == first


def test_retrieval_can_be_turned_off_for_everything(retro_lm) -> None:
    text = instances("loglikelihood_rolling", (TEXTS[4],))
    scores = [retro_lm(retrieval=mode).loglikelihood_rolling(text)[0] for mode in (True, False, "on", "off")]
    assert scores[0] == scores[2]
    assert scores[1] == scores[3]
    assert not math.isclose(scores[0], scores[1], rel_tol=1e-4)
    off = retro_lm(retrieval="off", num_neighbours=0)
    assert np.isclose(off.loglikelihood_rolling(text)[0], scores[1])
    [request] = instances("generate_until", (TEXTS[4], {"max_gen_toks": 3}))
    assert off.generate_until([request]) == retro_lm(retrieval="off").generate_until([request])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"retrieval": "maybe"}, "retrieval is 'maybe'; it must be one of on, off, random"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"homes": "x"}, "unknown model argument homes=x"),
    ],
)
def test_arguments_that_cannot_be_are_named(retro_lm, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        retro_lm(**arguments)


def test_generation_arguments_that_cannot_be_are_named(retro_lm) -> None:
    lm = retro_lm()
    with pytest.raises(ConfigError, match="num_beams"):
        lm.generate_until(instances("generate_until", ("alpha", {"num_beams": 4, "max_gen_toks": 3})))
    with pytest.raises(ConfigError, match="max_gen_toks is 999"):
        lm.generate_until(instances("generate_until", ("alpha", {"max_gen_toks": 999})))
