"""Everything that waits for a card, in one command and less than eight minutes: towers, ranking, decoding, end to end.

    python benchmarks/bench_gpu.py WORK [--bundle FOLDER ...] [--skeleton FOLDER ...] [--device cuda] [--rows 10000000]

The runtime alone is needed, from wheels: onnxruntime-gpu, numpy, pillow, tokenizers, click, ftfy, tqdm. What else is
installed takes part: torch (eager and compiled towers with open_clip, a product with topk for the ranking), faiss on
the GPU, nvImageCodec, TensorRT, and onnx-ir for the fused graphs (fused.onnx, next to the tower). Towers are those
of --bundle, in any precision, and of --skeleton, with random weights (see benchmarks/skeleton.py); default: skeletons
of four sizes that are kept here. --device cpu asks the same with the CPU provider in sizes so small that the code is
tried and nothing is learned: the reduced form that the tests run.

Images a second are those of a host clock around work that is complete when it returns, copies included; images a
device second, and the shares made of them, of CUDA events around batches that are on the card already; the medians of
several. The peak is the fastest large square product in half precision that onnxruntime, or torch, makes on the same
card; the bandwidth that of a copy in device memory, read and written, both by the same events. Each question is asked
by itself: one that fails is told and the others go on.
WORK/gpu-<date>.json, .html and .md hold what was measured, and are written after each question.
"""

import argparse
import importlib.util
import json
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_peers
import machine
import numpy as np
import report
from gpu_clock import bound_run, clock_of, seconds_on
from gpu_goals import goals
from gpu_ranking import ranking
from skeleton import fill
from suite import commit

from clipret import Bundle
from clipret.backends import BackendChoice
from clipret.errors import ClipretError
from clipret.hardware.cuda import device_name
from clipret.inference.config import EncoderConfig
from clipret.inference.tower import OnnxTower, open_tower
from clipret.ort.graph import Node, Value, model

SHAPES = {  # width, layers, patch, tokens, hidden, embedding of open_clip's image towers
    "ViT-B-32": (768, 12, 32, 50, 3072, 512),
    "ViT-L-14": (1024, 24, 14, 257, 4096, 768),
    "ViT-H-14": (1280, 32, 14, 257, 5120, 1024),
    "ViT-bigG-14": (1664, 48, 14, 257, 8192, 1280),
}
GOALS = "What was aimed at, by the best way and batch of those above; a goal whose figures are missing is not told."
DECODING = (
    "JPEGs of 640 x 480 in memory, as many threads as processors. nvImageCodec is refused where its pixels differ from "
    "Pillow's by more than the levels allowed."
)


@dataclass
class Card:
    """The device, whether it is the CPU in a card's place, and its limits."""

    device: str
    work: Path
    began: float = field(default_factory=time.monotonic)
    limit: float = 460.0  # seconds after which no further variant is begun
    flops: float = 0.0
    bytes_a_second: float = 0.0

    def __post_init__(self) -> None:
        self.clock = clock_of(self.device)

    @property
    def small(self) -> bool:
        return self.device == "cpu"

    @property
    def late(self) -> bool:
        return time.monotonic() - self.began > self.limit


def seconds(run: Callable[[], object], least: float, most: int = 50) -> float:
    """By the host's clock, the median of runs for at least `least` seconds in all, after two that do not count."""
    for _ in range(2):
        run()
    taken: list[float] = []
    while not taken or (sum(taken) < least and len(taken) < most):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def graph_seconds(card: Card, content: bytes, inputs: dict[str, np.ndarray]) -> float:
    """Of a small graph with its inputs and its output in the device's memory."""
    import onnxruntime

    provider = "CPUExecutionProvider" if card.small else "CUDAExecutionProvider"
    session = onnxruntime.InferenceSession(content, providers=[(provider, dict(card.clock.options))])
    assert provider in session.get_providers(), f"onnxruntime could not start {provider}"
    return seconds_on(card.clock, bound_run(session, card.device, inputs), 1.0)


def limits(card: Card) -> dict[str, Any]:
    """The card's own: a large product in half, a copy in its memory."""
    side, length = (256, 1 << 20) if card.small else (8192, 1 << 30)
    rng = np.random.default_rng(0)
    square = rng.standard_normal((side, side), dtype=np.float32).astype(np.float16)
    product = model(
        [Node("MatMul", ["a", "b"], ["c"])],
        [Value("a", "float16", ("n", "m")), Value("b", "float16", ("m", "k"))],
        [Value("c", "float16", ("n", "k"))],
    )
    rates = {"onnxruntime": 2 * side**3 / graph_seconds(card, product, {"a": square, "b": square})}
    if not card.small and (torch_rate := gpu_peers.product_rate(card.device, side)) is not None:
        rates["torch"] = torch_rate
    copy = model([Node("Neg", ["a"], ["b"])], [Value("a", "float16", ("n",))], [Value("b", "float16", ("n",))])
    taken = graph_seconds(card, copy, {"a": np.zeros(length, np.float16)})
    card.flops, card.bytes_a_second = max(rates.values()), 4 * length / taken
    name = "the CPU in a card's place" if card.small else device_name(int(card.device.partition(":")[2] or 0))
    return {
        "card": name,
        "matrix_peak_gflops": {key: round(rate / 1e9, 1) for key, rate in rates.items()},
        "memory_gb_a_second": round(card.bytes_a_second / 1e9, 1),
    }


def variants(card: Card, bundle: Bundle) -> dict[str, Callable[[], Any]]:
    """Ways of running an image tower here, by name; each opens it."""
    plain, more = bundle.file("image.onnx"), card.clock.options
    made: dict[str, Callable[[], Any]] = {
        "onnxruntime": lambda: OnnxTower(plain, card.device, 4, provider_options=more)
    }
    if not card.small:
        made["onnxruntime, CUDA graphs"] = lambda: OnnxTower(plain, card.device, 4, True, more)
    if importlib.util.find_spec("onnx_ir"):
        from clipret_export.fusion import fuse

        fused = plain.with_name("fused.onnx")
        if "MultiHeadAttention" in fuse(plain, fused):
            made["onnxruntime, fused"] = lambda: OnnxTower(fused, card.device, 4, provider_options=more)
            if not card.small:
                made["onnxruntime, fused, CUDA graphs"] = lambda: OnnxTower(fused, card.device, 4, True, more)
    libraries: tuple[BackendChoice, ...] = ("tensorrt", "tensorrt_rtx")
    for library in libraries:
        if bundle.manifest.engines and importlib.util.find_spec(library):
            made[library] = lambda library=library: open_tower(  # type: ignore[misc]
                bundle, "image", card.device, EncoderConfig(threads=4, backend=library)
            )
    return made


def towers(card: Card, bundle: Bundle) -> dict[str, Any]:
    """Images a second of each way and batch, copies to and from the card included, and its rows compared with float32's
    on the CPU."""
    name, size = bundle.manifest.model, bundle.manifest.image.size
    gflop = 2 * machine.multiplications(*SHAPES[name]) / 1e9 if name in SHAPES else 0.0
    batches = (1, 3) if card.small else (1, 16, 64, 256) if name in ("ViT-B-32", "ViT-L-14") else (1, 16, 64)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (max(batches), size, size, 3), dtype=np.uint8)
    result: dict[str, Any] = {"gflop_a_image": round(gflop, 2), "precision": bundle.manifest.precision, "parity": {}}
    failed: dict[str, str] = {}
    expected = None
    try:
        expected = open_tower(bundle, "image", "cpu", EncoderConfig(threads=8)).run(images[:2])
    except Exception as error:  # bf16 without OpenVINO
        failed["parity"] = f"the CPU cannot run it: {error}"
    ways = variants(card, bundle)
    if not card.small:
        ways |= gpu_peers.towers(name, card.device, failed)
    for way, opening in ways.items():
        if card.late:
            failed[way] = "no time left"
            continue
        try:
            tower = opening()
            rows = tower.run(images[:2])
            if expected is not None and not way.startswith("open_clip"):  # whose random weights are others
                result["parity"][way] = {"cosine_to_cpu": round(float((rows * expected).sum(axis=1).min()), 7)}
            for batch in batches[-1:] if "compiled" in way else batches:  # a shape takes a minute to compile
                given, least = images[:batch], 0.05 if card.small else 0.5
                taken = seconds(lambda at=tower, given=given: at.run(given), least)  # type: ignore[misc]
                found = result.setdefault(f"batch {batch}", {}).setdefault(way, {})
                found["images_a_second"] = round(batch / taken, 1)
                if gflop:
                    found["share_with_copies"] = round(batch / taken * gflop * 1e9 / card.flops, 3)
                if (alone := device_seconds(card, tower, given, least)) is None:
                    continue
                found["images_a_device_second"] = round(batch / alone, 1)
                if gflop:
                    found["share_of_matrix_peak"] = round(batch / alone * gflop * 1e9 / card.flops, 3)
            del tower
        except Exception as error:  # one way fails, the others have their turn
            failed[way] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return result | {"failed": failed}


def device_seconds(card: Card, tower: Any, images: np.ndarray, least: float) -> float | None:
    """Of a batch that is on the card already, by the card's clock; None of a tower whose stream is its own."""
    if isinstance(tower, gpu_peers.OpenClip):
        return tower.device_seconds(images, least)
    if not isinstance(tower, OnnxTower):
        return None
    graph = len(images) + 1_000_000 if tower.graphs else 0  # a number that its own recordings do not have
    run = bound_run(tower.session, card.device, {tower.session.get_inputs()[0].name: images}, graph)
    return seconds_on(card.clock, run, least)


def attention(card: Card, bundle: Bundle) -> dict[str, Any]:
    """Which kernels run, of the graph as it is and fused."""
    from attention_kernels import kernels

    files = [bundle.path / name for name in ("image.onnx", "fused.onnx")]
    return {file.stem: kernels(file, card.device, 8) for file in files if file.exists()}


def jpegs(count: int, size: tuple[int, int]) -> list[bytes]:
    """Drawn ones, a few different."""
    from bench_decode import drawn, jpeg

    few = [jpeg(drawn(*size, seed)) for seed in range(min(count, 6))]
    return [few[number % len(few)] for number in range(count)]


def decoding(card: Card, bundle: Bundle) -> dict[str, Any]:
    """Images a second of Pillow and of nvImageCodec in as many threads as there are processors; end to end with each,
    as a share of the slower of decoding and towers."""
    from concurrent.futures import ThreadPoolExecutor

    from clipret.hardware.cpu import cpu_count
    from clipret.images.decode import load
    from clipret.images.nvimagecodec import MAX_DIFFERENCE, GpuDecoder
    from clipret.inference.encoder import Encoder

    count, threads, spec = (8 if card.small else 4096), cpu_count(), bundle.manifest.image
    files = jpegs(count, (96, 72) if card.small else (640, 480))
    batch = 4 if card.small else 128
    tower = OnnxTower(bundle.file("image.onnx"), card.device, threads)
    pixels = np.stack([load(files[0], spec)] * batch)
    tower_rate = batch / seconds(lambda: tower.run(pixels), 0.5)
    result: dict[str, Any] = {"threads": threads, "model": bundle.manifest.model, "tower_images_a_second": tower_rate}
    ways: dict[str, Any] = {"pillow": lambda content: load(content, spec)}
    try:
        decoder = GpuDecoder(card.device)
        ways["gpu"] = lambda content: decoder.load(content, spec)
        result["gpu pixels"] = {
            "levels_mean": decoder.levels[0],
            "levels_max": decoder.levels[1],
            "allowed": MAX_DIFFERENCE,
        }
    except Exception as error:
        result["missing"] = {"nvImageCodec": str(error)}
    for way, run in ways.items():
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, files[:threads]))
            began = time.perf_counter()
            for _ in pool.map(run, files):
                pass
            rate = len(files) / (time.perf_counter() - began)
        encoder = Encoder(bundle, EncoderConfig(device=card.device, threads=threads, batch_size=batch, decode=way))  # type: ignore[arg-type]
        list(encoder.encode_images(files[:batch]))
        began = time.perf_counter()
        for _ in encoder.encode_images(files):
            pass
        whole = len(files) / (time.perf_counter() - began)
        result[way] = {
            "decode_images_a_second": round(rate, 1),
            "end_to_end_images_a_second": round(whole, 1),
            "share_of_the_slower": round(whole / min(rate, tower_rate), 3),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--bundle", type=Path, nargs="+", default=[])
    parser.add_argument("--skeleton", type=Path, nargs="+", default=[])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--limit", type=float, default=460, help="seconds after which nothing more is begun")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    try:
        card = Card(arguments.device, arguments.work, limit=arguments.limit)
    except ClipretError as error:
        raise SystemExit(f"{error}, which tries the code in a reduced form") from None
    words = " ".join(f"--bundle {path.name}" for path in arguments.bundle)
    asker = Asker(card, f"python benchmarks/bench_gpu.py WORK --device {card.device} {words}".strip())
    asker.ask("limits", "The card", "Its largest product and its memory.", lambda: limits(card))
    sizes = (min(arguments.rows, 20_000), 32) if card.small else (arguments.rows, arguments.dim)
    asker.ask(
        "ranking",
        "Ranking",
        "One query and 1,024 on embeddings in device memory, float16 and quantized; the results against the CPU's.",
        lambda: ranking(card, *sizes),
    )
    folders = [(path, path) for path in arguments.bundle]
    kept = [] if folders else [Path(__file__).parent / "skeletons" / name for name in SHAPES]
    folders += [(skeleton, card.work / skeleton.name) for skeleton in arguments.skeleton or kept if skeleton.is_dir()]
    about = "Copies to and from the card included; parity is the smallest cosine to the same graph on the CPU."
    for number, (source, path) in enumerate(folders):

        def bundle(source: Path = source, path: Path = path) -> Bundle:
            return Bundle.open(path) if path.exists() else fill(source, path)

        asker.ask(f"towers {path.name}", f"Tower: {path.name}", about, lambda: towers(card, bundle()))
        if number == 0:
            asker.ask("attention", "Kernels", "What runs the tower.", lambda: attention(card, bundle()))
            asker.ask("decode", "Decoding, end to end", DECODING, lambda: decoding(card, bundle()))
    asker.ask("goals", "Goals", GOALS, lambda: {"goals": goals(asker.questions)}, late=True)
    print(asker.write(gpu_peers.missing(card.small)))


class Asker:
    """Asks questions one after another and keeps what came of each."""

    def __init__(self, card: Card, command: str) -> None:
        self.card, self.command = card, command
        self.questions: dict[str, Any] = {}
        self.late: dict[str, str] = {}

    def ask(self, name: str, title: str, about: str, run: Callable[[], dict[str, Any]], *, late: bool = False) -> None:
        if self.card.late and not late:
            self.late[name] = "no time left"
            return
        began = time.monotonic()
        record: dict[str, Any] = {"title": title, "about": about, "command": self.command}
        try:
            record["results"] = {name: {"benchmark": name, **run()}}
        except Exception as error:
            record["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            traceback.print_exc()
        record["seconds"] = round(time.monotonic() - began, 1)
        self.questions[name] = record
        self.write({})

    def write(self, missing: dict[str, str]) -> Path:
        facts = machine.describe()
        if card := self.questions.get("limits", {}).get("results"):
            facts["machine"] = card["limits"]["card"]
        note = "the reduced form on a CPU: nothing is learned of a card" if self.card.small else ""
        content = {
            **facts,
            "commit": commit(),
            "note": note,
            "questions": self.questions,
            "missing": self.late | missing,
        }
        path = self.card.work / f"gpu-{facts['date']}.json"
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        report.write(path)
        return path


if __name__ == "__main__":
    main()
