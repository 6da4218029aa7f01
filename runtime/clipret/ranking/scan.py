"""The first stage of the exact search: approximate scores of all embeddings, block by block, with proven error bounds.

Three methods with the same results. `FloatScan` multiplies the embeddings in float32 with numpy. `QuantizedScan`
multiplies the quantized embeddings in onnxruntime, directly from the mapped files: the fastest from about thirty
queries per call. `PackedScan` keeps the quantized embeddings in memory in the order in which the product reads them: a
single query then costs one pass over them at the speed of the memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from clipret.arrays import Floats
from clipret.errors import ClipretError
from clipret.hardware.cpu import int8_saturates
from clipret.ort.graph import Node, Value, model
from clipret.ort.session import open_session
from clipret.ranking.embedding_shards import widened
from clipret.ranking.quantization import ZERO, QuantizedEmbeddings

__all__ = [
    "Block",
    "FloatScan",
    "PackedScan",
    "QuantizedQueries",
    "QuantizedScan",
    "Scan",
    "check_lengths",
    "longest",
    "rounding",
]


_FLOAT_ROWS = 16384  # embeddings of a block in float32: 32 MiB at 512 dimensions
_BLOCK_SIZE = 1024  # with 256 queries the products take 1 MiB, which stays in the second-level cache
_PACKED_ROWS = 65536  # with few queries the number of calls decides the time


@dataclass(frozen=True)
class Block:
    """Approximate scores of the embeddings `start` to `start + count`.

    Attributes:
        values: int32 or float32, [n,Q] if `by_row`, else [Q,n].
        base, unit, error: float64 [Q]; score = base + unit * value, with an error of at most `error`.
    """

    start: int
    count: int
    values: npt.NDArray[np.int32] | npt.NDArray[np.float32]
    by_row: bool
    base: Floats
    unit: Floats
    error: Floats


class Scan(Protocol):
    """A method that scores all embeddings for queries, float64 [Q,D]."""

    def blocks(self, grid: Floats) -> Iterator[Block]: ...


class FloatScan:
    """Float32 products of the embeddings themselves: the narrowest bounds, and numpy alone."""

    def __init__(self, shards: Sequence[npt.NDArray[np.float16]]) -> None:
        self._shards = shards

    def blocks(self, grid: Floats) -> Iterator[Block]:
        """Raises ClipretError where the lengths of embeddings and queries are beyond exact arithmetic."""
        Q, D = grid.shape
        single = np.ascontiguousarray(grid.T, dtype=np.float32)
        norms = np.linalg.norm(grid, axis=1)
        start = 0
        for shard in self._shards:
            for low in range(0, len(shard), _FLOAT_ROWS):
                block = widened(shard[low : low + _FLOAT_ROWS])
                longest_embedding = float(np.sqrt(np.einsum("nd,nd->n", block, block).max())) * (1 + 1e-4)
                check_lengths(longest_embedding, norms)
                error = rounding(D) * longest_embedding * norms + 1e-12
                yield Block(start + low, len(block), block @ single, True, np.zeros(Q), np.ones(Q), error)
            start += len(shard)


def rounding(D: int) -> float:
    """How far a float32 product of D components lies from the exact one, in units of the two lengths' product.

    Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: for any order of summation, with or without
    fused multiply-add. Components of a query are multiples of 2^-24, exact in float32 below 1; others round once more.
    """
    unit = float(np.finfo(np.float32).eps) / 2
    return (D + 2) * unit / (1 - (D + 2) * unit)


def check_lengths(longest: float, norms: Floats) -> None:
    """Raise ClipretError unless every product of an embedding's and a query's length is below 32 (also for NaN)."""
    if not longest * norms.max(initial=0.0) < 32:
        raise ClipretError(
            f"embeddings of length {longest:.3g} and queries of length {norms.max():.3g} are too long for exact "
            "ranking (the product of the lengths must be below 32): normalise them"
        )


@dataclass(frozen=True)
class QuantizedQueries:
    """Queries as integers: query = step * values + rest, `rest` being the length of what is lost."""

    values: npt.NDArray[np.int8]  # [Q,D], within +-_limit()
    step: Floats
    rest: Floats
    norms: Floats

    @classmethod
    def of(cls, grid: Floats) -> "QuantizedQueries":
        step = np.abs(grid).max(axis=1) / _limit()
        step[step == 0] = 1.0
        values = np.rint(grid / step[:, None])
        rest = np.linalg.norm(grid - values * step[:, None], axis=1)
        return cls(values.astype(np.int8), step, rest, np.linalg.norm(grid, axis=1))

    def scales(self, grid: Floats, quantized: QuantizedEmbeddings) -> tuple[Floats, Floats, Floats]:
        """`base`, `unit` and `error` of the blocks of `quantized`."""
        check_lengths(longest(quantized), self.norms)
        base = grid @ quantized.center.astype(np.float64)
        # embedding = center + q + e, query = step * values + f, hence by the Cauchy-Schwarz inequality
        # |query.embedding - query.center - step * values.q| <= |query| |e| + |f| |q|
        error = self.norms * quantized.residual + self.rest * quantized.reach
        error += 1e-10 * (1 + np.abs(base))  # rounding of the float64 arithmetic here and in the ranker
        return base, quantized.scale * self.step, error


def _limit() -> int:
    """The largest quantized value of a query: processors without VNNI add two products in 16 bits without overflow."""
    return 63 if int8_saturates() else 127


class QuantizedScan:
    """Products with the quantized embeddings as they are in their files."""

    def __init__(self, quantized: Sequence[QuantizedEmbeddings], threads: int) -> None:
        self._quantized = quantized
        self._threads = threads

    def blocks(self, grid: Floats) -> Iterator[Block]:
        queries = QuantizedQueries.of(grid)
        session = _query_session(queries.values, self._threads)
        start = 0
        for quantized in self._quantized:
            scales = queries.scales(grid, quantized)
            for low in range(0, len(quantized.values), _BLOCK_SIZE):
                values = session.run(None, {"rows": quantized.values[low : low + _BLOCK_SIZE]})[0]
                yield Block(start + low, len(values), values, True, *scales)
            start += len(quantized.values)


class PackedScan:
    """Products with a copy of the quantized embeddings in memory, in onnxruntime's own layout."""

    def __init__(self, quantized: Sequence[QuantizedEmbeddings], threads: int) -> None:
        self._groups = [(start, _limits(group), _packed_session(group, threads)) for start, group in _groups(quantized)]

    def blocks(self, grid: Floats) -> Iterator[Block]:
        queries = QuantizedQueries.of(grid)
        shifted = (queries.values.astype(np.int16) + _limit()).astype(np.uint8)
        for start, quantized, packed in self._groups:
            values = packed.run(None, {"queries": shifted})[0]
            yield Block(start, values.shape[1], values, False, *queries.scales(grid, quantized))


def _limits(group: Sequence[QuantizedEmbeddings]) -> QuantizedEmbeddings:
    """Bounds that hold for every shard of a group, without the values."""
    residual, reach = max(one.residual for one in group), max(one.reach for one in group)
    return replace(group[0], values=np.empty((0, 0), np.uint8), residual=residual, reach=reach)


def longest(quantized: QuantizedEmbeddings) -> float:
    """An upper bound of the embeddings' lengths."""
    return float(np.linalg.norm(quantized.center.astype(np.float64))) + quantized.reach + quantized.residual


def _groups(quantized: Sequence[QuantizedEmbeddings]) -> Iterator[tuple[int, list[QuantizedEmbeddings]]]:
    """Neighbouring shards with the same center and scale, up to _PACKED_ROWS embeddings, with their first position."""
    start, group = 0, list[QuantizedEmbeddings]()
    for one in quantized:
        embeddings = sum(len(member.values) for member in group)
        if group and not (
            embeddings + len(one.values) <= _PACKED_ROWS
            and one.scale == group[0].scale
            and np.array_equal(one.center, group[0].center)
        ):
            yield start, group
            start, group = start + embeddings, []
        group.append(one)
    if group:
        yield start, group


def _query_session(queries: npt.NDArray[np.int8], threads: int) -> Any:
    """embeddings uint8 [n,D] -> values int32 [n,Q]. Opens in under a millisecond; with the queries as a constant of the
    graph, onnxruntime reorders them once instead of once per block."""
    Q, D = queries.shape
    return open_session(
        model(
            [Node("MatMulInteger", ["rows", "queries", "zero"], ["values"])],
            [Value("rows", "uint8", ("n", D))],
            [Value("values", "int32", ("n", Q))],
            {"queries": np.ascontiguousarray(queries.T), "zero": np.array(ZERO, np.uint8)},
        ),
        threads=threads,
        exact_int8=False,  # queries are within +-_limit()
    )


def _packed_session(quantized: Sequence[QuantizedEmbeddings], threads: int) -> Any:
    """queries uint8 [Q,D], larger by _limit() -> values int32 [Q,n]."""
    # onnxruntime is fast with a signed second factor. It folds the transposition when the session is opened.
    embeddings = (np.concatenate([one.values for one in quantized]) ^ np.uint8(ZERO)).view(np.int8)
    return open_session(
        model(
            [
                Node("Transpose", ["rows"], ["columns"], {"perm": [1, 0]}),
                Node("MatMulInteger", ["queries", "columns", "zero"], ["values"]),
            ],
            [Value("queries", "uint8", ("Q", embeddings.shape[1]))],
            [Value("values", "int32", ("Q", len(embeddings)))],
            {"rows": embeddings, "zero": np.array(_limit(), np.uint8)},
        ),
        threads=threads,
        exact_int8=False,  # queries are within +-_limit()
    )
