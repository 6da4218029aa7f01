"""FP16 with a float32 residual stream: the matrix products run in half, everything between them in float32.

A CLIP tower converted whole overflows where its residual stream grows past 65,504 and loses digits in LayerNorm;
the products themselves, which take nearly all the time, are harmless. So each Linear, Conv2d and Embedding
gets half weights and casts at its border, and nothing else changes. The conversion happens in torch, since
converters that work on the ONNX graph trip over its uint8 input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipret.export.towers import PlainAttention, replace_modules

__all__ = ["to_half"]


class _Half(nn.Module):
    """A Linear or Conv2d that multiplies in half: float32 in, float32 out."""

    # open_clip's blocks ask their first linear layer for the dtype of the residual stream; a layer may answer
    # with this name instead of its weight's dtype.
    int8_original_dtype = torch.float32

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.half()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x.to(torch.float16))
        return y.to(torch.float32)


class _HalfEmbedding(nn.Module):
    """A lookup table stored in half, which halves what is usually the text tower's largest matrix."""

    def __init__(self, inner: nn.Embedding) -> None:
        super().__init__()
        self.weight = nn.Parameter(inner.weight.data.half(), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).to(torch.float32)


class _HalfAttention(PlainAttention):
    """The same attention with queries, keys and values in half from the projections to the output's sum."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        q, k, v = (x.to(torch.float16) for x in (query, key, value))
        x, _ = super().forward(q, k, v, need_weights, attn_mask)
        return x.to(torch.float32), None


def to_half(tower: nn.Module) -> None:
    """Convert a tower in place. Its nn.MultiheadAttention must have become PlainAttention before."""

    def attention(plain: nn.Module) -> nn.Module:
        plain.__class__ = _HalfAttention
        return plain.half()

    # Attention first: its linear layers then already are half and need no casts of their own.
    replace_modules(tower, PlainAttention, attention)
    inside = {
        id(child) for module in tower.modules() if isinstance(module, _HalfAttention) for child in module.modules()
    }

    def outside(module: nn.Module) -> nn.Module:
        return module if id(module) in inside else _Half(module)

    for kind in (nn.Linear, nn.Conv2d):
        replace_modules(tower, kind, outside)
    replace_modules(tower, nn.Embedding, _HalfEmbedding)
