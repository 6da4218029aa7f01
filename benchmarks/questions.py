"""The questions of the suite: what each asks, how its script is called, and when it cannot be asked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["QUESTIONS", "Question", "Run"]


@dataclass(frozen=True)
class Run:
    """Where a run keeps its things. `data`: photographs with captions, drawn or real; `real`: the folder with real
    data, None where there is none."""

    work: Path
    quick: bool
    data: Path
    real: Path | None


@dataclass(frozen=True)
class Question:
    """`command`: the words after `python`, of a run. `minutes` of the whole form on one quiet core. `needs`: modules.
    `lacks`: why a run cannot ask it, or nothing."""

    name: str
    title: str
    about: str
    minutes: float
    command: Callable[[Run], Sequence[object]]
    needs: tuple[str, ...] = ()
    lacks: Callable[[Run], str] = lambda _: ""


def only_whole(run: Run) -> str:
    return "takes too long for --quick" if run.quick else ""


def real(folder: str) -> Callable[[Run], str]:
    def lacks(run: Run) -> str:
        if run.quick:
            return "takes too long for --quick"
        found = run.real is not None and (run.real / folder).is_dir()
        return "" if found else f"needs real data: --data FOLDER with {folder}/ in it"

    return lacks


def pick(run: Run, quick: Sequence[object], whole: Sequence[object]) -> Sequence[object]:
    return quick if run.quick else whole


def bundles(run: Run) -> list[object]:
    """The bundles that bench_towers left behind; the tests' tiny one where it was not asked."""
    folders = [run.work / f"ViT-B-32-{precision}" for precision in ("fp32", "bf16")]
    return [word for folder in folders if folder.exists() for word in ("--bundle", folder)]


def decode(run: Run) -> list[object]:
    images = [run.data / "images"] if run.real is not None else []
    return ["bench_decode.py", *images, "--rounds", 1 if run.quick else 5]


def ray_lacks(run: Run) -> str:
    found = (run.work / "ViT-B-32-bf16").exists()
    return only_whole(run) or ("" if found else "needs a bundle that the towers question leaves")


def traffic_gallery(run: Run) -> Path:
    return run.work / "traffic" / "0" / "zeros-test"


def rerank_lacks(run: Run) -> str:
    return "" if traffic_gallery(run).exists() else "needs a gallery that the traffic question leaves"


def exported(run: Run) -> list[object]:
    """Chinese-CLIP's tokenizer needs its vocabulary, which is not part of the project."""
    vocab = None if run.real is None else run.real / "tokenizers" / "chinese_clip_vocab.txt"
    if vocab is not None and vocab.exists():
        return ["--vocab", vocab]
    return ["--model", "ViT-B-32", "ViT-L-14", "ViT-H-14", "ViT-bigG-14", "ViT-B-16-SigLIP"]


QUESTIONS = (
    Question(
        "towers",
        "Towers: engine, precision, batch",
        "ViT-B-32's image tower on one core, shares of the machine's float32 peak, compared with open_clip eager and "
        "compiled and ONNX with a batch of 1; the parity of every backend with torch. onnxruntime computes fp16 graphs "
        "in float32 on a CPU: that row shows the rounding of weights, not of half arithmetic, which the export checks "
        "in torch. OpenVINO computes bf16 and int8 natively where the processor has them.",
        8,
        lambda run: [
            "bench_towers.py",
            run.work,
            "--data",
            run.data,
            *pick(run, ["--precision", "fp32", "--batch", 1, "--rounds", 1], []),
        ],
        ("open_clip", "onnxscript"),
    ),
    Question(
        "encode",
        "End to end: a folder of JPEGs, texts, memory",
        "From files to embeddings, decoding included, compared with open_clip's loop, sentence-transformers and rclip; "
        "texts; peak memory of an indexing run.",
        5,
        lambda run: ["bench_encode.py", run.work, "--data", run.data],
        ("open_clip", "onnxscript"),
        only_whole,
    ),
    Question(
        "decode",
        "Decoding JPEGs",
        "JPEG bytes to a tower's square, compared with Pillow, OpenCV and torchvision, and how far the pixels differ.",
        3,
        decode,
    ),
    Question(
        "rank",
        "Exact ranking, a million rows",
        "One, 16 and 256 queries compared with faiss's flat index, numpy and torch; the hardware limit is a pass over "
        "memory, or the processor's 8-bit products.",
        8,
        lambda run: ["bench_rank.py", *pick(run, ["--rows", 50_000, "--rounds", 3], []), "--large", 0],
        ("faiss",),
    ),
    Question(
        "rank-large",
        "Exact ranking, four million rows",
        "The same with a gallery of 6 GB.",
        3,
        lambda _: ["bench_rank.py", "--rows", 0],
        ("faiss",),
        only_whole,
    ),
    Question(
        "query",
        "Cold start and warm queries",
        "CPU seconds of a whole `clipret-search query`, and queries a second of a searcher that is open.",
        2,
        lambda run: [
            "bench_query.py",
            *(["--rows", 10_000, "--pairs", 3] if run.quick else bundles(run)),
        ],
    ),
    Question(
        "serve",
        "Latency of the service",
        "1, 8 and 64 clients at a time compared with the plain server that one writes first; memory of the process.",
        6,
        lambda run: [
            "bench_serve.py",
            *pick(run, ["--rows", 10_000, "--rounds", 1, "--requests", 400], bundles(run)[:2]),
        ],
        ("fastapi", "uvicorn"),
    ),
    Question(
        "train",
        "A training step",
        "CPU seconds of a step compared with open_clip's own trainer: the same model, data and batch.",
        8,
        lambda run: [
            "bench_train.py",
            run.data,
            run.work / "train",
            "--only",
            "speed",
            *pick(run, ["--rounds", 1], []),
        ],
        ("open_clip_train", "webdataset", "pandas"),
    ),
    Question(
        "export",
        "Exporting full-size models",
        "Time, memory and parity of `clipret-export`, each model and precision a process of its own.",
        40,
        lambda run: [
            "bench_export.py",
            run.work / "export",
            *pick(run, ["--model", "ViT-B-32", "--precision", "fp32"], exported(run)),
        ],
        ("open_clip", "onnxscript"),
    ),
    Question(
        "scale",
        "Cost as it grows",
        "Indexing, gallery and queries at ten thousand, a hundred thousand, a million images, and four million rows.",
        6,
        lambda run: [
            "bench_scale.py",
            *pick(run, ["--counts", 300, 3_000, "--rows", 3_000, 30_000, "--rounds", 3], []),
        ],
    ),
    Question(
        "ray",
        "Indexing on a Ray cluster",
        "Images a second of one process and of workers on this machine, and the CPU time of each image. With "
        "several workers the CPU time is undercounted: workers that end take theirs with them.",
        6,
        lambda run: ["bench_ray.py", run.work / "ViT-B-32-bf16", "--data", run.data / "images", "--images", 512],
        ("ray", "psutil", "openvino"),
        ray_lacks,
    ),
    Question(
        "gallery_size",
        "Size of a gallery",
        "Bytes per image: embeddings, quantized embeddings, database.",
        1,
        lambda run: ["bench_gallery_size.py", *pick(run, ["--images", 20_000], [])],
    ),
    Question(
        "demo",
        "The demo",
        "The whole line on drawn images, from drawing to mAP.",
        4,
        lambda run: ["bench_demo.py", run.work / "demo"],
        ("torch",),
        only_whole,
    ),
    Question(
        "train_memory",
        "Memory of training",
        "Computed and measured, per model and way of training.",
        30,
        lambda _: ["bench_train_memory.py"],
        ("open_clip",),
        only_whole,
    ),
    Question(
        "flickr8k",
        "Quality on photographs",
        "Training from scratch, export in four precisions, recall of each compared with torch's.",
        40,
        lambda run: ["bench_flickr8k.py", run.data, run.work / "flickr8k"],
        ("torch",),
        real("flickr8k"),
    ),
    Question(
        "completion",
        "Completion on real cars",
        "Hidden colours filled in again, and how many rightly.",
        18,
        lambda run: ["bench_completion.py", (run.real or run.data) / "vehicles", run.work / "cars", "--seed", 0],
        ("torch",),
        real("vehicles"),
    ),
    Question(
        "traffic",
        "The traffic pipeline, step by step",
        "What each step brings, on drawn data in the challenge's format; one seed.",
        15,
        lambda run: ["bench_traffic.py", run.work / "traffic", "--seed", 0],
        ("torch",),
        only_whole,
    ),
    Question(
        "rerank",
        "Re-ranking",
        "What each way of re-ranking gains and costs.",
        1,
        lambda run: [
            "bench_rerank.py",
            traffic_gallery(run),
            run.work / "traffic" / "0" / "drawn" / "test_queries.csv",
            *("--equal", "color", "--equal", "type", "--includes", "attributes", "--rows", 1_000_000),
        ],
        lacks=rerank_lacks,
    ),
)
