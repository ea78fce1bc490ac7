"""Self-attention and cross-attention. All blocks are residual."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from retro_ray.model.attention_kernels import KeysValues, Mask, attend, join_heads, split_heads
from retro_ray.model.cached_rows import CachedRows
from retro_ray.model.layers import (
    Linear,
    Rotary,
    RowRotation,
    joint_product,
    residual_scale,
    rotate,
    rotate_rows,
    start_normal,
)
from retro_ray.model.new_tokens import NewTokens
from retro_ray.model.rms_norm import RMSNorm


class SelfAttention(nn.Module):
    """ATTN: residual multi-head self-attention with rotary positions, normalised before.

    H heads of queries, and G of keys and values, which are as many if `num_kv_heads` is None.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        eps: float,
        *,
        num_kv_heads: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = head_dim
        self.norm = RMSNorm(dim, eps=eps)
        self.query = Linear(dim, num_heads * head_dim, bias=bias)
        self.key = Linear(dim, num_kv_heads * head_dim, bias=bias)
        self.value = Linear(dim, num_kv_heads * head_dim, bias=bias)
        self.out = Linear(num_heads * head_dim, dim, bias=bias)
        self.query_norm = RMSNorm(head_dim, eps=eps) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(head_dim, eps=eps) if qk_norm else nn.Identity()
        self._head_counts = num_heads, num_kv_heads, num_kv_heads
        self.joint_projection: nn.Module | None = None
        """In place of query, key and value, once weights are packed."""

    def forward(
        self,
        h_BTD: Tensor,
        rotary: Rotary,
        mask: Mask | None = None,
        causal: bool = False,
        remember: Callable[[Tensor, Tensor], KeysValues] | None = None,
    ) -> Tensor:
        """Attention among the positions of `h`.

        `remember` is shown the new keys and values and returns those to attend to: how a cache
        takes part.
        """
        q_BHTE, k_BGSE, v_BGSE = (x_BTHE.transpose(1, 2) for x_BTHE in self.project(self.norm(h_BTD)))
        q_BHTE, k_BGSE = rotate(q_BHTE, rotary), rotate(k_BGSE, rotary)
        if remember is not None:
            k_BGSE, v_BGSE = remember(k_BGSE, v_BGSE)
        return h_BTD + self.out(join_heads(attend(q_BHTE, k_BGSE, v_BGSE, mask, causal)))

    def step(self, h_ND: Tensor, new: NewTokens, keys: CachedRows, values: CachedRows) -> Tensor:
        """The same for new tokens, whose keys and values join those of a cache."""
        q_NHE, k_NGE, v_NGE = self._project_rotated(self.norm(h_ND), new.rotation)
        keys.of[new.slots_N, :, new.positions_N] = k_NGE.to(keys.of.dtype)
        values.of[new.slots_N, :, new.positions_N] = v_NGE.to(values.of.dtype)
        return h_ND + self.out(new.read_past(q_NHE, keys.of, values.of))

    def _project_rotated(self, x_ND: Tensor, rotation: RowRotation) -> tuple[Tensor, Tensor, Tensor]:
        """`project`, with queries and keys rotated."""
        if self.joint_projection is None or not isinstance(self.key_norm, nn.Identity):
            q_NHE, k_NGE, v_NGE = self.project(x_ND)
            return rotate_rows(q_NHE, rotation), rotate_rows(k_NGE, rotation), v_NGE
        # Queries and keys lie side by side, and rotate in one.
        projected = self.joint_projection(x_ND).unflatten(-1, (-1, self.head_dim))
        num_heads, num_kv_heads, _ = self._head_counts
        rotated = rotate_rows(projected[:, : num_heads + num_kv_heads], rotation)
        return rotated[:, :num_heads], rotated[:, num_heads:], projected[:, num_heads + num_kv_heads :]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [..., H, E], keys and values [..., G, E] of `x` [..., D], not yet rotated."""
        if self.joint_projection is None:
            projected = joint_product((self.query, self.key, self.value), x)
        else:
            projected = self.joint_projection(x).split([n * self.head_dim for n in self._head_counts], dim=-1)
        queries, keys, values = (part.unflatten(-1, (-1, self.head_dim)) for part in projected)
        return self.query_norm(queries), self.key_norm(keys), values

    def initialise(self, num_layers: int) -> None:
        """Starting weights for a block in a stack of `num_layers`."""
        for linear in (self.query, self.key, self.value):
            start_normal(linear)
        start_normal(self.out, scale=residual_scale(num_layers))


class CrossAttention(nn.Module):
    """CA: cross-attention from x [B, T, D] to y [B, S, D'], normalised before on the side of x."""

    def __init__(self, dim: int, context_dim: int, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = RMSNorm(dim, eps=eps)
        self.query = Linear(dim, num_heads * head_dim, bias=False)
        self.key = Linear(context_dim, num_heads * head_dim, bias=False)
        self.value = Linear(context_dim, num_heads * head_dim, bias=False)
        self.out = Linear(num_heads * head_dim, dim, bias=False)

    def keys_values(self, key_input_BSD: Tensor, value_input_BSD: Tensor, rotary: Rotary) -> KeysValues:
        """Rotated keys and values, each [B, H, S, E]."""
        if key_input_BSD is value_input_BSD:
            key_BSX, value_BSX = joint_product((self.key, self.value), value_input_BSD)
        else:
            key_BSX, value_BSX = self.key(key_input_BSD), self.value(value_input_BSD)
        return rotate(split_heads(key_BSX, self.head_dim), rotary), split_heads(value_BSX, self.head_dim)

    def read(self, x_BTD: Tensor, rotary: Rotary, keys_values: KeysValues, mask: Tensor | None) -> Tensor:
        """What the normalised `x` reads from keys and values; without the residual."""
        q_BHTE = rotate(split_heads(self.query(x_BTD), self.head_dim), rotary)
        return self.out(join_heads(attend(q_BHTE, *keys_values, mask)))

    def initialise(self, num_layers: int) -> None:
        """Starting weights for a block in a stack of `num_layers`."""
        for linear in (self.query, self.key, self.value):
            start_normal(linear)
        start_normal(self.out, scale=residual_scale(num_layers))
