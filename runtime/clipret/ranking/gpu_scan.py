"""The first stage of the exact search on a GPU: products with all embeddings and their best k, block by block.

Two forms, one result. Embeddings as they are, in half precision, or their quantized: half the memory, and exact
integer products, so only the quantization error is uncertain. A block stays in the device's memory if it fits and is
sent again for each call if not. What comes back is approximate, but the bound of its error is known, and
with it whether an embedding that was not listed could matter.

The best k of millions of scores in two steps: the scores are read once for the largest of each _CHUNK, the k
chunks with the largest of those hold the best k, and only these are sorted. A plain TopK reads all several times.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from clipret.arrays import Floats, Mask, StoredEmbeddings
from clipret.errors import require
from clipret.hardware.cuda import free_memory
from clipret.ort.graph import Node, Value, model
from clipret.ort.session import gpu_number, has_device, open_session
from clipret.ranking.candidates import Pool
from clipret.ranking.quantization import ZERO, QuantizedEmbeddings
from clipret.ranking.scan import QuantizedQueries, check_lengths

__all__ = ["DeviceScan"]


_BLOCK_ROWS = 1 << 21  # 3 GiB of embeddings at 768 dimensions: a call costs a tenth of a millisecond, so there are few
_INDEXES = 1 << 31  # numbers of a block or of its scores: what a kernel may count in 32 bits
_SCORES = 1 << 29  # scores of a block at a time: 1 GiB in half precision
_CHUNK = 64
_NEVER = -(1 << 30)  # added to the integer score of an embedding that may not be found: below any that there is


@dataclass(frozen=True)
class _Part:
    """Embeddings `start` to `start + count`, as float16 or quantized. `resident` is their OrtValue on the device, None
    if they did not fit."""

    start: int
    count: int
    shards: Sequence[npt.NDArray[Any]]
    quantized: QuantizedEmbeddings | None
    resident: Any = None

    @property
    def chunks(self) -> int:
        return -(-self.count // _CHUNK)

    def array(self) -> npt.NDArray[Any]:
        """As the product wants them, with embeddings of nothing up to whole chunks: float16 [n,D], or int8 [D,n]."""
        width = self.shards[0].shape[1]
        shape = (self.chunks * _CHUNK, width)
        if self.quantized is None:
            embeddings = np.zeros(shape, np.float16)
            np.concatenate(self.shards, out=embeddings[: self.count])
            return embeddings
        columns = np.zeros(shape[::-1], np.int8)
        start = 0
        for shard in self.shards:
            columns[:, start : start + len(shard)] = (shard ^ np.uint8(ZERO)).view(np.int8).T
            start += len(shard)
        return columns


class DeviceScan:
    """The first stage on a device of onnxruntime.

    Args:
        shards: Embeddings, float16 [n,D] each.
        device: "cuda" or "cuda:N"; "cpu" runs the same graph, slowly.
        quantized: The quantized embeddings of each shard.
        coded: Keep the quantized embeddings on the device instead of the float16 ones. Default: if those do not fit.
        block_rows: Embeddings multiplied at a time.
        resident_rows: The most embeddings that stay on the device. Default: all that fit.

    Raises:
        ClipretError: onnxruntime has no such device.
    """

    def __init__(
        self,
        shards: Sequence[StoredEmbeddings],
        device: str,
        *,
        quantized: Sequence[QuantizedEmbeddings] | None = None,
        coded: bool | None = None,
        block_rows: int = _BLOCK_ROWS,
        resident_rows: int | None = None,
    ) -> None:
        self._ort = require("onnxruntime", "gpu" if device.startswith("cuda") else "cpu")
        gpu = gpu_number(device)
        if gpu is not None and not has_device(device):
            open_session(b"", device)  # which says what is missing
        self._device = device
        kind = "cpu" if gpu is None else "cuda"
        self._kind, self._number = kind, gpu or 0
        if coded is None:
            coded = quantized is not None and kind == "cuda" and not self._has_room(shards)
        self.coded = coded and quantized is not None
        self.longest = max((_longest(shard) for shard in shards), default=0.0)
        block_rows = min(block_rows, (_INDEXES - 1) // (shards[0].shape[1] if shards else 1) // _CHUNK * _CHUNK)
        groups = _grouped(shards, quantized if self.coded else None, block_rows)
        self.parts: list[_Part] = []
        left = sum(map(len, shards)) if resident_rows is None else resident_rows
        start = 0
        for group, limits in groups:
            count = sum(map(len, group))
            part = _Part(start, count, group, limits)
            value = self._uploaded(part.array()) if count <= left else None
            left = left - count if value is not None else 0
            self.parts.append(replace(part, resident=value))
            start += count
        if left == 0 and self.parts and self.parts[-1].resident is None:
            self._make_room()

    def width(self, k: int) -> int:
        """How many embeddings of a part to list, so that usually no other can be among the k best: quantized ones are
        coarser than halves."""
        return 2 * k + 128 if self.coded else min(2 * k, k + 64)

    def _has_room(self, shards: Sequence[StoredEmbeddings]) -> bool:
        """Whether the embeddings and the memory of a product fit into the free memory of the device."""
        return sum(shard.nbytes for shard in shards) + 6 * _SCORES < free_memory(self._number)

    def _uploaded(self, array: npt.NDArray[Any]) -> Any:
        """`array` on the device, or None where its memory is full."""
        try:
            return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._kind, self._number)
        except Exception:  # onnxruntime exports no type for it; what else could fail here fails again in the product
            return None

    def _make_room(self) -> None:
        """Give one resident block back: the others need its memory for the product and for the embeddings that come."""
        for at in reversed(range(len(self.parts))):
            if self.parts[at].resident is not None:
                self.parts[at] = replace(self.parts[at], resident=None)
                return

    @cached_property
    def _sessions(self) -> dict[bool, Any]:
        """Whether embeddings are left out ->  queries [Q,D], embeddings, starts int64 [Q,1], k and c int64 [1] (, bias
        [n]) -> values [Q,k], places [Q,k] within the c chosen chunks, chunks [Q,c] counted through all queries."""
        dtype, score = ("int8", "int32") if self.coded else ("float16", "float16")
        embeddings: tuple[int | str, ...] = ("D", "n") if self.coded else ("n", "D")
        sessions = {}
        for masked in (False, True):
            if self.coded:
                nodes = [Node("MatMulInteger", ["queries", "rows"], ["scores"])]
            else:
                nodes = [Node("Gemm", ["queries", "rows"], ["scores"], {"transB": 1})]
            if masked:
                nodes.append(Node("Add", ["scores", "bias"], ["masked"]))
            nodes += [
                Node("Reshape", ["masked" if masked else "scores", "by_chunk"], ["cut"]),  # [Q,n/64,64]
                Node("ReduceMax", ["cut", "last"], ["largest"], {"keepdims": 0}),
                Node("TopK", ["largest", "c"], ["most", "chosen"]),
                Node("Add", ["chosen", "starts"], ["chunks"]),
                Node("Reshape", ["cut", "flat"], ["lines"]),  # [Q*n/64,64]
                Node("Gather", ["lines", "chunks"], ["held"]),  # [Q,c,64]
                Node("Reshape", ["held", "by_query"], ["few"]),  # [Q,c*64]
                Node("TopK", ["few", "k"], ["values", "places"]),
            ]
            inputs = [Value("queries", dtype, ("Q", "D")), Value("rows", dtype, embeddings)]
            inputs += [Value("starts", "int64", ("Q", 1)), Value("c", "int64", (1,)), Value("k", "int64", (1,))]
            content = model(
                nodes,
                inputs + ([Value("bias", score, ("n",))] if masked else []),
                [
                    Value("values", score, ("Q", "k")),
                    Value("places", "int64", ("Q", "k")),
                    Value("chunks", "int64", ("Q", "c")),
                ],
                {
                    "by_chunk": np.array([0, -1, _CHUNK]),
                    "by_query": np.array([0, -1]),
                    "flat": np.array([-1, _CHUNK]),
                    "last": np.array([-1]),
                },
            )
            sessions[masked] = open_session(content, self._device)
        return sessions

    def top(self, number: int, grid: Floats, k: int, allowed: Mask | None) -> tuple[Pool, Floats]:
        """Of part `number`, the k most promising allowed embeddings of each query float64 [Q,D], and [Q] a limit on the
        exact score of every embedding that is not among them (-inf where all are).

        `allowed`: bool [N] of all embeddings.
        """
        part = self.parts[number]
        step = max(1, _SCORES // (part.chunks * _CHUNK))
        found = [self._top(part, grid[low : low + step], k, allowed, low) for low in range(0, len(grid), step)]
        return Pool.joined([pool for pool, _ in found]), np.concatenate([limits for _, limits in found])

    def _top(self, part: _Part, grid: Floats, k: int, allowed: Mask | None, first: int) -> tuple[Pool, Floats]:
        """The same of queries that come `first` among all."""
        queries: npt.NDArray[Any]
        if part.quantized is None:
            queries, base, unit, error = self._halves(grid)
        else:
            coded = QuantizedQueries.of(grid)
            queries, (base, unit, error) = coded.values, coded.scales(grid, part.quantized)
        whole = k >= part.count
        k = part.chunks * _CHUNK if whole else k
        c = min(k, part.chunks)
        inputs: dict[str, npt.NDArray[Any]] = {
            "queries": queries,
            "starts": np.arange(len(grid))[:, None] * part.chunks,
        }
        inputs |= {"k": np.array([k]), "c": np.array([c])}
        if allowed is not None:
            bias = np.zeros(part.chunks * _CHUNK, np.int32 if self.coded else np.float16)
            bias[: part.count][~allowed[part.start : part.start + part.count]] = _NEVER if self.coded else -np.inf
            inputs["bias"] = bias
        values, places, chunks = self._run(part, inputs)

        # The embeddings of nothing at the end of the last chunk are dropped here.
        position = np.take_along_axis(chunks - inputs["starts"], places // _CHUNK, axis=1) * _CHUNK + places % _CHUNK
        query, rank = np.nonzero((values > (_NEVER // 2 if self.coded else -np.inf)) & (position < part.count))
        score = base[query] + unit[query] * values[query, rank].astype(np.float64)
        pool = Pool(query + first, position[query, rank] + part.start, score - error[query], score + error[query])
        # TopK sorts: the last is the least, as low as can be where everything allowed is listed.
        least = values[:, -1].astype(np.float64)
        if self.coded:
            least[least <= _NEVER // 2] = -np.inf
        return pool, np.full(len(grid), -np.inf) if whole else base + unit * least + error

    def _halves(self, grid: Floats) -> tuple[StoredEmbeddings, Floats, Floats, Floats]:
        """Queries in half precision, and how a product with them is read: base, unit, error."""
        half = grid.astype(np.float16)
        norms = np.linalg.norm(grid, axis=1)
        check_lengths(self.longest, norms)
        # The query is rounded, and so is the result, to 11 bits. Between them products of halves are exact in float32,
        # and tensor cores add them up with at least 24 bits, cutting off what lies below (Fasi, Higham, Mikaitis and
        # Pranesh, Numerical behavior of NVIDIA tensor cores, 2021). A library may split the sum and round its parts
        # to halves: each bit of the bound is doubled twice for it.
        rest = np.linalg.norm(grid - half.astype(np.float64), axis=1)
        bound = grid.shape[1] * 2.0**-22 + 2.0**-9
        error = self.longest * (rest + norms * bound) + 2.0**-20
        return half, np.zeros(len(grid)), np.ones(len(grid)), error

    def _run(self, part: _Part, inputs: dict[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        session = self._sessions["bias" in inputs]
        binding = session.io_binding()
        if part.resident is not None:
            binding.bind_ortvalue_input("rows", part.resident)
        else:
            binding.bind_cpu_input("rows", part.array())
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name in ("values", "places", "chunks"):
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        outputs: list[npt.NDArray[Any]] = binding.copy_outputs_to_cpu()
        return outputs


def _grouped(
    shards: Sequence[StoredEmbeddings], quantized: Sequence[QuantizedEmbeddings] | None, embeddings: int
) -> list[tuple[list[npt.NDArray[Any]], QuantizedEmbeddings | None]]:
    """The shards in order, cut and joined into blocks of about `embeddings` embeddings. Quantized shards are joined
    only if they share center and scale; a block has the bounds of all its shards."""
    groups = list[tuple[list[npt.NDArray[Any]], QuantizedEmbeddings | None]]()
    held = 0
    for number, shard in enumerate(shards):
        own = None if quantized is None else quantized[number]
        for low in range(0, len(shard), embeddings):
            piece = (shard if own is None else own.values)[low : low + embeddings]
            if not groups or held + len(piece) > embeddings or not _alike(groups[-1][1], own):
                groups.append(([], own))
                held = 0
            group, limits = groups[-1]
            group.append(piece)
            held += len(piece)
            if limits is not None and own is not None:
                residual, reach = max(limits.residual, own.residual), max(limits.reach, own.reach)
                groups[-1] = (group, replace(limits, residual=residual, reach=reach))
    return groups


def _alike(one: QuantizedEmbeddings | None, other: QuantizedEmbeddings | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.scale == other.scale and np.array_equal(one.center, other.center)


def _longest(shard: StoredEmbeddings) -> float:
    most = 0.0
    for low in range(0, len(shard), 4096):
        block = shard[low : low + 4096].astype(np.float32)
        most = max(most, float(np.einsum("nd,nd->n", block, block).max()))
    return float(np.sqrt(most)) * (1 + 1e-4)
