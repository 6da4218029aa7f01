"""Bytes of a gallery an image: embeddings, quantized embeddings and database, for `clipret-search plan`.

    python benchmarks/bench_gallery_size.py [--images 100000] [--dim 512]

Paths have 40 characters, and there is no metadata. Sizes do not depend on the machine.
"""

import argparse
import tempfile
from pathlib import Path

import msgspec
import numpy as np
from machine import keep

from clipret import Bundle, Gallery
from clipret.gallery.gallery import ImageRecord

_SHARD = 8192


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    asked = parser.parse_args()
    rng = np.random.default_rng(0)
    bundle = Bundle.open(Path(__file__).parent.parent / "tests" / "data" / "tiny-bundle")
    with tempfile.TemporaryDirectory() as folder:
        with Gallery.create(Path(folder) / "gallery", bundle, Path(folder)) as made:
            info = msgspec.structs.replace(made.info, embedding_dim=asked.dim)
        with Gallery(Path(folder) / "gallery", info) as gallery, gallery.writing():
            for low in range(0, asked.images, _SHARD):
                numbers = range(low, min(low + _SHARD, asked.images))
                rows = rng.standard_normal((len(numbers), asked.dim)).astype(np.float32)
                rows /= np.linalg.norm(rows, axis=1, keepdims=True)
                digests = rng.bytes(16 * len(numbers)).hex()
                images = [
                    ImageRecord(f"shards/{one // 10000:06d}.tar/{one:022d}.jpg", 100_000 + one % 50_000, 10**18, digest)
                    for one, digest in zip(numbers, map("".join, zip(*[iter(digests)] * 32, strict=True)), strict=True)
                ]
                gallery.append(images, rows)
        sizes = dict.fromkeys(("rows", "codes", "database"), 0)
        for file in (Path(folder) / "gallery").iterdir():
            kind = {"rows-": "rows", "codes": "codes"}.get(file.name[:5], "database" if file.suffix == ".db" else "")
            if kind:
                sizes[kind] += file.stat().st_size
    each = {f"{kind}_bytes_a_image": round(size / asked.images, 1) for kind, size in sizes.items()}
    keep("gallery-size", {"images": asked.images, "dim": asked.dim, "path_characters": 40, **each})


if __name__ == "__main__":
    main()
