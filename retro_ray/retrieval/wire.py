"""Small requests and answers as one string of bytes.

Ray sends a few kilobytes of bytes in half the time that it takes for an object with as many arrays,
whose buffers it registers one by one. Large ones go as they are: there it spares the copies.
"""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np

from retro_ray.index.encoder import PreparedQueries
from retro_ray.index.merge import Candidates
from retro_ray.index.search import Wanted
from retro_ray.retrieval.following import CommitId
from retro_ray.retrieval.messages import CandidateAnswer, CandidateRequest

MAX_BYTES = 100_000
"""A larger message is better sent as an object."""


def request_to_bytes(request: CandidateRequest) -> bytes:
    """For `request_from_bytes`."""
    queries, wanted = request.queries, request.wanted
    return _pack(
        [
            [request.commit.generation, request.commit.version],
            [queries.keys, queries.transformed, queries.lists, queries.list_distances],
            [wanted.num_candidates, wanted.widening],
            request.excluded_ids,
        ]
    )


def request_from_bytes(message: bytes) -> CandidateRequest:
    """What `request_to_bytes` was given; its arrays are read-only."""
    commit, queries, wanted, excluded_ids = _unpack(message)
    return CandidateRequest(CommitId(*commit), PreparedQueries(*queries), Wanted(*wanted), excluded_ids)


def answer_to_bytes(answer: CandidateAnswer) -> bytes:
    """For `answer_from_bytes`."""
    found = answer.candidates
    arrays = None if found is None else [found.coarse, found.distances, found.ids, found.hidden_from]
    return _pack([[answer.commit.generation, answer.commit.version], arrays, answer.num_queued])


def answer_from_bytes(message: bytes) -> CandidateAnswer:
    """What `answer_to_bytes` was given; its arrays are read-only."""
    commit, arrays, num_queued = _unpack(message)
    return CandidateAnswer(CommitId(*commit), None if arrays is None else Candidates(*arrays), num_queued)


def _pack(content: Any) -> bytes:
    message: bytes = msgpack.Packer(default=_array_to_map).pack(content)
    return message


def _unpack(message: bytes) -> Any:
    return msgpack.unpackb(message, object_hook=_array_from_map)


def _array_to_map(array: Any) -> dict[str, Any]:
    return {"dtype": array.dtype.str, "shape": array.shape, "data": array.tobytes()}


def _array_from_map(content: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(content["data"], content["dtype"]).reshape(content["shape"])
