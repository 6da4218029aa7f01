"""Stored embeddings by position, and their scores against queries: fast in float32 or exact in float64."""

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from clipret.arrays import Floats, Ids, StoredEmbeddings
from clipret.ort.graph import Node, Value, model
from clipret.ort.session import open_session

__all__ = ["EmbeddingShards", "widened"]


_PAIRS = 256  # embeddings multiplied at a time: 2 MiB of float64 with their queries at D = 512 stay in the cache


class EmbeddingShards:
    """Embeddings float16 [n,D] of several shards under the positions 0 to N - 1."""

    def __init__(self, shards: Sequence[StoredEmbeddings]) -> None:
        self.shards = shards
        self._starts = np.cumsum([0] + [len(shard) for shard in shards])

    def take(self, positions: Ids) -> StoredEmbeddings:
        """The embeddings, float16 [P,D], at ascending positions."""
        embeddings = np.empty((len(positions), self.shards[0].shape[1]), dtype=np.float16)
        if not len(positions):
            return embeddings
        first, last = np.searchsorted(self._starts, positions[[0, -1]], "right") - 1
        bounds = np.searchsorted(positions, self._starts[first : last + 2])
        for number, low, high in zip(range(first, last + 1), bounds[:-1], bounds[1:], strict=True):
            # mode="clip" only because np.take otherwise copies once more; the positions are within the shard.
            at = positions[low:high] - self._starts[number]
            np.take(self.shards[number], at, axis=0, out=embeddings[low:high], mode="clip")
        return embeddings

    def scores(self, positions: Ids, query: Ids, grid: Floats) -> Floats:
        """Float64 products of pairs: the embeddings at `positions` [P] with the rows `query` [P] of `grid` [Q,D]."""
        return self._scores(positions, query, grid)

    def estimates(self, positions: Ids, query: Ids, grid: Floats) -> Floats:
        """The same in float32, in a third of the time; wrong by scan.rounding(D) * |embedding| * |query| at most."""
        return self._scores(positions, query, grid.astype(np.float32))

    def _scores(self, positions: Ids, query: Ids, grid: npt.NDArray[np.floating[Any]]) -> Floats:
        scores = np.empty(len(positions))
        order = np.argsort(positions)  # from the front of the files to their back
        for low in range(0, len(order), _PAIRS):
            part = order[low : low + _PAIRS]
            embeddings = widened(self.take(positions[part])).astype(grid.dtype, copy=False)
            scores[part] = np.einsum("pd,pd->p", embeddings, grid[query[part]])
        return scores


def widened(embeddings: StoredEmbeddings) -> npt.NDArray[np.float32]:
    """Float16 embeddings [n,D] as float32. onnxruntime, if installed, does it ten times faster than numpy."""
    if not importlib.util.find_spec("onnxruntime"):
        return embeddings.astype(np.float32)
    wide: npt.NDArray[np.float32] = _cast().run(None, {"rows": embeddings})[0]
    return wide


@cache
def _cast() -> Any:
    nodes = [Node("Cast", ["rows"], ["wide"], {"to": 1})]
    graph = model(nodes, [Value("rows", "float16", ("n", "D"))], [Value("wide", "float32", ("n", "D"))])
    return open_session(graph, threads=1)
