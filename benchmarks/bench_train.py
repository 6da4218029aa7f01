"""Speed and quality of training compared with open_clip's own trainer, `open_clip_train.main`: same model, data and
batch.

    pip install braceexpand webdataset pandas     # which open_clip's trainer wants and does not ask for
    python benchmarks/bench_train.py DATA WORK

DATA is a folder with captions.tsv (path, split, lang, caption) and images/. The model is a vision transformer of 256 x
6 at 96 px with a text tower of 256 x 4 and 32 tokens, the batch 128. CPU seconds of one thread, whole steps, loading
the images included. The speed is that of processes that run in turn, each after an epoch to warm up. The quality is
recall@10 of English captions on the 1,000 validation photographs of Flickr8k, from the same first weights in each of
several seeds; a training in WORK is used again.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, keep, sets

from clipret.tables import read_table

BATCH, STEPS, EPOCHS = 128, 6, 2  # of which the first warms up
MODEL_CFG = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 96, "layers": 6, "width": 256, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
}
# of both trainers, which see each of 6,000 images five times: open_clip's in one epoch of 30,000 rows, with a caption
# each time; clipret in five epochs, with one or with all captions
LR, WEIGHT_DECAY, WARMUP_STEPS = 1e-3, 0.1, 50
VARIANTS = ("open_clip fp32", "open_clip bf16", "clipret fp32", "clipret bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each trainer and precision")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind whose recall is averaged")
    parser.add_argument("--only", choices=("speed", "quality"), help="the other part stays as it was in results/")
    parser.add_argument("--worker", choices=(*VARIANTS, "parts fp32", "parts bf16"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    if arguments.worker is not None:
        worker(arguments.worker, work)
        return
    work.mkdir(parents=True, exist_ok=True)
    write_inputs(arguments.data.absolute(), work)
    before = RESULTS / "train.json"
    result: dict[str, Any] = json.loads(before.read_text()) if arguments.only and before.exists() else {}
    if arguments.only != "quality":
        result["speed"] = speed(work, arguments.rounds)
        result["parts"] = {}
        for precision in ("fp32", "bf16"):
            result["parts"][precision] = run_worker(f"parts {precision}", work)[0]
            print(f"a step of clipret in {precision}, CPU ms:", result["parts"][precision], file=sys.stderr)
    if arguments.only != "speed":
        result["quality"] = quality(arguments.data.absolute(), work, arguments.seeds)
        print(json.dumps(result["quality"], indent=2), file=sys.stderr)
    keep("train", {name: result[name] for name in ("speed", "parts", "quality") if name in result})


def write_inputs(data: Path, work: Path) -> None:
    """The model with random weights, and the lists that both trainers read."""
    write_model(work / "vit", seed=0)
    rows = read_table(data / "captions.tsv", "split = 'train' and lang = 'en'").rows
    first = list({row["path"]: row for row in reversed(rows)}.values())[: BATCH * STEPS]
    val = read_table(data / "captions.tsv", "split = 'val' and lang = 'en'").rows
    for name, chosen in (("whole", rows), ("part", first), ("val", val[:100])):
        # pandas reads quotes, which captions hold
        lines = [f"{data / 'images' / row['path']}\t" + row["caption"].replace('"', "'") for row in chosen]
        (work / f"{name}.tsv").write_text("path\ttitle\n" + "\n".join(lines) + "\n", encoding="utf-8")


def write_model(folder: Path, seed: int) -> None:
    """Random weights, in a folder that both trainers load."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    config = {"model_cfg": MODEL_CFG, "preprocess_cfg": {"size": 96}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    save_file(open_clip.CLIP(**MODEL_CFG).state_dict(), folder / "open_clip_model.safetensors")


def speed(work: Path, rounds: int) -> dict[str, Any]:
    """Images a CPU second, in turn."""
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for number in range(rounds):
        for variant in VARIANTS if number % 2 == 0 else VARIANTS[::-1]:
            epochs = run_worker(variant, work)
            seconds[variant] += epochs[1:]
            print(f"{variant}: {[round(s / STEPS, 3) for s in epochs]} CPU s a step", file=sys.stderr)
    median = {variant: statistics.median(values) / STEPS for variant, values in seconds.items()}
    table = {
        variant: {
            "cpu_seconds_a_step": round(median[variant], 4),
            "images_a_cpu_second": round(BATCH / median[variant], 1),
            "times_open_clip_fp32": round(median["open_clip fp32"] / median[variant], 3),
            "steps": STEPS * len(seconds[variant]),
        }
        for variant in VARIANTS
    }
    for variant, line in table.items():
        print(variant, line, file=sys.stderr)
    return table


def run_worker(variant: str, work: Path) -> Any:
    """What a process of this script, in one thread, prints in its last line."""
    command = [sys.executable, __file__, "-", str(work), "--worker", variant]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{variant}: exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def worker(variant: str, work: Path) -> None:
    torch.set_num_threads(1)
    what, precision = variant.split()
    if what == "open_clip":
        times = time_open_clip(work, precision)
    elif what == "clipret":
        times = time_clipret(work, precision)
    else:
        times = [parts_of_a_step(work, precision)]
    print(json.dumps(times))


def time_open_clip(work: Path, precision: str) -> list[float]:
    """CPU seconds of each epoch of `open_clip_train.main`, validation and checkpoints left out."""
    import open_clip_train.main as trainer

    seconds: list[float] = []
    trainer.train_one_epoch = timed(trainer.train_one_epoch, seconds)
    trainer.main(open_clip_arguments(work / "part.tsv", work, EPOCHS, precision, f"speed-{time.time_ns()}"))
    return seconds


def open_clip_arguments(
    rows: Path, work: Path, epochs: int, precision: str, name: str, model: Path | None = None, seed: int = 0
) -> list[str]:
    given = {
        "train-data": rows,
        "dataset-type": "csv",
        "csv-separator": "\t",
        "csv-img-key": "path",
        "csv-caption-key": "caption",
        "model": f"local-dir:{model or work / 'vit'}",
        "seed": seed,
        "batch-size": BATCH,
        "epochs": epochs,
        "lr": LR,
        "wd": WEIGHT_DECAY,
        "warmup": WARMUP_STEPS,
        "workers": 0,
        "precision": {"fp32": "fp32", "bf16": "amp_bf16"}[precision],
        "device": "cpu",
        "logs": work / "logs",
        "name": name,
        "save-frequency": epochs,
    }
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def time_clipret(work: Path, precision: str) -> list[float]:
    """The same of `clipret_training.fit`."""
    from clipret_training.data.training_data import TrainingData
    from clipret_training.fit import fit

    seconds: list[float] = []
    original = TrainingData.epoch

    def timed_epoch(self: TrainingData, at: Any) -> Iterator[Any]:
        began = time.process_time()
        yield from original(self, at)  # the steps are done between what it yields
        seconds.append(time.process_time() - began)

    TrainingData.epoch = timed_epoch  # type: ignore[method-assign]
    try:
        fit(speed_config(work, precision), work / "logs" / f"clipret-{time.time_ns()}")
    finally:
        TrainingData.epoch = original  # type: ignore[method-assign]
    return seconds


def speed_config(work: Path, precision: str) -> Any:
    from clipret_training.config import FitConfig

    return FitConfig.for_model(
        str(work / "part.tsv"),
        str(work / "vit"),
        val=str(work / "val.tsv"),
        precision=precision,
        threads=1,
        epochs=EPOCHS,
        batch_size=BATCH,
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        validate_every=EPOCHS,
    )


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def run(*given: Any, **named: Any) -> Any:
        began = time.process_time()
        result = function(*given, **named)
        seconds.append(time.process_time() - began)
        return result

    return run


def parts_of_a_step(work: Path, precision: str) -> dict[str, float]:
    """CPU ms of each part of a step of clipret, the median of several; and what the processor does at its best."""
    from torch.utils.flop_counter import FlopCounterMode

    from clipret_training.annotations import read_annotation_files
    from clipret_training.checkpoint import Position
    from clipret_training.data.training_data import TrainingData
    from clipret_training.distributed.world import World
    from clipret_training.learner import Learner
    from clipret_training.step import GradientStep
    from clipret_training.tuning.precision import autocast

    config, world, at = speed_config(work, precision), World(0, 1, torch.device("cpu")), Position(step=1)
    torch.set_num_threads(config.threads)
    annotations, _ = read_annotation_files(config)
    learner = Learner(config, annotations.pairs.captions, world, None)
    model = learner.model.train()
    data = TrainingData(config, annotations, learner.loaded, world)
    gradients = GradientStep(model, config.loss_config, precision=config.precision, device=world.device)

    def draw() -> Any:
        chosen, pixels = next(data.reader.batches(range(BATCH * STEPS), BATCH))
        return data.batch(chosen, pixels, at)

    def step() -> None:
        gradients(draw(), at.step)
        learner.step(LR)

    batch = draw()
    step()  # makes the optimiser's moments
    gradient = torch.randn(BATCH, MODEL_CFG["embed_dim"])

    def pass_through(encode: Callable[[Any], Any], *inputs: torch.Tensor) -> None:
        with autocast(config.precision, world.device):
            rows = torch.cat([encode(part) for part in inputs])
        rows.float().backward(gradient)

    rows = [torch.nn.functional.normalize(torch.randn(BATCH, 256), dim=1).requires_grad_() for _ in range(2)]
    parts: dict[str, Callable[[], Any]] = {
        "images, captions, augmentation": draw,
        "image tower, both ways": lambda: pass_through(model.encode_image, batch.images),
        "text tower, both ways": lambda: pass_through(model.encode_text, *batch.texts.groups),
        "loss, both ways": lambda: gradients.compute_loss(batch, *rows, rows[1][:0]).backward(),
        "clipping": lambda: learner.clip(1.0),
        "AdamW": learner.optimizer.step,
        "whole step": step,
    }
    taken = {name: [] for name in parts}
    for _ in range(7):
        for name, part in parts.items():
            began = time.process_time()
            part()
            taken[name].append(1000 * (time.process_time() - began))
    result = {name: round(statistics.median(times), 1) for name, times in taken.items()}
    with FlopCounterMode(display=False) as counter:
        step()
    best = peak(torch.bfloat16 if precision == "bf16" else torch.float32)
    done = counter.get_total_flops() / 1e9  # GFLOP of matrix products, forwards and backwards
    return result | {
        "gflop": round(done, 1),
        "peak_gflops": best,
        "share_of_peak": round(done / best / (result["whole step"] / 1000), 3),
    }


def peak(dtype: torch.dtype) -> float:
    """GFLOP a CPU second of a large matrix product."""
    a, b = (torch.randn(1536, 1536, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(12):
        began = time.process_time()
        a @ b
        best = max(best, 2 * 1536**3 / (time.process_time() - began) / 1e9)
    return round(best, 1)


def quality(data: Path, work: Path, seeds: int) -> dict[str, Any]:
    """Recall after as many passes over the images, from the same first weights in each seed; and of the small
    recipe."""
    captions = ("fit", data / "captions.tsv", *sets(image_root=data / "images", threads=1))
    split = sets(where="lang = 'en' and split = 'train'", val_where="lang = 'en' and split = 'val'")
    alike: tuple[Any, ...] = ("--epochs", 5, "--batch-size", BATCH, "--lr", LR)
    alike += sets(weight_decay=WEIGHT_DECAY, warmup=WARMUP_STEPS / 234, crop_area=0.9, jitter=0, flip=0)
    alike += sets(decode_scale=1.33, clip=0, validate_every=5, precision="bf16")
    muon = ("--set", "optimizer=muon")

    def clipret(name: str, *options: Any) -> dict[str, Any]:
        command = ("clipret_training", *captions, *split, *options, "--out", work / name, "--resume")
        cpu_seconds(sys.executable, "-m", *command)  # nothing where it is done
        lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
        measured = [line for line in lines if "text_to_image" in line]
        best = max(measured, key=lambda line: line["text_to_image"]["recall_at_10"])
        return {
            "cpu_seconds": round(lines[-1]["cpu_seconds"]),
            "recall_at_10": best["text_to_image"]["recall_at_10"],
            "mean_recall": best["mean_recall"],
            "course": [[round(m["cpu_seconds"]), round(m["text_to_image"]["recall_at_10"], 4)] for m in measured],
        }

    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        write_model(work / f"vit-{seed}", seed)
        model = ("--model", work / f"vit-{seed}", *alike, "--set", f"seed={seed}")
        for caption, run in (
            ("open_clip's trainer, fp32, AdamW, 1 epoch of 30,000 pairs", lambda: open_clip(data, work, seed)),  # noqa: B023
            (
                "clipret, bf16, AdamW, 5 epochs of 6,000 images, a caption each",
                lambda: clipret(f"adamw-{seed}", *model, "--set", "captions=1"),  # noqa: B023
            ),
            (
                "clipret, bf16, Muon, 5 epochs of 6,000 images, a caption each",
                lambda: clipret(f"muon-{seed}", *model, *muon, "--set", "captions=1"),  # noqa: B023
            ),
            (
                "clipret, bf16, Muon, 5 epochs of 6,000 images, all five captions",
                lambda: clipret(f"muon-all-{seed}", *model, *muon, "--set", "captions=5"),  # noqa: B023
            ),
        ):
            runs.setdefault(caption, []).append(run())
            print(f"seed {seed}: {caption}: {runs[caption][-1]}", file=sys.stderr)
    result: dict[str, Any] = {
        caption: {
            **{key: round(statistics.fmean(run[key] for run in each), 5) for key in each[0] if key != "course"},
            "recall_at_10_of_seeds": [round(run["recall_at_10"], 5) for run in each],
            "mean_recall_of_seeds": [round(run["mean_recall"], 5) for run in each],
        }
        for caption, each in runs.items()
    }
    timms = ("--opt", "timm/muon", "--beta1", "0.9", "--beta2", "0.98", "--eps", "1e-7")
    return result | {
        "open_clip's trainer, fp32, timm's Muon, 1 epoch of 30,000 pairs, seed 0": open_clip(data, work, 0, *timms),
        "clipret, recipe small": clipret("small", "--model", "clipret-small"),
    }


def open_clip(data: Path, work: Path, seed: int, *options: str) -> dict[str, Any]:
    """CPU seconds of a whole training by `open_clip_train.main`, and the recall of its weights."""
    name = f"{'muon' if options else 'quality'}-{seed}"
    seconds = work / f"{'open_clip-muon' if options else 'open_clip'}-{seed}.json"
    if not seconds.exists():
        model = work / f"vit-{seed}"
        arguments = [*open_clip_arguments(work / "whole.tsv", work, 1, "fp32", name, model, seed), *options]
        code = "import sys; from open_clip_train.main import main; main(sys.argv[1:])"
        seconds.write_text(json.dumps(cpu_seconds(sys.executable, "-c", code, *arguments)))
    saved = work / "logs" / name / "checkpoints" / "epoch_1.pt"
    state = torch.load(saved, map_location="cpu", weights_only=False)["state_dict"]
    found = measure(data, work, {name.removeprefix("module."): tensor for name, tensor in state.items()})
    return {"cpu_seconds": json.loads(seconds.read_text()), **found}


def measure(data: Path, work: Path, state: dict[str, torch.Tensor]) -> dict[str, float]:
    """Recall of weights of the vision transformer, by the validation of clipret's trainings."""
    from clipret_training.annotations import read_annotations
    from clipret_training.config import FitConfig
    from clipret_training.data.batches import ImageReader, Texts
    from clipret_training.models.load import load_model
    from clipret_training.validation import recall

    loaded = load_model(str(work / "vit"))
    loaded.model.load_state_dict(state)
    config = FitConfig(data=str(data / "captions.tsv"), model="", image_root=str(data / "images"))
    val = read_annotations(config, config.data, "lang = 'en' and split = 'val'")
    images = ImageReader(val, loaded.image, threads=1, cache_limit=2**32)
    found = recall(loaded, val.pairs, images, Texts(loaded, val), torch.device("cpu"))
    return {"recall_at_10": found["text_to_image"]["recall_at_10"], "mean_recall": found["mean_recall"]}


def cpu_seconds(*command: object) -> float:
    """User and system seconds of a command in one thread."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [*map(str, command)], check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)


if __name__ == "__main__":
    main()
