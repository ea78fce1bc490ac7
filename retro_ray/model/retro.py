"""The RETRO model: what the decoder does with whole sequences, and the same token by token.

Shapes: B sequences, T tokens, L chunks with neighbours, M chunk length, K neighbours per chunk,
R = 2M neighbour length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retro_ray.model.cache import DecodeCache
from retro_ray.model.decoder import RetroDecoder
from retro_ray.model.decoding import most_new_tokens, read_new_tokens, read_prompts
from retro_ray.model.pointer import DecoderOutput


class RetroModel(RetroDecoder):
    """A decoder that reads the neighbours of its earlier chunks, and goes on from a cache of what it has read."""

    def new_cache(
        self,
        batch_size: int,
        max_tokens: int,
        *,
        num_neighbours: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> DecodeCache:
        """Empty slots for `batch_size` sequences; what is not given is as in the model.

        Where new tokens are read with weights of eight bits, keys and values are held in as many.
        """
        weight = self.token_embedding.weight
        return DecodeCache(
            self.config,
            batch_size,
            max_tokens,
            num_neighbours=self.config.num_neighbours if num_neighbours is None else num_neighbours,
            device=device or weight.device,
            dtype=dtype or weight.dtype,
            rows_dtype=None if self.int8 is None else torch.int8,
        )

    @torch.no_grad()
    def prefill(
        self,
        tokens_BT: Tensor,
        lengths_B: Tensor,
        cache: DecodeCache,
        neighbours_BLKR: Tensor | None = None,
        neighbour_mask_BLKR: Tensor | None = None,
        *,
        slots_B: Tensor | None = None,
    ) -> Tensor:
        """Read prompts into empty or used slots in one pass; logits [B, V] after each one's last token.

        Arguments and errors are those of `prefill_outputs`.
        """
        outputs = self.prefill_outputs(
            tokens_BT, lengths_B, cache, neighbours_BLKR, neighbour_mask_BLKR, slots_B=slots_B
        )
        return torch.cat([self.read_out(output[-1:]) for output in outputs])

    @torch.no_grad()
    def prefill_outputs(
        self,
        tokens_BT: Tensor,
        lengths_B: Tensor,
        cache: DecodeCache,
        neighbours_BLKR: Tensor | None = None,
        neighbour_mask_BLKR: Tensor | None = None,
        *,
        slots_B: Tensor | None = None,
    ) -> list[DecoderOutput]:
        """Read prompts in one pass; the input of `read_out` for the tokens [length] of each.

        Args:
            tokens_BT: int64, prompts padded on the right.
            lengths_B: int64, real tokens of each prompt, 1 to T.
            cache: its slots are overwritten.
            neighbours_BLKR: int64, neighbours of the first L complete chunks; what is behind a
                prompt's own last complete chunk has no effect.
            neighbour_mask_BLKR: bool, True for real neighbour tokens. None: all are real.
            slots_B: int64, the slots to use. Default: the first B.

        Raises:
            ConfigError: prompts or neighbours do not fit the cache or each other.
        """
        return read_prompts(self, tokens_BT, lengths_B, cache, neighbours_BLKR, neighbour_mask_BLKR, slots_B)

    @torch.no_grad()
    def decode_step(
        self,
        tokens_B: Tensor,
        cache: DecodeCache,
        neighbours_BKR: Tensor | None = None,
        neighbour_mask_BKR: Tensor | None = None,
        arrived_B: Tensor | None = None,
        *,
        active_B: Tensor | None = None,
    ) -> Tensor:
        """One more token for every slot, each at its own position; logits [B, V] after it.

        A token at a position p with (p + 1) % m == 0 completes a chunk, whose neighbours condition
        its own logits and those of the next m - 1 tokens: ask `completes_chunk` before the step,
        retrieve for the chunk *with* this token, and pass what came. Without neighbours CCA
        contributes zero until the next chunk is complete.

        Args:
            tokens_B: int64, the next token of every slot of `cache`.
            cache: advanced by one token.
            neighbours_BKR: int64, neighbours of the chunks that these tokens complete. Rows of slots
                that complete none are ignored.
            neighbour_mask_BKR: bool, True for real neighbour tokens. None: all are real.
            arrived_B: bool, the rows of `neighbours_BKR` that hold neighbours. None: all.
            active_B: bool, the slots that take part; others keep their state, and their logits mean
                nothing. None: all.

        Raises:
            ConfigError: a slot or the neighbours do not fit the cache.
        """
        num_new = [1] * len(tokens_B) if active_B is None else active_B.long().tolist()
        if all(num_new):
            return self.decode_tokens(tokens_B, num_new, cache, neighbours_BKR, neighbour_mask_BKR, arrived_B)
        dtype = torch.promote_types(self.read_out_weight.dtype, torch.float32)
        logits_BV = torch.zeros(len(tokens_B), self.config.vocab_size, dtype=dtype, device=tokens_B.device)
        if any(num_new):
            active = torch.tensor(num_new, dtype=torch.bool, device=tokens_B.device)
            logits_BV[active] = self.decode_tokens(
                tokens_B[active], num_new, cache, neighbours_BKR, neighbour_mask_BKR, arrived_B
            )
        return logits_BV

    @torch.no_grad()
    def decode_tokens(
        self,
        tokens_N: Tensor,
        num_new: Sequence[int],
        cache: DecodeCache,
        neighbours_BKR: Tensor | None = None,
        neighbour_mask_BKR: Tensor | None = None,
        arrived_B: Tensor | None = None,
    ) -> Tensor:
        """Several more tokens of each slot in one pass; logits [N, V] after each of them.

        Where a chunk is completed, its neighbours condition what follows: of a slot's new tokens only
        the first may complete one (see `most_new_tokens`). Neighbours are as in `decode_step`, those
        of the chunks that first tokens complete. Tokens that turn out to be wrong, as drafts do, are
        taken back by `cache.truncate`.

        Args:
            tokens_N: int64, the new tokens of the first slot, then those of the second, and so on.
            num_new: how many are each slot's, for the first slots of `cache`; 0 leaves one out.
            cache: its slots grow by so many tokens.
            neighbours_BKR: int64, for as many slots as `num_new` names.
            neighbour_mask_BKR: bool, True for real neighbour tokens. None: all are real.
            arrived_B: bool, the rows of `neighbours_BKR` that hold neighbours. None: all.

        Raises:
            ConfigError: a slot's new tokens or the neighbours do not fit the cache, or a chunk ends
                behind a slot's first new token.
        """
        return read_new_tokens(self, tokens_N, num_new, cache, neighbours_BKR, neighbour_mask_BKR, arrived_B)

    def most_new_tokens(self, length: int) -> int:
        """How many tokens a slot of `length` tokens may get in one pass of `decode_tokens`."""
        return most_new_tokens(length, self.config.chunk_length)

    def completes_chunk(self, cache: DecodeCache) -> Tensor:
        """Which slots [B], as bool on the CPU, complete a chunk with their next token."""
        return (cache.lengths + 1) % self.config.chunk_length == 0
