"""The cold query: CPU time of one `clipret-search query` on a gallery of 10,000 rows, process start included.

    python benchmarks/bench_query.py [--rows 10000] [--pairs 15]

The gallery is made of random unit rows under a real bundle (the tests' tiny one unless --bundle names another), so
what is measured is everything but a large text tower. Its floor is the same Python importing the libraries that
a query cannot do without; the two run in turn, A B A B.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from machine import keep

from clipret import Bundle, Gallery
from clipret.gallery import Picture

TINY = Path(__file__).parent.parent / "tests" / "data" / "tiny-bundle"
FLOOR = "import sqlite3, click, numpy, onnxruntime, PIL.Image, tokenizers"


def make_gallery(folder: Path, bundle: Bundle, rows: int) -> None:
    rng = np.random.default_rng(0)
    with Gallery.create(folder, bundle, folder) as gallery, gallery.writing():
        for low in range(0, rows, 8192):
            values = rng.normal(size=(min(8192, rows - low), bundle.manifest.embedding_dim)).astype(np.float32)
            values /= np.linalg.norm(values, axis=1, keepdims=True)
            gallery.append([Picture(f"{low + n:07d}.jpg", 1, 1, "") for n in range(len(values))], values)


def cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--bundle", type=Path, default=TINY)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    with tempfile.TemporaryDirectory() as folder:
        gallery = Path(folder, "gallery")
        make_gallery(gallery, bundle, arguments.rows)
        query = [sys.executable, "-m", "clipret.cli", "query", str(gallery), "a red sedan"]
        floor = [sys.executable, "-c", FLOOR]
        pairs = [(cpu_seconds(query), cpu_seconds(floor)) for _ in range(arguments.pairs + 1)][1:]
    queries, floors = zip(*pairs, strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    median, least = statistics.median(queries), statistics.median(floors)
    print(
        f"cold query on {arguments.rows:,} rows of {bundle.manifest.embedding_dim}: median {median:.3f} CPU s",
        file=sys.stderr,
    )
    print(f"importing its libraries alone: median {least:.3f} CPU s; ratio {ratio:.2f}", file=sys.stderr)
    keep(
        "query",
        {
            "rows": arguments.rows,
            "dim": bundle.manifest.embedding_dim,
            "model": bundle.manifest.model,
            "cpu_seconds_median": round(median, 4),
            "cpu_seconds_max": round(max(queries), 4),
            "imports_cpu_seconds_median": round(least, 4),
            "ratio_to_imports_median": round(ratio, 3),
        },
    )


if __name__ == "__main__":
    main()
