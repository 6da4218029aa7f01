"""What the export observes and converts: layers with a stock forward, and calls of scaled_dot_product_attention.

Architectures differ only in the code around these two, so this module does not depend on any architecture.
"""

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
    """The kind of layer that a module is; None if it is no layer or overrides `forward`."""
    for kind, stock in _STOCK.items():
        if isinstance(module, stock) and type(module).forward is stock.forward:
            return kind
    return None


@contextmanager
def attention_as(compute: Callable[..., Tensor]) -> Iterator[None]:
    """Replace scaled_dot_product_attention inside the block.

    Args:
        compute: Called as compute(original, q, k, v, **options), with q, k and v [...,L,D]. Arguments after v arrive by
            name.
    """
    attend = F.scaled_dot_product_attention

    def instead(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        return compute(attend, query, key, value, **dict(zip(_OPTIONS, args, strict=False)), **options)

    F.scaled_dot_product_attention = instead
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attend


def replace_modules(root: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> int:
    """Replace the submodules of one class.

    Args:
        root: The module to change in place.
        kind: The exact class; subclasses stay.
        make: Returns the replacement of a module, or the module itself to keep it.

    Returns:
        The number of modules replaced.
    """
    matches = [
        (parent, name, child)
        for parent in root.modules()
        for name, child in parent.named_children()
        if type(child) is kind
    ]
    replacements = [(parent, name, child, make(child)) for parent, name, child in matches]
    for parent, name, _, new in replacements:
        setattr(parent, name, new)
    return sum(child is not new for _, _, child, new in replacements)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Split the width of tokens into attention heads.

    Args:
        x: float32 [B,L,W].
        heads: H, a divisor of W.

    Returns:
        float32 [B,H,L,W/H].
    """
    return x.reshape(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)
