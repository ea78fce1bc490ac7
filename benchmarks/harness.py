"""Does EleutherAI's lm_eval see the same model as jobs/evaluate.py, in this process and through the service?

The beginnings of held-out documents, each of which fits into the model's context, are scored three times:

    evaluate   jobs/evaluate.py --input
    retro      lm_eval --model retro: our own windows and neighbours, so the same nats but for rounding
    service    lm_eval --model local-completions against `serve run retro_ray.serve:app`: prompts as tokens, echo,
               log-probabilities; the service computes in bf16 weights, and caches

A longer document would differ: lm_eval's rolling windows for a service begin anew where the last one ended, each with
one token of context, so that their chunks, and what is retrieved for them, begin elsewhere.

Two more tasks compare the last two: the last word of each text (its log-likelihood, and whether it is the likeliest),
and greedy continuations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.load_home import require_home
from benchmarks.load_service import RunningService
from retro_ray.command_line import parse, run
from retro_ray.config import default_home
from retro_ray.database.store import Database
from retro_ray.errors import ConfigError, DatabaseError
from retro_ray.evaluation.own_text import document_tokens
from retro_ray.training.checkpoint import find_checkpoint
from retro_ray.training.run_folder import run_directory

_REPOSITORY = Path(__file__).parents[1]
_TASKS = ("own_text", "own_last_word", "own_continuation")
_ROOM = 24
"""Tokens of the context left for what own_continuation generates, so that no context is cut."""


@dataclass(frozen=True, kw_only=True)
class HarnessBenchmark:
    """Bits per byte of one checkpoint on the same text by jobs/evaluate.py, and by lm_eval in two ways."""

    home: Path = field(default_factory=lambda: default_home() / "benchmarks" / "harness")
    """Home with a database and a trained run; a small one is built where there is none."""
    max_documents: int = 40
    """Documents at most."""
    json: Path | None = None
    """Write the metrics to this file."""


@dataclass(frozen=True)
class Harness:
    """lm_eval in a folder of its own, without the network."""

    folder: Path

    def write_documents(self, texts: Sequence[str]) -> None:
        """The files that the tasks read."""
        _write_lines(self.folder / "documents.jsonl", [{"text": text} for text in texts])
        split = [text.rstrip().rpartition(" ") for text in texts]
        words = [{"context": context, "word": f" {word}"} for context, _, word in split if context]
        _write_lines(self.folder / "last_words.jsonl", words)

    def run(self, name: str, module: str, model: str, model_args: dict[str, Any], *options: str) -> dict[str, Any]:
        """What lm_eval reports: `results` per task, and `samples` per task."""
        arguments = ",".join(f"{key}={value}" for key, value in model_args.items())
        command = [sys.executable, "-m", module, "--model", model, "--model_args", arguments, *options]
        command += ["--tasks", ",".join(_TASKS), "--include_path", str(_REPOSITORY / "benchmarks" / "lm_eval_tasks")]
        command += ["--output_path", str(self.folder / name), "--log_samples"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "hf")}
        _call(command, self.folder, environment)
        [results] = (self.folder / name).rglob("results_*.json")
        samples = {}
        for task in _TASKS:
            [path] = results.parent.glob(f"samples_{task}_*.jsonl")
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            samples[task] = sorted(rows, key=lambda row: row["doc_id"])
        return {"results": json.loads(results.read_text(encoding="utf-8"))["results"], "samples": samples}


def held_out_texts(database: Database, max_tokens: int, max_documents: int) -> list[str]:
    """The beginnings of held-out documents, each of at most so many tokens.

    Raises:
        DatabaseError: there are none.
    """
    store = database.validation
    if store is None:
        raise DatabaseError(f"the database in {database.directory} has no validation split")
    tokenizer = database.tokenizer
    texts = []
    for document in range(store.num_documents):
        text = tokenizer.decode(document_tokens(store, document)[: max_tokens - 8]).rstrip("\ufffd")
        if 0 < len(tokenizer.encode(text)) <= max_tokens:
            texts.append(text)
    return texts[:max_documents]


def measure(home: Path, max_documents: int) -> dict[str, Any]:
    """The metrics."""
    database = Database.open(home)
    _, meta = find_checkpoint(run_directory(home, "default"))
    # lm_eval keeps one token of its length for what is generated, and the service puts one in front.
    max_length = meta.config.model.context_length - 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        harness = Harness(folder)
        texts = held_out_texts(database, max_length - _ROOM, max_documents)
        harness.write_documents(texts)
        database.tokenizer.save_pretrained(folder / "tokenizer")
        evaluated = _evaluate(home, folder)
        retro = harness.run("on", "retro_ray.lm_eval", "retro", {"home": home})
        without = harness.run("off", "retro_ray.lm_eval", "retro", {"home": home, "retrieval": "off"})
        with RunningService(home, {"num_replicas": 1}) as service:
            of_service = {
                "base_url": f"{service.url}/v1/completions",
                "model": "default",
                "tokenizer": folder / "tokenizer",
                "tokenizer_backend": "huggingface",
                "max_length": max_length,
            }
            served = harness.run("service", "lm_eval", "local-completions", of_service, "--batch_size", "4")
    return {
        "documents": len(texts),
        "tokens": evaluated["tokens"],
        "text_bytes": evaluated["text_bytes"],
        "step": meta.step,
        **_compare_texts(evaluated, retro, without, served),
        **_compare_words(retro, served),
    }


def _compare_texts(
    evaluated: dict[str, Any], retro: dict[str, Any], without: dict[str, Any], served: dict[str, Any]
) -> dict[str, Any]:
    def score(answer: dict[str, Any], metric: str) -> float:
        return answer["results"]["own_text"][f"{metric},none"]

    on, off = evaluated["bits_per_byte"]["on"], evaluated["bits_per_byte"]["off"]
    by_document = zip(_log_likelihoods(retro, "own_text"), _log_likelihoods(served, "own_text"), strict=True)
    return {
        "bits_per_byte_evaluate": on,
        "bits_per_byte_retro": score(retro, "bits_per_byte"),
        "bits_per_byte_service": score(served, "bits_per_byte"),
        "word_perplexity_evaluate": evaluated["word_perplexity"]["on"],
        "word_perplexity_retro": score(retro, "word_perplexity"),
        "word_perplexity_service": score(served, "word_perplexity"),
        "difference_retro": score(retro, "bits_per_byte") / on - 1,
        "difference_retro_off": score(without, "bits_per_byte") / off - 1,
        "difference_service": score(served, "bits_per_byte") / on - 1,
        "largest_difference_service_of_a_document": max(abs(b / a - 1) for a, b in by_document),
        "gain_on_over_off": 1 - on / off,
    }


def _compare_words(retro: dict[str, Any], served: dict[str, Any]) -> dict[str, Any]:
    def last_word(answer: dict[str, Any], metric: str) -> float:
        return answer["results"]["own_last_word"][f"{metric},none"]

    def continuations(answer: dict[str, Any]) -> list[str]:
        return [sample["filtered_resps"][0] for sample in answer["samples"]["own_continuation"]]

    pairs = list(zip(continuations(retro), continuations(served), strict=True))
    words = zip(_log_likelihoods(retro, "own_last_word"), _log_likelihoods(served, "own_last_word"), strict=True)
    return {
        "last_word_perplexity_retro": last_word(retro, "perplexity"),
        "last_word_perplexity_service": last_word(served, "perplexity"),
        "last_word_accuracy_retro": last_word(retro, "acc"),
        "last_word_accuracy_service": last_word(served, "acc"),
        "largest_difference_of_a_last_word_nats": max(abs(a - b) for a, b in words),
        "equal_continuations": sum(ours == theirs for ours, theirs in pairs) / len(pairs),
    }


def _log_likelihoods(answer: dict[str, Any], task: str) -> list[float]:
    """Of every document; lm_eval logs a number, or with a continuation also whether it is the likeliest."""
    firsts = [sample["filtered_resps"][0] for sample in answer["samples"][task]]
    return [float(first[0] if isinstance(first, list) else first) for first in firsts]


def _evaluate(home: Path, folder: Path) -> dict[str, Any]:
    report = folder / "evaluate.json"
    command = [sys.executable, "jobs/evaluate.py", "--home", str(home), "--input", str(folder / "documents.jsonl")]
    _call([*command, "--json", str(report)], _REPOSITORY, {**os.environ, "RAY_ADDRESS": "local"})
    return json.loads(report.read_text(encoding="utf-8"))


def _call(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()[-1500:]}")


def _write_lines(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(benchmark: HarnessBenchmark) -> None:
    """Measure and report."""
    home = benchmark.home.expanduser().absolute()
    require_home(home)
    metrics = measure(home, benchmark.max_documents)
    for name, value in metrics.items():
        print(f"{name:>40}  {value:,.6g}")
    if benchmark.json is not None:
        benchmark.json.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parsed = parse(HarnessBenchmark, "python -m benchmarks.harness")
    run(lambda: main(parsed))
