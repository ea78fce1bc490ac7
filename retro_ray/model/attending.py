"""Which positions read which chunk's neighbours: the m from the last token of a chunk on (paper, listing 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Attending:
    """Positions that attend to encoded neighbours, of B sequences of T tokens, of which the first L chunks of M tokens
    each may have some. C of these B * L chunks have.
    """

    batch_size: int
    num_tokens: int
    num_chunks: int
    """L."""
    chunk_length: int
    numbers_C: Tensor | None
    """int64, ascending: the chunks that have neighbours, of all B * L; None: all of them."""

    @property
    def _start(self) -> int:
        """The first m - 1 tokens attend to nothing."""
        return self.chunk_length - 1

    @property
    def _end(self) -> int:
        # The last attending chunk may be cut short by the end of the sequence, or the sequence may go on behind it.
        return min(self.num_tokens, self._start + self.num_chunks * self.chunk_length)

    def of_chunks(self, x_BTD: Tensor) -> Tensor:
        """The attending positions of each chunk with neighbours, [C, M, D]; zeros behind the end of a sequence."""
        missing = self._start + self.num_chunks * self.chunk_length - self._end
        x_BTD = F.pad(x_BTD[:, self._start : self._end], (0, 0, 0, missing))
        x_NMD = x_BTD.reshape(self.batch_size * self.num_chunks, self.chunk_length, x_BTD.shape[-1])
        return x_NMD if self.numbers_C is None else x_NMD[self.numbers_C]

    def of_sequences(self, x_CMD: Tensor) -> Tensor:
        """The same back in their places, [B, T, D]; zeros at all others."""
        if self.numbers_C is not None:
            num_all = self.batch_size * self.num_chunks
            x_CMD = x_CMD.new_zeros(num_all, *x_CMD.shape[1:]).index_copy(0, self.numbers_C, x_CMD)
        x_BTD = x_CMD.reshape(self.batch_size, self.num_chunks * self.chunk_length, x_CMD.shape[-1])
        x_BTD = x_BTD[:, : self._end - self._start]
        return F.pad(x_BTD, (0, 0, self._start, self.num_tokens - self._end))

    def chunk_numbers(self, device: torch.device) -> Tensor:
        """Number among the C of the chunk that each position attends to, int64 [B, T]; 0 where it attends to none."""
        num_chunks = self.batch_size * self.num_chunks if self.numbers_C is None else len(self.numbers_C)
        numbers_C11 = torch.arange(num_chunks, device=device)[:, None, None]
        return self.of_sequences(numbers_C11.expand(-1, self.chunk_length, 1))[..., 0]
