"""What each logit depends on, shown by gradients: zero where it must not look, not zero where it must."""

import pytest
import torch
from torch import Tensor

from retro_ray.model import RetroModel, attention_kernels
from tests.unit.model.models import RETRIEVAL, Batch, random_batch, random_model, small_config

M = 4
NUM_TOKENS = 18
KINDS = pytest.mark.parametrize("kind", RETRIEVAL)


@pytest.fixture(params=["plain", "fused"])
def _kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by matrix products, as on a CPU; then by the fused kernel, as on a GPU."""
    monkeypatch.setattr(attention_kernels, "_PLAIN_MAX_POSITIONS", 10_000 if request.param == "plain" else 0)


def flow(model: RetroModel, batch: Batch, segments_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Size of the gradient of the logits at (b, t) to each embedded token and neighbour token.

    Returns [B, T, B, T] and [B, T, B, L, K, R].
    """
    assert model.neighbour_embedding is not None
    captured: list[Tensor] = []

    def capture(_module: torch.nn.Module, _args: object, embedded: Tensor) -> Tensor:
        captured.append(embedded.detach().requires_grad_())
        return captured[-1]

    hooks = [m.register_forward_hook(capture) for m in (model.token_embedding, model.neighbour_embedding)]
    logits_BTV = model(batch.tokens_BT, segments_BT=segments_BT, **batch.retrieval)
    for hook in hooks:
        hook.remove()
    # A random direction: a sum over the vocabulary could cancel.
    direction_V = torch.randn(logits_BTV.shape[-1], dtype=logits_BTV.dtype)
    to_tokens, to_neighbours = [], []
    for logit in (logits_BTV @ direction_V).flatten():
        tokens_grad, neighbours_grad = torch.autograd.grad(logit, captured, retain_graph=True)
        to_tokens.append(tokens_grad.abs().amax(-1))
        to_neighbours.append(neighbours_grad.abs().amax(-1).view(batch.neighbours_BLKR.shape))
    shape = tuple(logits_BTV.shape[:2])
    return torch.stack(to_tokens).unflatten(0, shape), torch.stack(to_neighbours).unflatten(0, shape)


@KINDS
def test_every_logit_depends_on_exactly_what_it_may(kind: str) -> None:
    config = small_config(**RETRIEVAL[kind])
    model = random_model(config)
    batch = random_batch(config, num_tokens=NUM_TOKENS)
    to_tokens, to_neighbours = flow(model, batch)

    sequence = torch.arange(2)
    same_sequence = sequence[:, None] == sequence
    position = torch.arange(NUM_TOKENS)
    causal = position[:, None] >= position
    torch.testing.assert_close(to_tokens > 0, same_sequence[:, None, :, None] & causal[None, :, None, :])

    # Neighbours of chunk u, counted from 1, reach t >= u * m - 1: from the chunk's last token on, at
    # once, and through self-attention ever after. Masked tokens reach nothing.
    chunk = torch.arange(1, NUM_TOKENS // M + 1)
    after = position[:, None] >= chunk * M - 1
    allowed = same_sequence[:, None, :, None] & after[None, :, None, :]
    expected = allowed[..., None, None] & batch.mask_BLKR
    torch.testing.assert_close(to_neighbours > 0, expected)


def test_which_tokens_match_reaches_what_it_may() -> None:
    """What is compared has no gradient: a token is exchanged for another one instead."""
    config = small_config(**RETRIEVAL["paper and pointer"], vocab_size=3)
    model = random_model(config)
    batch = random_batch(config, batch_size=1, num_tokens=NUM_TOKENS)

    def logits(tokens_BT: Tensor, neighbours_BLKR: Tensor) -> Tensor:
        with torch.no_grad():
            return model(tokens_BT, neighbours_BLKR=neighbours_BLKR, neighbour_mask_BLKR=batch.mask_BLKR)[0]

    before = logits(batch.tokens_BT, batch.neighbours_BLKR)
    for t in range(NUM_TOKENS):
        tokens_BT = batch.tokens_BT.clone()
        tokens_BT[0, t] = (tokens_BT[0, t] + 1) % 3
        changed = (logits(tokens_BT, batch.neighbours_BLKR) - before).abs().amax(-1) > 1e-12
        assert not changed[:t].any()
        assert changed[t]
    for place in batch.mask_BLKR.new_ones(batch.mask_BLKR.shape).nonzero().tolist():
        neighbours_BLKR = batch.neighbours_BLKR.clone()
        neighbours_BLKR[tuple(place)] = (neighbours_BLKR[tuple(place)] + 1) % 3
        changed = (logits(batch.tokens_BT, neighbours_BLKR) - before).abs().amax(-1) > 1e-12
        first = (place[1] + 1) * M - 1
        assert not changed[:first].any()
        assert bool(changed[first:].any()) == bool(batch.mask_BLKR[tuple(place)])


def test_without_later_self_attention_neighbours_reach_exactly_one_chunk() -> None:
    """CCA in the last layer only: no way on from the m attending positions."""
    config = small_config(cca_layers=(3,))
    batch = random_batch(config, num_tokens=NUM_TOKENS, masked_share=0)
    _, to_neighbours = flow(random_model(config), batch)
    reached = to_neighbours[0, :, 0].amax((-1, -2)) > 0
    for u in range(1, 5):
        attending = torch.zeros(NUM_TOKENS, dtype=torch.bool)
        attending[u * M - 1 : u * M - 1 + M] = True
        assert reached[:, u - 1].tolist() == attending.tolist()


def test_packed_documents_do_not_see_each_other() -> None:
    """Documents of 6, 4 and 5 tokens, one of which ends inside a chunk, then padding."""
    config = small_config(**RETRIEVAL["pointer"])
    segments_BT = torch.tensor([[3] * 6 + [5] * 4 + [3] * 5 + [-1] * 3])
    batch = random_batch(config, batch_size=1, num_tokens=NUM_TOKENS, masked_share=0)
    # The first and the third document have the same number, so they are one: give the third its own.
    segments_BT[0, 10:15] = 7
    to_tokens, to_neighbours = flow(random_model(config), batch, segments_BT)
    segment = segments_BT[0]
    position = torch.arange(NUM_TOKENS)
    same = segment[:, None] == segment
    assert torch.equal(to_tokens[0, :, 0] > 0, same & (position[:, None] >= position))
    # A chunk's neighbours belong to the document of its last token.
    owner = segment[M - 1 :: M]
    expected = (segment[:, None] == owner) & (position[:, None] >= torch.arange(1, 5) * M - 1)
    assert torch.equal(to_neighbours[0, :, 0].amax((-1, -2)) > 0, expected)


def test_packed_documents_read_as_if_alone() -> None:
    """Chunk-aligned documents, padded to whole chunks, in one sequence or each in its own."""
    config = small_config(**RETRIEVAL["pointer"], vocab_size=3)
    model = random_model(config)
    batch = random_batch(config, batch_size=1, num_tokens=16)
    segments_BT = torch.tensor([[1] * 7 + [-1] + [2] * 8])
    packed = model(batch.tokens_BT, segments_BT=segments_BT, **batch.retrieval)
    for chunks, length in ((slice(0, 2), 7), (slice(2, 4), 8)):
        start = chunks.start * M
        alone = model(
            batch.tokens_BT[:, start : start + 8],
            neighbours_BLKR=batch.neighbours_BLKR[:, chunks],
            neighbour_mask_BLKR=batch.mask_BLKR[:, chunks],
        )
        torch.testing.assert_close(packed[:, start : start + length], alone[:, :length])


@pytest.mark.usefixtures("_kernel")
def test_all_padding_is_finite() -> None:
    config = small_config()
    batch = random_batch(config)
    segments_BT = torch.full_like(batch.tokens_BT, -1)
    assert random_model(config)(batch.tokens_BT, segments_BT=segments_BT, **batch.retrieval).isfinite().all()


@pytest.mark.usefixtures("_kernel")
@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_neighbours_none_left_and_all_masked_are_bitwise_alike(kind: str, dtype: torch.dtype) -> None:
    config = small_config(**RETRIEVAL[kind])
    model = random_model(config, dtype=dtype)
    batch = random_batch(config)
    off = model(batch.tokens_BT)
    nothing_real = torch.zeros_like(batch.mask_BLKR)
    for neighbours_BLKR, mask_BLKR in (
        (batch.neighbours_BLKR, nothing_real),
        (batch.neighbours_BLKR[:, :2], nothing_real[:, :2]),
        (batch.neighbours_BLKR[:, :, :0], None),
        (batch.neighbours_BLKR[:, :0], None),
    ):
        on = model(batch.tokens_BT, neighbours_BLKR=neighbours_BLKR, neighbour_mask_BLKR=mask_BLKR)
        assert torch.equal(on, off)
    assert not torch.equal(model(batch.tokens_BT, **batch.retrieval), off)


@KINDS
def test_one_chunk_without_neighbours_is_as_if_it_had_none(kind: str) -> None:
    """Chunk 2 masked: its positions get what they get from the other chunks alone."""
    config = small_config(**RETRIEVAL[kind])
    model = random_model(config)
    batch = random_batch(config)
    mask_BLKR = batch.mask_BLKR.clone()
    mask_BLKR[:, 1:] = False
    masked = model(batch.tokens_BT, neighbours_BLKR=batch.neighbours_BLKR, neighbour_mask_BLKR=mask_BLKR)
    absent = model(batch.tokens_BT, neighbours_BLKR=batch.neighbours_BLKR[:, :1], neighbour_mask_BLKR=mask_BLKR[:, :1])
    torch.testing.assert_close(masked, absent)


@pytest.mark.usefixtures("_kernel")
@KINDS
def test_masked_neighbours_give_finite_zero_gradients(kind: str) -> None:
    config = small_config(**RETRIEVAL[kind], share_encoder_embedding=False)
    model = random_model(config)
    batch = random_batch(config)
    model(
        batch.tokens_BT,
        neighbours_BLKR=batch.neighbours_BLKR,
        neighbour_mask_BLKR=torch.zeros_like(batch.mask_BLKR),
    ).square().sum().backward()
    for name, weight in model.named_parameters():
        if weight.grad is None:
            continue
        assert weight.grad.isfinite().all(), name
        if name.startswith(("encoder.", "neighbour_embedding", "pointer.")) or ".cca." in name:
            assert not weight.grad.any(), name


@KINDS
def test_order_of_neighbours_does_not_matter(kind: str) -> None:
    config = small_config(**RETRIEVAL[kind])
    model = random_model(config)
    batch = random_batch(config, num_neighbours=4)
    order = torch.tensor([2, 0, 3, 1])
    permuted = model(
        batch.tokens_BT,
        neighbours_BLKR=batch.neighbours_BLKR[:, :, order],
        neighbour_mask_BLKR=batch.mask_BLKR[:, :, order],
    )
    torch.testing.assert_close(permuted, model(batch.tokens_BT, **batch.retrieval))


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 7, 8, 11, 15])
def test_a_prefix_has_the_same_logits(num_tokens: int) -> None:
    """So a last chunk that is not complete reads as the start of a complete one."""
    config = small_config(**RETRIEVAL["pointer"], vocab_size=3)
    model = random_model(config)
    batch = random_batch(config, num_tokens=16)
    whole = model(batch.tokens_BT, **batch.retrieval)
    chunks = slice(0, num_tokens // M)
    prefix = model(
        batch.tokens_BT[:, :num_tokens],
        neighbours_BLKR=batch.neighbours_BLKR[:, chunks],
        neighbour_mask_BLKR=batch.mask_BLKR[:, chunks],
    )
    torch.testing.assert_close(prefix, whole[:, :num_tokens])


@KINDS
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    """Of every weight, through every path: self-attention, conditioned encoder, CCA, read-out."""
    config = small_config(**RETRIEVAL[kind])
    model = random_model(config)
    batch = random_batch(config)

    def loss() -> Tensor:
        return model(batch.tokens_BT, **batch.retrieval).sin().sum()

    loss().backward()
    step = 1e-6
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        direction = torch.randn_like(weight)
        with torch.no_grad():
            weight += step * direction
            above = loss()
            weight -= 2 * step * direction
            below = loss()
            weight += step * direction
        along = (weight.grad * direction).sum()
        torch.testing.assert_close((above - below) / (2 * step), along, rtol=1e-4, atol=1e-3, msg=name)
