"""8-bit codes of embeddings: what the first stage of the exact search reads, with proven limits of what they lose.

An embedding x is stored as unsigned bytes u with  x = center + scale * (u - 128) + e. Embeddings of a CLIP tower share most of their
direction; without the common part, `center`, the same bytes resolve the rest about four times finer. The search
never trusts the codes further than `residual` (the longest e) and `reach` (the longest scale * (u - 128)) allow.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipret.arrays import StoredEmbeddings

__all__ = ["ZERO", "QuantizedEmbeddings", "mean", "quantize"]

ZERO = 128  # the byte that stands for nothing
_BLOCK = 1024  # embeddings a block: 2 MiB of float32 at 512 dimensions


@dataclass(frozen=True)
class QuantizedEmbeddings:
    """`values` uint8 [n,D] of n embeddings, relative to `center` float32 [D].

    `scale`: what one step of a byte is worth. `residual`, `reach`: upper limits, over the embeddings, of the Euclidean
    lengths of  embedding - center - scale * (values - 128)  and of  scale * (values - 128).
    """

    values: npt.NDArray[np.uint8]
    center: npt.NDArray[np.float32]
    scale: float
    residual: float
    reach: float


def mean(embeddings: StoredEmbeddings) -> npt.NDArray[np.float32]:
    """The mean of embeddings float16 [n,D], n >= 1; float32 [D]."""
    total = np.zeros(embeddings.shape[1])
    for block in _blocks(embeddings):
        total += block.sum(axis=0, dtype=np.float64)
    return (total / len(embeddings)).astype(np.float32)


def quantize(embeddings: StoredEmbeddings, center: npt.NDArray[np.float32], scale: float = 0.0) -> QuantizedEmbeddings:
    """Quantized embeddings of finite embeddings float16 [n,D], n >= 1. Any center is right; one near the embeddings' mean resolves them best.

    `scale`: that of the shard before, which is kept where it is wide enough and less than half again too wide:
    neighbouring shards of one center and one scale are scanned as one.
    """
    widest = max(float(np.abs(block - center).max()) for block in _blocks(embeddings))
    least = widest / 127 * (1 + 1e-6)  # not one step more than 127 after float32's rounding
    if not least <= scale < 1.5 * least:
        scale = 1.1 * least if least else 1.0
    values = np.empty(embeddings.shape, np.uint8)
    residual = reach = largest = 0.0
    start = 0
    for block in _blocks(embeddings):
        steps = np.rint((block - center) / np.float32(scale))  # within +-127
        values[start : start + len(block)] = steps + ZERO
        steps *= np.float32(scale)
        reach = max(reach, _longest(steps))
        residual = max(residual, _longest(block - center - steps))
        largest = max(largest, float(np.abs(block).max()))
        start += len(block)
    # The lengths above are float32 arithmetic; every component is wrong by a few units in the last place at most.
    slack = (
        8 * float(np.finfo(np.float32).eps) * math.sqrt(embeddings.shape[1]) * (largest + float(np.abs(center).max()))
    )
    return QuantizedEmbeddings(values, center, scale, residual * (1 + 1e-4) + slack, reach * (1 + 1e-4) + slack)


def _blocks(embeddings: StoredEmbeddings) -> Iterator[npt.NDArray[np.float32]]:
    for low in range(0, len(embeddings), _BLOCK):
        yield embeddings[low : low + _BLOCK].astype(np.float32)


def _longest(vectors: npt.NDArray[np.float32]) -> float:
    return float(np.sqrt(np.einsum("nd,nd->n", vectors, vectors).max()))
