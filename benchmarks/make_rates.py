"""clipret/diagnostics/rates.json, which `clipret-search plan` reads, from the measurements in benchmarks/results/.

    python benchmarks/make_rates.py

Nothing is measured here. Multiplications of a model follow from the shape that open_clip gives it, as bench_encode.py
counts them. A test makes the file again and compares.
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FILE = HERE.parent / "runtime" / "clipret" / "diagnostics" / "rates.json"
MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "ViT-g-14", "ViT-bigG-14")
QUERY_TOKENS = 16  # of a query: texts are trimmed to the longest of their batch
_IMAGES = {"0.3 MP": "drawn 640x480", "2 MP": "tiled 1920x1080", "12 MP": "tiled 4000x3000"}


def result(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return value


def shape(name: str) -> dict[str, float]:
    """Width of the rows, and 10^9 operations (two a multiplication) of an image and of a query."""
    import open_clip

    config = open_clip.get_model_config(name)
    vision, text, dim = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    image = patches * 3 * vision["patch_size"] ** 2 * vision["width"] + vision["width"] * dim
    image += blocks(vision["layers"], patches + 1, vision["width"], vision.get("mlp_ratio", 4.0))
    texts = text["width"] * dim + blocks(text["layers"], QUERY_TOKENS, text["width"], text.get("mlp_ratio", 4.0))
    return {"dim": dim, "image_gflop": round(2e-9 * image, 2), "text_gflop": round(2e-9 * texts, 3)}


def blocks(layers: int, tokens: int, width: int, ratio: float) -> float:
    """Multiplications; the last block works for the pooled token, and on the others' keys and values only."""
    linear, attention = (4 + 2 * ratio) * width**2, 2 * tokens * width
    last = tokens * 2 * width**2 + (2 + 2 * ratio) * width**2 + attention
    return (layers - 1) * tokens * (linear + attention) + last


def rates() -> dict[str, Any]:
    towers, texts, ranks, size, decoded = map(result, ("towers", "encode-texts", "rank", "gallery-size", "decode"))
    models = {name: shape(name) for name in MODELS}
    images = {kind: towers["batches"]["batch 8"][name]["images_a_second"] for kind, name in KINDS.items()}
    base, isotropic = models[towers["model"]], ranks["isotropic"]
    clock = f"{ranks['clock']}, {ranks['machine']}, {ranks['date']}"
    return {
        "models": models,
        "query_tokens": QUERY_TOKENS,
        "encode": {
            "measured_on": f"{towers['model']}, one core of {towers['machine']}, {towers['date']}",
            "model": towers["model"],
            "images_a_core_second": {kind: round(rate, 2) for kind, rate in images.items()},
            "gflops_a_core": {kind: round(base["image_gflop"] * rate, 1) for kind, rate in images.items()},
            "queries_a_core_second": {kind: texts[kind]["texts_a_second"] for kind in KINDS},
        },
        "decode": {
            "measured_on": f"one core of {decoded['machine']}, {decoded['date']}",
            "core_ms_a_image": {
                size_: {kind: decoded[name]["cpu_ms"][mine] for kind, mine in DECODERS.items()}
                for size_, name in _IMAGES.items()
            },
        },
        "rank": {
            "measured_on": f"{isotropic['rows']:,} rows of {ranks['dim']}, {clock}",
            "rows": isotropic["rows"],
            "dim": ranks["dim"],
            "core_ms_a_query": {count: isotropic[f"{count} queries"]["ms_a_query"]["clipret"] for count in QUERIES},
        },
        "gallery": {
            "measured_on": f"{size['images']:,} images with paths of {size['path_characters']} characters",
            "database_bytes_a_image": size["database_bytes_a_image"],
        },
    }


KINDS = {"fp32": "fp32 onnxruntime", "bf16": "bf16 openvino", "int8": "int8 openvino"}
QUERIES = ("1", "16", "256")
DECODERS = {"default": "clipret", "fast": "clipret fast"}


def text() -> str:
    return json.dumps(rates(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(FILE)
