"""The edges of incremental decoding; its equality to the full pass is in tests/properties."""

import pytest
import torch

from retro_ray.errors import ConfigError
from retro_ray.model.causal_attention import refusal
from tests.unit.model.models import RETRIEVAL, place_new_tokens, random_batch, random_model, small_config

WHERE = torch.device("cpu"), torch.float64


def test_reset_empties_one_slot_only() -> None:
    config = small_config()
    model = random_model(config)
    batch = random_batch(config, num_tokens=9)
    cache = model.new_cache(2, 12)
    model.prefill(batch.tokens_BT, torch.tensor([9, 9]), cache, *batch.retrieval.values())
    assert cache.cca_mask.any(dim=1).tolist() == [True, True]
    cache.reset(0)
    assert cache.lengths.tolist() == [0, 9]
    assert cache.cca_mask.any(dim=1).tolist() == [False, True]
    # The emptied slot decodes from its first token as a fresh sequence does.
    logits_BV = model.decode_step(batch.tokens_BT[:, 0], cache)
    torch.testing.assert_close(logits_BV[0], model(batch.tokens_BT[:1, :1])[0, 0])


def test_completes_chunk_asks_for_neighbours_at_the_last_token() -> None:
    model = random_model(small_config())
    cache = model.new_cache(1, 9)
    asked = []
    for _ in range(9):
        asked.append(bool(model.completes_chunk(cache)))
        model.decode_step(torch.tensor([1]), cache)
    assert asked == [False, False, False, True, False, False, False, True, False]


def test_neighbours_of_a_slot_that_completes_no_chunk_are_ignored() -> None:
    config = small_config()
    model = random_model(config)
    batch = random_batch(config, batch_size=1)
    caches = [model.new_cache(1, 4) for _ in range(2)]
    plain = model.decode_step(torch.tensor([1]), caches[0])
    assert torch.equal(model.decode_step(torch.tensor([1]), caches[1], batch.neighbours_BLKR[:, 0]), plain)
    assert not caches[1].cca_mask.any()


def test_fewer_neighbours_replace_more() -> None:
    """The second chunk has one neighbour where the first had two: nothing of the first remains."""
    config = small_config(cca_start="copy")
    model = random_model(config)
    batch = random_batch(config, batch_size=1, num_tokens=11)
    mask_BLKR = batch.mask_BLKR.clone()
    mask_BLKR[:, 1, 1] = False
    expected = model(batch.tokens_BT, neighbours_BLKR=batch.neighbours_BLKR, neighbour_mask_BLKR=mask_BLKR)
    cache = model.new_cache(1, 11)
    for t in range(11):
        count = 2 if t == 3 else 1
        neighbours_BKR = batch.neighbours_BLKR[:, t // 4, :count] if t in (3, 7) else None
        mask_BKR = batch.mask_BLKR[:, t // 4, :count] if t in (3, 7) else None
        logits_BV = model.decode_step(batch.tokens_BT[:, t], cache, neighbours_BKR, mask_BKR)
        torch.testing.assert_close(logits_BV, expected[:, t])


def test_decoding_in_bfloat16_stays_close() -> None:
    config = small_config(normalize_embeddings=True, cca_start="copy")
    model = random_model(config)
    batch = random_batch(config, num_tokens=9)
    expected = model(batch.tokens_BT, **batch.retrieval)[:, -1]
    model = model.to(torch.bfloat16)
    cache = model.new_cache(2, 9)
    model.prefill(batch.tokens_BT[:, :8], torch.tensor([8, 8]), cache, *batch.retrieval.values())
    logits_BV = model.decode_step(batch.tokens_BT[:, 8], cache)
    assert logits_BV.dtype == torch.float32
    assert torch.cosine_similarity(logits_BV.double(), expected).min() > 0.99


def test_nothing_is_kept_for_a_backward_pass() -> None:
    config = small_config()
    model = random_model(config)
    batch = random_batch(config)
    cache = model.new_cache(2, 18)
    logits_BV = model.prefill(batch.tokens_BT[:, :17], torch.tensor([17, 17]), cache, *batch.retrieval.values())
    assert not logits_BV.requires_grad
    assert not model.decode_step(batch.tokens_BT[:, 17], cache).requires_grad


def test_what_does_not_fit_is_refused() -> None:
    config = small_config()
    model = random_model(config)
    batch = random_batch(config, num_neighbours=3)
    lengths_B = torch.tensor([18, 18])
    with pytest.raises(ConfigError, match="18 tokens does not fit a cache of max_tokens = 17"):
        model.prefill(batch.tokens_BT, lengths_B, model.new_cache(2, 17))
    cache = model.new_cache(2, 18)
    with pytest.raises(ConfigError, match=r"3 neighbours per chunk do not fit .* num_neighbours = 2"):
        model.prefill(batch.tokens_BT, lengths_B, cache, batch.neighbours_BLKR)
    with pytest.raises(ConfigError, match=r"prompt lengths \[0, 18\] must be from 1 to 18"):
        model.prefill(batch.tokens_BT, torch.tensor([0, 18]), cache)
    model.prefill(batch.tokens_BT, lengths_B, cache)
    with pytest.raises(ConfigError, match="19 tokens does not fit"):
        model.decode_step(batch.tokens_BT[:, 0], cache)
    with pytest.raises(ConfigError, match="3 neighbours"):
        model.decode_step(batch.tokens_BT[:, 0], model.new_cache(2, 18), batch.neighbours_BLKR[:, 0])


def test_full_slots_may_stay_while_others_go_on() -> None:
    config = small_config()
    model = random_model(config)
    batch = random_batch(config, num_tokens=6)
    cache = model.new_cache(2, 6)
    model.prefill(batch.tokens_BT, torch.tensor([6, 5]), cache, *batch.retrieval.values())
    logits_BV = model.decode_step(batch.tokens_BT[:, 5], cache, active_B=torch.tensor([False, True]))
    torch.testing.assert_close(logits_BV[1], model(batch.tokens_BT, **batch.retrieval)[1, 5])
    assert cache.lengths.tolist() == [6, 6]


def test_a_pausing_slot_keeps_its_state() -> None:
    """Also when its next token, which has not come, would complete a chunk."""
    config = small_config()
    model = random_model(config)
    batch = random_batch(config, num_tokens=7)
    cache = model.new_cache(2, 9)
    model.prefill(batch.tokens_BT, torch.tensor([7, 5]), cache, *batch.retrieval.values())
    assert model.completes_chunk(cache).tolist() == [True, False]
    mask_BS, values = cache.cca_mask.clone(), cache.cca_values[2].of.clone()
    active_B = torch.tensor([False, True])
    model.decode_step(batch.tokens_BT[:, 0], cache, batch.neighbours_BLKR[:, 0], active_B=active_B)
    assert torch.equal(cache.cca_mask, mask_BS)
    assert torch.equal(cache.cca_values[2].of, values)
    assert cache.lengths.tolist() == [7, 6]


def test_slots_decode_on_after_the_cache_was_resized_and_a_slot_moved() -> None:
    config = small_config(**RETRIEVAL["pointer"], vocab_size=3)
    model = random_model(config)
    batch = random_batch(config, batch_size=3, num_tokens=10)
    prompts = batch.tokens_BT[:, :9], torch.tensor([9, 5, 8])
    whole, moved = model.new_cache(3, 12), model.new_cache(3, 9)
    for cache in (whole, moved):
        model.prefill(*prompts, cache, *batch.retrieval.values())
    expected_BV = model.decode_step(batch.tokens_BT[:, 9], whole)
    moved.resize(4, 12, config.num_neighbours + 1)
    moved.move(2, 0)
    logits_BV = model.decode_step(batch.tokens_BT[[2, 1], 9], moved)
    torch.testing.assert_close(logits_BV, expected_BV[[2, 1]])
    assert moved.batch_size == 4
    assert moved.lengths.tolist() == [9, 6, 8, 0]
    moved.resize(2, 9, config.num_neighbours)
    assert (moved.batch_size, moved.max_tokens) == (2, 9)
    assert moved.lengths.tolist() == [9, 6]


@pytest.mark.parametrize("kind", RETRIEVAL)
def test_a_cache_without_neighbours_can_have_some_later(kind: str) -> None:
    config = small_config(**RETRIEVAL[kind])
    model = random_model(config)
    batch = random_batch(config, num_tokens=10)
    cache = model.new_cache(2, 10, num_neighbours=0)
    for num_neighbours in (config.num_neighbours, 0, config.num_neighbours):
        cache.resize(2, 10, num_neighbours)
    model.prefill(batch.tokens_BT[:, :9], torch.tensor([9, 9]), cache, *batch.retrieval.values())
    logits_BV = model.decode_step(batch.tokens_BT[:, 9], cache)
    torch.testing.assert_close(logits_BV, model(batch.tokens_BT, **batch.retrieval)[:, -1])


def test_new_tokens_stop_at_the_end_of_a_chunk() -> None:
    """Behind it, those of one pass would need different neighbours."""
    model = random_model(small_config())
    assert [model.most_new_tokens(length) for length in range(9)] == [3, 2, 1, 4, 3, 2, 1, 4, 3]
    cache = model.new_cache(2, 16)
    model.decode_tokens(torch.arange(4), [1, 3], cache)
    assert cache.lengths.tolist() == [1, 3]
    with pytest.raises(ConfigError, match=r"slot 0 has 1 tokens and gets 3: .* it may get 2 in one pass"):
        model.decode_tokens(torch.arange(4), [3, 1], cache)
    model.decode_tokens(torch.arange(6), [2, 4], cache)
    assert cache.lengths.tolist() == [3, 7]


def test_rows_that_no_slot_needs_any_longer_are_given_back() -> None:
    """Whoever stays reads what it read before; and grows again."""
    config = small_config(num_chunks=300)
    model = random_model(config)
    batch = random_batch(config, batch_size=2, num_tokens=300, num_neighbours=1)
    cache = model.new_cache(2, 320)
    model.prefill(batch.tokens_BT, torch.tensor([70, 300]), cache, *batch.retrieval.values())
    cache.give_back(161)
    assert cache.held_rows == 320, "half of them are needed"
    cache.give_back(70)
    assert cache.held_rows == 128
    for length in range(70, 131):
        neighbours = batch.neighbours_BLKR[:1, length // 4], batch.mask_BLKR[:1, length // 4]
        logits_BV = model.decode_step(batch.tokens_BT[:1, length], cache, *neighbours)
    assert cache.held_rows == 192
    expected_BTV = model(
        batch.tokens_BT[:1, :131],
        neighbours_BLKR=batch.neighbours_BLKR[:1, :32],
        neighbour_mask_BLKR=batch.mask_BLKR[:1, :32],
    )
    torch.testing.assert_close(logits_BV, expected_BTV[:, -1])


def test_a_cache_of_shared_heads_of_keys_grows_and_keeps_its_neighbours() -> None:
    """Chunked cross-attention has all heads, though self-attention has fewer of keys and values."""
    config = small_config(num_heads=2, num_kv_heads=1)
    model = random_model(config)
    batch = random_batch(config, num_tokens=10)
    cache = model.new_cache(2, 10)
    model.prefill(batch.tokens_BT[:, :9], torch.tensor([9, 9]), cache, *batch.retrieval.values())
    cache.resize(3, 12, config.num_neighbours + 1)
    logits_BV = model.decode_step(batch.tokens_BT[:, 9], cache)
    torch.testing.assert_close(logits_BV, model(batch.tokens_BT, **batch.retrieval)[:, -1])


def test_slots_of_very_different_lengths_are_read_to_their_ends() -> None:
    """One of which pauses."""
    config = small_config(num_chunks=300)
    model = random_model(config)
    lengths = [1, 1100, 3, 5, 2, 6]
    batch = random_batch(config, batch_size=6, num_tokens=1101, num_neighbours=1)
    cache = model.new_cache(6, 1104)
    model.prefill(batch.tokens_BT[:, :1100], torch.tensor(lengths), cache, *batch.retrieval.values())
    num_new = [1, 1, 2, 0, 1, 1]
    tokens_N = torch.cat(
        [batch.tokens_BT[b, n : n + new] for b, (n, new) in enumerate(zip(lengths, num_new, strict=True))]
    )
    neighbours = (batch.neighbours_BLKR[:, 0], batch.mask_BLKR[:, 0])
    of_slots = model.decode_tokens(tokens_N, num_new, cache, *neighbours).split(num_new)
    for b, (length, new) in enumerate(zip(lengths, num_new, strict=True)):
        end = length + new
        expected_TV = model(
            batch.tokens_BT[b : b + 1, :end],
            neighbours_BLKR=batch.neighbours_BLKR[b : b + 1, : end // 4],
            neighbour_mask_BLKR=batch.mask_BLKR[b : b + 1, : end // 4],
        )[0, length:]
        torch.testing.assert_close(of_slots[b], expected_TV)


@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_slots_in_groups_read_what_each_token_reads_alone(num_kv_heads: int) -> None:
    """As a GPU reads them and as a CPU does: slots of about equal length together, one of which pauses."""
    config = small_config(num_heads=4, num_kv_heads=num_kv_heads, head_dim=4, num_chunks=5000)
    lengths, num_new = [1, 17_000, 3, 5, 2, 6], [1, 1, 2, 0, 1, 3]
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(6, num_kv_heads, 17_024, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    q_NHE = torch.randn(8, 4, 4, generator=generator, dtype=torch.float64)
    refusal_BS = refusal(torch.rand(6, 64, generator=generator) < 0.3, torch.float64)
    in_groups = place_new_tokens(config, lengths, num_new, 17_024, *WHERE)
    alone = place_new_tokens(config, lengths, num_new, None, *WHERE)
    assert [range(*group.slots.indices(6)) for group in in_groups.groups] == [range(2), range(2, 3), range(4, 6)]
    assert [group.refusal_BTS.shape[-1] for group in in_groups.groups] == [17_024, 64, 64]
    assert not alone.groups
    for read in (
        lambda new: new.read_past(q_NHE, keys, values),
        lambda new: new.read_neighbours(q_NHE, keys, values, refusal_BS),
    ):
        torch.testing.assert_close(read(alone), read(in_groups))
