"""What benchmarks/generation.py runs on: a large database, and a model trained on real documents."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retro_ray.database.store import ChunkStore, Database
from retro_ray.errors import ConfigError, RetroRayError
from retro_ray.training.checkpoint import find_checkpoint, require_match
from retro_ray.training.run_folder import run_directory

MIN_CHUNKS = 50_000


def require_database(home: Path | None, cache: Path) -> Path:
    """`home`, or one built from python-docs in `cache`. (A larger vocabulary would leave fewer chunks than are wanted.)

    Raises:
        ConfigError: `home` is too small to say anything.
    """
    if home is None:
        home = cache / "python-docs"
        try:
            Database.open(home)
        except RetroRayError:
            _run("jobs/index.py", "--home", str(home))
    database = Database.open(home)
    if database.manifest.num_chunks < MIN_CHUNKS:
        raise ConfigError(
            f"the database in {home} has {database.manifest.num_chunks} chunks, retrieval is measured on at least "
            f"{MIN_CHUNKS}: name another --home, or none to have one built"
        )
    return home


def require_trained(home: Path | None, run: str, data: Path | None, cache: Path) -> Path | None:
    """`home`, or one built and trained from aws-cfn-2019 of `data` in `cache`; None without either."""
    if home is None and data is not None:
        home = (cache / "aws-cfn-2019").absolute()
        try:
            _, meta = find_checkpoint(run_directory(home, run))
            require_match(meta, Database.open(home).manifest)
        except RetroRayError:
            _run("jobs/index.py", "--home", str(home), "--input", str(data / "aws-cfn-2019"))
            _run("jobs/train.py", "--home", str(home), "--run", run, "--steps", "500", "--evaluate-every", "500")
    return home


def prompts(store: ChunkStore, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Stretches of so many tokens, each from another document where there are enough long ones."""
    rng = np.random.default_rng(seed)
    chunk_length = store.tokens(np.arange(1)).shape[1]
    stretches: list[list[int]] = []
    for length in lengths:
        num_chunks = -(-length // chunk_length)
        # The last chunk of a document may be padded.
        long_enough = np.flatnonzero(store.document_num_chunks > num_chunks)
        if len(long_enough) == 0:
            raise ConfigError(f"no document is longer than {length} tokens: use a corpus with longer ones")
        first, _ = store.document_rows(int(rng.choice(long_enough)))
        stretches.append(store.tokens(np.arange(first, first + num_chunks)).reshape(-1)[:length].tolist())
    return stretches


def _run(*command: str) -> None:
    print(f"needed first: {' '.join(command)}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, *command], env={**os.environ, "RAY_ADDRESS": "local"}, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
