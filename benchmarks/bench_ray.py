"""Indexing on a Ray cluster of this machine compared with indexing in one process.

    python benchmarks/bench_ray.py BUNDLE --data ../shared/data/flickr8k/images [--images 1024]

Archives of the images are read by one process, and by 1, 2, 4 … actors of one thread each. What an image costs is
the difference of a run on twice as many images and one on that many, so that starting actors is not counted (it is
reported too); the actors, Ray's own processes and the one that writes the gallery are all in it. CPU time is that of
the whole tree of processes; wall time says how it grows with workers, on a machine that does nothing else.
"""

import argparse
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import psutil
import ray
from machine import keep

from clipret import Bundle, Encoder, EncoderConfig, Gallery, index_images, open_source
from clipret.indexing.ray_cluster import connect, index_on_cluster
from clipret.indexing.ray_worker import Settings

SHARD = 64


def archives(folder: Path, images: list[Path], count: int) -> str:
    folder.mkdir()
    shards = -(-count // SHARD)
    for number in range(shards):
        with tarfile.open(folder / f"{number:04d}.tar", "w") as tar:
            for at in range(number * SHARD, min((number + 1) * SHARD, count)):
                tar.add(images[at % len(images)], f"{at:07d}.jpg")
    return str(folder / f"{{0000..{shards - 1:04d}}}.tar")


def cpu_seconds() -> dict[int, float]:
    """Of this process and all below it."""
    found = {}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return found


def measured(run: Callable[[], None]) -> tuple[float, float]:
    """CPU and wall seconds."""
    before, began = cpu_seconds(), time.perf_counter()
    run()
    wall, after = time.perf_counter() - began, cpu_seconds()
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items()), wall


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="*", help="Default: 1, 2, 4 … as far as there are cores.")
    asked = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    workers = asked.workers or [1 << power for power in range(cores.bit_length()) if 1 << power <= cores]
    images = sorted(asked.data.glob("*.jpg"))[: 2 * asked.images]
    bundle = Bundle.open(asked.bundle)
    settings = Settings(asked.bundle.absolute(), bundle.fingerprint, EncoderConfig(device="cpu", threads=1))
    ray.init(num_cpus=max(workers), include_dashboard=False, log_to_driver=False, object_store_memory=512 << 20)
    taken: dict[str, dict[int, list[tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory() as work:
        sizes = {n: archives(Path(work) / f"shards-{n}", images, n) for n in (asked.images, 2 * asked.images)}
        encoder = Encoder(bundle, EncoderConfig(device="cpu", threads=1))

        def run(name: str, count: int, size: int) -> None:
            source = open_source(sizes[size])
            with (
                tempfile.TemporaryDirectory(dir=work) as folder,
                Gallery.create(Path(folder) / "gallery", bundle, source.root) as gallery,
            ):

                def indexing() -> None:
                    if not count:
                        index_images(gallery, encoder, source)
                        return
                    with connect("auto", settings, count) as pool:
                        index_on_cluster(gallery, pool, source)

                taken.setdefault(name, {}).setdefault(size, []).append(measured(indexing))
                print(f"{name}, {size} images: {taken[name][size][-1][0]:.1f} CPU s", flush=True)
                assert len(gallery) == size

        small = min(sizes)
        index_warm = Path(work) / "warm"
        with Gallery.create(index_warm, bundle, Path(work)) as gallery:
            index_images(gallery, encoder, open_source(images[0]))
        with tempfile.TemporaryDirectory(dir=work) as folder, connect("auto", settings) as pool:  # Ray's own processes
            source = open_source(sizes[small])
            with Gallery.create(Path(folder) / "gallery", bundle, source.root) as gallery:
                index_on_cluster(gallery, pool, source)
        for _ in range(asked.rounds):
            for name, count in (("one process", 0), *((f"{n} workers", n) for n in workers)):
                for size in sizes:
                    run(name, count, size)
    ray.shutdown()
    results = {}
    for name, by_size in taken.items():
        pairs = list(zip(by_size[small], by_size[2 * small], strict=True))
        cpu, wall = (statistics.median((large[at] - less[at]) / small for less, large in pairs) for at in (0, 1))
        start = statistics.median(2 * less[1] - large[1] for less, large in pairs)
        results[name] = {"cpu_ms_a_image": round(1000 * cpu, 2), "images_a_second": round(1 / wall, 2)}
        results[name]["seconds_to_start"] = round(start, 1)
    one = results["one process"]
    for values in results.values():
        values["cpu_over_one_process"] = round(values["cpu_ms_a_image"] / one["cpu_ms_a_image"], 3)
        values["rate_over_one_process"] = round(values["images_a_second"] / one["images_a_second"], 2)
    keep("ray", {"model": bundle.manifest.model, "precision": bundle.manifest.precision, "images": small, **results})


if __name__ == "__main__":
    main()
