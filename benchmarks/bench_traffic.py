"""What each step of the traffic pipeline brings, on drawn data in the challenge's own format, over several seeds.

    python benchmarks/bench_traffic.py WORK [--seed 0] [--seed 1] [--seed 2] [--epochs 40]

For each seed other scenes are drawn and other weights: training images are clean and their captions name colour and
brand or only the type; test images are a camera's and queries name all. `clipret-train run traffic` goes from the
raw files to the answer, with images padded to a square with grey; a model each is also trained on images
cropped in the centre and padded with zeros, and one goes on from the pipeline's first model, for WiSE-FT, which wants
two models with a common start. Steps are added one to another from the top, but for the last ones, each by itself on
the completed model. A brand is not to be seen in a drawing, so the truth is colour and type, or the attributes of a
person, and vehicles and persons are measured apart. Chance is about 0.015 mAP for vehicles.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from machine import keep, sets

PROMPTS = """
[[rule]]
name = "vehicle"
words = ["bus", "microbus", "minivan", "suv", "sedan", "truck"]
strip = ["a", "an", "this is", "there is", "on the road", "drives along the road", "."]
templates = ["{}", "a {}"]
"""
CROP = ("--set", "resize=shortest")
ZEROS = ("--set", "resize=longest", "--set", "fill=0")
GREY = ("--set", "resize=longest", "--set", "fill=116")
ADAPT = ("--rerank", "adapt=50")
ALONE = {
    "nearest-neighbour normalisation": ("--rerank", "hubness=nnn"),
    "dual softmax": ("--rerank", "hubness=dual-softmax,temperature=20"),
    "k-reciprocal": ("--rerank", "k_reciprocal=100"),
}
METRICS = ("mAP@10", "mAP", "recall@1")


def run(*command: object) -> str:
    words = [str(word) for word in command]
    print("$", *words, file=sys.stderr)
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


class Seed:
    """All that one seed's folder holds; what is in it already is used again."""

    def __init__(self, work: Path, seed: int, epochs: int) -> None:
        self.work, self.epochs, self.drawn = work, epochs, work / "drawn"
        self.root = ("--image-root", self.drawn / "train_images")
        self.seed = seed
        self.fit = sets(seed=seed, threads=1, augment="surveillance")
        self.prompts = ("--prompts", work / "prompts.toml")

    def pipeline(self) -> None:
        """From the raw files to the answer by the one command."""
        fit = [*self.fit, "--epochs", str(self.epochs), *sets(validate_every=self.epochs)]
        images = [str(self.drawn / "test_images.csv"), "--image-root", str(self.drawn / "test_images")]
        values = {
            "labels": self.drawn / "train_label.txt",
            "images": self.drawn / "train_images",
            "texts": self.drawn / "test_text.txt",
            "test_images": self.drawn / "test_images",
            "test": json.dumps(images),
            "queries": self.drawn / "test_queries.csv",
            "fit": json.dumps(fit),
            "pad": json.dumps(GREY),
        }
        options = sets(**values)
        run("clipret-train", "run", "traffic", "--out", self.work / "grey", *options)

    def index(self, model: Path, name: str) -> Path:
        gallery = self.work / f"{name}-test"
        if not (gallery / "gallery.json").exists():
            run("clipret-export", model, self.work / f"{name}-bundle")
            images = (self.drawn / "test_images.csv", gallery, "--image-root", self.drawn / "test_images")
            run("clipret-search", "index", self.work / f"{name}-bundle", *images)
        return gallery

    def train(self, name: str, captions: Path, model: object, epochs: int, *options: str) -> Path:
        """The run folder of a training like the pipeline's, and its gallery of test images."""
        images = self.drawn / "train_images"
        where = sets(where="split = 'train'", val_where="split = 'val'", validate_every=epochs, image_root=images)
        command = (
            "clipret-train",
            "fit",
            captions,
            "--model",
            model,
            "--out",
            self.work / name,
            "--resume",
        )
        run(*command, *where, *self.fit, "--epochs", epochs, *options)
        return self.index(self.work / name, name)

    def evaluate(self, gallery: Path, *options: object) -> dict[str, dict[str, float]]:
        """mAP@10, mAP and recall@1 of the queries for vehicles and of those for persons."""
        judge = ("--equal", "color", "--equal", "type", "--includes", "attributes", "--json", "--encoder", "threads=1")
        wanted = [word for name in METRICS for word in ("--metric", name)]
        found = {}
        for kind in ("vehicle", "person"):
            only = ("--where", f"kind = '{kind}'")
            command = ("clipret-search", "eval", gallery, self.drawn / "test_queries.csv", *judge, *wanted, *only)
            metrics = json.loads(run(*command, *options))
            found[kind] = {name: metrics[name] for name in METRICS}
        return found

    def merge(self, first: Path, second: Path, depth: int) -> Path:
        """A result file of two galleries' re-ranked answers."""
        texts = ("--texts", self.drawn / "test_text.txt", "-k", depth)
        answers = [self.work / f"{gallery.name}.json" for gallery in (first, second)]
        for gallery, answer in zip((first, second), answers, strict=True):
            answer.write_text(run("clipret-search", "query", gallery, *texts, "--json", *self.prompts, *ADAPT))
        merged = self.work / "merged.json"
        merged.write_text(run("clipret-search", "merge", *answers, *texts))
        return merged

    def measure(self, train: int, test: int) -> dict[str, dict[str, dict[str, float]]]:
        self.work.mkdir(parents=True, exist_ok=True)
        self.prompts[1].write_text(PROMPTS)
        if not self.drawn.exists():
            counts = ("--train", train, "--test", test)
            run("clipret-train", "data", "challenge", self.drawn, *counts, "--seed", self.seed)
        self.pipeline()
        work, grey = self.work, self.work / "grey"
        first, second = grey / "first-test", grey / "second-test"
        given, completed = grey / "data" / "captions.csv", grey / "completed.csv"
        crop = self.train("crop", given, "clipret-small", self.epochs, *CROP)
        zeros = self.train("zeros", given, "clipret-small", self.epochs, *ZEROS)
        # A quarter of the epochs at a quarter of the learning rate, as one fine-tunes.
        tuning = (*GREY, "--lr", "5e-4")
        tuned = self.train("tuned", completed, grey / "first", max(1, self.epochs // 4), *tuning)
        if not (work / "wise").exists():
            run("clipret-train", "soup", work / "tuned", "--how", "wise", "--alpha", 0.5, "--out", work / "wise")
        wise = self.index(work / "wise", "wise")
        flipped = work / "flipped"
        if not flipped.exists():
            images = (self.drawn / "test_images.csv", flipped, "--image-root", self.drawn / "test_images")
            run("clipret-search", "index", grey / "second-bundle", *images, "--flip")
        result = {
            "baseline: centre crop": self.evaluate(crop),
            "pad to square, zeros": self.evaluate(zeros),
            "pad to square, grey": self.evaluate(first),
            "+ self-enhancement": self.evaluate(second),
            "+ prompts": self.evaluate(second, *self.prompts),
            "+ re-ranking: adapt=50": self.evaluate(second, *self.prompts, *ADAPT),
        }
        result["+ merge with the first model"] = self.evaluate(second, "--results", self.merge(first, second, test))
        result["alone: query adaptation"] = self.evaluate(second, *ADAPT)
        for name, options in ALONE.items():
            result[f"alone: {name}"] = self.evaluate(second, *options)
        result["alone: flip averaging"] = self.evaluate(flipped)
        result["first model, tuned on the completed captions"] = self.evaluate(tuned)
        result["… WiSE-FT, half way"] = self.evaluate(wise)
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
    work = arguments.work.absolute()
    runs = [Seed(work / str(seed), seed, epochs).measure(arguments.train, arguments.test) for seed in seeds]
    table = {}
    for name in runs[0]:
        for kind in ("vehicle", "person"):
            for metric in METRICS:
                values = [one[name][kind][metric] for one in runs]
                mean, spread = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
                table[f"{name}: {kind}: {metric}"] = [round(mean, 4), round(spread, 4)]
                print(f"{name:46} {kind:8} {metric:8} {mean:.4f} ± {spread:.4f}", file=sys.stderr)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    facts = {"seeds": seeds, "epochs": epochs, "cpu_seconds_of_this_call": round(used.ru_utime + used.ru_stime, 1)}
    keep("traffic", {**facts, "mean_and_deviation": table, "runs": runs})


if __name__ == "__main__":
    main()
