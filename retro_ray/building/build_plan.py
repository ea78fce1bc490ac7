"""What a build is asked for: the units of its input, and the name that tells it from other builds."""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass

import transformers
from fsspec.core import url_to_fs

from retro_ray.building.pages import CHUNKS_PER_PAGE
from retro_ray.config import CorpusConfig, DatabaseConfig
from retro_ray.database.format import FORMAT_VERSION, fingerprint
from retro_ray.embedding import ChunkEmbedder
from retro_ray.text import python_docs
from retro_ray.text.corpus import ReadUnit, plan_units


@dataclass(frozen=True)
class BuildPlan:
    """A build, before anything is read."""

    build_id: str
    """16 hex digits of input, settings and embedder: whoever asks for the same goes on with the same build."""
    units: list[ReadUnit]
    embedder_fingerprint: str
    key_dim: int


def plan_build(corpus: CorpusConfig, config: DatabaseConfig) -> BuildPlan:
    """Divide the input into units, and name the build.

    Raises:
        InputError: the input cannot be read.
        ConfigError: there is no such embedder.
    """
    units = plan_units(corpus)
    asked = dataclasses.asdict(config)
    excluded = plan_units(excluded_corpus(corpus, config)) if config.exclude_near else []
    if not excluded:
        del asked["exclude_near"]  # databases built before there was such a setting stay what they are
    embedder = ChunkEmbedder(config.embedder, device="cpu", bf16=False)
    build_id = fingerprint(
        {
            "format_version": FORMAT_VERSION,
            "chunks_per_page": CHUNKS_PER_PAGE,
            "corpus": dataclasses.asdict(corpus),
            "config": asked,
            "embedder": embedder.fingerprint,
            "units": [unit.to_dict() for unit in units],
            "files": [_file_identities(unit) for unit in [*units, *excluded]],
        }
    )
    return BuildPlan(build_id, units, embedder.fingerprint, embedder.dim)


def excluded_corpus(corpus: CorpusConfig, config: DatabaseConfig) -> CorpusConfig:
    """What `exclude_near` names, to be read as the corpus is."""
    return dataclasses.replace(corpus, input=config.exclude_near, share=1.0)


def _file_identities(unit: ReadUnit) -> list[list[str]]:
    """Name, size and time of change of a unit's files, so that changed input is another build."""
    if unit.format == python_docs.NAME:
        return [[transformers.__version__, platform.python_version()]]  # where its modules come from
    identities = []
    for file in unit.files:
        storage, path = url_to_fs(file)
        details = storage.info(path)
        changed = details.get("ETag") or details.get("mtime") or details.get("LastModified")
        identities.append([file, str(details.get("size")), str(changed)])
    return identities
