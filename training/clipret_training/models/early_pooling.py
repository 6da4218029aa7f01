"""Early pooling in training: a tower reads one token of its last block's output, so the block computes only that token.

Keys and values still come from every token; embeddings and gradients are the same. A few modules change their class,
but keep their names and weights. `clipret_export.pooling` does the same for exported graphs.
"""

from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from clipret_training.models.openclip import ShortTextCLIP

__all__ = ["pool_early"]


def pool_early(model: Any) -> None:
    """Change the towers of open_clip that read one token of their last block. Others stay as they are.

    Args:
        model: The model to change in place.
    """
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
    """A block for one token: float32 [B,L,W] -> [B,1,W], the tokens at the positions `at`, int64 [B], or the first."""

    at: Tensor | None = None

    def forward(self, q_x: Tensor, *_: None, attn_mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(q_x)
        if self.at is not None and attn_mask is not None:
            # The row of the causal mask for each text's token, once per head: [B*H,1,L]
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
