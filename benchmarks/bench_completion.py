"""Completion on real cars: how many colours are filled in rightly, how many strangers are, and whether it helps.

    python benchmarks/bench_completion.py DATA WORK [--seed 0] [--seed 1] [--seed 2] [--epochs 30]

DATA is a folder with labels.csv (path, split, known, color, brand, type) and images/: half of the cars are known by
their colour. Half of those labels are hidden, and all of brown and pink, which no caption then names ("strangers"). A
clipret-small learns from what is left, together with as many cars known by their model, and completes the hidden
half at several settings. Then one learns from the completed list and one from the true labels. Accuracy is the share
of held-out cars of the eight colours whose colour is the nearest word; mAP that of the eight colour queries
over all held-out cars, strangers included. About 1 label in 20 of this data is wrong. Everything runs through the
commands that users run.
"""

import argparse
import csv
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from machine import keep, sets

from clipret import Encoder, EncoderConfig, Gallery
from clipret.tables import read_table

STRANGERS = ("brown", "pink")
FORMS = ("a {} car", "{} vehicle", "{}")
SETTINGS = [(0.0, 0.95), (0.0, 0.98), (0.0, 0.99), (0.05, 0.95), (0.1, 0.95), (0.1, 0.98), (0.2, 0.97)]
USED = (0.1, 0.95)  # unfamiliar, precision: the defaults


def run(*command: object) -> str:
    words = [str(word) for word in command]
    print("$", *words, file=sys.stderr)
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


def write(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def lists(data: Path, work: Path, seed: int) -> dict[str, str]:
    """Writes what is known, and returns the true colour of every image that has one."""
    rng = random.Random(seed)
    rows = read_table(data / "labels.csv").rows
    truth = {row["path"]: row["color"] for row in rows if row["known"] == "color"}
    cars, models = [], []
    for row in rows:
        if row["known"] == "color":
            hidden = row["split"] == "val" or rng.random() < 0.5 or row["color"] in STRANGERS
            cars.append((row["path"], "a car", "" if hidden else row["color"], row["split"]))
        elif row["split"] == "train" and rng.random() < 0.5:
            name = " ".join(part for part in (row["brand"], row["type"]) if part)
            models += [(row["path"], form.format(name)) for form in ("{}", "a photo of a {}")]
    write(work / "captions.csv", ("path", "caption", "color", "split"), cars)
    write(work / "models.csv", ("path", "caption"), models)
    words = sorted({color for color in truth.values() if color not in STRANGERS})
    (work / "vocabulary.json").write_text(json.dumps({"slots": {"color": words}}))
    return truth


def trained(data: Path, work: Path, name: str, colors: dict[str, str], seed: int, epochs: int) -> dict[str, float]:
    """Train with these colours, index all cars known by colour, and measure on the held-out ones."""
    rows = [(path, form.format(color)) for path, color in colors.items() for form in FORMS]
    rows += [(row["path"], row["caption"]) for row in read_table(work / "models.csv").rows]
    write(work / f"{name}.csv", ("path", "caption"), rows)
    root = ("--image-root", data / "images")
    if not (
        work / f"{name}-gallery" / "gallery.json"
    ).exists():  # what is there from before is measured, not made again
        for part in ("", "-bundle", "-gallery"):
            shutil.rmtree(work / f"{name}{part}", ignore_errors=True)
        options = ("--model", "clipret-small", "--epochs", epochs, *sets(seed=seed, threads=1, val_split=0.03))
        images = sets(image_root=data / "images", validate_every=epochs, jitter=0.15, optimizer="adamw")
        fit = ("clipret-train", "fit", work / f"{name}.csv", "--out", work / name, *options)
        # AdamW, with which the published figures were measured.
        run(*fit, *images)
        run("clipret-export", work / name, work / f"{name}-bundle")
        run("clipret-search", "index", work / f"{name}-bundle", work / "captions.csv", work / f"{name}-gallery", *root)
    return quality(work / f"{name}-gallery", work, colors)


def quality(gallery: Path, work: Path, colors: dict[str, str]) -> dict[str, float]:
    truth = json.loads((work / "truth.json").read_text())
    words = json.loads((work / "vocabulary.json").read_text())["slots"]["color"]
    with Gallery.open(gallery) as opened:
        encoder, stored = Encoder(opened.bundle(), EncoderConfig(threads=1)), opened.read()
        paths = opened.paths(stored.ids)
        rows = np.concatenate([np.asarray(shard) for shard in stored.shards]).astype(np.float64)
        split = {row["path"]: row["split"] for row in read_table(work / "captions.csv").rows}
        held = np.array([split[path] == "val" for path in paths])
        texts = encoder.encode_texts([form.format(word) for word in words for form in FORMS]).astype(np.float64)
    means = texts.reshape(len(words), len(FORMS), -1).mean(axis=1)
    scores = rows[held] @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    own = np.array([truth[path] for path, one in zip(paths, held, strict=True) if one])
    usual = ~np.isin(own, STRANGERS)
    precision = []
    for at, word in enumerate(words):
        hits = (own == word)[np.argsort(-scores[:, at], kind="stable")]
        precision.append(float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean()))
    right = np.array(words)[scores.argmax(axis=1)] == own
    return {
        "labels": len(colors),
        "wrong_labels": sum(truth[path] != color for path, color in colors.items()),
        "accuracy": round(float(right[usual].mean()), 4),
        "mAP": round(float(np.mean(precision)), 4),
    }


def completed(data: Path, work: Path, truth: dict[str, str], unfamiliar: float, precision: float) -> dict[str, Any]:
    """Complete with the first model; what came of it among the images whose colour was hidden."""
    out = work / f"completed-{unfamiliar}-{precision}.csv"
    options = ("--image-root", data / "images", "--vocabulary", work / "vocabulary.json", "--where", "split = 'train'")
    forms = [word for form in FORMS for word in ("--template", form.format("{color}"))]
    limits = ("--confidence", f"unfamiliar={unfamiliar},precision={precision}", "--json", "--encoder", "threads=1")
    command = ("clipret-search", "complete", work / "none-gallery", work / "captions.csv", out)
    report = json.loads(run(*command, *options, *forms, *limits))[0]
    filled = {row["path"]: row["color"] for row in read_table(out).rows if row["filled"]}
    hidden = [
        row["path"] for row in read_table(work / "captions.csv").rows if row["split"] == "train" and not row["color"]
    ]
    usual = [path for path in hidden if truth[path] not in STRANGERS]
    good = [path for path in usual if path in filled]
    odd = [path for path in hidden if truth[path] in STRANGERS]
    return {
        "unfamiliar": unfamiliar,
        "precision_asked": precision,
        "precision_reported": round(report["precision"], 4),
        "coverage": round(len(good) / len(usual), 4),
        "precision": round(sum(filled[path] == truth[path] for path in good) / max(len(good), 1), 4),
        "strangers_filled": round(sum(path in filled for path in odd) / len(odd), 4),
    }


def measure(data: Path, work: Path, seed: int, epochs: int, again: bool) -> dict[str, Any]:
    work.mkdir(parents=True, exist_ok=True)
    truth = lists(data, work, seed)
    (work / "truth.json").write_text(json.dumps(truth))
    captions = read_table(work / "captions.csv").rows
    known = {row["path"]: row["color"] for row in captions if row["color"]}
    result: dict[str, Any] = {"none": trained(data, work, "none", known, seed, epochs)}
    result["completion"] = [completed(data, work, truth, *setting) for setting in SETTINGS]
    if not again:
        return result
    rows = read_table(work / f"completed-{USED[0]}-{USED[1]}.csv").rows
    full = known | {row["path"]: row["color"] for row in rows if row["filled"]}
    result["completed"] = trained(data, work, "completed", full, seed, epochs)
    train = {row["path"] for row in captions if row["split"] == "train"}
    true = {path: color for path, color in truth.items() if path in train and color not in STRANGERS}
    result["true"] = trained(data, work, "true", true, seed, epochs)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path, help="folder for runs, bundles and galleries; what is in it is used again")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--once", action="store_true", help="complete, but do not train with what came of it")
    arguments = parser.parse_args()
    seeds, epochs = arguments.seed or [0, 1, 2], arguments.epochs
    runs = [measure(arguments.data, arguments.work / str(seed), seed, epochs, not arguments.once) for seed in seeds]
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = {}
    for name in ("none",) if arguments.once else ("none", "completed", "true"):
        for metric in ("accuracy", "mAP"):
            values = [one[name][metric] for one in runs]
            summary[f"{name} {metric}"] = [round(float(np.mean(values)), 4), round(float(np.std(values)), 4)]
    keep(
        "completion",
        {
            "seeds": seeds,
            "epochs": epochs,
            "cpu_seconds_of_this_call": round(cpu.ru_utime + cpu.ru_stime, 1),
            "mean_and_deviation": summary,
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()
