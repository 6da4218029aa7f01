"""Packed attention projections, split so that adapters can target queries, keys and values separately.

nn.MultiheadAttention stores the three projections in one matrix and multiplies by it without calling a layer; timm's
attention has one layer for all three. Split, they are layers named q_proj, k_proj and v_proj, as in transformers, and
the result is the same up to rounding. `pack_attention` and `packed_state` restore the original names.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention, AttentionRope
from torch import Tensor, nn

from clipret.errors import ClipretError

__all__ = ["PARTS", "pack_attention", "packed_state", "split_attention", "splittable"]

PARTS = ("q_proj", "k_proj", "v_proj")


def splittable(model: nn.Module) -> list[str]:
    """The attention modules that `split_attention` can split.

    Args:
        model: The model.

    Returns:
        The names of its submodules.
    """
    names = []
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn:
            names.append(name)
        # Only attention that calls the layer: the other classes multiply by its weight and would bypass an adapter.
        elif isinstance(module, Attention | AttentionRope) and type(getattr(module, "qkv", None)) is nn.Linear:
            names.append(f"{name}.qkv" if name else "qkv")
    return names


def split_attention(model: nn.Module, names: Iterable[str]) -> None:
    """Split attention modules in place.

    Args:
        model: The model to change.
        names: Some of the names that `splittable` returned.
    """
    for name in names:
        packed = model.get_submodule(name)
        split = _SplitAttention(packed) if isinstance(packed, nn.MultiheadAttention) else _SplitLinear(packed)
        split.train(packed.training)
        _replace(model, name, split)


def pack_attention(model: nn.Module) -> None:
    """Undo `split_attention` in place: restore the original modules with the current weights.

    Args:
        model: The model to change.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, _Split):
            _replace(model, name, module.pack())


def packed_state(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and merge the weights of split attention as `pack_attention` does. The model stays as it is.

    Args:
        model: The model with split attention.
        state: Its state dict.

    Returns:
        The state dict that the model has after `pack_attention`.
    """
    state = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, _Split):
            module.pack_state(state, f"{name}." if name else "")
    return state


class _Split(nn.Module):
    """Three layers q_proj, k_proj and v_proj, made from one packed matrix or from three."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def __init__(self, weights: Iterable[Tensor], bias: Tensor | None, trained: Iterable[bool]) -> None:
        super().__init__()
        biases = bias.chunk(3) if bias is not None else (None, None, None)
        for part, weight, part_bias, train in zip(PARTS, weights, biases, trained, strict=True):
            self.add_module(part, _linear(weight, part_bias, train))

    def pack(self) -> nn.Module:
        """The original module with the current weights."""
        raise NotImplementedError

    def pack_state(self, state: dict[str, Tensor], prefix: str) -> None:
        """Pack the entries of a state dict in place."""
        raise NotImplementedError

    def _take(self, state: dict[str, Tensor], prefix: str, what: str) -> list[Tensor]:
        return [state.pop(f"{prefix}{part}.{what}") for part in PARTS if f"{prefix}{part}.{what}" in state]


class _SplitAttention(_Split):
    """nn.MultiheadAttention with the same arguments and results, but without attention weights."""

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        self_attention = packed.in_proj_weight is not None
        if self_attention:
            weights, trained = packed.in_proj_weight.chunk(3), [packed.in_proj_weight.requires_grad] * 3
        else:  # keys and values differ in width from the queries
            weights = (packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight)
            trained = [weight.requires_grad for weight in weights]
        super().__init__(weights, packed.in_proj_bias, trained)
        plain = nn.Linear(packed.embed_dim, packed.embed_dim, device="meta")
        plain.weight, plain.bias = packed.out_proj.weight, packed.out_proj.bias
        self.out_proj = plain
        self.heads, self.dropout, self.batch_first = packed.num_heads, packed.dropout, packed.batch_first
        self.self_attention = self_attention
        self.widths = (packed.embed_dim, packed.kdim, packed.vdim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        if need_weights or key_padding_mask is not None:
            raise ClipretError(
                "this model needs attention weights or a padding mask, which adapters on q, k and v do not support: "
                "choose other targets: --set 'adapter_targets=[\"mlp\"]'"
            )
        if not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B,L,W] -> [B,H,L,W/H]
            for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        if attn_mask is not None:
            if attn_mask.dim() == 3:  # [B*H,L,L], as in the original module
                attn_mask = attn_mask.reshape(-1, self.heads, *attn_mask.shape[1:])
            # In nn.MultiheadAttention True masks a position, in scaled_dot_product_attention it keeps one.
            attn_mask = attn_mask.to(q.dtype) if attn_mask.is_floating_point() else ~attn_mask
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        x = self.out_proj(x.transpose(1, 2).flatten(2))  # [B,L,W]
        return (x if self.batch_first else x.transpose(0, 1)), None

    def pack(self) -> nn.MultiheadAttention:
        width, kdim, vdim = self.widths
        packed = nn.MultiheadAttention(
            width,
            self.heads,
            self.dropout,
            self.out_proj.bias is not None,
            kdim=kdim,
            vdim=vdim,
            batch_first=self.batch_first,
            device="meta",
        )
        state = dict(self.state_dict())
        self.pack_state(state, "")
        packed.load_state_dict({name: value.detach() for name, value in state.items()}, strict=True, assign=True)
        packed.requires_grad_(self.q_proj.weight.requires_grad)
        packed.out_proj.requires_grad_(self.out_proj.weight.requires_grad)
        return packed.train(self.training)

    def pack_state(self, state: dict[str, Tensor], prefix: str) -> None:
        weights, biases = self._take(state, prefix, "weight"), self._take(state, prefix, "bias")
        if self.self_attention:
            state[f"{prefix}in_proj_weight"] = torch.cat(weights)
        else:
            state |= {f"{prefix}{part}_weight": weight for part, weight in zip(PARTS, weights, strict=True)}
        if biases:
            state[f"{prefix}in_proj_bias"] = torch.cat(biases)


class _SplitLinear(_Split):
    """timm's layer for queries, keys and values: [B,L,W] -> [B,L,3*W']."""

    def __init__(self, packed: Any) -> None:
        super().__init__(packed.weight.chunk(3), packed.bias, [packed.weight.requires_grad] * 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)

    def pack(self) -> nn.Linear:
        state = self.state_dict()
        self.pack_state(state, "")
        return _linear(state["weight"], state.get("bias"), self.q_proj.weight.requires_grad).train(self.training)

    def pack_state(self, state: dict[str, Tensor], prefix: str) -> None:
        for what in ("weight", "bias"):
            if parts := self._take(state, prefix, what):
                state[f"{prefix}{what}"] = torch.cat(parts)


def _linear(weight: Tensor, bias: Tensor | None, train: bool) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    # Copies, because parameters that share memory cannot be saved.
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=train)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=train)
    return linear


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
