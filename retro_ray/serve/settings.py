"""Arguments of `serve run retro_ray.serve:app NAME=VALUE ...`, or of the application in a Serve config file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from retro_ray.config import RetrievalConfig, RetrievalPolicy, default_home


@dataclass(frozen=True, kw_only=True)
class ServingRetrievalConfig(RetrievalConfig):
    """As a service searches: somebody waits for the answer."""

    timeout_s: float = 10.0
    policy: RetrievalPolicy = "partial"


class ServeSettings(BaseModel):
    """What is served, how large, and to whom."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    home: Path = Field(default_factory=default_home)
    """Folder of the database and the training runs."""
    run: str = "default"
    """Training run whose newest checkpoint is served; also the model's name in the API."""
    num_replicas: int = Field(default=1, ge=1)
    """Ignored with `autoscaling_config`, which has bounds of its own."""
    autoscaling_config: dict[str, Any] | None = None
    """Serve's own, e.g. '{"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 8}'."""
    num_cpus: float = Field(default=1, gt=0)
    """Of each replica; without a GPU it decodes with so many threads, at least one."""
    num_gpus: float = Field(default=0, ge=0)
    """Of each replica; above 0, model and embedder run on the GPU."""
    max_batch_size: int = Field(default=8, ge=1)
    """Completions that a replica decodes together."""
    max_queued: int = Field(default=64, ge=1)
    """Completions that wait in a replica; more are refused at once (503)."""
    retrieval: ServingRetrievalConfig = ServingRetrievalConfig()
    """How the shards are searched, e.g. '{"num_replicas": 2, "rerank": "overlap"}'. Where a shard does not
    answer, replies say so, unless the policy is set to wait or fail."""
    prefetch: bool = False
    """Retrieve for a chunk when three quarters of it are there, so that generation need not stop for it. What is found
    so fits less well: 2 % more bits per byte where that was measured."""
    speculate: int = Field(default=12, ge=0)
    """Tokens guessed at most from what was retrieved, and then read in one pass; 0: none. Changes no answer."""
    int8: bool = True
    """On a CPU that is fast with them, read new tokens, and the neighbours that come with them, with weights of eight
    bits, kept beside those in bf16, and hold keys and values in as many. Prompts and their scores are as without."""
    max_cached_tokens: int | None = Field(default=None, ge=1)
    """Tokens that the KV cache may hold; default: `max_batch_size` whole contexts."""
    max_deadline_s: float = Field(default=600, gt=0)
    """After which a request is given up; a request may ask for less."""
    drain_s: float = Field(default=30, ge=0)
    """What runs when a replica is shut down may go on for so long; then it is cut off."""
    refresh_s: float = Field(default=5, gt=0)
    """How often a replica looks for a new checkpoint, and whether the shards answer."""
    api_keys_file: Path | None = None
    """See retro_ray/serve/keys.py; without keys only this machine's own requests are answered."""
    log_bodies: bool = False
    """Log what is asked, not only how much of it."""

    @field_validator("home")
    @classmethod
    def _make_absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("autoscaling_config", "retrieval", mode="before")
    @classmethod
    def _read_json(cls, value: Any) -> Any:
        """On a command line it is text."""
        try:
            return json.loads(value) if isinstance(value, str) else value
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON: {error}") from error
