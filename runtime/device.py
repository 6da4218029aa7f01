"""The first stage of the exact search on a GPU: half-precision products and their best k, block by block.

The rows stay in the device's memory as far as it holds them; the others are sent anew for each call. What comes back
is approximate, but the bound of its error is known, and with it whether a row that was not listed could matter.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from clipret.candidates import Pool
from clipret.errors import ClipretError, require
from clipret.onnx_graph import Node, Value, model
from clipret.scan import check_lengths

__all__ = ["DeviceScan", "has_device"]

Rows = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_BLOCK_ROWS = 262144  # 256 MiB of rows at 512 dimensions; 256 queries give 128 MiB of scores


def has_device(device: str) -> bool:
    """Whether onnxruntime is there and can use the GPU `device` ("cuda", "cuda:N"); False for the CPU."""
    if not device.startswith("cuda") or not importlib.util.find_spec("onnxruntime"):
        return False
    return "CUDAExecutionProvider" in require("onnxruntime", "gpu").get_available_providers()


@dataclass(frozen=True)
class _Part:
    """Rows `start` to `start + count`; `resident` is their OrtValue on the device, None where it had no room."""

    start: int
    count: int
    shards: list[Rows]
    resident: Any

    @property
    def rows(self) -> Rows:
        return self.shards[0] if len(self.shards) == 1 else np.concatenate(self.shards)


class DeviceScan:
    """Rows float16 [n,D] of shards on a device of onnxruntime ("cuda", "cuda:N"; "cpu" runs the same graph slowly).

    `block_rows`: multiplied at a time; `resident_rows`: at most so many stay on the device, default all that it takes.
    Raises ClipretError where onnxruntime has no such device.
    """

    def __init__(
        self,
        shards: Sequence[Rows],
        device: str,
        *,
        block_rows: int = _BLOCK_ROWS,
        resident_rows: int | None = None,
    ) -> None:
        self._ort = require("onnxruntime", "gpu" if device.startswith("cuda") else "cpu")
        kind, _, number = device.partition(":")
        self._kind, self._number = kind, int(number or 0)
        provider = "CUDAExecutionProvider" if kind == "cuda" else "CPUExecutionProvider"
        available = self._ort.get_available_providers()
        if provider not in available:
            raise ClipretError(
                f"ranking on {device} needs onnxruntime's {provider}, this one has {', '.join(available)}: "
                "use --device cpu or  pip install 'clipret[gpu]'"
            )
        self._provider = (provider, {"device_id": str(self._number)} if kind == "cuda" else {})
        self.longest = max((_longest(shard) for shard in shards), default=0.0)
        self.parts: list[_Part] = []
        left = sum(map(len, shards)) if resident_rows is None else resident_rows
        start = 0
        for group in _grouped(shards, block_rows):
            count = sum(map(len, group))
            part = _Part(start, count, group, None)
            value = self._uploaded(part.rows) if count <= left else None
            left = left - count if value is not None else 0
            self.parts.append(_Part(start, count, group, value))
            start += count
        if left == 0 and self.parts and self.parts[-1].resident is None:
            self._make_room()

    def _uploaded(self, array: npt.NDArray[Any]) -> Any:
        """`array` on the device, or None where its memory is full."""
        try:
            return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._kind, self._number)
        except Exception:  # onnxruntime exports no type for it; what else could fail here fails again in the product
            return None

    def _make_room(self) -> None:
        """Give one resident block back: the others need its memory for the product and for the rows that come."""
        for at in reversed(range(len(self.parts))):
            part = self.parts[at]
            if part.resident is not None:
                self.parts[at] = _Part(part.start, part.count, part.shards, None)
                return

    @cached_property
    def _session(self) -> Any:
        """queries float16 [Q,D], rows float16 [n,D], bias float16 [n], k int64 [1] -> values, places [Q,k]."""
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        content = model(
            [
                Node("Gemm", ["queries", "rows", "bias"], ["scores"], {"transB": 1}),
                Node("TopK", ["scores", "k"], ["values", "places"]),
            ],
            [
                Value("queries", "float16", ("Q", "D")),
                Value("rows", "float16", ("n", "D")),
                Value("bias", "float16", ("n",)),
                Value("k", "int64", (1,)),
            ],
            [Value("values", "float16", ("Q", "k")), Value("places", "int64", ("Q", "k"))],
        )
        session = self._ort.InferenceSession(content, options, providers=[self._provider])
        if self._provider[0] not in session.get_providers():
            raise ClipretError(f"onnxruntime could not start {self._provider[0]}: see clipret[gpu]'s requirements")
        return session

    def top(self, number: int, grid: Floats, k: int, allowed: Mask | None) -> tuple[Pool, Floats]:
        """Of part `number`, the k most promising allowed rows of each query float64 [Q,D], and [Q] a limit on the
        exact score of every row that is not among them (-inf where all are).

        `allowed`: bool [N] of all rows.
        """
        part = self.parts[number]
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

        mask = None if allowed is None else allowed[part.start : part.start + part.count]
        bias = np.zeros(part.count, np.float16)
        if mask is not None:
            bias[~mask] = -np.inf
        k = min(k, part.count)
        binding = self._session.io_binding()
        if part.resident is not None:
            binding.bind_ortvalue_input("rows", part.resident)
        else:
            binding.bind_cpu_input("rows", np.ascontiguousarray(part.rows))
        binding.bind_cpu_input("queries", half)
        binding.bind_cpu_input("bias", bias)
        binding.bind_cpu_input("k", np.array([k]))
        binding.bind_output("values", "cpu")
        binding.bind_output("places", "cpu")
        self._session.run_with_iobinding(binding)
        values, places = binding.copy_outputs_to_cpu()

        query, rank = np.nonzero(np.isfinite(values))
        score = values[query, rank].astype(np.float64)
        pool = Pool(query, places[query, rank] + part.start, score - error[query], score + error[query])
        # TopK sorts: the last is the least. It is -inf where everything allowed is listed.
        last = values[:, -1].astype(np.float64)
        return pool, np.full(len(grid), -np.inf) if k == part.count else last + error


def _grouped(shards: Sequence[Rows], rows: int) -> list[list[Rows]]:
    """The shards cut and put together into blocks of about `rows` rows, in their order."""
    groups, group, held = list[list[Rows]](), list[Rows](), 0
    for shard in shards:
        for low in range(0, len(shard), rows):
            piece = shard[low : low + rows]
            if group and held + len(piece) > rows:
                groups.append(group)
                group, held = [], 0
            group.append(piece)
            held += len(piece)
    return [*groups, group] if group else groups


def _longest(shard: Rows) -> float:
    most = 0.0
    for low in range(0, len(shard), 4096):
        block = shard[low : low + 4096].astype(np.float32)
        most = max(most, float(np.einsum("nd,nd->n", block, block).max()))
    return float(np.sqrt(most)) * (1 + 1e-4)
