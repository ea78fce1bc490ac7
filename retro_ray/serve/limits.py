"""What one request may ask for at most, and reading no more of its body than that."""

from __future__ import annotations

from starlette.types import Message, Receive

from retro_ray.serve.errors import ApiError

MAX_BODY_BYTES = 1 << 20
MAX_DOCUMENTS_BODY_BYTES = 16 << 20
"""Of POST /v1/documents."""
MAX_PROMPT_CHARACTERS = 100_000
MAX_PROMPT_TOKENS = 100_000
MAX_CHOICES = 32
"""Prompts x n of one request."""
MAX_TEXTS = 64
"""Texts of one request to /v1/retrieve."""
MAX_DOCUMENTS = 1000
"""Of one request to /v1/documents."""
MAX_ID_CHARACTERS = 500
"""Of a document's id, title and source."""


def limited(receive: Receive, max_bytes: int) -> Receive:
    """`receive`, which stops reading a body beyond `max_bytes`, whatever its headers say.

    Raises:
        ApiError: the body is larger (413).
    """
    num_bytes = 0

    async def limited_receive() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes:
            raise ApiError(413, f"the body is larger than {max_bytes} bytes: send less in one request")
        return message

    return limited_receive
