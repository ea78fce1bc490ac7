"""Weights in the order in which a CPU's kernels read them, for inference.

As they come, weights are put into that order in every product, which is what most of the time goes
into when the rows are few, as in decoding. For new tokens they are there in eight bits, too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retro_ray.model.attention import SelfAttention
from retro_ray.model.int8_product import Int8Product, int8_is_fast
from retro_ray.model.retro import RetroModel

_EXPECTED_ROWS = 8
"""What the order is chosen for; it serves other numbers of rows almost as well."""
_LONG_SUM = 1024
"""oneDNN adds up more terms than these in another order for one row than for several."""


class PackedLinear(nn.Module):
    """A linear layer of weights [out, in] and perhaps a bias [out], in bf16. It cannot be trained, moved or saved.

    With `int8`, rows [N, in], as new tokens are, are multiplied by weights of eight bits, and the result is float32;
    sequences [B, T, in] by those in bf16.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, int8: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._bias = None if bias is None else bias.detach()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _EXPECTED_ROWS)
        self._int8 = Int8Product(weight) if int8 else None

    def forward(self, x: Tensor) -> Tensor:
        if self._int8 is not None and x.dim() == 2:
            return self._int8(x) if self._bias is None else self._int8(x).add_(self._bias)
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
    int8 = int8 and int8_is_fast()
    model.packed_read_out = PackedLinear(model.read_out_weight, int8=int8)
    for layer in model.layers:
        _pack(layer, int8=int8)
    _pack(model, int8=False)
    return True


def _pack(root: nn.Module, int8: bool) -> None:
    """All matrices in `root` that are not packed yet."""
    for module in root.modules():
        if isinstance(module, SelfAttention) and module.joint_projection is None:
            projections = module.query, module.key, module.value
            biases: list[Tensor] = [linear.bias for linear in projections if linear.bias is not None]
            weights = torch.cat([linear.weight for linear in projections])
            module.joint_projection = PackedLinear(weights, torch.cat(biases) if biases else None, int8=int8)
            del module.query, module.key, module.value
    for module in list(root.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias, int8=int8))
