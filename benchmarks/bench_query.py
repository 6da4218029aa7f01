"""Text queries end to end: one cold `clipret-search query`, and queries a second of a searcher that is open.

    python benchmarks/bench_query.py --bundle demo/bundle --bundle work/ViT-B-32 [--rows 100000] [--pairs 15]

Cold: CPU time of the whole process, on a gallery of random unit embeddings made under each bundle (the tests' tiny one
unless --bundle names others). Its floor is the same Python importing the libraries that a query cannot do without;
the two run in turn, A B A B. Warm, on one core: texts that were never asked before, one at a time and 256 at a
time, through tokenizer, text tower and ranking, with the share of the tower; and texts that were.
"""

import argparse
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import keep

from clipret import Bundle, Encoder, EncoderConfig, Gallery, Searcher
from clipret.gallery.gallery import ImageRecord

TINY = Path(__file__).parent.parent / "tests" / "data" / "tiny-bundle"
FLOOR = "import sqlite3, click, numpy, onnxruntime, PIL.Image, tokenizers"
WORDS = (
    ("small", "large", "old", "new"),
    ("red", "blue", "green", "grey", "white", "black", "brown", "yellow"),
    ("car", "bus", "truck", "van", "bicycle", "woman", "man", "dog"),
    ("at night", "in the rain", "in the snow", "from behind", "from above", "near a wall", "on the left", "alone"),
)


def make_gallery(folder: Path, bundle: Bundle, rows: int) -> None:
    rng = np.random.default_rng(0)
    with Gallery.create(folder, bundle, folder) as gallery, gallery.writing():
        for low in range(0, rows, 8192):
            values = rng.normal(size=(min(8192, rows - low), bundle.manifest.embedding_dim)).astype(np.float32)
            values /= np.linalg.norm(values, axis=1, keepdims=True)
            gallery.append([ImageRecord(f"{low + n:07d}.jpg", 1, 1, "") for n in range(len(values))], values)


def texts() -> list[str]:
    """2,048 different ones, of six to nine tokens."""
    return [f"a {' '.join(words)}" for words in itertools.product(*WORDS)]


def cpu_seconds(command: list[str]) -> float:
    # Of a Python that keeps what it compiles, as a user's does: without, each start compiles every module again.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cold(gallery: Path, pairs: int) -> dict[str, float]:
    query = [sys.executable, "-m", "clipret.cli", "query", str(gallery), "a red sedan"]
    floor = [sys.executable, "-c", FLOOR]
    times = [(cpu_seconds(query), cpu_seconds(floor)) for _ in range(pairs + 1)][1:]
    queries, floors = zip(*times, strict=True)
    return {
        "cpu_seconds_median": round(statistics.median(queries), 4),
        "cpu_seconds_max": round(max(queries), 4),
        "imports_cpu_seconds_median": round(statistics.median(floors), 4),
        "ratio_to_imports_median": round(statistics.median(a / b for a, b in times), 3),
    }


def warm(gallery: Path, bundle: Bundle) -> dict[str, float]:
    """Queries a second of CPU time on one core."""
    searcher = Searcher(Gallery.open(gallery), Encoder(bundle, EncoderConfig(device="cpu", threads=1)), resident=True)
    asked = texts()
    searcher.search(["warm up"], 10)
    searcher.search([f"warm up {number}" for number in range(256)], 10)

    def rate(batches: list[list[str]]) -> float:
        times = []
        for batch in batches:
            start = time.process_time()
            searcher.search(batch, 10)
            times.append((time.process_time() - start) / len(batch))
        return round(1 / statistics.median(times), 1)

    start = time.process_time()
    searcher.encoder.encode_texts([f"{text} again" for text in asked[:256]])
    tower = time.process_time() - start
    result = {
        "one_at_a_time": rate([[text] for text in asked[:256]]),
        "256_at_a_time": rate([asked[low : low + 256] for low in range(256, 2048, 256)]),
        "256_at_a_time_tower_alone": round(256 / tower, 1),
        "known_one_at_a_time": rate([[text] for text in asked[:256]]),
    }
    searcher.gallery.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--bundle", type=Path, action="append")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"rows": arguments.rows}
    for path in arguments.bundle or [TINY]:
        bundle = Bundle.open(path)
        with tempfile.TemporaryDirectory() as folder:
            gallery = Path(folder, "gallery")
            make_gallery(gallery, bundle, arguments.rows)
            measured: dict[str, Any] = {"dim": bundle.manifest.embedding_dim, "cold": cold(gallery, arguments.pairs)}
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
            measured["warm_queries_a_second"] = warm(gallery, bundle)
            os.sched_setaffinity(0, set(range(os.cpu_count() or 1)))
        name = f"{bundle.manifest.model} {bundle.manifest.precision}"
        result[name] = measured
        print(f"{name}: {measured}", file=sys.stderr)
    keep("query", result)


if __name__ == "__main__":
    main()
