"""Text of tokens as they come."""

from __future__ import annotations

from collections.abc import Sequence

from retro_ray.text.tokenizer import TextTokenizer

_MOST_UNFINISHED = 8
"""Bytes that make no character, at the end of a text, may be the start of one; no more than so many."""


class TextStream:
    """Decodes a sequence token by token, in time that does not grow with its length.

    Args:
        tokenizer: of the tokens.
        context: tokens in front of the text. Some tokenizers drop the space before a first word, so
            that a text must be decoded together with a token before it.
    """

    def __init__(self, tokenizer: TextTokenizer, context: Sequence[int]) -> None:
        self.text = ""
        """Whole characters only, until it is flushed."""
        self.ends: list[int] = []
        """Of each token: how long the text is with it. A character whose bytes are split between
        tokens belongs to the last of them."""
        self._tokenizer = tokenizer
        self._window = list(context)
        self._num_known = len(tokenizer.decode(self._window))
        self._newest: list[int] = []

    @property
    def num_settled(self) -> int:
        """Tokens that are part of the text by now; those behind them have added nothing yet."""
        return len(self.ends) - len(self._newest)

    def push(self, token: int) -> None:
        """Take in the next token."""
        self._window.append(token)
        self._newest.append(token)
        decoded = self._tokenizer.decode(self._window)
        num_unfinished = len(decoded) - len(decoded.rstrip("\ufffd"))
        if len(decoded) > self._num_known and not 0 < num_unfinished <= _MOST_UNFINISHED:
            self.text += decoded[self._num_known :]
            # What was new is the context of what comes.
            self._window, self._newest = self._newest, []
            self._num_known = len(self._tokenizer.decode(self._window))
        self.ends.append(len(self.text))

    def flush(self) -> None:
        """Take the bytes of an unfinished character as they are (U+FFFD): no more tokens come."""
        self.text += self._tokenizer.decode(self._window)[self._num_known :]
        self.ends[-1:] = [len(self.text)] * len(self.ends[-1:])
        self._window, self._num_known, self._newest = [], 0, []

    def start_of(self, index: int) -> int:
        """Where in the text token number `index` starts, or will."""
        return self.ends[index - 1] if index else 0
