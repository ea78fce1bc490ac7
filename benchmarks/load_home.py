"""A small home to serve: a tenth of Python's documentation, and a model that was trained for a moment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from retro_ray.database.store import Database
from retro_ray.errors import RetroRayError
from retro_ray.training.checkpoint import find_checkpoint, require_match
from retro_ray.training.run_folder import run_directory

_PROMPT_CHUNKS = 2


def require_home(home: Path) -> None:
    """Build a database and train a run in `home`, unless both are there and go together."""
    try:
        _, meta = find_checkpoint(run_directory(home, "default"))
        require_match(meta, Database.open(home).manifest)
    except RetroRayError:
        for command in (
            ["jobs/index.py", "--share", "0.1", "--discard-edits"],
            ["jobs/train.py", "--steps", "30", "--evaluate-every", "30"],
        ):
            print(f"building the home to serve: {' '.join(command)}", file=sys.stderr, flush=True)
            environment = {**os.environ, "RAY_ADDRESS": "local"}
            done = subprocess.run([sys.executable, *command, "--home", str(home)], env=environment, check=False)
            if done.returncode:
                raise SystemExit(done.returncode) from None


def sample_texts(home: Path, count: int) -> list[str]:
    """Beginnings of up to `count` documents, each longer than a chunk, so that its neighbours are retrieved."""
    database = Database.open(home)
    store = max(database.segments, key=lambda one: one.num_chunks)
    texts = []
    for document in np.random.default_rng(0).integers(store.num_documents, size=count):
        first, stop = store.document_rows(int(document))
        rows = np.arange(first, min(stop, first + _PROMPT_CHUNKS))
        is_real = np.arange(database.chunk_length)[None, :] < store.lengths(rows)[:, None]
        texts.append(database.tokenizer.decode(store.tokens(rows)[is_real]))
    return [text for text in texts if len(database.tokenizer.encode(text)) > database.chunk_length]
