"""Ranking on a card, for bench_gpu: rates compared with the card's limits and torch, and whether the results are the
CPU's."""

import time
from collections.abc import Callable
from typing import Any

import gpu_peers
import numpy as np

from clipret.ranking.gpu_scan import DeviceScan
from clipret.ranking.quantization import QuantizedEmbeddings, quantize
from clipret.ranking.ranker import Ranker, snap

K = 10


def shards_of(rows: int, dim: int) -> tuple[list[np.ndarray], list[QuantizedEmbeddings]]:
    """Unit embeddings float16 in shards that all differ, and quantized ones of one center and scale: a block that was
    drawn, its components moved by one more place in each shard, which is as fast as memory."""
    base_rows = min(rows, 1 << 18)
    rng = np.random.default_rng(0)
    base = rng.standard_normal((base_rows, dim), dtype=np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    half = base.astype(np.float16)
    center = np.zeros(dim, np.float32)
    quantized = quantize(half, center)
    shards, coded = [], []
    for number, low in enumerate(range(0, rows, base_rows)):
        count = min(base_rows, rows - low)
        shards.append(np.roll(half, number, axis=1)[:count])
        values = np.roll(quantized.values, number, axis=1)[:count]
        coded.append(QuantizedEmbeddings(values, center, quantized.scale, quantized.residual, quantized.reach))
    return shards, coded


def ranking(card: Any, rows: int, dim: int) -> dict[str, Any]:
    """`card`: a bench_gpu.Card."""
    shards, quantized = shards_of(rows, dim)
    rng = np.random.default_rng(1)
    many = 16 if card.small else 1024
    queries = rng.standard_normal((many, dim))
    queries = snap(queries / np.linalg.norm(queries, axis=1, keepdims=True))
    result: dict[str, Any] = {"rows": rows, "dim": dim, "k": K}
    for form in ("halves", "quantized"):
        if card.late:
            result[form] = {"failed": "no time left"}
            continue
        try:
            result[form] = _form(card, form, shards, quantized, queries)
        except Exception as error:  # the other form has its turn
            result[form] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    if rate := result["quantized"].get("scan 1 query", {}).get("gb_a_second"):
        milliseconds = 100e6 * dim / rate / 1e6
        result["100 million rows quantized, computed"] = {"gib": round(100e6 * dim / 2**30, 1), "scan_ms": milliseconds}
    if not card.small:
        result["torch"] = gpu_peers.ranking(card.device, shards, queries, K, card.flops, card.bytes_a_second, _median)
        result["faiss"] = gpu_peers.faiss_ranking(shards, queries, K, _median)
    return result


def _form(
    card: Any, form: str, shards: list[np.ndarray], quantized: list[QuantizedEmbeddings], queries: np.ndarray
) -> dict[str, Any]:
    coded, (rows, dim) = form == "quantized", (sum(map(len, shards)), shards[0].shape[1])
    began = time.perf_counter()
    scan = DeviceScan(shards, card.device, quantized=quantized, coded=coded)
    found: dict[str, Any] = {
        "upload_seconds": round(time.perf_counter() - began, 2),
        "resident_share": round(sum(part.count for part in scan.parts if part.resident is not None) / rows, 3),
    }
    ranker = Ranker(shards, None, quantized, threads=8)
    ranker._device, ranker._length = scan, scan.longest
    size = rows * dim * (1 if coded else 2)
    for count in (1, len(queries)):
        asked = queries[:count]

        def scanned(asked: np.ndarray = asked) -> None:
            for number in range(len(scan.parts)):
                scan.top(number, asked, scan.width(K), None)

        taken = _median(scanned)
        name = "1 query" if count == 1 else f"{count} queries"
        found[f"scan {name}"] = {
            "ms": round(1000 * taken, 3),
            "gb_a_second": round(size / taken / 1e9, 1),
            "share_of_bandwidth": round(size / taken / card.bytes_a_second, 3),
            "share_of_matrix_peak": round(2 * count * rows * dim / taken / card.flops, 3),
        }
        found[f"rank {name}"] = {
            "ms_a_query": round(1000 * _median(lambda asked=asked: ranker.rank(asked, K)) / count, 3)
        }  # type: ignore[misc]
    some = queries[:16]
    first = [shards[0]] if len(shards) == 1 else shards[:4]  # the CPU's turn takes seconds even so
    cpu = Ranker(first, None, quantized[: len(first)], threads=8)
    ours = Ranker(first, None, quantized[: len(first)], threads=8)
    ours._device = DeviceScan(first, card.device, quantized=quantized[: len(first)], coded=coded)
    ours._length = ours._device.longest
    same = all(np.array_equal(a, b) for a, b in zip(ours.rank(some, K), cpu.rank(some, K), strict=True))
    return found | {"same as the CPU's": same, "rows compared": sum(map(len, first))}


def _median(run: Callable[[], object]) -> float:
    run()
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[2]
