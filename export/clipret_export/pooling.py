"""Early pooling: a CLIP tower reads one token of its last block's output, so the block computes only that token.

Keys and values still come from every token. The embedding is the same, and a ViT-B-32 does a twelfth less work. Towers
with another pooling (mean, attention over all tokens, a class token in timm) stay as they are.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import Tensor, nn

from clipret_export.layers import split_heads

__all__ = ["pool_early"]


def pool_early(model: Any) -> None:
    """Rewrite the towers that read one token of their last block.

    Args:
        model: The model to change in place, in eval mode.
    """
    for parent in list(model.modules()):
        children: list[tuple[str, Any]] = list(parent.named_children())
        for name, child in children:
            if isinstance(child, VisionTransformer) and child.pool_type == "tok" and child.attn_pool is None:
                _pool_class_token(child)
            elif isinstance(child, TextTransformer) and _pools_one_token(child):
                setattr(parent, name, _PooledText(child, child.pool_type, child.eos_id))
            elif name == "encoder" and _is_bert(child) and _reads_first_token(parent, model):
                layers = cast(nn.ModuleList, child.layer)  # checked by _is_bert
                layers[-1] = _PooledBertLayer(layers[-1])
    if hasattr(model, "text_pool_type") and type(model.transformer.resblocks[-1]) is ResidualAttentionBlock:
        model.pooled_text = _PooledText(model, model.text_pool_type, model.text_eos_id)
        model.encode_text = model.pooled_text.forward


def _pool_class_token(tower: VisionTransformer) -> None:
    blocks = tower.transformer.resblocks
    last = blocks[-1]
    if type(last) is ResidualAttentionBlock and tower.transformer.batch_first:
        blocks[-1] = _PooledBlock(last)


class _PooledBlock(nn.Module):
    """A residual attention block for one token: float32 [B,L,W] -> [B,1,W], the token at `at` [B] or the first."""

    def __init__(self, block: ResidualAttentionBlock) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ls_1 = block.ln_1, block.attn, block.ls_1
        self.ln_2, self.mlp, self.ls_2 = block.ln_2, block.mlp, block.ls_2

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        mask = attn_mask
        if at is not None and mask is not None:
            mask = mask[at][:, None, None]  # the row of the causal mask for each text's token: [B,1,1,L]
        x = _pick(x, at) + self.ls_1(self.attn(_pick(y, at), y, y, need_weights=False, attn_mask=mask)[0])
        pooled: Tensor = x + self.ls_2(self.mlp(self.ln_2(x)))
        return pooled


def _pick(x: Tensor, at: Tensor | None) -> Tensor:
    """[B,L,W] -> [B,1,W]"""
    return x[:, :1] if at is None else x[torch.arange(x.shape[0], device=x.device), at].unsqueeze(1)


def _pools_one_token(text: TextTransformer) -> bool:
    return (
        text.pool_type in ("argmax", "eos", "first", "last")
        and text.cls_emb is None
        and not text.use_pad_mask
        and type(text.transformer.resblocks[-1]) is ResidualAttentionBlock
    )


class _PooledText(nn.Module):
    """The text tower of open_clip.CLIP or a TextTransformer, with a last block that computes the pooled token only.

    int64 [B,L] -> float32 [B,D].
    """

    attn_mask: Tensor | None

    def __init__(self, text: Any, pool_type: str, eos_id: int | None) -> None:
        super().__init__()
        self.token_embedding, self.positional_embedding = text.token_embedding, text.positional_embedding
        *blocks, last = text.transformer.resblocks
        self.blocks, self.last = nn.ModuleList(blocks), _PooledBlock(last)
        self.ln_final, self.text_projection = text.ln_final, text.text_projection
        self.register_buffer("attn_mask", text.attn_mask, persistent=False)
        self.pool_type, self.eos_id = pool_type, eos_id

    def forward(self, text: Tensor, normalize: bool = False) -> Tensor:
        L = text.shape[1]
        x = self.token_embedding(text) + self.positional_embedding[:L]  # [B,L,W]
        mask = None if self.attn_mask is None else self.attn_mask[:L, :L]  # [L,L]
        for block in self.blocks:
            x = block(x, attn_mask=mask)
        x = self.ln_final(self.last(x, mask, self._position(text))[:, 0])  # [B,W]
        if isinstance(self.text_projection, nn.Module):
            x = self.text_projection(x)
        elif self.text_projection is not None:
            x = x @ self.text_projection
        return F.normalize(x, dim=-1) if normalize else x

    def _position(self, text: Tensor) -> Tensor:
        """The position of the pooled token, int64 [B]."""
        if self.pool_type == "argmax":
            return text.argmax(dim=-1)
        if self.pool_type == "eos":
            return torch.eq(text, self.eos_id or 0).int().argmax(dim=-1)
        return torch.full_like(text[:, 0], 0 if self.pool_type == "first" else text.shape[1] - 1)


def _is_bert(encoder: nn.Module) -> bool:
    """Whether an encoder of transformers has the layers of BERT, as BERT, RoBERTa and XLM-RoBERTa have."""
    layers = getattr(encoder, "layer", None)
    parts = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return False
    names = {name for name, _ in layers[-1].named_modules()}
    return {*parts, "intermediate", "output"} <= names and not getattr(layers[-1], "is_decoder", False)


def _reads_first_token(bert: nn.Module, model: nn.Module) -> bool:
    """Whether the module that contains the transformer `bert` reads only its first token."""
    for parent in model.modules():
        if getattr(parent, "transformer", None) is bert:  # open_clip's HFTextEncoder
            return type(getattr(parent, "pooler", None)).__name__ in ("ClsPooler", "ClsLastHiddenStatePooler")
        if getattr(parent, "bert", None) is bert:  # our ChineseClip
            return True
    return False


class _PooledBertLayer(nn.Module):
    """A layer of BERT for the first token: float32 [B,L,W] -> [B,1,W]. `attention_mask` is additive, [B,1,*,L]."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output = layer.attention, layer.intermediate, layer.output
        self.heads = layer.attention.self.num_attention_heads

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        inner, first = self.attention.self, hidden_states[:, :1]
        projected = (inner.query(first), inner.key(hidden_states), inner.value(hidden_states))
        q, k, v = (split_heads(y, self.heads) for y in projected)
        mask = None if attention_mask is None else attention_mask[:, :, :1]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.attention.output(x, first)
        pooled: Tensor = self.output(self.intermediate(x), x)
        return pooled
