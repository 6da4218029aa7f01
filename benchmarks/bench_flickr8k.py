"""Quality on real images: train from scratch, export, index, evaluate, and compare the bundle with torch.

    python benchmarks/bench_flickr8k.py DATA WORK [--lang en] [--lang zh]

DATA is a folder with captions.tsv (path, split, lang, caption) and images/. Everything runs through the commands that
users run; the last part computes the recall of the same checkpoint with torch alone, without clipret's
export, gallery or ranking. Chance is 1 % (ten of 1,000 images).
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from machine import keep, sets

from clipret.images.decode import load
from clipret.inference.tokenizer import Tokenizer
from clipret.tables import read_table
from clipret_training.models.load import load_model

PRECISIONS = ("fp32", "fp16", "bf16", "int8")


def run(*command: object) -> tuple[str, float]:
    """Standard output of a command and the CPU seconds, user and system, that it took."""
    words = [str(word) for word in command]
    print("$", *words, file=sys.stderr)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return output, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def torch_recall(run_folder: Path, data: Path, lang: str) -> dict[str, float]:
    """recall@k of the run's best checkpoint in torch, float32, by sorting a plain matrix of cosines."""
    table = read_table(data / "captions.tsv", f"split = 'val' and lang = '{lang}'")
    paths = sorted({row["path"] for row in table.rows})
    number = {path: at for at, path in enumerate(paths)}
    answers: dict[str, set[int]] = {}
    for row in table.rows:
        answers.setdefault(row["caption"].strip(), set()).add(number[row["path"]])
    loaded = load_model(str(run_folder))
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (loaded.mean, loaded.std))
    pixels = np.stack([load(data / "images" / path, loaded.image) for path in paths])
    tokens = torch.from_numpy(Tokenizer(loaded.tokenizer_json, loaded.text)(list(answers)))
    with torch.inference_mode():
        inputs = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
        images: Any = torch.cat([loaded.model.encode_image(part, normalize=True) for part in inputs.split(100)])
        texts: Any = torch.cat([loaded.model.encode_text(part, normalize=True) for part in tokens.split(500)])
    order = (texts @ images.T).argsort(dim=1, descending=True, stable=True).numpy()
    pairs = zip(order, answers.values(), strict=True)
    first = np.array([min(np.flatnonzero(np.isin(row, list(right)))) for row, right in pairs])
    return {f"recall_at_{k}": float((first < k).mean()) for k in (1, 5, 10)}


def measure(data: Path, work: Path, lang: str) -> dict[str, Any]:
    captions, images = data / "captions.tsv", data / "images"
    chosen = f"lang = '{lang}'"
    folder = work / f"{lang}-run"
    train = sets(where=f"split = 'train' and {chosen}", val_where=f"split = 'val' and {chosen}", image_root=images)
    seconds = work / f"{lang}-train-cpu-seconds.json"
    if not seconds.exists():  # a run that is there from before is measured, not trained again
        model = ("--model", "clipret-small")
        _, cpu = run("clipret-train", "fit", captions, *model, *train, "--out", folder)
        seconds.write_text(json.dumps(round(cpu, 1)))
    result: dict[str, Any] = {
        "train_cpu_seconds": json.loads(seconds.read_text()),
        "torch": torch_recall(folder, data, lang),
    }
    calibration = ("--calibration", f"{captions},image_root={images},where=split = 'train' and {chosen}")
    for precision in PRECISIONS:
        bundle, gallery = work / f"{lang}-{precision}", work / f"{lang}-{precision}-gallery"
        options: list[object] = [] if precision == "fp32" else [f"--{precision}"]
        options += calibration if precision == "int8" else ()
        output, _ = run("clipret-export", folder, bundle, *options, "--overwrite", "--json")
        report = json.loads(output)
        shutil.rmtree(gallery, ignore_errors=True)
        run("clipret-search", "index", bundle, captions, gallery, "--image-root", images, "--where", "split = 'val'")
        only = ("--where", f"split = 'val' and {chosen}", "--image-root", images)
        result[precision] = json.loads(run("clipret-search", "eval", gallery, captions, *only, "--json")[0])
        for k in (1, 5, 10):
            difference = 100 * (result[precision][f"recall_at_{k}"] - result["torch"][f"recall_at_{k}"])
            result[precision][f"recall_at_{k}_minus_torch_points"] = round(difference, 3)
        result[precision]["min_cosine"] = {tower: report[tower]["min_cosine"] for tower in ("image", "text")}
        result[precision]["float32_layers"] = report["float32_layers"]
        result[precision]["size_mb"] = round(report["bytes"] / 1e6, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path, help="folder for runs, bundles and galleries; a run in it is used again")
    parser.add_argument("--lang", action="append", choices=["en", "zh"])
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = {lang: measure(arguments.data, arguments.work, lang) for lang in arguments.lang or ["en", "zh"]}
    for lang, result in results.items():
        for kind in ("torch", *PRECISIONS):
            shares = "  ".join(f"R@{k} {100 * result[kind][f'recall_at_{k}']:5.2f} %" for k in (1, 5, 10))
            print(f"{lang} {kind:5} {shares}   (training {result['train_cpu_seconds']} CPU s)", file=sys.stderr)
    keep("flickr8k", results)


if __name__ == "__main__":
    main()
