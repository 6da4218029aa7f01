"""8-bit quantization of embeddings for the first stage of the exact search, with proven error bounds.

An embedding x is stored as unsigned bytes u with  x = center + scale * (u - 128) + e. Embeddings of a CLIP tower share
most of their direction; without this common part, `center`, the bytes resolve the rest about four times finer. The
search's error bounds follow from `residual` (the longest e) and `reach` (the longest scale * (u - 128)).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipret.arrays import StoredEmbeddings

__all__ = ["ZERO", "QuantizedEmbeddings", "mean", "quantize"]

ZERO = 128  # the byte for 0
_BLOCK = 1024  # embeddings a block: 2 MiB of float32 at 512 dimensions


@dataclass(frozen=True)
class QuantizedEmbeddings:
    """The quantized embeddings of a shard.

    Attributes:
        values: uint8 [n,D].
        center: float32 [D], subtracted before quantization.
        scale: The value of one step.
        residual: Upper bound of the Euclidean length of  embedding - center - scale * (values - 128).
        reach: Upper bound of the Euclidean length of  scale * (values - 128).
    """

    values: npt.NDArray[np.uint8]
    center: npt.NDArray[np.float32]
    scale: float
    residual: float
    reach: float


def mean(embeddings: StoredEmbeddings) -> npt.NDArray[np.float32]:
    """The mean, float32 [D], of embeddings float16 [n,D] with n >= 1."""
    total = np.zeros(embeddings.shape[1])
    for block in _blocks(embeddings):
        total += block.sum(axis=0, dtype=np.float64)
    return (total / len(embeddings)).astype(np.float32)


def quantize(embeddings: StoredEmbeddings, center: npt.NDArray[np.float32], scale: float = 0.0) -> QuantizedEmbeddings:
    """Quantize embeddings.

    Args:
        embeddings: Finite float16 [n,D], n >= 1.
        center: float32 [D]. Any value is correct; the mean of the embeddings gives the finest resolution.
        scale: The scale of the previous shard. It is kept if it is at most 1.5 times what is needed: neighbouring
            shards with the same center and scale are scanned as one.
    """
    widest = max(float(np.abs(block - center).max()) for block in _blocks(embeddings))
    least = widest / 127 * (1 + 1e-6)  # at most 127 steps after rounding to float32
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
    # The lengths above are float32 arithmetic: each component has an error of a few units in the last place at most.
    slack = (
        8 * float(np.finfo(np.float32).eps) * math.sqrt(embeddings.shape[1]) * (largest + float(np.abs(center).max()))
    )
    return QuantizedEmbeddings(values, center, scale, residual * (1 + 1e-4) + slack, reach * (1 + 1e-4) + slack)


def _blocks(embeddings: StoredEmbeddings) -> Iterator[npt.NDArray[np.float32]]:
    for low in range(0, len(embeddings), _BLOCK):
        yield embeddings[low : low + _BLOCK].astype(np.float32)


def _longest(vectors: npt.NDArray[np.float32]) -> float:
    return float(np.sqrt(np.einsum("nd,nd->n", vectors, vectors).max()))
