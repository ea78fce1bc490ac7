"""Packed weights give the same logits; and, on a CPU that they are made for, whatever is beside a sequence."""

import pytest
import torch

from retro_ray.model import RetroModel
from retro_ray.model.cached_rows import whole_blocks
from retro_ray.model.int8_product import int8_is_fast
from retro_ray.model.packing import pack_weights
from tests.unit.model.models import (
    LLAMA_BLOCKS,
    RETRIEVAL,
    place_new_tokens,
    random_batch,
    random_model,
    small_config,
)

WIDE = {
    "hidden_dim": 64,
    "head_dim": 32,
    "ffn_dim": 1536,
    "encoder_dim": 64,
    "encoder_ffn_dim": 1536,
    "num_chunks": 300,
}


def tolerance() -> dict[str, float]:
    """None on a CPU whose kernels packed weights are for; else that of bf16."""
    return {"rtol": 0, "atol": 0} if pack_weights(bf16_model()) else {"rtol": 0.1, "atol": 0.1}


OF_LLAMA = {**LLAMA_BLOCKS, "rope_frequencies": tuple(10.0 ** -(n / 4) for n in range(16))}
BLOCKS = pytest.mark.parametrize("blocks", [{}, OF_LLAMA], ids=["ours", "llama"])
INT8 = pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])


def bf16_model(**blocks: object) -> RetroModel:
    config = small_config(**WIDE, **blocks, normalize_embeddings=True, **RETRIEVAL["pointer"])
    return random_model(config).to(torch.bfloat16).eval()


@BLOCKS
def test_packed_weights_give_the_same_logits(blocks: dict) -> None:
    plain, packed = bf16_model(**blocks), bf16_model(**blocks)
    pack_weights(packed)
    batch = random_batch(plain.config, num_tokens=14)
    expected, actual = (model(batch.tokens_BT, **batch.retrieval) for model in (plain, packed))
    assert torch.cosine_similarity(actual, expected, dim=-1).min() > 0.999


@BLOCKS
def test_prompts_are_read_with_weights_as_they_are_and_new_tokens_with_those_of_eight_bits(blocks: dict) -> None:
    plain, packed = bf16_model(**blocks), bf16_model(**blocks)
    pack_weights(plain)
    has_int8 = pack_weights(packed, int8=True) and int8_is_fast()
    batch = random_batch(plain.config, num_tokens=14)

    def read(model: RetroModel) -> tuple[torch.Tensor, torch.Tensor]:
        cache = model.new_cache(2, 14)
        of_prompts = model.prefill(batch.tokens_BT[:, :13], torch.tensor([13, 13]), cache, *batch.retrieval.values())
        return of_prompts, model.decode_step(batch.tokens_BT[:, 13], cache)

    (expected, expected_next), (actual, actual_next) = read(plain), read(packed)
    torch.testing.assert_close(actual, expected, **tolerance())
    assert torch.cosine_similarity(actual_next, expected_next, dim=-1).min() > 0.99
    assert has_int8 == bool((actual_next != expected_next).any())


def test_only_what_they_serve_is_packed() -> None:
    model = random_model(small_config())
    assert not pack_weights(model)
    assert sum(weight.numel() for weight in model.parameters()) == model.count_parameters(include_embeddings=True)


@INT8
def test_a_row_gets_the_same_to_the_bit_whatever_is_beside_it(int8: bool) -> None:
    """Also where oneDNN would add up in another order for one row than for several."""
    generator = torch.Generator().manual_seed(0)
    model = bf16_model()
    pack_weights(model, int8=int8)
    linear = model.layers[0].feed_forward.down
    x_ND = torch.randn(256, linear.in_features, generator=generator).bfloat16()
    expected = linear(x_ND)
    for size in (1, 2, 3, 32):
        torch.testing.assert_close(torch.cat([linear(part) for part in x_ND.split(size)]), expected, **tolerance())


def test_a_token_reads_the_same_to_the_bit_whatever_is_beside_it() -> None:
    """Whether slots beside it are longer, other tokens are new, or the cache has room for more."""
    config = small_config(num_heads=16, head_dim=64, num_chunks=300)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(3, 16, 1216, 64, generator=generator).bfloat16() for _ in range(2))
    q_NHE = torch.randn(4, 16, 64, generator=generator).bfloat16()
    lengths = [1010, 1150, 1098]
    where = torch.device("cpu"), torch.bfloat16
    together = place_new_tokens(config, lengths, [1, 1, 2], None, *where).read_past(q_NHE, keys, values)
    for slot, length, row in ((0, 1010, 0), (1, 1150, 1), (2, 1098, 2), (2, 1099, 3)):
        num_rows = whole_blocks(length + 1)
        alone = place_new_tokens(config, [length], [1], None, *where)
        own = (store[slot : slot + 1, :, :num_rows].contiguous() for store in (keys, values))
        torch.testing.assert_close(alone.read_past(q_NHE[row : row + 1], *own)[0], together[row], **tolerance())


@INT8
@BLOCKS
def test_a_sequence_gets_the_same_logits_to_the_bit_whatever_is_beside_it(blocks: dict, int8: bool) -> None:
    """Prompts, single tokens and several, short beside long."""
    model = bf16_model(**blocks)
    pack_weights(model, int8=int8)
    batch = random_batch(model.config, batch_size=3, num_tokens=1080, num_neighbours=1)
    lengths = [1030, 1002, 9]

    def decode(slots: list[int], num_new_tokens: list[dict[int, int]]) -> dict[int, torch.Tensor]:
        """The logits of the prompts' last tokens and of those behind, by slot."""
        cache = model.new_cache(len(slots), 1080)
        logits = list(
            model.prefill(
                batch.tokens_BT[slots, : max(lengths[b] for b in slots)],
                torch.tensor([lengths[b] for b in slots]),
                cache,
                batch.neighbours_BLKR[slots],
                batch.mask_BLKR[slots],
            )[:, None]
        )
        for step in num_new_tokens:
            before, num_new = cache.lengths.tolist(), [step[b] for b in slots]
            tokens = [batch.tokens_BT[b, n : n + new] for b, n, new in zip(slots, before, num_new, strict=True)]
            chunks = [n // model.config.chunk_length for n in before]
            neighbours = batch.neighbours_BLKR[slots, chunks], batch.mask_BLKR[slots, chunks]
            of_slots = model.decode_tokens(torch.cat(tokens), num_new, cache, *neighbours).split(num_new)
            logits = [torch.cat(pair) for pair in zip(logits, of_slots, strict=True)]
        return dict(zip(slots, logits, strict=True))

    several = [{0: 1, 1: 1, 2: 2}, {0: 3, 1: 4, 2: 0}, {0: 1, 1: 1, 2: 4}]
    together = decode([0, 1, 2], several)
    for slot in range(3):
        total = sum(step[slot] for step in several)
        one_by_one = [{slot: 1}] * total
        torch.testing.assert_close(decode([slot], one_by_one)[slot], together[slot], **tolerance())
