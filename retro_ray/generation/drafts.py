"""Drafts: what a sequence may say next, guessed from what it has been given to read.

Retrieved text that the sequence has begun to repeat is likely to go on as it does in the database;
so is text of its own (Yang et al. 2023, He et al. 2023). The model reads a whole draft in one pass,
which on most hardware takes little longer than one token. A draft's tokens are taken as long as
each is the one that is chosen there anyway: with the same random numbers, drafts change no answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retro_ray.generation.neighbours import RetrievedChunk

DEFAULT_DRAFT_TOKENS = 12
"""At most, in one pass. A CPU reads so many rows in about half as much time again as one."""
_NUM_CHUNKS = 3
"""Newest chunks whose neighbours are searched."""
_LONGEST_MATCH = 16
_SHORTEST_OWN_MATCH = 2
"""Single words recur in a text of its own too often to say what follows."""
_LEARNING_RATE = 0.15
_BOUNDARY = -1
"""Stands between texts; no token."""


class Drafter:
    """Drafts for one sequence, and learns how far to trust them.

    A draft is as long as the text in front of it that the sequence has repeated, times a factor that
    follows the share of drafted tokens that turned out right.

    Args:
        max_tokens: of a draft.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._hit_rate = 0.5
        self._own = np.empty(0, dtype=np.int64)
        self._read = np.empty(0, dtype=np.int64)
        self._num_chunks_read = 0

    def draft(self, tokens: Sequence[int], retrieved: Sequence[RetrievedChunk], most: int) -> list[int]:
        """Up to `most` tokens that may follow `tokens`, of which there is at least one."""
        if most <= 0:
            return []
        self._take_in(tokens, retrieved)
        own = self._own[: len(tokens)]
        read_length, read_ends = _longest_match(self._read, own)
        own_length, own_ends = _longest_match(own, own)
        from_own = own_length > read_length and own_length >= _SHORTEST_OWN_MATCH
        length = own_length if from_own else read_length
        num_tokens = min(most, self._max_tokens, round(2 * self._hit_rate * length))
        if num_tokens == 0:
            return []
        if from_own:
            return _continued(own, int(own_ends[-1]) + 1, num_tokens)
        # The nearest neighbour of the newest chunk that has a match stands first.
        start = int(read_ends[0]) + 1
        followed_by = self._read[start : start + num_tokens].tolist()
        return followed_by[: followed_by.index(_BOUNDARY)] if _BOUNDARY in followed_by else followed_by

    def learn(self, num_drafted: int, num_right: int) -> None:
        """Take in how much of the last draft was right; what is behind the first wrong token says nothing."""
        if num_drafted:
            hit_rate = num_right / min(num_right + 1, num_drafted)
            self._hit_rate += _LEARNING_RATE * (hit_rate - self._hit_rate)

    def _take_in(self, tokens: Sequence[int], retrieved: Sequence[RetrievedChunk]) -> None:
        num_known = len(self._own)
        if len(tokens) > num_known:
            self._own = np.concatenate([self._own, np.array(tokens[num_known:], dtype=np.int64)])
        if len(retrieved) > self._num_chunks_read:
            self._num_chunks_read = len(retrieved)
            newest = [answer.neighbours for answer in retrieved[: -_NUM_CHUNKS - 1 : -1]]
            texts = [found.tokens[0, k][found.mask[0, k]] for found in newest for k in range(found.tokens.shape[1])]
            boundary = np.array([_BOUNDARY])
            self._read = np.concatenate([part for text in texts for part in (text, boundary)])


def _longest_match(text: np.ndarray, suffix: np.ndarray) -> tuple[int, np.ndarray]:
    """How many of the last tokens of `suffix` stand together in `text`, and where their last one does.

    Only where a token follows.
    """
    ends = np.flatnonzero((text[:-1] == suffix[-1]) & (text[1:] != _BOUNDARY))
    if not len(ends):
        return 0, ends
    for length in range(1, min(_LONGEST_MATCH, len(suffix))):
        longer = ends[ends >= length]
        longer = longer[text[longer - length] == suffix[-1 - length]]
        if not len(longer):
            return length, ends
        ends = longer
    return min(_LONGEST_MATCH, len(suffix)), ends


def _continued(text: np.ndarray, start: int, num_tokens: int) -> list[int]:
    """What follows in `text` from `start` on; where it ends, the same once more."""
    followed_by = text[start : start + num_tokens].tolist()
    period = len(text) - start
    while len(followed_by) < num_tokens:
        followed_by.append(followed_by[-period])
    return followed_by
