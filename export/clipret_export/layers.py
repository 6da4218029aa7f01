"""What the export converts and observes: layers with a stock forward, and scaled_dot_product_attention wherever it is
called. Architectures differ in everything around these two, so nothing here knows any."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Kind", "attention_as", "kind_of", "replace_modules", "split_heads"]

Kind = Literal["linear", "convolution", "embedding"]

_OPTIONS = ("attn_mask", "dropout_p", "is_causal")
_STOCK: dict[Kind, type[nn.Module]] = {"linear": nn.Linear, "convolution": nn.Conv2d, "embedding": nn.Embedding}


def kind_of(module: nn.Module) -> Kind | None:
    """Which kind of layer a module is; None for one that is no layer or has a forward of its own."""
    for kind, stock in _STOCK.items():
        if isinstance(module, stock) and type(module).forward is stock.forward:
            return kind
    return None


@contextmanager
def attention_as(compute: Callable[..., Tensor]) -> Iterator[None]:
    """Inside the block scaled_dot_product_attention(q, k, v, ...) is compute(the original, q, k, v, ...),
    everything after v by its name."""
    attend = F.scaled_dot_product_attention

    def instead(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        return compute(attend, query, key, value, **dict(zip(_OPTIONS, args, strict=False)), **options)

    F.scaled_dot_product_attention = instead
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attend


def replace_modules(root: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> int:
    """Put make(module) in the place of every submodule of exactly this kind; returns how many were replaced.

    A module for which `make` gives the module itself stays.
    """
    found = [
        (parent, name, child)
        for parent in root.modules()
        for name, child in parent.named_children()
        if type(child) is kind
    ]
    made = [(parent, name, child, make(child)) for parent, name, child in found]
    for parent, name, _, new in made:
        setattr(parent, name, new)
    return sum(child is not new for _, _, child, new in made)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """float32 [B,L,W] -> [B,H,L,W/H]"""
    return x.reshape(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)
