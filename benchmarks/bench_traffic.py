"""What each step of the traffic pipeline brings, on drawn data in the challenge's own format, over several seeds.

    python benchmarks/bench_traffic.py WORK [--seed 0] [--seed 1] [--seed 2] [--epochs 40] [--train 2640] [--test 1320]

For each seed other scenes are drawn and other weights: training pictures are clean and their captions name colour and
brand or only the type; test pictures are a camera's and queries name all. `clipret-train run traffic` does the rest,
once with pictures padded to a square with zeros and once with grey, which is clipret-small's own way. A brand is not
to be seen in a drawing, so the truth is colour and type, or the attributes of a person. Each step of re-ranking by
itself and mirror images are added here, on the last model of the second run. Chance is about 0.015 mAP for vehicles.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from machine import keep

PROMPTS = """
[[rule]]
name = "vehicle"
words = ["bus", "microbus", "minivan", "suv", "sedan", "truck"]
strip = ["a", "an", "this is", "there is", "on the road", "drives along the road", "."]
templates = ["{}", "a {}"]
"""
PADS = {
    "zeros": ["--set", "resize=longest", "--set", "fill=0"],
    "grey": ["--set", "resize=longest", "--set", "fill=116"],
}
RERANK = {
    "adapt": ("--adapt", "50"),
    "nnn": ("--hubness", "nnn"),
    "dual softmax": ("--hubness", "dual-softmax", "--temperature", "20"),
    "reciprocal": ("--reciprocal", "100"),
}


def run(*command: object) -> Any:
    words = [str(word) for word in command]
    print("$", *words, file=sys.stderr)
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


def measure(work: Path, seed: int, epochs: int, train: int, test: int) -> dict[str, dict[str, float]]:
    drawn, prompts = work / "drawn", work / "prompts.toml"
    work.mkdir(parents=True, exist_ok=True)
    if not prompts.exists() or prompts.read_text() != PROMPTS:  # a file that is written again is a changed one
        prompts.write_text(PROMPTS)
    if not drawn.exists():
        run("clipret-train", "data", "challenge", drawn, "--train", train, "--test", test, "--seed", seed)
    fit = ["--epochs", str(epochs), "--seed", str(seed), "--threads", "1", "--augment", "surveillance"]
    pictures = [str(drawn / "test_pictures.csv"), "--image-root", str(drawn / "test_images")]
    values = {
        "labels": drawn / "train_label.txt",
        "images": drawn / "train_images",
        "texts": drawn / "test_text.txt",
        "test_images": drawn / "test_images",
        "test": json.dumps(pictures),
        "queries": drawn / "test_queries.csv",
        "fit": json.dumps([*fit, "--validate-every", str(epochs)]),
        "prompts": json.dumps(["--prompts", str(prompts)]),
        "rerank": json.dumps(RERANK["adapt"]),
    }
    sets = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
    result: dict[str, dict[str, float]] = {}
    for pad, options in PADS.items():
        command = ("clipret-train", "run", "traffic", "--out", work / pad, *sets, "--set", f"pad={json.dumps(options)}")
        for name, record in json.loads(run(*command, "--json")).items():
            if record["metrics"]:
                result[f"{pad}, {name}"] = record["metrics"]
    judge = ("--equal", "color", "--equal", "type", "--includes", "attributes", "--json")
    metrics = [word for name in ("mAP@10", "mAP", "recall@1") for word in ("--metric", name)]
    second, queries = work / "grey" / "second-test", drawn / "test_queries.csv"
    for name, options in RERANK.items():
        result[name] = json.loads(run("clipret-search", "eval", second, queries, *judge, *metrics, *options))
    run("clipret-search", "mirror", second, work / "mirrored")
    result["mirror"] = json.loads(run("clipret-search", "eval", work / "mirrored", queries, *judge, *metrics))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="a folder for everything; what is done in it already is kept")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--train", type=int, default=2640)
    parser.add_argument("--test", type=int, default=1320)
    arguments = parser.parse_args()
    seeds, epochs = arguments.seed or [0, 1, 2], arguments.epochs
    runs = [measure(arguments.work / str(seed), seed, epochs, arguments.train, arguments.test) for seed in seeds]
    table = {}
    for name in runs[0]:
        for metric in ("mAP@10", "mAP", "recall@1"):
            values = [one[name][metric] for one in runs]
            table[f"{name}: {metric}"] = [round(float(np.mean(values)), 4), round(float(np.std(values)), 4)]
            print(f"{name:24} {metric:8} {np.mean(values):.4f} ± {np.std(values):.4f}", file=sys.stderr)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = round(used.ru_utime + used.ru_stime, 1)
    facts = {"seeds": seeds, "epochs": epochs, "cpu_seconds_of_this_call": cpu}
    keep("traffic", {**facts, "mean_and_deviation": table, "runs": runs})


if __name__ == "__main__":
    main()
