"""Weights in the order in which a CPU's kernels read them, for inference.

As they come, weights are put into that order in every product, which is what most of the time goes
into when the rows are few, as in decoding. For new tokens they are there in eight bits, too (int8_blocks.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retro_ray.model.attention import SelfAttention
from retro_ray.model.int8_blocks import Int8Decoder
from retro_ray.model.int8_product import int8_is_fast
from retro_ray.model.retro import RetroModel

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


def pack_weights(model: RetroModel, int8: bool = False) -> bool:
    """Pack all of a model's matrices, which from then on computes and no more: no training, no saving.

    With `int8`, and where a CPU is fast with them, new tokens are read with weights of eight bits. Prompts are not, nor
    neighbours: what texts are scored by are the weights as they are.

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
        model.int8 = Int8Decoder(model)
    model.packed_read_out = PackedLinear(model.read_out_weight)
    for module in model.modules():
        if isinstance(module, SelfAttention) and module.joint_projection is None:
            projections = module.query, module.key, module.value
            biases: list[Tensor] = [linear.bias for linear in projections if linear.bias is not None]
            weights = torch.cat([linear.weight for linear in projections])
            module.joint_projection = PackedLinear(weights, torch.cat(biases) if biases else None)
            del module.query, module.key, module.value
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias))
    return True
