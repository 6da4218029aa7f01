"""Cost as it grows: indexing, size and memory of a gallery, time of a query, with the fitted slopes.

    python benchmarks/bench_scale.py [--counts 10000 100000 1000000] [--rows 10000 100000 1000000 4000000] [--dim 512]

CPU seconds on one core. Images: drawn JPEGs of 64 px in a .zip, no two alike, indexed by `clipret-search index` with
the tests' tiny tower, so that what is measured is everything around the tower: reading, hashing, decoding, rows,
quantized embeddings, the database. A tower costs the same for each image and is measured by bench_towers. A query is
one cold `clipret-search query` on that gallery. Rows: random unit embeddings around a common direction in files as a
gallery has them, ranked in this process, one query and 64, with the quantized embeddings read from their files and kept
in memory.

The slope is that of a straight line through the logarithms: 1 is a cost that stays the same for each image, less is a
fixed part that is shared by more of them, more is a cost that grows faster than the gallery.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
from bench_query import TINY
from bench_rank import K, make_shards, open_shards, private_mib
from machine import keep
from PIL import Image

from clipret import Ranker

# CPU seconds and peak memory of a command; the system counts what its parent held at its start, hence a small one.
CHILD = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=-3)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))
sys.exit(os.waitstatus_to_exitcode(status))
"""
MANY = 64

ONE = ("--encoder", "threads=1", "--device", "cpu")


def run(*command: object) -> tuple[float, float]:
    """CPU seconds and peak MiB of `clipret-search` with these arguments."""
    words = [sys.executable, "-m", "clipret.cli", *map(str, command)]
    done = subprocess.run([sys.executable, "-c", CHILD, *words], check=True, stdout=subprocess.PIPE, text=True)
    seconds, mib = json.loads(done.stdout)
    return seconds, mib


def write_images(path: Path, count: int) -> None:
    """A .zip of drawn JPEGs; known bytes are not encoded again, so each has its number behind its end."""
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(200):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
        contents.append(buffer.getvalue())
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            archive.writestr(f"{number:08d}.jpg", contents[number % 200] + number.to_bytes(4, "little"))


def indexing(counts: Sequence[int]) -> list[dict[str, Any]]:
    points = []
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_images(folder / "images.zip", count)
            gallery = folder / "gallery"
            seconds, mib = run(
                "index", TINY, folder / "images.zip", gallery, "--encoder", "threads=1", "--device", "cpu"
            )
            queries = [run("query", gallery, "a red image", "--device", "cpu") for _ in range(3)]
            again, _ = run("index", TINY, folder / "images.zip", gallery, *ONE)
            size = sum(file.stat().st_size for file in gallery.rglob("*") if file.is_file())
        points.append(
            {
                "images": f"{count:,}",
                "index_cpu_seconds": round(seconds, 2),
                "index_ms_a_image": round(1000 * seconds / count, 3),
                "index_again_cpu_seconds": round(again, 2),
                "peak_mib": round(mib, 1),
                "gallery_bytes_a_image": round(size / count, 1),
                "cold_query_cpu_seconds": round(statistics.median(taken for taken, _ in queries), 3),
            }
        )
        print(points[-1], file=sys.stderr)
    return points


def ranking(counts: Sequence[int], dim: int, rounds: int) -> list[dict[str, Any]]:
    points = []
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            queries = make_shards(folder, "cone", count, dim)
            shards, quantized = open_shards(folder)
            size = sum(file.stat().st_size for file in folder.iterdir())
            point: dict[str, Any] = {"rows": f"{count:,}", "bytes_a_row": round(size / count, 1)}
            for form in ("streamed", "resident"):
                before, began = private_mib(), time.process_time()
                ranker = Ranker(shards, None, quantized, threads=1, resident=form == "resident")
                point[f"{form}_open_seconds"] = round(time.process_time() - began, 3)
                for many in (1, MANY):
                    times = []
                    for number in range(rounds + 1):
                        asked = queries[number * many : (number + 1) * many]
                        began = time.process_time()
                        ranker.rank(asked, K)
                        times.append(1000 * (time.process_time() - began) / many)
                    point[f"{form}_ms_a_query_{many}"] = round(statistics.median(times[1:]), 3)
                point[f"{form}_mib"] = round(max(0.0, private_mib() - before), 1)
                del ranker
        points.append(point)
        print(point, file=sys.stderr)
    return points


def slopes(points: Sequence[dict[str, Any]], size: str, names: Sequence[str]) -> dict[str, Any]:
    """Of each figure: the fitted slope, that between the last two sizes, and what it says."""
    x = np.log([float(point[size].replace(",", "")) for point in points])
    found: dict[str, Any] = {}
    for name in names:
        y = np.log([max(float(point[name]), 1e-9) for point in points])
        if len(points) < 2:
            continue
        last = float((y[-1] - y[-2]) / (x[-1] - x[-2]))
        found[name] = {
            "slope": round(float(np.polyfit(x, y, 1)[0]), 3),
            "between the largest two": round(last, 3),
            "meaning": meaning(last),
        }
    return found


def meaning(slope: float) -> str:
    if slope < 0.1:
        return "does not grow"
    if slope < 0.9:
        return "grows more slowly than the gallery: a fixed part is shared by more"
    if slope <= 1.1:
        return "grows as the gallery does: the cost of one stays the same"
    return "grows faster than the gallery"


def series(points: Sequence[dict[str, Any]], size: str, names: dict[str, str]) -> dict[str, list[list[float]]]:
    return {
        label: [[float(point[size].replace(",", "")), float(point[name])] for point in points]
        for name, label in names.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="of images")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 4_000_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    images = indexing(arguments.counts)
    rows = ranking(arguments.rows, arguments.dim, arguments.rounds)
    costs = {
        "index_cpu_seconds": "index",
        "index_again_cpu_seconds": "index again, nothing new",
        "cold_query_cpu_seconds": "a cold query",
    }
    queries = {
        "streamed_ms_a_query_1": "one, quantized, from files",
        "resident_ms_a_query_1": "one, quantized, in memory",
        f"streamed_ms_a_query_{MANY}": f"{MANY} at a time, from files",
        f"resident_ms_a_query_{MANY}": f"{MANY} at a time, in memory",
    }
    memory = {"streamed_mib": "quantized, from files", "resident_mib": "quantized, in memory"}
    result = {
        "dim": arguments.dim,
        "clock": "CPU time, one core",
        "indexing": images,
        "ranking": rows,
        "slopes of indexing": slopes(images, "images", [*costs, "peak_mib", "gallery_bytes_a_image"]),
        "slopes of ranking": slopes(rows, "rows", [*queries, "resident_mib", "resident_open_seconds"]),
        "plots": [
            {
                "caption": "Indexing and a cold query",
                "x": "images",
                "y": "CPU seconds",
                "series": series(images, "images", costs),
            },
            {"caption": "Ranking", "x": "rows", "y": "CPU ms a query", "series": series(rows, "rows", queries)},
            {"caption": "Memory of ranking", "x": "rows", "y": "MiB", "series": series(rows, "rows", memory)},
        ],
    }
    keep("scale", result)


if __name__ == "__main__":
    main()
