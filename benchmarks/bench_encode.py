"""Encoding images and texts compared with open_clip, sentence-transformers, rclip and a plain onnxruntime loop.

    python benchmarks/bench_encode.py work [--data ../shared/data/flickr8k] [--images 64] [--rounds 5] [--only ...]

Everything runs on one core and is measured in CPU time; what is compared runs in turn, A B A B, and medians are told.
Weights are random, for none can be downloaded here: the speed is that of the real ones. Bundles of ViT-B-32 in three
precisions are made in the folder `work` and kept there; int8 takes its ranges from the images.

- folder: JPEG files to rows, decoding included. The peers are installed packages or left out: sentence-transformers
  on a random CLIPModel of the same shape, and rclip's own indexing code with its model replaced by the same ViT-B-32.
- memory: peak resident size of `clipret-search index` on 2,000 and 20,000 images with a small model.
- texts: queries a second, one at a time and many, and the CPU time of a fresh process up to the first.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before torch and numpy are imported
os.environ.pop("OPENBLAS_CORETYPE", None)  # a kernel for another processor would be a false peak
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import torch
from machine import keep

from clipret import Bundle, Encoder, EncoderConfig
from clipret.images.decode import load

NAME = "ViT-B-32"
PRECISIONS = {"fp32": "onnxruntime", "fp32 openvino": "openvino", "bf16": "openvino", "int8": "openvino"}
PRECISIONS |= {"int8 onnxruntime": "onnxruntime"}
PARTS = ("folder", "memory", "texts")


def bundles(work: Path, data: Path, precisions: Sequence[str] = ("fp32", "bf16", "int8")) -> dict[str, Bundle]:
    """ViT-B-32 in several precisions, exported where that has not happened."""
    made = {}
    for precision in precisions:
        folder = work / f"{NAME}-{precision}"
        if not folder.exists():
            option = [] if precision == "fp32" else [f"--{precision}"]
            if precision == "int8":
                every = max(1, len((data / "captions.tsv").read_bytes().splitlines()) // 80)
                images = f"image_root={data / 'images'},where=rowid % {every} = 0"
                option += ["--calibration", f"{data / 'captions.tsv'},{images}"]
            subprocess.run(["clipret-export", NAME, str(folder), *option], check=True, stdout=subprocess.DEVNULL)
        made[precision] = Bundle.open(folder)
    return made


def in_turn(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median CPU seconds of each, run once before and then in turn."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.process_time()
            run()
            seconds[name].append(time.process_time() - began)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def eager() -> tuple[Any, Any]:
    """open_clip's model and its transform, as its README has them."""
    import open_clip

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms(NAME)
    return model.eval(), transform


def open_clip_loop() -> Callable[[Sequence[Path]], object]:
    """The plain loop: a Dataset, a DataLoader that reads in this process, encode_image."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    model, transform = eager()

    class Folder(Dataset[Any]):
        def __init__(self, paths: Sequence[Path]) -> None:
            self.paths = paths

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, at: int) -> Any:
            return transform(Image.open(self.paths[at]))

    def run(paths: Sequence[Path]) -> object:
        with torch.inference_mode():
            return [model.encode_image(batch, normalize=True) for batch in DataLoader(Folder(paths), batch_size=32)]

    return run


def onnxruntime_loop(bundle: Bundle) -> Callable[[Sequence[Path]], object]:
    """One image at a time through onnxruntime with the options it comes with."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = bundle.file("image.onnx")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name, spec = session.get_inputs()[0].name, bundle.manifest.image
    return lambda paths: [session.run(None, {name: load(path, spec)[None]}) for path in paths]


def sentence_transformers_loop(work: Path, bundle: Bundle) -> Callable[[Sequence[Path]], object]:
    """`SentenceTransformer.encode` on opened images, as its documentation has it for CLIP."""
    from PIL import Image
    from sentence_transformers import SentenceTransformer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

    folder, end = work / "hf-clip", "<|endoftext|>"
    if not folder.exists():
        tokens = {"bos_token": "<|startoftext|>", "eos_token": end, "pad_token": end, "unk_token": end}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(bundle.path / "tokenizer.json"), model_max_length=77, **tokens
        )
        CLIPModel(CLIPConfig()).save_pretrained(folder)  # its defaults are ViT-B-32
        CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)
    model = SentenceTransformer(str(folder), device="cpu")
    return lambda paths: model.encode(
        [Image.open(path) for path in paths], batch_size=32, normalize_embeddings=True, show_progress_bar=False
    )


def rclip_loop(work: Path) -> Callable[[Sequence[Path]], object]:
    """rclip's own indexing of a folder: hash, decode, onnxruntime in batches of 8, sqlite. Its model, which it
    downloads, is replaced by open_clip's ViT-B-32 with random weights, exported with float32 pixels as rclip's is."""
    from rclip import db, model_download
    from rclip.main import RClip
    from rclip.model import Model
    from rclip.utils import preprocess

    graph = work / "rclip.onnx"
    if not graph.exists():
        visual, pixels = eager()[0].visual, torch.randn(2, 3, 224, 224)
        axes = ({0: torch.export.Dim("batch")},)
        program = torch.onnx.export(
            visual, (pixels,), input_names=["input"], output_names=["output"], dynamo=True, dynamic_shapes=axes
        )
        program.save(graph)
    preprocess.IMAGE_SIZE = 224
    model = Model()
    model._session_visual_var = model_download._load_onnx_session(str(graph))

    def run(paths: Sequence[Path]) -> object:
        with tempfile.TemporaryDirectory() as folder:
            database = db.DB(Path(folder, "db.sqlite3"))
            indexing = RClip(model, database, 8, None)
            indexing._index_images([(str(path), {"modified_at": 0.0, "size": path.stat().st_size}) for path in paths])
            indexing.close()
            database.close()
        return None

    return run


def folder(made: dict[str, Bundle], images: Sequence[Path], rounds: int, work: Path) -> dict[str, Any]:
    runs = {"open_clip": open_clip_loop(), "onnxruntime batch 1": onnxruntime_loop(made["fp32"])}
    peers = {
        "sentence-transformers": ("sentence_transformers", lambda: sentence_transformers_loop(work, made["fp32"])),
        "rclip": ("rclip", lambda: rclip_loop(work)),
    }
    result: dict[str, Any] = {"images": len(images)}
    for name, (module, make) in peers.items():
        if importlib.util.find_spec(module) is None:
            result[name] = "not installed"
            continue
        version = importlib.metadata.version(name)
        runs[f"{name} {version}"] = make()

    def encode(encoder: Encoder) -> Callable[[Sequence[Path]], object]:
        return lambda paths: list(encoder.encode_images(paths))

    for name, engine in PRECISIONS.items():
        runs[name] = encode(Encoder(made[name.split()[0]], EncoderConfig(device="cpu", backend=engine, threads=1)))  # type: ignore[arg-type]
    bound: dict[str, Callable[[], object]] = {name: lambda at=run: at(images) for name, run in runs.items()}
    seconds = in_turn(bound, rounds)
    for name, taken in seconds.items():
        result[name] = {
            "images_a_second": round(len(images) / taken, 1),
            "ratio": round(seconds["open_clip"] / taken, 2),
        }
    return result


def small_bundle(work: Path) -> Path:
    """clipret-small with random weights: what is measured with it is not what it finds."""
    from clipret_training.models.load import load_model
    from clipret_training.run import RunFolder

    bundle = work / "small"
    if not bundle.exists():
        loaded = load_model("clipret-small", captions=["a red car", "a blue bus by the road"], seed=0)
        shutil.rmtree(work / "small-run", ignore_errors=True)
        RunFolder.create(work / "small-run", {"seed": 0}, loaded).save(loaded, "best")
        subprocess.run(["clipret-export", str(work / "small-run"), str(bundle)], check=True, stdout=subprocess.DEVNULL)
    return bundle


# The system counts what a process's parent held when it was started, hence a small parent.
PEAK = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=-3, stderr=-3)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def peak_memory(command: list[str]) -> int:
    """The peak resident size of a process in bytes."""
    done = subprocess.run([sys.executable, "-c", PEAK, *command], check=True, capture_output=True, text=True)
    return int(done.stdout) * 1024


def memory(images: Sequence[Path], work: Path) -> dict[str, Any]:
    bundle, peaks = small_bundle(work), {}
    contents = [path.read_bytes() for path in images]
    for count in (2000, 20000):
        with tempfile.TemporaryDirectory(dir=work) as folder:
            target = Path(folder, "images")
            target.mkdir()
            for number in range(count):  # no two alike, since known bytes are not encoded again
                content = contents[number % len(contents)] + number.to_bytes(4, "little")
                Path(target, f"{number:05d}.jpg").write_bytes(content)
            peaks[count] = peak_memory(
                ["clipret-search", "index", str(bundle), str(target), str(Path(folder, "gallery"))]
            )
    few, many = peaks.values()
    return {
        **{f"peak_mib_{count}": round(peak / 2**20, 1) for count, peak in peaks.items()},
        "ratio": round(many / few, 3),
    }


COLD = """
import sys, time
from clipret import Bundle, Encoder
Encoder(Bundle.open(sys.argv[1])).encode_texts(["a red car at night"])
print(time.process_time())
"""


def texts(made: dict[str, Bundle], captions: Sequence[str], rounds: int) -> dict[str, Any]:
    import open_clip

    model, tokenizer = eager()[0], open_clip.get_tokenizer(NAME)
    several = list(dict.fromkeys(captions))[:128]

    def many() -> None:
        with torch.inference_mode():
            for low in range(0, len(several), 32):
                model.encode_text(tokenizer(several[low : low + 32]), normalize=True)

    def one() -> None:
        with torch.inference_mode():
            for text in several[:16]:
                model.encode_text(tokenizer([text]), normalize=True)

    encoders = {name: Encoder(bundle, EncoderConfig(device="cpu", threads=1)) for name, bundle in made.items()}
    all_runs: dict[str, Callable[[], object]] = {"open_clip": many}
    all_runs |= {name: lambda at=encoder: at.encode_texts(several) for name, encoder in encoders.items()}
    single: dict[str, Callable[[], object]] = {"open_clip": one}
    single |= {
        name: lambda at=encoder: [at.encode_texts([text]) for text in several[:16]]
        for name, encoder in encoders.items()
    }
    batched, alone = in_turn(all_runs, rounds), in_turn(single, rounds)
    cold = {
        name: statistics.median(
            float(subprocess.run([sys.executable, "-c", COLD, str(bundle.path)], check=True, stdout=-1).stdout)
            for _ in range(3)
        )
        for name, bundle in made.items()
    }
    return {
        name: {
            "texts_a_second": round(len(several) / taken, 1),
            "ratio": round(batched["open_clip"] / taken, 2),
            "one_at_a_time": round(16 / alone[name], 1),
            **({"cold_cpu_seconds": round(cold[name], 2)} if name in cold else {}),
        }
        for name, taken in batched.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/flickr8k"), help="images/ and captions.tsv")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    images = sorted((arguments.data / "images").glob("*.jpg"))[: arguments.images]
    lines = (arguments.data / "captions.tsv").read_text(encoding="utf-8").splitlines()[1:]
    captions = [line.split("\t")[3] for line in lines[:2000:5]]
    made = bundles(arguments.work, arguments.data)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "folder": lambda: folder(made, images, arguments.rounds, arguments.work),
        "memory": lambda: memory(images, arguments.work),
        "texts": lambda: texts(made, captions, arguments.rounds),
    }
    for name in arguments.only:
        keep(f"encode-{name}", {"model": NAME, "threads": 1, **parts[name]()})


if __name__ == "__main__":
    main()
