"""The first stage of the exact search: approximate scores of all embeddings, block by block, with proven error bounds.

Three ways, one result. `FloatScan` multiplies the embeddings themselves in float32 with numpy. `QuantizedScan` multiplies the
8-bit codes in onnxruntime, straight from the mapped files: as fast as it gets from some thirty queries a call on.
`PackedScan` keeps the codes in memory in the order in which the product reads them: a single query then costs one
pass over them at the speed of the memory.
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


_FLOAT_ROWS = 16384  # embeddings a block in float32: 32 MiB at 512 dimensions
_CODE_ROWS = 1024  # with 256 queries the products take 1 MiB, which stays in the second-level cache
_PACKED_ROWS = 65536  # few queries come this way, so it is the count of calls that costs


@dataclass(frozen=True)
class Block:
    """Embeddings `start` to `start + count`: score = base + unit * value, wrong by `error` at most (each float64 [Q]).

    `values`: int32 or float32, [n,Q] if `by_row`, else [Q,n].
    """

    start: int
    count: int
    values: npt.NDArray[np.int32] | npt.NDArray[np.float32]
    by_row: bool
    base: Floats
    unit: Floats
    error: Floats


class Scan(Protocol):
    """Something that scores all embeddings for queries float64 [Q,D]."""

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
            f"embeddings of length {longest:.3g} and queries of length {norms.max():.3g} are beyond exact ranking (their "
            "product must be below 32): normalise them"
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

    def scales(self, grid: Floats, codes: QuantizedEmbeddings) -> tuple[Floats, Floats, Floats]:
        """`base`, `unit` and `error` of the blocks of `codes`."""
        check_lengths(longest(codes), self.norms)
        base = grid @ codes.center.astype(np.float64)
        # embedding = center + coded + e, query = step * values + f, hence with Cauchy and Schwarz
        # |query.embedding - query.center - step * values.coded| <= |query| |e| + |f| |coded|
        error = self.norms * codes.residual + self.rest * codes.reach
        error += 1e-10 * (1 + np.abs(base))  # float64 arithmetic on the way, here and in the ranker
        return base, codes.scale * self.step, error


def _limit() -> int:
    """The largest code of a query: x86 processors without VNNI add two products in 16 bits, which must not overflow."""
    return 63 if int8_saturates() else 127


class QuantizedScan:
    """Products of the 8-bit codes as they lie in their files; `threads` of the engine."""

    def __init__(self, codes: Sequence[QuantizedEmbeddings], threads: int) -> None:
        self._codes = codes
        self._threads = threads

    def blocks(self, grid: Floats) -> Iterator[Block]:
        queries = QuantizedQueries.of(grid)
        session = _query_session(queries.values, self._threads)
        start = 0
        for codes in self._codes:
            scales = queries.scales(grid, codes)
            for low in range(0, len(codes.values), _CODE_ROWS):
                values = session.run(None, {"rows": codes.values[low : low + _CODE_ROWS]})[0]
                yield Block(start + low, len(values), values, True, *scales)
            start += len(codes.values)


class PackedScan:
    """Products of codes that the engine holds in its own layout: a copy of the codes in memory, made here."""

    def __init__(self, codes: Sequence[QuantizedEmbeddings], threads: int) -> None:
        self._groups = [(start, _limits(group), _packed_session(group, threads)) for start, group in _groups(codes)]

    def blocks(self, grid: Floats) -> Iterator[Block]:
        queries = QuantizedQueries.of(grid)
        shifted = (queries.values.astype(np.int16) + _limit()).astype(np.uint8)
        for start, codes, packed in self._groups:
            values = packed.run(None, {"queries": shifted})[0]
            yield Block(start, values.shape[1], values, False, *queries.scales(grid, codes))


def _limits(group: Sequence[QuantizedEmbeddings]) -> QuantizedEmbeddings:
    """What holds for every shard of a group; the values are left behind."""
    residual, reach = max(one.residual for one in group), max(one.reach for one in group)
    return replace(group[0], values=np.empty((0, 0), np.uint8), residual=residual, reach=reach)


def longest(codes: QuantizedEmbeddings) -> float:
    """An upper limit of the embeddings' lengths."""
    return float(np.linalg.norm(codes.center.astype(np.float64))) + codes.reach + codes.residual


def _groups(codes: Sequence[QuantizedEmbeddings]) -> Iterator[tuple[int, list[QuantizedEmbeddings]]]:
    """Neighbouring shards of the same center and scale, up to _PACKED_ROWS embeddings together, with their first embedding."""
    start, group = 0, list[QuantizedEmbeddings]()
    for one in codes:
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
    """embeddings uint8 [n,D] -> values int32 [n,Q]. Made in under a millisecond; with the queries [Q,D] as its constant it
    has them in the product's own order once, not once a block."""
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


def _packed_session(codes: Sequence[QuantizedEmbeddings], threads: int) -> Any:
    """queries uint8 [Q,D], larger by _limit() -> values int32 [Q,n]."""
    # A signed second factor is what onnxruntime is fast with. It folds the transposition when the session is made.
    embeddings = (np.concatenate([one.values for one in codes]) ^ np.uint8(ZERO)).view(np.int8)
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
