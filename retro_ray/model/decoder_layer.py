"""One layer of the decoder: its blocks, of the kinds that a config names."""

from __future__ import annotations

from torch import nn

from retro_ray.config import ModelConfig
from retro_ray.model.attention import SelfAttention
from retro_ray.model.chunked import ChunkedCrossAttention
from retro_ray.model.layers import FeedForward, GatedFeedForward


class DecoderLayer(nn.Module):
    """One layer p of the decoder; with a chunked cross-attention, added later, if p is in P."""

    cca: ChunkedCrossAttention | None

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.number = number
        self.self_attention = SelfAttention(
            config.hidden_dim,
            config.num_heads,
            config.head_dim,
            config.norm_eps,
            num_kv_heads=config.num_kv_heads,
            bias=config.attention_bias,
            qk_norm=config.qk_norm,
        )
        self.register_module("cca", None)
        feed_forward = GatedFeedForward if config.feed_forward == "swiglu" else FeedForward
        self.feed_forward = feed_forward(config.hidden_dim, config.ffn_dim, config.norm_eps)
        self.self_attention.initialise(config.num_layers)
        self.feed_forward.initialise(config.num_layers)
