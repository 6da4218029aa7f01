"""Exact ranking on one core: CPU milliseconds a query compared with faiss's flat index, and whether the order is right.

    python benchmarks/bench_rank.py [--rows 1000000] [--dim 512] [--rounds 7]

Rows are float16 and unit: spread evenly ("isotropic") or around a common direction, as the rows of a CLIP tower are
("cone"); one row in a hundred is a copy of another. They lie in files of 8,192 and are memory-mapped, as in a gallery.
The variants take turns, A B A B; the first round is not counted. The limits: one query cannot be faster than one
pass over the quantized, in memory, 256 cannot be faster than the machine's 8-bit products; both are measured here.

Also: the order of 1,000 queries against float64 sums over all rows, the private memory of each way of searching,
and a gallery four times the size of the memory that the process may use (a memory cgroup, where one can be made).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy and faiss are loaded

import numpy as np
from machine import keep

from clipret import Ranker
from clipret.ranking.quantization import QuantizedEmbeddings, mean, quantize
from clipret.ranking.ranker import snap
from clipret.ranking.scan import _BLOCK_SIZE, _query_session

SHARD = 8192
K = 10
BATCHES = (1, 16, 256)
PEER_ROWS = 1_000_000  # numpy and torch hold all scores at once: a gigabyte for 256 queries


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def make_shards(folder: Path, kind: str, rows: int, dim: int) -> np.ndarray:
    """Write the shards with their quantized embeddings; float32 queries [1000,D] come back."""
    rng = np.random.default_rng(0)
    common = rng.standard_normal(dim).astype(np.float32) * 2
    before: QuantizedEmbeddings | None = None
    for number, low in enumerate(range(0, rows, SHARD)):
        values = rng.standard_normal((min(SHARD, rows - low), dim), dtype=np.float32)
        if kind == "cone":
            values += common
        values[99::100] = values[: len(values[99::100])]  # duplicates
        shard = unit(values).astype(np.float16)
        quantized = quantize(shard, before.center if before else mean(shard), before.scale if before else 0.0)
        before = quantized
        np.save(folder / f"rows-{number:06d}.npy", shard)
        np.save(folder / f"codes-{number:06d}.npy", quantized.values)
        limits = {"scale": quantized.scale, "residual": quantized.residual, "reach": quantized.reach}
        np.savez(folder / f"limits-{number:06d}.npz", center=quantized.center, **limits)
    queries = rng.standard_normal((1000, dim)).astype(np.float32)
    return snap(unit(queries + 0.3 * common if kind == "cone" else queries))


def open_shards(folder: Path) -> tuple[list[np.ndarray], list[QuantizedEmbeddings]]:
    shards = [np.load(file, mmap_mode="r") for file in sorted(folder.glob("rows-*.npy"))]
    quantized = []
    for values, file in zip(sorted(folder.glob("codes-*")), sorted(folder.glob("limits-*")), strict=True):
        limits = np.load(file)
        numbers = (float(limits[name]) for name in ("scale", "residual", "reach"))
        quantized.append(QuantizedEmbeddings(np.load(values, mmap_mode="r"), limits["center"], *numbers))
    return shards, quantized


def milliseconds(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds of each variant in each round, the first one dropped."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            start = time.process_time()
            run()
            times[name].append(1000 * (time.process_time() - start))
    return {name: values[1:] for name, values in times.items()}


def brute_force(shards: list[np.ndarray], queries: np.ndarray) -> np.ndarray:
    """Positions [Q,K] by float64 scores, ties by position."""
    scores = np.full((len(queries), K), -np.inf)
    places = np.full((len(queries), K), np.iinfo(np.int64).max)
    start = 0
    for shard in shards:
        own = queries @ shard.astype(np.float64).T
        # Everything that reaches the block's own K-th score, ties included, competes with the best so far.
        kth = np.partition(own, -K, axis=1)[:, -K]
        for at, position in enumerate(own):
            mine = np.flatnonzero(position >= max(kth[at], scores[at, -1]))
            score = np.concatenate([scores[at], position[mine]])
            place = np.concatenate([places[at], mine + start])
            best = np.lexsort((place, -score))[:K]
            scores[at], places[at] = score[best], place[best]
        start += len(shard)
    return places


def peers(shards: list[np.ndarray]) -> dict[str, Callable[[np.ndarray], Any]]:
    """The two lines that one writes first, over rows in float32."""
    rows = np.concatenate([shard.astype(np.float32) for shard in shards])
    found: dict[str, Callable[[np.ndarray], Any]] = {
        "numpy": lambda queries: np.argpartition(queries @ rows.T, -K, axis=1)[:, -K:]
    }
    if find_spec("torch"):
        import torch

        torch.set_num_threads(1)
        tensor = torch.from_numpy(rows)
        found["torch"] = lambda queries: torch.topk(torch.from_numpy(queries) @ tensor.T, K)
    return found


def limits(quantized: list[QuantizedEmbeddings], dim: int) -> tuple[float, float]:
    """Bytes a second of a pass over memory, and 8-bit operations a second of a product in the cache."""
    data = np.concatenate([one.values for one in quantized[:64]]).reshape(-1).view(np.uint64)
    passes = milliseconds({"read": lambda: int(np.bitwise_or.reduce(data))}, 9)["read"]
    rng = np.random.default_rng(0)
    session = _query_session(rng.integers(-127, 128, (256, dim), dtype=np.int8), 1)
    block = rng.integers(0, 256, (_BLOCK_SIZE, dim), dtype=np.uint8)
    products = milliseconds({"multiply": lambda: [session.run(None, {"rows": block}) for _ in range(20)]}, 9)
    return data.nbytes / min(passes) * 1000, 20 * 2 * _BLOCK_SIZE * dim * 256 / min(products["multiply"]) * 1000


def private_mib() -> float:
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) / 1024


def inside(folder: Path, mode: str) -> None:
    """A process of its own: open the shards, search, print what it took as JSON."""
    queries = np.load(folder / "queries.npy")
    before = private_mib()
    shards, quantized = open_shards(folder)
    if mode == "faiss":
        import faiss

        index = faiss.IndexFlatIP(shards[0].shape[1])
        for shard in shards:
            index.add(shard.astype(np.float32))

        def search(count: int) -> Any:
            return index.search(queries[:count].astype(np.float32), K)[1]

    else:
        ranker = Ranker(shards, None, quantized, threads=1, resident=mode == "resident")

        def search(count: int) -> Any:
            return ranker.rank(queries[:count], K)[1]

    found = {str(count): search(count).tolist() for count in BATCHES}
    start = time.perf_counter()
    search(16)
    taken = {
        "mib": round(private_mib() - before, 1),
        "found": found,
        "wall_ms_16": 1000 * (time.perf_counter() - start),
    }
    print(json.dumps(taken))


def run_inside(folder: Path, mode: str, prepare: Callable[[], None] | None = None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--inside", str(folder), mode]
    done = subprocess.run(command, check=True, capture_output=True, text=True, preexec_fn=prepare)
    value: dict[str, Any] = json.loads(done.stdout)
    return value


@contextmanager
def limited_memory(size: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """What limits a child's memory to `size` bytes, and the name of that."""
    version1, version2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    base, name = (version1, "memory.limit_in_bytes") if version1.is_dir() else (version2, "memory.max")
    group = base / f"bench-rank-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(size))
    except OSError:
        import resource

        yield "RLIMIT_DATA", lambda: resource.setrlimit(resource.RLIMIT_DATA, (size, size))
        return
    try:
        yield "cgroup", lambda: _join(group)
    finally:
        time.sleep(0.2)
        group.rmdir()


def _join(group: Path) -> None:
    (group / "cgroup.procs").write_text("0")


def compare(folder: Path, kind: str, rows: int, dim: int, rounds: int, exact: bool) -> dict[str, Any]:
    import faiss

    faiss.omp_set_num_threads(1)
    queries = make_shards(folder, kind, rows, dim)
    np.save(folder / "queries.npy", queries)
    shards, quantized = open_shards(folder)
    flat = faiss.IndexFlatIP(dim)
    for shard in shards:
        flat.add(shard.astype(np.float32))
    start = time.process_time()
    resident = Ranker(shards, None, quantized, threads=1, resident=True)
    result: dict[str, Any] = {"rows": rows, "pack_seconds": round(time.process_time() - start, 2)}
    streamed = Ranker(shards, None, quantized, threads=1)
    others = peers(shards) if rows <= PEER_ROWS else {}
    for batch in BATCHES:
        asked = queries[:batch]
        single = asked.astype(np.float32)
        times = milliseconds(
            {
                "clipret": lambda asked=asked: resident.rank(asked, K),  # type: ignore[misc]
                "faiss flat": lambda single=single: flat.search(single, K),  # type: ignore[misc]
                "clipret streamed": lambda asked=asked: streamed.rank(asked, K),  # type: ignore[misc]
                **{name: lambda run=run, single=single: run(single) for name, run in others.items()},  # type: ignore[misc]
            },
            rounds,
        )
        ratios = [b / a for a, b in zip(times["clipret"], times["faiss flat"], strict=True)]
        medians = {name: round(statistics.median(values) / batch, 3) for name, values in times.items()}
        result[f"{batch} queries"] = {"ms_a_query": medians, "faiss_over_clipret": round(statistics.median(ratios), 2)}
        print(f"{kind} {rows:,} x {dim}, {batch} queries: {result[f'{batch} queries']}", file=sys.stderr)
    bandwidth, speed = limits(quantized, dim)
    result["limit_ms_a_query"] = {
        "1 query": round(rows * dim / bandwidth * 1000, 2),
        "256 queries": round(2 * rows * dim / speed * 1000, 3),
    }
    print(f"limits: {result['limit_ms_a_query']}", file=sys.stderr)
    if exact:
        expected = brute_force(shards, queries)
        answers = {"resident": resident, "streamed": streamed, "float32": Ranker(shards)}
        wrong = {
            name: int((ranker.rank(queries, K)[1] != expected).any(axis=1).sum()) for name, ranker in answers.items()
        }
        few = np.concatenate([resident.rank(queries[low : low + 16], K)[1] for low in range(0, 1000, 16)])
        wrong["resident, 16 at a time"] = int((few != expected).any(axis=1).sum())
        faiss_wrong = int((flat.search(queries.astype(np.float32), K)[1] != expected).any(axis=1).sum())
        result["queries_of_1000_in_another_order"] = {**wrong, "faiss flat": faiss_wrong}
        print(f"in another order than float64: {result['queries_of_1000_in_another_order']}", file=sys.stderr)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="0: the large gallery only")
    parser.add_argument("--large", type=int, default=4_000_000, help="rows of the large gallery; 0: none")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if arguments.inside:
        inside(Path(arguments.inside[0]), arguments.inside[1])
        return
    about: dict[str, Any] = {"dim": arguments.dim, "k": K, "clock": "CPU time, one core"}
    result = dict(about)
    for kind in ("isotropic", "cone") if arguments.rows else ():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            result[kind] = compare(folder, kind, arguments.rows, arguments.dim, arguments.rounds, exact=True)
            if kind == "cone":
                result["memory"] = memory(folder, arguments.rows * arguments.dim * 3)
    if arguments.rows:
        keep("rank", result)
    if arguments.large:
        with tempfile.TemporaryDirectory() as name:
            keep("rank-large", about | compare(Path(name), "cone", arguments.large, arguments.dim, 3, exact=False))


def memory(folder: Path, size: int) -> dict[str, Any]:
    """Private memory of each way, and the search under a limit of a quarter of the gallery's `size`."""
    runs = {mode: run_inside(folder, mode) for mode in ("streamed", "resident", "faiss")}
    private = {mode: run["mib"] for mode, run in runs.items()}
    result: dict[str, Any] = {"gallery_mib": round(size / 2**20), "private_mib": private}
    if size // 4 > 256 * 2**20:  # Python and its libraries alone need most of that
        with limited_memory(size // 4) as (means, prepare):
            limited = run_inside(folder, "streamed", prepare)
        if limited["found"] != runs["resident"]["found"]:
            raise SystemExit("the limited run found something else")
        milliseconds = round(limited["wall_ms_16"] / 16, 1)
        result["limited"] = {"mib": round(size / 4 / 2**20), "by": means, "wall_ms_a_query_16": milliseconds}
    print(f"memory: {result}", file=sys.stderr)
    return result


if __name__ == "__main__":
    main()
