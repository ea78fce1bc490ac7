#!/usr/bin/env python3
"""Build the retrieval database: documents -> chunks -> keys -> index shards -> neighbours."""

from __future__ import annotations

import json
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from retro_ray.command_line import parse, run
from retro_ray.config import CorpusConfig, DatabaseConfig, RetrievalConfig, default_home
from retro_ray.errors import RetroRayError


@dataclass(frozen=True, kw_only=True)
class IndexJob:
    """Build the retrieval database of a home from documents.

    Started again after an interruption, it goes on where it was; started again with the same input
    and settings, it finds that there is nothing to do.
    """

    home: Path = field(default_factory=default_home)
    """Folder of everything retro_ray keeps; all nodes of a cluster must share it."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    database: DatabaseConfig = field(default_factory=DatabaseConfig)
    discard_edits: bool = False
    """Build anew a database that was edited since it was built, without what was added to it."""
    num_replicas: int = 1
    """Actors that serve each shard while neighbours are searched, on different nodes where there are several."""
    mmap: bool = False
    """These actors leave indexes and keys on disk: for a database larger than memory."""
    json: bool = False
    """Print the result as one JSON object."""


def main(job: IndexJob) -> None:
    """Build, then say what was built."""
    from retro_ray.building.build import DatabaseBuilder
    from retro_ray.database.summary import as_lines, describe_build
    from retro_ray.ray_session import connect

    start = time.perf_counter()
    home = job.home.expanduser().absolute()
    with redirect_stdout(sys.stderr):  # the result alone is output; Ray prints its own warnings there
        connect()
        retrieval = RetrievalConfig(num_replicas=job.num_replicas, mmap=job.mmap)
        builder = DatabaseBuilder(home, job.corpus, job.database, discard_edits=job.discard_edits, retrieval=retrieval)
        manifest = builder.run()
    result = describe_build(home, manifest, time.perf_counter() - start)
    print(json.dumps(result, indent=2) if job.json else as_lines(result))


def explain(error: BaseException, home: Path) -> RetroRayError | None:
    """The user's error behind one that crossed Ray's processes."""
    from retro_ray.ray_session import user_error

    return user_error(error, home)


if __name__ == "__main__":
    parsed = parse(IndexJob, "jobs/index.py")
    run(lambda: main(parsed), lambda error: explain(error, parsed.home))
