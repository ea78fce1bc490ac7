"""Recipes: functions that return a complete `RunConfig`. A variant calls one and replaces fields.

The paper's four sizes have its table's weights within 5 % although their positions are rotary and
have none. The paper's baselines come out to the million if each attention has Transformer-XL's
projection of relative positions, hidden_dim x (heads x head_dim). Here the feed-forward block, which
has two matrices, gets what those projections would have taken: its inner width is the paper's plus
heads x head_dim / 2, in decoder and encoder alike. (The paper does not state the encoder's heads.)
"""

from __future__ import annotations

from collections.abc import Callable

from retro_ray.config import ModelConfig, RunConfig, TrainingConfig
from retro_ray.errors import ConfigError


def tiny(vocab_size: int, chunk_length: int = 64) -> RunConfig:
    """2.7 million weights besides the embedding, a million tokens: minutes on two CPU cores."""
    return RunConfig(
        recipe="tiny",
        model=ModelConfig(
            vocab_size=vocab_size,
            chunk_length=chunk_length,
            num_chunks=8,
            hidden_dim=192,
            num_layers=4,
            num_heads=3,
            head_dim=64,
            ffn_dim=768,
            cca_layers=(2,),  # one in the middle is as good as every third (paper, Table 13), and faster
            encoder_dim=192,
            encoder_layers=1,
            encoder_heads=3,
            encoder_ffn_dim=768,
            encoder_ca_layers=(1,),
            share_encoder_embedding=True,
            normalize_embeddings=True,
            pointer=True,
        ),
        training=TrainingConfig(
            num_steps=300,
            batch_size=4,
            micro_batch_size=4,
            learning_rate=3e-3,
            num_warmup_steps=50,
            optimizer="muon",
            retrieval_dropout=0.2,
            final_retrieval_dropout=0.7,
            checkpoint_every=150,
            evaluate_every=150,
            num_evaluation_chunks=500,
        ),
    )


def small(vocab_size: int, chunk_length: int = 64) -> RunConfig:
    """33 million weights besides the embedding, 330 million tokens: for one GPU, or a long run on a CPU."""
    return RunConfig(
        recipe="small",
        model=ModelConfig(
            vocab_size=vocab_size,
            chunk_length=chunk_length,
            num_chunks=16,
            hidden_dim=512,
            num_layers=8,
            num_heads=8,
            head_dim=64,
            ffn_dim=2048,
            cca_layers=(3, 5, 7),
            encoder_dim=512,
            encoder_layers=1,
            encoder_heads=8,
            encoder_ffn_dim=2048,
            encoder_ca_layers=(1,),
            share_encoder_embedding=True,
            normalize_embeddings=True,
            pointer=True,
        ),
        training=TrainingConfig(
            num_steps=10_000,
            batch_size=32,
            micro_batch_size=8,
            learning_rate=2e-3,
            num_warmup_steps=300,
            optimizer="muon",
            retrieval_dropout=0.1,
        ),
    )


def paper_172m(vocab_size: int, chunk_length: int = 64) -> RunConfig:
    """The paper's smallest model, RETRO of a 132M baseline."""
    return _paper(
        "paper-172m", vocab_size, chunk_length, dim=896, ffn=3584, heads=16, head_dim=64, layers=12, first_cca=6
    )


def paper_425m(vocab_size: int, chunk_length: int = 64) -> RunConfig:
    """RETRO of the paper's 368M baseline."""
    return _paper(
        "paper-425m", vocab_size, chunk_length, dim=1536, ffn=6144, heads=12, head_dim=128, layers=12, first_cca=6
    )


def paper_1_5b(vocab_size: int, chunk_length: int = 64) -> RunConfig:
    """RETRO of the paper's 1,309M baseline."""
    return _paper(
        "paper-1.5b", vocab_size, chunk_length, dim=2048, ffn=8192, heads=16, head_dim=128, layers=24, first_cca=9
    )


def paper_7_5b(vocab_size: int, chunk_length: int = 64) -> RunConfig:
    """The paper's largest model, RETRO of a 6,982M baseline."""
    return _paper(
        "paper-7.5b",
        vocab_size,
        chunk_length,
        dim=4096,
        ffn=16_384,
        heads=32,
        head_dim=128,
        layers=32,
        first_cca=9,
        learning_rate=1e-4,
        batch_size=1024,
    )


Recipe = Callable[..., RunConfig]

RECIPES: dict[str, Recipe] = {
    "tiny": tiny,
    "small": small,
    "paper-172m": paper_172m,
    "paper-425m": paper_425m,
    "paper-1.5b": paper_1_5b,
    "paper-7.5b": paper_7_5b,
}


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe is {name!r}; it must be one of {', '.join(RECIPES)}")
    return RECIPES[name]


def _paper(
    name: str,
    vocab_size: int,
    chunk_length: int,
    *,
    dim: int,
    ffn: int,
    heads: int,
    head_dim: int,
    layers: int,
    first_cca: int,
    learning_rate: float = 2e-4,
    batch_size: int = 256,
) -> RunConfig:
    """One line of the paper's Table 2, with Table 10's P and the learning rate, warm-up and batch stated for it."""
    encoder_dim, encoder_ffn, encoder_attention_dim = 896, 3584, 1024
    num_chunks = 2048 // chunk_length
    tokens_per_step = batch_size * num_chunks * chunk_length
    return RunConfig(
        recipe=name,
        model=ModelConfig(
            vocab_size=vocab_size,
            chunk_length=chunk_length,
            num_chunks=num_chunks,
            hidden_dim=dim,
            num_layers=layers,
            num_heads=heads,
            head_dim=head_dim,
            ffn_dim=ffn + heads * head_dim // 2,
            cca_layers=tuple(range(first_cca, layers + 1, 3)),
            encoder_dim=encoder_dim,
            encoder_layers=2,
            encoder_heads=encoder_attention_dim // head_dim,
            encoder_ffn_dim=encoder_ffn + encoder_attention_dim // 2,
            encoder_ca_layers=(1,),
        ),
        training=TrainingConfig(
            num_steps=round(419.4e9 / tokens_per_step),
            batch_size=batch_size,
            micro_batch_size=1,
            learning_rate=learning_rate,
            num_warmup_steps=750,
        ),
    )
