"""Weights in the order in which a CPU's kernels read them, for inference.

As they come, weights are put into that order in every product, which is what most of the time goes
into when the rows are few, as in decoding. For new tokens they are there in eight bits, too (int8_blocks.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from retro_ray.model.attention import SelfAttention
from retro_ray.model.chunked import NeighbourEncoding
from retro_ray.model.decoder import RetroDecoder
from retro_ray.model.int8_blocks import Int8Decoder
from retro_ray.model.int8_linear import Int8Linear
from retro_ray.model.int8_product import int8_is_fast

_EXPECTED_ROWS = 8
"""What the order is chosen for; it serves other numbers of rows almost as well."""
_LONG_SUM = 1024
"""oneDNN adds up more terms than these in another order for one row than for several."""


class PackedLinear(nn.Module):
    """A linear layer of weights [out, in] and perhaps a bias [out], in bf16. It cannot be trained, moved or saved."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._bias = None if bias is None else bias.detach()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _EXPECTED_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.bfloat16)
        # A single row would be summed in another order than the same row beside others.
        alone = self.in_features > _LONG_SUM and x.numel() == self.in_features
        rows = x.reshape(1, -1).expand(2, -1).contiguous() if alone else x
        product = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return product[0].view(*x.shape[:-1], -1) if alone else product


def pack_weights(model: RetroDecoder, int8: bool = False) -> bool:
    """Pack all of a model's matrices, which from then on computes and no more: no training, no saving.

    With `int8`, and where a CPU is fast with them, new tokens and the neighbours that come with them are read with
    weights of eight bits. Prompts are not, nor their neighbours: what texts are scored by are the weights as they are.

    Returns:
        Whether it was done: only on a CPU with bf16 products, for a model in bf16, and once.
    """
    weight = model.token_embedding.weight
    capabilities = torch.cpu.get_capabilities()
    has_products = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not has_products:
        return False
    if model.packed_read_out is not None:
        return False
    if int8 and int8_is_fast():
        model.int8 = Int8Decoder(model.layers, model.read_out_weight)
        if not capabilities.get("amx_bf16"):  # which is as fast
            model.int8.encoding = _encoding_in_int8(model.encoding)
    model.packed_read_out = PackedLinear(model.read_out_weight)
    _pack(model, PackedLinear)
    return True


def _encoding_in_int8(encoding: NeighbourEncoding | None) -> NeighbourEncoding | None:
    if encoding is None:
        return None
    copied = copy.deepcopy(encoding)
    for cca in copied.ccas.values():
        del cca.query, cca.out
    for part in (copied.encoder, *copied.ccas.values()):
        _pack(part, Int8Linear)
    return copied


def _pack(root: nn.Module, packed: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
    """All matrices in `root`."""
    for module in root.modules():
        if isinstance(module, SelfAttention) and module.joint_projection is None:
            projections = module.query, module.key, module.value
            biases: list[Tensor] = [linear.bias for linear in projections if linear.bias is not None]
            weights = torch.cat([linear.weight for linear in projections])
            module.joint_projection = packed(weights, torch.cat(biases) if biases else None)
            del module.query, module.key, module.value
    for module in list(root.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, packed(child.weight, child.bias))
