"""The demo as a measurement: quality by language, and what the whole of it costs.

    python benchmarks/bench_demo.py [FOLDER]

Runs demo.sh into FOLDER (default: demo), then evaluates the gallery once for each language. Chance is the mAP@10 of
a ranking drawn at random, averaged over 20 draws for each query.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from machine import keep

from clipret import Gallery
from clipret.evaluation.metrics import average_precision
from clipret.tables import read_table


def chance(gallery: Path, queries: Path) -> float:
    with Gallery.open(gallery) as opened:
        images = sorted(opened.ids_by_path())
    answers: dict[str, set[str]] = {}
    for row in read_table(queries).rows:
        answers.setdefault(row["caption"], set()).add(Path(row["path"]).name)
    rng = np.random.default_rng(0)
    number = {path: at for at, path in enumerate(images)}
    relevant = [{number[path] for path in paths} for paths in answers.values()]
    draws = [average_precision(rng.permutation(len(images))[:10].tolist(), rows) for rows in relevant * 20]
    return float(np.mean(draws))


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(["sh", str(Path(__file__).parent / "demo.sh"), str(out)], check=True, stdout=sys.stderr)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    gallery, queries = out / "gallery", out / "camera" / "queries.csv"
    result: dict[str, object] = {"wall_seconds": round(wall, 1), "cpu_seconds": round(cpu, 1)}
    for lang in ("en", "zh"):
        command = ["clipret-search", "eval", str(gallery), str(queries), "--where", f"lang = '{lang}'", "--json"]
        result[lang] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    keep("demo", result | {"chance_map_at_10": round(chance(gallery, queries), 4)})


if __name__ == "__main__":
    main()
