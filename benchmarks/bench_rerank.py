"""Re-ranking: what each step gains on a gallery with ground truth, and what it costs in time.

    python benchmarks/bench_rerank.py GALLERY QUERIES [--equal COLUMN] [--includes COLUMN] [--image-root FOLDER]
        [--where SQL] [--name NAME] [--rows 1000000]

GALLERY and QUERIES as for clipret-search eval. Steps are measured with their defaults, each by itself; the cost is
CPU time on one core for all queries, the plain ranking first and again between the steps, so that a ratio compares
neighbours. With --rows the cost alone is measured once more on so many random unit embeddings of 512 values and 64
queries. Hubness is measured with the queries themselves, which makes it transductive, and with half of the queries as
reference for the other half.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
from machine import keep

from clipret import Encoder, EncoderConfig, Gallery, Ranker, Searcher
from clipret.evaluation.evaluate import GroundTruth, measure, read_attribute_truth, read_ground_truth
from clipret.evaluation.metrics import Metric
from clipret.gallery.info import Stored
from clipret.ranking.quantization import mean, quantize
from clipret.search.rerank import Rerank, Reranker

STEPS = {
    "adapt 10, half": Rerank(adapt=10),
    "adapt 50, half": Rerank(adapt=50),
    "adapt 50, whole": Rerank(adapt=50, adapt_weight=1.0),
    "nnn": Rerank(hubness="nnn"),
    "nnn, 1 neighbour": Rerank(hubness="nnn", neighbours=1),
    "dual softmax, 100": Rerank(hubness="dual-softmax"),
    "dual softmax, 20": Rerank(hubness="dual-softmax", temperature=20.0),
    "k-reciprocal 100": Rerank(k_reciprocal=100),
    "adapt 50, k-reciprocal 100": Rerank(adapt=50, k_reciprocal=100),
}
METRICS = [Metric.parse(name) for name in ("mAP@10", "mAP", "recall@1", "recall@10")]


def cost(rank: Callable[[npt.NDArray[np.float64], int], Any], queries: npt.NDArray[np.float64]) -> float:
    """CPU seconds of the quicker of two rankings of ten images each."""
    seconds = []
    for _ in range(2):
        began = time.process_time()
        rank(queries, 10)
        seconds.append(time.process_time() - began)
    return min(seconds)


def of_gallery(arguments: argparse.Namespace) -> dict[str, Any]:
    gallery = Gallery.open(arguments.gallery)
    searcher = Searcher(gallery, Encoder(gallery.bundle(), EncoderConfig(device="cpu", threads=1)))
    if arguments.equal or arguments.includes:
        columns = {"equal": arguments.equal or (), "includes": arguments.includes or ()}
        truth = read_attribute_truth(searcher, arguments.queries, where=arguments.where, **columns)
    else:
        root = arguments.image_root
        truth = read_ground_truth(searcher, arguments.queries, where=arguments.where, image_root=root)
    queries = searcher.embed(list(truth.relevant))
    plain = cost(searcher.ranker.rank, queries)
    lines = {"none": measure(searcher, truth, METRICS)}
    for name, how in STEPS.items():
        reranker = Reranker(searcher.stored, searcher.ranker, how)
        took, again = cost(reranker.rank, queries), cost(searcher.ranker.rank, queries)
        lines[name] = measure(searcher, truth, METRICS, reranker.rank)
        lines[name]["cost_ratio"] = round(took / max(again, 1e-9), 1)
        lines[name]["cpu_ms_a_query"] = round(1000 * took / len(queries), 3)
    lines["none"]["cpu_ms_a_query"] = round(1000 * plain / len(queries), 3)
    # Inductive: every second query measures the hubs for the others.
    texts = list(truth.relevant)
    half = GroundTruth({text: truth.relevant[text] for text in texts[1::2]}, 0, 0)
    for name in ("nnn", "dual softmax, 20"):
        reranker = Reranker(searcher.stored, searcher.ranker, STEPS[name], searcher.embed(texts[::2]))
        plain_half, with_half = (measure(searcher, half, METRICS, find) for find in (None, reranker.rank))
        lines[f"{name}, half as reference"] = {
            f"{metric} gained": round(with_half[metric] - plain_half[metric], 4) for metric in with_half
        }
    counts = {"queries": len(texts), "images": len(gallery)}
    return {**counts, "steps": {name: {k: round(v, 4) for k, v in line.items()} for name, line in lines.items()}}


def of_random_rows(count: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shards = []
    for low in range(0, count, 65536):
        part = rng.normal(size=(min(65536, count - low), 512)).astype(np.float32)
        shards.append((part / np.linalg.norm(part, axis=1, keepdims=True)).astype(np.float16))
    queries = rng.normal(size=(64, 512))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    stored = Stored(shards, np.arange(count), None, [quantize(shard, mean(shard)) for shard in shards])
    ranker = Ranker(stored.shards, None, stored.quantized, threads=1)
    costs = {"none": cost(ranker.rank, queries)}
    for name in ("adapt 50, half", "nnn", "dual softmax, 100", "k-reciprocal 100"):
        costs[name] = cost(Reranker(stored, ranker, STEPS[name]).rank, queries)
    return {"rows": count, "cpu_ms_a_query": {name: round(1000 * one / 64, 2) for name, one in costs.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gallery", type=Path)
    parser.add_argument("queries", type=Path)
    parser.add_argument("--equal", action="append")
    parser.add_argument("--includes", action="append")
    parser.add_argument("--image-root", type=Path)
    parser.add_argument("--where")
    parser.add_argument("--name", default="rerank", help="of the file in results/")
    parser.add_argument("--rows", type=int, default=0)
    arguments = parser.parse_args()
    result = of_gallery(arguments)
    for name, line in result["steps"].items():
        print(f"{name:32} " + "  ".join(f"{key} {value:.4f}" for key, value in line.items()))
    if arguments.rows:
        result["random"] = of_random_rows(arguments.rows)
    keep(arguments.name, result)


if __name__ == "__main__":
    main()
