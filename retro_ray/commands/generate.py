"""`python -m retro_ray generate`: continue a prompt, with citations."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from retro_ray.config import default_home

if TYPE_CHECKING:
    from retro_ray.generation.engine import GenerationEngine
    from retro_ray.generation.request import GenerationRequest, GenerationResult


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt with the newest checkpoint of a run, retrieving after every chunk."""

    prompt: tyro.conf.Positional[str]
    """The text to continue; may be empty."""
    home: Path = field(default_factory=default_home)
    """Folder of the database and the runs. $RETRO_RAY_HOME, or ~/.retro_ray."""
    run_name: Annotated[str, tyro.conf.arg(name="run")] = "default"
    """Run whose newest checkpoint generates."""
    max_tokens: int = 128
    """Tokens generated at most."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this much probability."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0: from all."""
    seed: int | None = None
    """Of sampling."""
    num_neighbours: int | None = None
    """Neighbours per chunk. Default: as many as in training."""
    no_retrieval: bool = False
    """Generate without neighbours."""
    prefetch: bool = False
    """Look neighbours up when three quarters of a chunk are there, so that generation does not stop for them. They fit
    less well: 2 % more bits per byte where that was measured."""
    speculate: int = 12
    """Tokens guessed at most from what was retrieved, and then read in one pass; 0: none. Changes no answer."""
    int8: bool = True
    """On a CPU that is fast with them, read new tokens, and the neighbours that come with them, with weights of eight
    bits, and hold keys and values in as many. Costs less than 0.1 % more bits per byte where that was measured."""
    json: bool = False
    """Print one JSON object, at the end."""

    def run(self) -> None:
        from retro_ray.database.store import Database
        from retro_ray.generation.engine import GenerationEngine
        from retro_ray.generation.fast_model import fast_model
        from retro_ray.generation.request import GenerationRequest
        from retro_ray.generation.sampling import SamplingConfig
        from retro_ray.openmp import computing_alone
        from retro_ray.retrieval.open import open_retriever
        from retro_ray.training.checkpoint import load_model
        from retro_ray.training.run_folder import run_directory

        request = GenerationRequest(
            prompt=self.prompt,
            max_tokens=self.max_tokens,
            sampling=SamplingConfig(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seed=self.seed),
            retrieval=not self.no_retrieval,
            num_neighbours=self.num_neighbours,
        )
        with computing_alone():
            database = Database.open(self.home)
            model, _, _ = load_model(run_directory(self.home, self.run_name), database.manifest)
            retriever = None if self.no_retrieval else open_retriever(database)
            engine = GenerationEngine(
                fast_model(model, int8=self.int8),
                database.tokenizer,
                retriever,
                prefetch=self.prefetch,
                speculate=self.speculate,
            )
        if self.json:
            [result] = engine.generate([request])
            print(json.dumps(dataclasses.asdict(result), indent=2, ensure_ascii=False))
        else:
            print(self.prompt, end="", flush=True)
            print(citations_as_text(asyncio.run(print_as_it_comes(engine, request))))


async def print_as_it_comes(engine: GenerationEngine, request: GenerationRequest) -> GenerationResult:
    """Generate, and print the text while it is being generated."""
    from retro_ray.generation.events import Finished, TextDelta
    from retro_ray.generation.scheduler import GenerationScheduler

    with contextlib.closing(GenerationScheduler(engine, max_batch_size=1)) as scheduler:
        async for event in scheduler.stream(request):
            if isinstance(event, TextDelta):
                print(event.text, end="", flush=True)
            elif isinstance(event, Finished):
                print()
                return event.result
    raise AssertionError("a stream ends with Finished or an error")


def as_text(prompt: str, result: GenerationResult) -> str:
    """A generation for people: the text, then what each stretch of it was conditioned on."""
    return f"{prompt}{result.text}\n{citations_as_text(result)}"


def citations_as_text(result: GenerationResult) -> str:
    """What each stretch of the text was conditioned on."""
    lines = []
    for citation in result.citations:
        stretch = " ".join(result.text[citation.text_start : citation.text_end].split())
        lines.append(f'\n"{_shortened(stretch)}" was conditioned on')
        for neighbour in citation.neighbours:
            lines.append(f"  {neighbour.title} [{neighbour.document_id}], distance {neighbour.distance:.2f}:")
            lines.append(f"    {_shortened(neighbour.text)} | {_shortened(neighbour.continuation)}")
    return "\n".join(lines)


def _shortened(text: str, length: int = 70) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 3] + "..."
