"""The model equals the naive reference, whatever the shape."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_ray.config import ModelConfig
from tests.unit.model.models import random_batch, random_model
from tests.unit.model.naive_retro import naive_logits

NO_DEADLINE = settings(max_examples=100, deadline=None)


@st.composite
def model_configs(draw: st.DrawFn) -> ModelConfig:
    num_layers = draw(st.integers(1, 3))
    encoder_layers = draw(st.integers(1, 2))
    hidden_dim = draw(st.sampled_from([4, 6]))
    share = draw(st.booleans())
    head_dim = draw(st.sampled_from([2, 4]))
    num_heads, num_kv_heads = draw(st.sampled_from([(1, None), (2, None), (2, 1), (4, 2)]))
    frequencies = st.floats(0.01, 2.0)
    layers_from = {n: st.sets(st.integers(1, n)).map(lambda s: tuple(sorted(s))) for n in (1, 2, 3)}
    return ModelConfig(
        vocab_size=draw(st.sampled_from([3, 11])),  # of three tokens, many match by chance
        chunk_length=draw(st.integers(1, 4)),
        num_chunks=3,
        hidden_dim=hidden_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_dim=5,
        feed_forward=draw(st.sampled_from(["gelu", "swiglu"])),
        attention_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        cca_layers=draw(layers_from[num_layers]),
        encoder_dim=hidden_dim if share else draw(st.sampled_from([4, 8])),
        encoder_layers=encoder_layers,
        encoder_heads=draw(st.integers(1, 2)),
        encoder_ffn_dim=7,
        encoder_ca_layers=draw(layers_from[encoder_layers]),
        share_encoder_embedding=share,
        normalize_embeddings=draw(st.booleans()),
        normalize_neighbour_embeddings=draw(st.booleans()),
        rope_frequencies=draw(st.just(()) | st.tuples(*[frequencies] * (head_dim // 2))),
        rope_magnitude=draw(st.sampled_from([1.0, 1.2])),
        cca_start=draw(st.sampled_from(["paper", "copy"])),
        tie_embeddings=draw(st.booleans()),
        pointer=draw(st.booleans()),
        pointer_max_ngram=draw(st.integers(0, 5)),
    )


def reference(config: ModelConfig, model: torch.nn.Module, *arrays: torch.Tensor | None) -> np.ndarray:
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    return naive_logits(config, weights, *(None if x is None else x.numpy() for x in arrays))


@NO_DEADLINE
@given(
    config=model_configs(),
    num_tokens=st.integers(1, 11),
    missing_chunks=st.integers(0, 2),
    num_neighbours=st.integers(0, 4),
    masked_share=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    with_mask=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_logits_equal_the_reference(
    config: ModelConfig,
    num_tokens: int,
    missing_chunks: int,
    num_neighbours: int,
    masked_share: float,
    with_mask: bool,
    seed: int,
) -> None:
    model = random_model(config, seed)
    batch = random_batch(
        config,
        num_tokens=num_tokens,
        num_chunks=max(0, num_tokens // config.chunk_length - missing_chunks),
        num_neighbours=num_neighbours,
        masked_share=masked_share,
        seed=seed,
    )
    mask = batch.mask_BLKR if with_mask else None
    logits = model(batch.tokens_BT, neighbours_BLKR=batch.neighbours_BLKR, neighbour_mask_BLKR=mask)
    expected = reference(config, model, batch.tokens_BT, batch.neighbours_BLKR, mask)
    np.testing.assert_allclose(logits.detach().numpy(), expected, rtol=1e-9, atol=1e-9)


@NO_DEADLINE
@given(config=model_configs(), num_tokens=st.integers(2, 11), seed=st.integers(0, 2**31), data=st.data())
def test_packed_documents_equal_the_reference(
    config: ModelConfig, num_tokens: int, seed: int, data: st.DataObject
) -> None:
    """Documents of any length in any place of a chunk, some of them padding."""
    model = random_model(config, seed)
    batch = random_batch(config, num_tokens=num_tokens, num_neighbours=2, seed=seed)
    document = st.tuples(st.integers(-1, 5), st.integers(1, 5))
    segments = []
    for _ in range(2):
        runs = data.draw(st.lists(document, min_size=num_tokens, max_size=num_tokens))
        segments.append([number for number, length in runs for _ in range(length)][:num_tokens])
    segments_BT = torch.tensor(segments)
    logits = model(batch.tokens_BT, segments_BT=segments_BT, **batch.retrieval)
    expected = reference(config, model, batch.tokens_BT, batch.neighbours_BLKR, batch.mask_BLKR, segments_BT)
    np.testing.assert_allclose(logits.detach().numpy(), expected, rtol=1e-9, atol=1e-9)
