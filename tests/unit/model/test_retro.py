"""The model's surface: types, errors, start of weights, precision, checkpointing."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from retro_ray.errors import ConfigError
from retro_ray.model import RetroModel, decoder
from tests.unit.model.models import RETRIEVAL, VOCAB_SIZE, random_batch, random_model, small_config

KINDS = pytest.mark.parametrize("kind", RETRIEVAL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_float32(dtype: torch.dtype) -> None:
    config = small_config()
    batch = random_batch(config)
    logits = random_model(config, dtype=dtype)(batch.tokens_BT, **batch.retrieval)
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 18, VOCAB_SIZE)


@pytest.mark.parametrize("pointer", [True, False])
@pytest.mark.parametrize("tie", [True, False])
def test_output_then_read_out_in_slices_is_forward(tie: bool, pointer: bool) -> None:
    config = small_config(tie_embeddings=tie, pointer=pointer)
    model = random_model(config)
    batch = random_batch(config)
    output = model.output(batch.tokens_BT, **batch.retrieval)
    logits = model(batch.tokens_BT, **batch.retrieval)
    parts = output[torch.ones(batch.tokens_BT.shape, dtype=torch.bool)].split(5)
    torch.testing.assert_close(torch.cat([model.read_out(part) for part in parts]), logits.flatten(0, 1))
    if not pointer:
        torch.testing.assert_close(output.hidden @ model.read_out_weight[:7].T, logits[..., :7])


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((2, 5, 2, 8), "at most 4"),
        ((1, 4, 2, 8), r"must be \[2,"),
        ((2, 4, 2, 4), "any, 8"),
        ((2, 4, 8), r"neighbours of shape \(2, 4, 8\)"),
    ],
)
def test_neighbours_that_do_not_fit_are_refused(shape: tuple[int, ...], wanted: str) -> None:
    model = random_model(small_config())
    with pytest.raises(ConfigError, match=wanted):
        model(torch.zeros(2, 18, dtype=torch.int64), neighbours_BLKR=torch.zeros(shape, dtype=torch.int64))


def test_a_mask_of_another_shape_is_refused() -> None:
    config = small_config()
    batch = random_batch(config)
    with pytest.raises(ConfigError, match="neighbour mask has shape"):
        random_model(config)(
            batch.tokens_BT,
            neighbours_BLKR=batch.neighbours_BLKR,
            neighbour_mask_BLKR=batch.mask_BLKR[:, :, :1],
        )


def test_a_model_without_cca_has_no_encoder_and_ignores_neighbours() -> None:
    config = small_config(cca_layers=())
    model = random_model(config)
    batch = random_batch(config)
    assert not [name for name, _ in model.named_parameters() if "encoder" in name or "neighbour" in name]
    assert torch.equal(model(batch.tokens_BT), model(batch.tokens_BT, **batch.retrieval))


def test_count_of_parameters() -> None:
    config = small_config(share_encoder_embedding=True)
    model = RetroModel(config)
    attention, feed_forward = 4 * 16 * 16 + 16, 2 * 16 * 24 + 16
    encoder = 2 * (4 * 16 * 16 + 16 + 2 * 16 * 20 + 16) + (4 * 16 * 16 + 16) + 2 * 16
    inside = 3 * (attention + feed_forward) + 2 * attention + encoder + 16
    assert model.count_parameters() == inside
    assert model.count_parameters(include_embeddings=True) == inside + VOCAB_SIZE * 16
    untied = RetroModel(dataclasses.replace(config, tie_embeddings=False, share_encoder_embedding=False))
    assert untied.count_parameters() == inside
    assert untied.count_parameters(include_embeddings=True) == inside + 3 * VOCAB_SIZE * 16


@KINDS
def test_the_seed_decides_the_start(kind: str) -> None:
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(RetroModel(small_config(**RETRIEVAL[kind])).state_dict())
    same = [all(torch.equal(models[0][name], other[name]) for name in models[0]) for other in models[1:]]
    assert same == [True, False]


def test_the_decoder_starts_alike_with_and_without_retrieval() -> None:
    states = []
    for cca_layers in ((), (2, 3)):
        torch.manual_seed(5)
        states.append(RetroModel(small_config(cca_layers=cca_layers, share_encoder_embedding=True)).state_dict())
    baseline, retro = states
    assert set(baseline) < set(retro)
    assert all(torch.equal(weight, retro[name]) for name, weight in baseline.items())


def test_the_papers_start_leaves_the_decoder_alone_but_learns() -> None:
    config = small_config()
    torch.manual_seed(0)
    model = RetroModel(config)
    batch = random_batch(config)
    on = model(batch.tokens_BT, **batch.retrieval)
    assert torch.equal(on, model(batch.tokens_BT))
    F.cross_entropy(on.flatten(0, 1), batch.tokens_BT.flatten()).backward()
    assert model.layers[1].cca is not None
    assert model.layers[1].cca.out.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["copy", "paper and pointer"])
def test_the_copying_start_predicts_what_followed_the_token_in_a_neighbour(kind: str) -> None:
    """Untrained, at a useful width: the successor's logit rises most of all tokens', by the pointer alone too."""
    config = small_config(
        vocab_size=200,
        hidden_dim=128,
        encoder_dim=128,
        head_dim=32,
        num_heads=4,
        encoder_heads=4,
        share_encoder_embedding=True,
        normalize_embeddings=True,
        **RETRIEVAL[kind],
    )
    hits = 0
    for seed in range(20):
        torch.manual_seed(seed)
        model = RetroModel(config)
        # All different, so that "the token behind it" is one token.
        tokens = torch.randperm(200)
        tokens_BT, neighbour_R = tokens[None, :4].clone(), tokens[4:12].clone()
        place = seed % 7
        neighbour_R[place] = tokens_BT[0, 3]
        neighbours = neighbour_R[None, None, None]
        with torch.no_grad():
            gain_V = (model(tokens_BT, neighbours_BLKR=neighbours) - model(tokens_BT))[0, 3]
        hits += int(gain_V.argmax() == neighbour_R[place + 1])
    assert hits >= 18


@pytest.mark.parametrize("max_ngram", [1, 3])
def test_untrained_what_followed_a_longer_match_gets_more(max_ngram: int) -> None:
    """Of two places where the last token stands, one has the two before it as well."""
    config = small_config(**RETRIEVAL["paper and pointer"], vocab_size=50, pointer_max_ngram=max_ngram)
    torch.manual_seed(0)
    model = RetroModel(config)
    tokens_BT = torch.tensor([[1, 2, 3, 4]])
    neighbours_BLKR = torch.tensor([[[[9, 4, 20, 11, 2, 3, 4, 30]]]])
    with torch.no_grad():
        pointed = model.output(tokens_BT, neighbours_BLKR=neighbours_BLKR).pointed
    assert pointed is not None
    after_one, after_three = pointed.given_to(torch.tensor([20]))[0, 3], pointed.given_to(torch.tensor([30]))[0, 3]
    if max_ngram == 1:
        assert after_three < 3 * after_one
    else:
        # Each further token adds 2 to the logit.
        assert after_three > 20 * after_one


def test_between_different_widths_the_copying_start_is_silent() -> None:
    config = small_config(cca_start="copy", encoder_dim=8)
    model = RetroModel(config)
    batch = random_batch(config)
    assert torch.equal(model(batch.tokens_BT, **batch.retrieval), model(batch.tokens_BT))


def test_normalised_embeddings_do_not_depend_on_their_scale() -> None:
    config = small_config(normalize_embeddings=True, tie_embeddings=False)
    model = random_model(config)
    batch = random_batch(config)
    before = model(batch.tokens_BT, **batch.retrieval)
    with torch.no_grad():
        model.token_embedding.weight *= 3
    torch.testing.assert_close(model(batch.tokens_BT, **batch.retrieval), before)


@KINDS
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_bfloat16_forward_and_backward_are_finite_and_close(kind: str, autocast: bool, packed: bool) -> None:
    config = small_config(**RETRIEVAL[kind], normalize_embeddings=True)
    torch.manual_seed(0)
    model = RetroModel(config)
    batch = random_batch(config)
    batch.mask_BLKR[0, 1] = False
    segments_BT = torch.tensor([0] * 8 + [1] * 7 + [-1] * 3).expand(2, -1) if packed else None
    exact = model(batch.tokens_BT, segments_BT=segments_BT, **batch.retrieval)
    if not autocast:
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(batch.tokens_BT, segments_BT=segments_BT, **batch.retrieval)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact, atol=0.02, rtol=0.05)
    F.cross_entropy(logits.flatten(0, 1), batch.tokens_BT.flatten()).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name


@KINDS
def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    config = small_config(**RETRIEVAL[kind], share_encoder_embedding=True)
    model = random_model(config)
    batch = random_batch(config)
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(batch.tokens_BT, **batch.retrieval).sin().sum().backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_gradient_checkpointing_keeps_fewer_activations() -> None:
    config = small_config(num_layers=6)
    model = random_model(config)
    batch = random_batch(config)
    kept = []
    for model.gradient_checkpointing in (False, True):
        saved: list[int] = []

        def pack(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(batch.tokens_BT, **batch.retrieval)
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 4


@KINDS
@pytest.mark.parametrize("with_neighbours", [[], [2], [0, 1, 5, 7]])
def test_chunks_without_neighbours_are_left_out_without_a_trace(
    kind: str, with_neighbours: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(**RETRIEVAL[kind])
    model, batch = random_model(config), random_batch(config)
    has_some = torch.zeros(batch.mask_BLKR.shape[:2].numel(), dtype=torch.bool)
    has_some[with_neighbours] = True
    mask_BLKR = batch.mask_BLKR & has_some.view(*batch.mask_BLKR.shape[:2], 1, 1)
    results = []
    for leave_out in (True, False):
        if not leave_out:
            monkeypatch.setattr(decoder, "chunks_with_neighbours", lambda mask: None)
        logits = model(batch.tokens_BT, neighbours_BLKR=batch.neighbours_BLKR, neighbour_mask_BLKR=mask_BLKR)
        results.append((logits, *torch.autograd.grad(logits.sin().sum(), list(model.parameters()))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
