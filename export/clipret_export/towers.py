"""The two towers as torch modules that take what the bundle promises: uint8 images, int64 token ids.

`rewrite` replaces what exports badly or computes more than the embedding needs; the embedding stays the same to 1e-6.
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
    """uint8 [B,S,S,3] -> float32 [B,D], unit embeddings. Mean, std and channel order are inside."""

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
    """int64 [B,L] -> float32 [B,D], unit embeddings, for any L that the model's TextSpec allows."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.model = loaded.model

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model.encode_text(tokens)  # type: ignore[operator]
        return F.normalize(x.to(torch.float32), dim=-1)


def rewrite(model: nn.Module) -> None:
    """Rewrite a model in place: normalisations folded into convolutions, plain attention, early pooling.

    Must come before any conversion to lower precision.
    """
    model.eval().requires_grad_(False)
    _fold_normalisations(model)
    replace_modules(model, nn.MultiheadAttention, _plain)
    pool_early(model)


def _fold_normalisations(model: Any) -> None:
    """BatchNorm2d of the image tower into the convolutions before them.

    Engines fold them too, but not across the casts of lower precision. A tower that torch.fx cannot trace keeps its
    normalisations and is merely slower.
    """
    visual = model.visual
    if not any(isinstance(module, nn.BatchNorm2d) for module in visual.modules()):
        return
    pool = getattr(visual, "attnpool", None)
    if isinstance(pool, AttentionPool2d):
        visual.attnpool = nn.Identity()  # a traced attention would be out of the reach of `attention_as`
        model.visual = nn.Sequential(visual, PlainAttentionPool(pool))
    with contextlib.suppress(TraceError):
        folded = fuse(visual)
        model.visual = nn.Sequential(folded, model.visual[1]) if model.visual is not visual else folded


def _plain(packed: nn.MultiheadAttention) -> nn.Module:
    return packed if packed.bias_k is not None or packed.add_zero_attn else PlainAttention(packed)


class PlainAttention(nn.Module):
    """nn.MultiheadAttention as four linear layers around scaled_dot_product_attention.

    The stock module packs its projections and takes a fused path in eval mode that the exporter unrolls; this one
    becomes four matrix products and a softmax. Call and result are the stock module's.
    """

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = packed.num_heads
        self.batch_first = packed.batch_first
        if packed.in_proj_weight is not None:
            weights = packed.in_proj_weight.data.chunk(3)
        else:  # keys and values of another width than the queries'
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
        if attn_mask is not None and attn_mask.dim() == 3:  # [B*H,L,L], as the stock module takes it
            attn_mask = attn_mask.reshape(-1, self.heads, *attn_mask.shape[1:])
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        x = self.out(x.transpose(1, 2).flatten(2))  # [B,L,W]
        return (x if self.batch_first else x.transpose(0, 1)), None


class PlainAttentionPool(nn.Module):
    """open_clip's AttentionPool2d, whose only query is the mean of the image: float32 [B,C,h,w] -> [B,D]."""

    def __init__(self, packed: AttentionPool2d) -> None:
        super().__init__()
        self.heads = packed.num_heads
        self.positional_embedding = packed.positional_embedding
        self.q, self.k, self.v, self.out = packed.q_proj, packed.k_proj, packed.v_proj, packed.c_proj

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)  # [B,h*w,C]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding
        q, k, v = (split_heads(y, self.heads) for y in (self.q(x[:, :1]), self.k(x), self.v(x)))
        rows: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))
        return rows


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear
