"""Pooling before the last block, in training: of its outputs a tower reads one token, so only that one is computed.

Its keys and values still come from every token; rows and gradients are the same. The classes of a few modules change,
names and weights stay. (clipret_export.pooling does the same to graphs.)
"""

from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from clipret_training.models.openclip import ShortTextCLIP

__all__ = ["pool_early"]


def pool_early(model: Any) -> None:
    """Change in place the towers of open_clip's transformers that are known to read one token; others stay."""
    for module in model.modules():
        if isinstance(module, VisionTransformer) and module.pool_type == "tok" and module.attn_pool is None:
            _pool_last(module.transformer)
    if isinstance(model, ShortTextCLIP) and _pool_last(model.transformer):
        model.__class__ = _EarlyTextCLIP


def _pool_last(transformer: Any) -> bool:
    last = transformer.resblocks[-1]
    if type(last) is not ResidualAttentionBlock or not transformer.batch_first:
        return False
    last.__class__ = _PooledBlock
    return True


class _PooledBlock(ResidualAttentionBlock):  # type: ignore[misc]
    """float32 [B,L,W] -> [B,1,W]: the first token, or those at the positions `at`, int64 [B]."""

    at: Tensor | None = None

    def forward(self, q_x: Tensor, *_: None, attn_mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(q_x)
        if self.at is not None and attn_mask is not None:
            # Each text's own row of the causal mask, once for each head: [B*H,1,L]
            attn_mask = attn_mask[self.at][:, None].repeat_interleave(self.heads, dim=0)
        x = self._pick(q_x) + self.ls_1(self.attention(self._pick(y), y, y, attn_mask=attn_mask))
        pooled: Tensor = x + self.ls_2(self.mlp(self.ln_2(x)))
        return pooled

    @property
    def heads(self) -> int:
        attention: Any = self.attn
        heads: int = attention.num_heads if isinstance(attention, nn.MultiheadAttention) else attention.heads
        return heads

    def _pick(self, x: Tensor) -> Tensor:
        return x[:, :1] if self.at is None else x[torch.arange(len(x), device=x.device), self.at].unsqueeze(1)


class _EarlyTextCLIP(ShortTextCLIP):
    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        L = text.shape[1]
        x = self.token_embedding(text) + self.positional_embedding[:L]  # [B,L,W]
        # open_clip's text_global_pool, before the last block
        ends = text.argmax(dim=-1) if self.text_pool_type == "argmax" else (text == self.text_eos_id).int().argmax(-1)
        self.transformer.resblocks[-1].at = ends  # [B]
        x = self.ln_final(self.transformer(x, attn_mask=self.attn_mask[:L, :L]))[:, 0]  # [B,W]
        if isinstance(self.text_projection, nn.Linear):
            x = self.text_projection(x)
        elif self.text_projection is not None:
            x = x @ self.text_projection
        return nn.functional.normalize(x, dim=-1) if normalize else x
