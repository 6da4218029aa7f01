"""The two towers as torch modules with the inputs of a bundle: uint8 images and int64 token ids.

`rewrite` replaces modules that export badly or compute more than the embedding needs. Embeddings stay the same within
1e-6.
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.fx.proxy import TraceError

from clipret_export.layers import replace_modules, split_heads
from clipret_export.pooling import pool_early
from clipret_training.models import LoadedModel

__all__ = ["ImageTower", "PlainAttention", "TextTower", "rewrite"]


class ImageTower(nn.Module):
    """The image tower: uint8 [B,S,S,3] -> embeddings float32 [B,D] of unit length.

    The normalization of pixels and the change of the channel order are part of it.

    Args:
        loaded: The model.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.model = loaded.model
        mean, std = torch.tensor(loaded.mean), torch.tensor(loaded.std)
        # (x / 255 - mean) / std as one multiplication and one addition
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, pixels: Tensor) -> Tensor:
        # The cast comes first: TensorRT refuses to transpose uint8.
        x = pixels.to(torch.float32) * self.scale + self.shift  # [B,S,S,3]
        x = self.model.encode_image(x.permute(0, 3, 1, 2))  # type: ignore[operator]  # [B,3,S,S] -> [B,D]
        return F.normalize(x.to(torch.float32), dim=-1)


class TextTower(nn.Module):
    """The text tower: int64 [B,L] -> embeddings float32 [B,D] of unit length, for any L that the TextSpec allows.

    Args:
        loaded: The model.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.model = loaded.model

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model.encode_text(tokens)  # type: ignore[operator]
        return F.normalize(x.to(torch.float32), dim=-1)


def rewrite(model: nn.Module) -> None:
    """Fold batch normalizations into convolutions, unpack attention and pool early.

    Call it before any conversion to lower precision.

    Args:
        model: The model to change in place.
    """
    model.eval().requires_grad_(False)
    _fold_normalizations(model)
    replace_modules(model, nn.MultiheadAttention, _plain)
    pool_early(model)


def _fold_normalizations(model: Any) -> None:
    """Fold each BatchNorm2d of the image tower into the convolution before it.

    Backends fold them as well, but not across the casts of lower precision. A tower that torch.fx cannot trace keeps
    its normalizations and is only slower.
    """
    visual = model.visual
    if not any(isinstance(module, nn.BatchNorm2d) for module in visual.modules()):
        return
    pool = getattr(visual, "attnpool", None)
    if isinstance(pool, AttentionPool2d):
        visual.attnpool = nn.Identity()  # `attention_as` would not reach a traced attention
        model.visual = nn.Sequential(visual, PlainAttentionPool(pool))
    with contextlib.suppress(TraceError):
        folded = fuse(visual)
        model.visual = nn.Sequential(folded, model.visual[1]) if model.visual is not visual else folded


def _plain(packed: nn.MultiheadAttention) -> nn.Module:
    return packed if packed.bias_k is not None or packed.add_zero_attn else PlainAttention(packed)


class PlainAttention(nn.Module):
    """nn.MultiheadAttention as four linear layers around scaled_dot_product_attention.

    The stock module packs its projections, and in eval mode takes a fused path that the exporter unrolls. This one
    becomes four matrix products and a softmax, with the same arguments and results.

    Args:
        packed: The stock module.
    """

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = packed.num_heads
        self.batch_first = packed.batch_first
        if packed.in_proj_weight is not None:
            weights = packed.in_proj_weight.data.chunk(3)
        else:  # keys and values differ in width from the queries
            weights = [w.data for w in (packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight)]
        biases = packed.in_proj_bias.data.chunk(3) if packed.in_proj_bias is not None else (None, None, None)
        self.q, self.k, self.v = map(_linear, weights, biases)
        self.out = packed.out_proj

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        assert not need_weights
        if not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = (split_heads(x, self.heads) for x in (self.q(query), self.k(key), self.v(value)))
        if attn_mask is not None and attn_mask.dim() == 3:  # [B*H,L,L], as in the stock module
            attn_mask = attn_mask.reshape(-1, self.heads, *attn_mask.shape[1:])
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        x = self.out(x.transpose(1, 2).flatten(2))  # [B,L,W]
        return (x if self.batch_first else x.transpose(0, 1)), None


class PlainAttentionPool(nn.Module):
    """open_clip's AttentionPool2d with one query, the mean over the image: float32 [B,C,h,w] -> [B,D].

    Args:
        packed: The original module.
    """

    def __init__(self, packed: AttentionPool2d) -> None:
        super().__init__()
        self.heads = packed.num_heads
        self.positional_embedding = packed.positional_embedding
        self.q, self.k, self.v, self.out = packed.q_proj, packed.k_proj, packed.v_proj, packed.c_proj

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)  # [B,h*w,C]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding
        q, k, v = (split_heads(y, self.heads) for y in (self.q(x[:, :1]), self.k(x), self.v(x)))
        embeddings: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))
        return embeddings


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear
