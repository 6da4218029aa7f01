"""An image tower: engine x precision x batch, compared with eager and compiled open_clip and a fixed batch of 1 in
ONNX.

    python benchmarks/bench_towers.py work --data DATA [--precision fp32 fp16 bf16 int8] [--batch 1 8 32] [--rounds 9]

One core, CPU time, everything in turn, A B A B, medians. Weights are random: the speed is that of the real ones. The
machine's peak is the fastest 2048 x 2048 product in float32 that numpy, torch or onnxruntime makes in the same rounds;
products of bfloat16 and int8 have a higher one, so that shares of the float32 peak may exceed 1. Multiplications are
those that the tower computes (the last block for the pooled token only); open_clip computes 7 % more.

"onnx batch 1" is the way of Chinese-CLIP's deployment: TorchScript export of the tower with a batch of 1, run image
by image in onnxruntime. The parity of every backend is that of `clipret-export check`: the smallest cosine of the
bundle's rows to torch's in float32, for images and texts.
"""

import argparse
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_encode as encode  # pins this process to one core before numpy and torch are loaded
import numpy as np
import torch
from machine import keep, multiplications

from clipret import Bundle
from clipret.backends import BackendChoice
from clipret.inference.config import EncoderConfig
from clipret.inference.tower import open_tower
from clipret.ort.graph import Node, Value, model
from clipret.ort.session import open_session
from clipret_export.parity import LIMITS, check_bundle

ENGINES: dict[str, tuple[BackendChoice, ...]] = {
    "fp32": ("onnxruntime", "openvino"),
    "fp16": ("onnxruntime", "openvino"),
    "bf16": ("openvino",),
    "int8": ("onnxruntime", "openvino"),
}


def products() -> dict[str, Callable[[], object]]:
    """2048 x 2048 x 2048 in float32, by every library there is."""
    square = np.random.default_rng(0).standard_normal((2048, 2048), dtype=np.float32)
    tensor, side = torch.from_numpy(square), ("n", 2048)
    graph = model(
        [Node("MatMul", ["x", "square"], ["y"])],
        [Value("x", "float32", side)],
        [Value("y", "float32", side)],
        {"square": square},
    )
    runner = open_session(graph, threads=1)
    return {
        "numpy": lambda: square @ square,
        "torch": lambda: tensor @ tensor,
        "onnxruntime": lambda: runner.run(None, {"x": square}),
    }


def one_at_a_time(visual: Any, work: Path, size: int) -> Callable[[np.ndarray], object]:
    """The tower exported with a batch of 1, as a loop over the images."""
    import onnxruntime

    path = work / "batch-1.onnx"
    if not path.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = torch.randn(1, 3, size, size)
            torch.onnx.export(visual, (pixels,), path, input_names=["image"], dynamo=False, opset_version=17)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda pixels: [opened.run(None, {"image": one[None]}) for one in pixels]


def peers(eager: Any, work: Path, size: int) -> tuple[dict[str, Callable[[torch.Tensor], object]], dict[str, str]]:
    """What runs float32 pixels [B,3,S,S], and what could not be measured and why."""
    missing: dict[str, str] = {}

    def plain(pixels: torch.Tensor) -> None:
        with torch.inference_mode():
            eager.encode_image(pixels, normalize=True)

    runs: dict[str, Callable[[torch.Tensor], object]] = {"open_clip": plain}
    if shutil.which("g++") or shutil.which("clang++"):
        compiled = torch.compile(eager.visual, dynamic=False)

        def fast(pixels: torch.Tensor) -> None:
            with torch.inference_mode():
                torch.nn.functional.normalize(compiled(pixels), dim=-1)

        runs["open_clip compiled"] = fast
    else:
        missing["open_clip compiled"] = "torch.compile needs a C++ compiler on a CPU: install g++"
    try:
        loop = one_at_a_time(eager.visual, work, size)
        runs["onnx batch 1"] = lambda pixels: loop(pixels.numpy())
    except Exception as error:
        missing["onnx batch 1"] = f"torch's TorchScript exporter: {type(error).__name__}: {str(error).splitlines()[0]}"
    return runs, missing


def parity(bundle: Bundle, engine: BackendChoice) -> dict[str, float]:
    """Smallest cosines to torch's float32 rows, which the bundle carries."""
    report = check_bundle(bundle, LIMITS[bundle.manifest.precision], backend=engine)
    return {"cosine_image": round(report.image.min_cosine, 7), "cosine_text": round(report.text.min_cosine, 7)}


def measure(made: dict[str, Bundle], batches: Sequence[int], rounds: int, work: Path) -> dict[str, Any]:
    eager, _ = encode.eager()
    first = next(iter(made.values()))
    size = first.manifest.image.size
    visual = eager.visual
    width, patch = visual.conv1.out_channels, visual.conv1.kernel_size[0]
    tokens, blocks = visual.positional_embedding.shape[0], visual.transformer.resblocks
    work_done = 2 * multiplications(
        width, len(blocks), patch, tokens, blocks[0].mlp.c_fc.out_features, visual.output_dim
    )
    torch_runs, missing = peers(eager, work, size)
    towers: dict[str, Any] = {}
    accuracy: dict[str, Any] = {}
    for precision, bundle in made.items():
        for engine in ENGINES[precision]:
            name = f"{precision} {engine}"
            try:
                towers[name] = open_tower(bundle, "image", "cpu", EncoderConfig(threads=1, backend=engine))
                accuracy[name] = parity(bundle, engine)
            except Exception as error:  # one engine that is missing or fails leaves the others their turn
                towers.pop(name, None)
                missing[name] = str(error)
    rng = np.random.default_rng(0)
    result: dict[str, Any] = {"gflop_a_image": round(work_done / 1e9, 2), "parity": accuracy, "batches": {}}
    for batch in batches:
        images = rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
        pixels = torch.randn(batch, 3, size, size)
        runs: dict[str, Callable[[], object]] = {
            name: lambda run=run, given=pixels: run(given)
            for name, run in torch_runs.items()  # type: ignore[misc]
        }
        runs |= {
            name: lambda at=tower, given=images: at.run(given)
            for name, tower in towers.items()  # type: ignore[misc]
        }
        squares = products()
        seconds = encode.in_turn(runs | squares, rounds)
        peak = 2 * 2048**3 / min(seconds.pop(name) for name in squares)
        result["peak_gflops"] = max(result.get("peak_gflops", 0.0), round(peak / 1e9, 1))
        result["batches"][f"batch {batch}"] = {
            name: {
                "images_a_second": round(batch / taken, 2),
                "times_open_clip": round(seconds["open_clip"] / taken, 2),
                "share_of_fp32_peak": round(work_done * batch / taken / peak, 3),
            }
            for name, taken in seconds.items()
        }
    return result | {"missing": missing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/flickr8k"), help="images/ and captions.tsv")
    parser.add_argument("--precision", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    made = encode.bundles(arguments.work, arguments.data, arguments.precision)
    measured = measure(made, arguments.batch, arguments.rounds, arguments.work)
    keep("towers", {"model": encode.NAME, "threads": 1, **measured})


if __name__ == "__main__":
    main()
