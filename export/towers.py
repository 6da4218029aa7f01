"""The two towers as torch modules that take what the bundle promises: uint8 pictures, int64 token ids."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipret.training.loaded import LoadedModel

__all__ = ["ImageTower", "PlainAttention", "TextTower", "replace_modules"]


class ImageTower(nn.Module):
    """uint8 [B,S,S,3] -> float32 [B,D], unit rows. Mean, std and channel order are inside."""

    scale: Tensor
    shift: Tensor

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.model = loaded.model
        mean, std = torch.tensor(loaded.mean), torch.tensor(loaded.std)
        # (x / 255 - mean) / std as one product and one sum
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, pixels: Tensor) -> Tensor:
        # The cast comes first: TensorRT refuses to transpose uint8.
        x = pixels.to(torch.float32) * self.scale + self.shift  # [B,S,S,3]
        x = self.model.encode_image(x.permute(0, 3, 1, 2))  # type: ignore[operator]  # [B,3,S,S] -> [B,D]
        return F.normalize(x.to(torch.float32), dim=-1)


class TextTower(nn.Module):
    """int64 [B,L] -> float32 [B,D], unit rows, for any L that the model's TextSpec allows."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.model = loaded.model

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model.encode_text(tokens)  # type: ignore[operator]
        return F.normalize(x.to(torch.float32), dim=-1)


class PlainAttention(nn.Module):
    """nn.MultiheadAttention's self-attention as three linear layers around scaled_dot_product_attention.

    The stock module packs its projections and takes a fused path in eval mode that the exporter unrolls; this one
    becomes four matrix products and a softmax. Call and result are the stock module's.
    """

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        if packed.in_proj_weight is None or packed.bias_k is not None or packed.add_zero_attn:
            raise ValueError("only self-attention with one packed projection is known here")
        self.heads = packed.num_heads
        self.batch_first = packed.batch_first
        width = packed.embed_dim
        bias = packed.in_proj_bias is not None
        self.q, self.k, self.v = (nn.Linear(width, width, bias) for _ in range(3))
        for linear, weight in zip((self.q, self.k, self.v), packed.in_proj_weight.data.chunk(3), strict=True):
            linear.weight.data = weight.clone()
        if packed.in_proj_bias is not None:
            for linear, value in zip((self.q, self.k, self.v), packed.in_proj_bias.data.chunk(3), strict=True):
                linear.bias.data = value.clone()
        self.out = packed.out_proj

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        assert not need_weights
        if not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = (self._split(x) for x in (self.q(query), self.k(key), self.v(value)))  # [B,H,L,W/H]
        mask = attn_mask.to(q.dtype) if attn_mask is not None else None
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.out(x.transpose(1, 2).flatten(2))  # [B,L,W]
        return (x if self.batch_first else x.transpose(0, 1)), None

    def _split(self, x: Tensor) -> Tensor:
        B, L, W = x.shape
        return x.view(B, L, self.heads, W // self.heads).transpose(1, 2)


def replace_modules(root: nn.Module, kind: type[nn.Module], make: Any) -> int:
    """Put make(module) in the place of every submodule of exactly this kind; returns how many."""
    found = [
        (parent, name) for parent in root.modules() for name, child in parent.named_children() if type(child) is kind
    ]
    for parent, name in found:
        setattr(parent, name, make(getattr(parent, name)))
    return len(found)
