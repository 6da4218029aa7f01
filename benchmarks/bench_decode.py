"""Decoding JPEGs to a tower's square: CPU time an image compared with plain Pillow, and how far the pixels differ.

    python benchmarks/bench_decode.py [../shared/data/flickr8k] [--size 224] [--rounds 9]

"pillow" is what open_clip's transform does with Pillow: open, resize the short side bicubically, crop the centre.
Images are in memory and the variants take turns, A B A B; the first round is not counted. With several threads it
is wall time. The limit is decoding alone, without resizing. cv2 and torchvision take part where they are installed.

The images: photographs, where the folder of Flickr8k is named; 1/f noise with drawn edges in three sizes, whose
spectrum is like that of photographs; and as large ones of photographs, tiled.
"""

import argparse
import hashlib
import io
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from machine import keep
from PIL import Image, ImageDraw

from clipret.bundle import ImageSpec
from clipret.images.decode import load
from clipret.images.walk import find_images

SIZES = {"640x480": 24, "1920x1080": 12, "4000x3000": 4}
TILE = 480  # pixels of one photograph in a tiled image: three times its own 160
Decode = Callable[[bytes], Any]


def drawn(width: int, height: int, seed: int) -> Image.Image:
    """Octaves of noise, each half as strong as the one before it, a hundred shapes, and the grain of a sensor."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0, dtype=np.float32)
    cells, strength = 4, 60.0
    while cells < width:
        octave = rng.integers(0, 256, (cells * height // width + 1, cells, 3), dtype=np.uint8)
        grown = Image.fromarray(octave).resize((width, height), Image.Resampling.BICUBIC)
        pixels += (np.asarray(grown, dtype=np.float32) - 128) * (strength / 128)
        cells, strength = 2 * cells, strength / 2
    pixels += rng.normal(0, 2, pixels.shape).astype(np.float32)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(100):
        x, y, side = rng.integers(width), rng.integers(height), int(rng.integers(4, width // 12))
        draw = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        draw((x, y, x + side, y + side // 2), fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
    return image


def tiled(width: int, height: int, seed: int, photographs: list[Path]) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height))
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            with Image.open(photographs[rng.integers(len(photographs))]) as tile:
                image.paste(tile.convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC), (left, top))
    return image


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def plain_pillow(content: bytes, size: int) -> np.ndarray:
    image = Image.open(io.BytesIO(content))
    width, height = image.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    return np.array(image.crop((left, top, left + size, top + size)).convert("RGB"))


def peers(size: int) -> dict[str, Decode]:
    found: dict[str, Decode] = {}
    if find_spec("cv2"):
        import cv2

        cv2.setNumThreads(1)

        def with_cv2(content: bytes) -> np.ndarray:
            image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
            height, width = image.shape[:2]
            scale = size / min(height, width)
            image = cv2.resize(image, (int(width * scale), int(height * scale)), interpolation=cv2.INTER_AREA)
            top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
            return np.ascontiguousarray(image[top : top + size, left : left + size])

        found["cv2 (area)"] = with_cv2
    if find_spec("torchvision"):
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg
        from torchvision.transforms.v2 import functional as F

        torch.set_num_threads(1)

        def with_torchvision(content: bytes) -> np.ndarray:
            image = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
            image = F.resize(image, [size], F.InterpolationMode.BICUBIC, antialias=True)
            return F.center_crop(image, [size, size]).permute(1, 2, 0).contiguous().numpy()

        found["torchvision"] = with_torchvision
    return found


def milliseconds(variants: dict[str, Decode], images: list[bytes], rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds an image of each variant in each round, the first one dropped."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, decode in variants.items():
            began = time.process_time()
            for content in images:
                decode(content)
            times[name].append(1000 * (time.process_time() - began) / len(images))
    return {name: values[1:] for name, values in times.items()}


def scaling(variants: dict[str, Decode], images: list[bytes], threads: list[int], rounds: int) -> dict[str, Any]:
    """Images a second of wall time with so many threads: the median of all rounds, and its ratio to one thread.

    "hashing" holds no lock of Python's: what it gains from threads is what the machine has to give just then.
    """
    content = bytes(4_000_000)
    variants = {**variants, "hashing": lambda _: hashlib.sha256(content).digest()}
    found: dict[str, dict[int, list[float]]] = {name: {count: [] for count in threads} for name in variants}
    for _ in range(rounds):
        for name, decode in variants.items():
            for count in threads:
                with ThreadPoolExecutor(count) as pool:
                    began = time.perf_counter()
                    for _ in pool.map(decode, images):
                        pass
                    found[name][count].append(len(images) / (time.perf_counter() - began))
    result: dict[str, Any] = {}
    for count in threads:
        result[f"{count} threads"] = {
            name: {
                "rate": round(statistics.median(of[count]), 1),
                "times_one": round(statistics.median(b / a for a, b in zip(of[threads[0]], of[count], strict=True)), 2),
            }
            for name, of in found.items()
        }
    return result


def levels(one: list[np.ndarray], other: list[np.ndarray]) -> dict[str, float]:
    difference = np.abs(np.stack(one).astype(int) - np.stack(other))
    return {"mean": round(float(difference.mean()), 3), "max": int(difference.max())}


def measure(images: list[bytes], size: int, rounds: int, threads: list[int]) -> dict[str, Any]:
    spec = ImageSpec(size)
    ours: dict[str, Decode] = {
        "pillow": lambda content: plain_pillow(content, size),
        "clipret": lambda content: load(content, spec),
        "clipret fast": lambda content: load(content, spec, fast=True),
    }
    others = peers(size)
    limit: dict[str, Decode] = {"decoding alone": lambda content: Image.open(io.BytesIO(content)).load()}
    times = milliseconds({**ours, **others, **limit}, images, rounds)
    pillow = times["pillow"]
    reference = [ours["pillow"](content) for content in images]
    result: dict[str, Any] = {
        "images": len(images),
        "kilobytes": round(statistics.mean(map(len, images)) / 1000),
        "cpu_ms": {name: round(statistics.median(values), 3) for name, values in times.items()},
        "times_pillow": {
            name: round(statistics.median(b / a for a, b in zip(values, pillow, strict=True)), 3)
            for name, values in times.items()
        },
        "levels_to_pillow": {
            name: levels([decode(content) for content in images], reference)
            for name, decode in {**ours, **others}.items()
            if name != "pillow"
        },
        "fast_levels": fast_levels(images, {"shortest": size, "longest": size, "squash": size}),
    }
    result["wall"] = scaling(ours, images * max(1, 24 // len(images)), threads, rounds)
    return result


def fast_levels(images: list[bytes], modes: dict[str, int]) -> dict[str, dict[str, float]]:
    """How far the fast way is from the faithful one, in each way of resizing."""
    found = {}
    for mode, side in modes.items():
        spec = ImageSpec(side, mode)  # type: ignore[arg-type]
        faithful, fast = ([load(content, spec, fast=f) for content in images] for f in (False, True))
        found[mode] = levels(fast, faithful)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", nargs="?", type=Path, help="a folder of JPEGs of 160 pixels, such as Flickr8k's")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    threads = sorted({1, cores})
    result: dict[str, Any] = {"size": arguments.size, "clock": "CPU time in one thread; wall time in several"}

    def add(name: str, images: list[bytes]) -> None:
        result[name] = measure(images, arguments.size, arguments.rounds, threads)
        print(f"{name}: {result[name]}", file=sys.stderr)

    photographs = find_images(arguments.photographs) if arguments.photographs else []
    if photographs:
        add("photographs", [file.read_bytes() for file in photographs[:256]])
        sample = [file.read_bytes() for file in photographs[:1000]]
        # Just two and just three samples for each pixel of the square: as far as the fast way ever goes.
        least = {"shortest": 40, "longest": 26, "squash": 40}
        result["photographs at the least samples"] = {"sides": least, **fast_levels(sample, least)}
        print(f"least samples: {result['photographs at the least samples']}", file=sys.stderr)
    for name, count in SIZES.items():
        width, height = map(int, name.split("x"))
        add(f"drawn {name}", [jpeg(drawn(width, height, seed)) for seed in range(count)])
        if photographs and width > TILE * 2:
            add(f"tiled {name}", [jpeg(tiled(width, height, seed, photographs)) for seed in range(count)])
    keep("decode", result)


if __name__ == "__main__":
    main()
