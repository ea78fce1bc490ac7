"""`python -m retro_ray demo`: the whole system on this machine, from documents to a cited text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from retro_ray.config import default_home

Result = TypeVar("Result")

_PROMPT_CHUNKS = 2
_GENERATED_TOKENS = 128
_EVALUATED_CHUNKS = 800


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run all of retro_ray on the documentation that this Python carries.

    Index it, train a small RETRO on it for two minutes, score that on held-out modules with
    retrieval on, off and random, generate a text with its citations, and tell it of documents that it
    does not know.
    """

    home: Path = field(default_factory=default_home)
    """Folder of the database and the run. $RETRO_RAY_HOME, or ~/.retro_ray."""
    share: float = 0.6
    """Share of the documentation to take in; jobs/index.py takes all of it."""
    steps: int | None = None
    """Training steps. Default: the recipe's."""

    def run(self) -> None:
        from retro_ray.building.build import DatabaseBuilder
        from retro_ray.commands.demo_update import update_as_text, update_database
        from retro_ray.commands.generate import as_text
        from retro_ray.config import CorpusConfig, DatabaseConfig
        from retro_ray.database.store import Database
        from retro_ray.ray_session import connect
        from retro_ray.training.launch import launch

        home = self.home.expanduser().absolute()
        corpus = CorpusConfig(share=self.share)
        seconds: dict[str, float] = {}
        _timed("start Ray", seconds, connect)
        _title("1. The retrieval database: documents -> chunks -> keys -> index shards -> neighbours")
        manifest = _timed("index", seconds, DatabaseBuilder(home, corpus, DatabaseConfig(rerank="overlap")).run)
        seconds |= {f"  {stage}": taken for stage, taken in manifest.stage_seconds.items()}
        _title("2. Training: RETRO on chunks and their neighbours")
        training = {} if self.steps is None else {"num_steps": self.steps}
        _timed("train", seconds, lambda: launch(home, recipe="tiny", training=training))
        _title("3. Evaluation on documents that are in no database")
        scores = _timed("evaluate", seconds, lambda: score_held_out(home))
        _title("4. Generation: neighbours are retrieved after every chunk")
        prompt = held_out_prompt(Database.open(home))
        result = _timed("generate", seconds, lambda: generate(home, prompt))
        print(as_text(prompt, result))
        _title("5. An update: documents are added, the model stays as it is")
        update = _timed("update", seconds, lambda: update_database(home))
        print(update_as_text(update))

        _title("Summary")
        print(
            f"{manifest.num_documents:,} documents and {manifest.num_chunks:,} chunks in {manifest.num_shards} shards"
        )
        print(f"{scores['on'].value:8.4f} bits per byte, RETRO[ON]")
        print(f"{scores['off'].value:8.4f} bits per byte, RETRO[OFF]")
        print(f"{scores['random'].value:8.4f} bits per byte, random neighbours")
        bits = update.result["bits_per_byte"]
        told = "of documents that it was told of by an update"
        print(f"{bits['after']:8.4f} bits per byte {told}; {bits['before']:.4f} before")
        for stage, taken in seconds.items():
            print(f"{taken:8.1f} s  {stage}")
        print(f"{_total(seconds):8.1f} s  in all; everything is in {home}")
        print("Next: serve run retro_ray.serve:app, or python -m retro_ray search TEXT")


def score_held_out(home: Path):
    """Sums over some held-out documents, by retrieval on, off and random."""
    from retro_ray.evaluation.evaluate import evaluate
    from retro_ray.evaluation.subject import open_subject

    with open_subject(home, max_chunks=_EVALUATED_CHUNKS) as subject:
        return evaluate(subject).scores


def held_out_prompt(database) -> str:
    """The first two chunks of a held-out document that goes on for a while."""
    store = database.validation
    long_enough = store.document_num_chunks >= 2 * _PROMPT_CHUNKS
    document = int(long_enough.argmax())
    first, _ = store.document_rows(document)
    chunks = store.tokens(range(first, first + _PROMPT_CHUNKS)).reshape(-1)
    return database.tokenizer.decode(chunks)


def generate(home: Path, prompt: str):
    """Continue a prompt greedily with the newest checkpoint of the default run."""
    from retro_ray.database.store import Database
    from retro_ray.generation.engine import GenerationEngine
    from retro_ray.generation.fast_model import fast_model
    from retro_ray.generation.request import GenerationRequest
    from retro_ray.generation.sampling import SamplingConfig
    from retro_ray.retrieval.open import open_retriever
    from retro_ray.training.checkpoint import load_model
    from retro_ray.training.run_folder import run_directory

    database = Database.open(home)
    model, _, _ = load_model(run_directory(home, "default"), database.manifest)
    engine = GenerationEngine(fast_model(model), database.tokenizer, open_retriever(database))
    request = GenerationRequest(prompt=prompt, max_tokens=_GENERATED_TOKENS, sampling=SamplingConfig(temperature=0.0))
    return engine.generate([request])[0]


def _timed(stage: str, seconds: dict[str, float], work: Callable[[], Result]) -> Result:
    start = time.perf_counter()
    result = work()
    seconds[stage] = time.perf_counter() - start
    return result


def _total(seconds: dict[str, float]) -> float:
    return sum(taken for stage, taken in seconds.items() if not stage.startswith(" "))


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)
