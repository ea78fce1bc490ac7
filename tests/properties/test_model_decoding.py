"""Cached, batched, incremental decoding gives the logits of the full forward pass."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retro_ray.model import DecodeCache, RetroModel
from tests.unit.model.models import LLAMA_BLOCKS, RETRIEVAL, Batch, random_batch, random_model, small_config

MOST_TOKENS = 18
FEW_TOKENS = 4
"""So that the end of a text often stands in its neighbours too, some tokens long."""
BLOCKS = st.sampled_from([{}, LLAMA_BLOCKS])


def full_logits(model: RetroModel, batch: Batch, arrived_BL: Tensor) -> Tensor:
    mask_BLKR = batch.mask_BLKR & arrived_BL[:, :, None, None]
    return model(batch.tokens_BT, neighbours_BLKR=batch.neighbours_BLKR, neighbour_mask_BLKR=mask_BLKR)


def decode_one(
    model: RetroModel, cache: DecodeCache, batch: Batch, arrived_BL: Tensor, active_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Feed every slot its next token; logits and positions."""
    rows = torch.arange(cache.batch_size)
    positions_B = cache.lengths.clone()
    tokens_B = batch.tokens_BT[rows, positions_B.clamp(max=batch.tokens_BT.shape[1] - 1)]
    # Of slots that complete no chunk, whatever is passed is ignored.
    chunks_B = (positions_B // model.config.chunk_length).clamp(max=batch.neighbours_BLKR.shape[1] - 1)
    logits_BV = model.decode_step(
        tokens_B,
        cache,
        batch.neighbours_BLKR[rows, chunks_B],
        batch.mask_BLKR[rows, chunks_B],
        arrived_BL[rows, chunks_B],
        active_B=active_B,
    )
    return logits_BV, positions_B


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(sorted(RETRIEVAL)),
    blocks=BLOCKS,
    cca_layers=st.sampled_from([(), (1,), (2, 3), (1, 2, 3), (3,)]),
    lengths=st.lists(st.integers(1, MOST_TOKENS - 1), min_size=1, max_size=4),
    num_neighbours=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_prompts_of_any_length_then_single_tokens(
    kind: str,
    blocks: dict,
    cca_layers: tuple[int, ...],
    lengths: list[int],
    num_neighbours: int,
    seed: int,
    data: st.DataObject,
) -> None:
    """Sequences of different lengths, some pausing at times, some chunks without neighbours."""
    changes = {**RETRIEVAL[kind], **blocks, "cca_layers": cca_layers, "share_encoder_embedding": True}
    config = small_config(**changes, vocab_size=FEW_TOKENS)
    model = random_model(config, seed)
    batch_size = len(lengths)
    batch = random_batch(
        config, batch_size=batch_size, num_tokens=MOST_TOKENS, num_neighbours=num_neighbours, seed=seed
    )
    bits = st.lists(st.booleans(), min_size=batch_size * 4, max_size=batch_size * 4)
    arrived_BL = torch.tensor(data.draw(bits)).view(batch_size, 4)
    expected_BTV = full_logits(model, batch, arrived_BL)

    cache = model.new_cache(batch_size, MOST_TOKENS, num_neighbours=data.draw(st.integers(num_neighbours, 4)))
    longest = max(lengths)
    num_chunks = longest // config.chunk_length
    logits_BV = model.prefill(
        batch.tokens_BT[:, :longest],
        torch.tensor(lengths),
        cache,
        batch.neighbours_BLKR[:, :num_chunks],
        batch.mask_BLKR[:, :num_chunks] & arrived_BL[:, :num_chunks, None, None],
    )
    rows = torch.arange(batch_size)
    torch.testing.assert_close(logits_BV, expected_BTV[rows, torch.tensor(lengths) - 1])
    for _ in range(MOST_TOKENS):
        pausing = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch_size, max_size=batch_size)))
        active_B = (cache.lengths < MOST_TOKENS) & ~pausing
        logits_BV, positions_B = decode_one(model, cache, batch, arrived_BL, active_B)
        expected_BV = expected_BTV[rows, positions_B.clamp(max=MOST_TOKENS - 1)]
        torch.testing.assert_close(logits_BV[active_B], expected_BV[active_B])
        assert cache.lengths.tolist() == (positions_B + active_B).tolist()


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(RETRIEVAL)),
    blocks=BLOCKS,
    cca_layers=st.sampled_from([(), (2, 3), (1, 2, 3), (3,)]),
    lengths=st.lists(st.integers(1, MOST_TOKENS - 1), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_several_new_tokens_in_one_pass_some_of_them_wrong(
    kind: str, blocks: dict, cca_layers: tuple[int, ...], lengths: list[int], seed: int, data: st.DataObject
) -> None:
    """Every slot gets another number of tokens, none at times; those behind the right ones are taken back."""
    config = small_config(**RETRIEVAL[kind], cca_layers=cca_layers, vocab_size=FEW_TOKENS, **blocks)
    model = random_model(config, seed)
    batch_size = len(lengths)
    batch = random_batch(config, batch_size=batch_size, num_tokens=MOST_TOKENS, seed=seed)
    arrived_BL = torch.rand(batch_size, 4, generator=torch.Generator().manual_seed(seed)) < 0.7
    expected_BTV = full_logits(model, batch, arrived_BL)
    cache = model.new_cache(batch_size, MOST_TOKENS)
    num_chunks = max(lengths) // config.chunk_length
    model.prefill(
        batch.tokens_BT[:, : max(lengths)],
        torch.tensor(lengths),
        cache,
        batch.neighbours_BLKR[:, :num_chunks],
        batch.mask_BLKR[:, :num_chunks] & arrived_BL[:, :num_chunks, None, None],
    )
    for _ in range(MOST_TOKENS):
        before = cache.lengths.tolist()
        num_right = [
            data.draw(st.integers(0, min(MOST_TOKENS - length, model.most_new_tokens(length)))) for length in before
        ]
        num_new = [
            data.draw(st.integers(right, min(MOST_TOKENS - length, model.most_new_tokens(length)))) if right else 0
            for length, right in zip(before, num_right, strict=True)
        ]
        if not any(num_new):
            continue
        tokens_BT = batch.tokens_BT.clone()
        for b, (length, right) in enumerate(zip(before, num_right, strict=True)):
            tokens_BT[b, length + right :] = (tokens_BT[b, length + right :] + 1) % config.vocab_size
        chunks_B = [min(length // config.chunk_length, 3) for length in before]
        rows = range(batch_size)
        logits_NV = model.decode_tokens(
            torch.cat([tokens_BT[b, before[b] : before[b] + num_new[b]] for b in rows]),
            num_new,
            cache,
            batch.neighbours_BLKR[rows, chunks_B],
            batch.mask_BLKR[rows, chunks_B],
            arrived_BL[rows, chunks_B],
        )
        for b, of_slot in enumerate(logits_NV.split(num_new)):
            end = before[b] + num_right[b]
            torch.testing.assert_close(of_slot[: num_right[b]], expected_BTV[b, before[b] : end])
        cache.truncate([length + right for length, right in zip(before, num_right, strict=True)])


@settings(max_examples=20, deadline=None)
@given(
    first_lengths=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    slot=st.integers(0, 2),
    new_length=st.integers(1, 9),
    steps=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_a_slot_taken_over_while_the_others_decode(
    first_lengths: list[int], slot: int, new_length: int, steps: int, seed: int
) -> None:
    """Nothing of a slot's last user remains, and the other slots do not notice."""
    config = small_config(**RETRIEVAL["pointer"], vocab_size=FEW_TOKENS)
    model = random_model(config, seed)
    batch = random_batch(config, batch_size=4, num_tokens=MOST_TOKENS, seed=seed)
    arrived_BL = torch.ones(4, 4, dtype=torch.bool)
    expected_BTV = full_logits(model, batch, arrived_BL)

    cache = model.new_cache(3, MOST_TOKENS)
    model.prefill(
        batch.tokens_BT[:3, :9],
        torch.tensor(first_lengths),
        cache,
        batch.neighbours_BLKR[:3, :2],
        batch.mask_BLKR[:3, :2],
    )
    users = [0, 1, 2]

    def step() -> None:
        current = Batch(batch.tokens_BT[users], batch.neighbours_BLKR[users], batch.mask_BLKR[users])
        active_B = torch.ones(3, dtype=torch.bool)
        logits_BV, positions_B = decode_one(model, cache, current, arrived_BL[users], active_B)
        torch.testing.assert_close(logits_BV, expected_BTV[users, positions_B])

    for _ in range(steps):
        step()
    # The fourth sequence arrives without neighbours for its prompt.
    users[slot] = 3
    without = batch.mask_BLKR.clone()
    without[3, : new_length // config.chunk_length] = False
    expected_BTV[3] = full_logits(model, Batch(batch.tokens_BT, batch.neighbours_BLKR, without), arrived_BL)[3]
    logits_BV = model.prefill(
        batch.tokens_BT[3:, :new_length], torch.tensor([new_length]), cache, slots_B=torch.tensor([slot])
    )
    torch.testing.assert_close(logits_BV[0], expected_BTV[3, new_length - 1])
    while int(cache.lengths.max()) < MOST_TOKENS:
        step()
