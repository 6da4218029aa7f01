"""Exporting full-size models: time, peak memory, size, nodes, smallest cosine to torch.

    python benchmarks/bench_export.py work [--model NAME ...] [--precision fp32 fp16] [--vocab vocab.txt]

Weights are random, for none can be downloaded here; shapes, time and memory are those of the real ones. Each export is
a process of its own: `clipret-export`, the check against torch included. The SigLIP model gets a small tokenizer
made here, since its own lies on the hub; Chinese-CLIP's needs a vocabulary of 21,128 lines (--vocab). The floor next to
each time is what any exporter must do: read or draw the weights, run torch once on the check's images and texts,
and write the bytes.

Bundles go to the folder `work` and are removed again.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import keep

MODELS = (
    "ViT-B-32",
    "ViT-L-14",
    "ViT-H-14",
    "ViT-bigG-14",
    "ViT-B-16-SigLIP",
    "Chinese-CLIP ViT-B-16",
    "Chinese-CLIP ViT-H-14",
)
CHINESE = {  # vision width, layers and patch; text width and layers; embedding
    "Chinese-CLIP ViT-B-16": (768, 12, 16, 768, 12, 512),
    "Chinese-CLIP ViT-H-14": (1280, 32, 14, 1024, 24, 1024),
}

FLOOR = """
import sys, time, json
from clipret_export.reference import reference
from clipret_training.models.load import load_model
began = time.monotonic()
loaded = load_model(sys.argv[1])
reference(loaded)
print(json.dumps({"seconds": time.monotonic() - began}))
"""


def source_of(name: str, work: Path, vocab: Path) -> str:
    """What clipret-export calls a model of this name with random weights."""
    if "SigLIP" in name:
        return str(siglip(name, work / name))
    return str(chinese(name, work / name, vocab)) if name in CHINESE else name


def chinese(name: str, folder: Path, vocab: Path) -> Path:
    """A checkpoint in the layout of OFA-Sys, half as theirs are, with the vocabulary next to it."""
    import torch

    from clipret_training.models.chinese_clip import FAMILY, ChineseClip

    folder.mkdir(exist_ok=True)
    shutil.copy(vocab, folder / "vocab.txt")
    width, layers, patch, hidden, deep, dim = CHINESE[name]
    vision = {"image_size": 224, "patch_size": patch, "width": width, "layers": layers, "heads": width // 64}
    vision |= {"mlp_ratio": 4.0} | ({"heads": 16} if width == 1280 else {})
    text = {"hidden_size": hidden, "num_hidden_layers": deep, "num_attention_heads": hidden // 64}
    text |= {"vocab_size": 21128, "intermediate_size": 4 * hidden, "max_position_embeddings": 512, "type_vocab_size": 2}
    torch.manual_seed(0)
    model = ChineseClip({"family": FAMILY, "embed_dim": dim, "vision": vision, "text": text}).half()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def siglip(name: str, folder: Path) -> Path:
    """A folder of open_clip's with the configuration of `name` and a tokenizer learned from a few sentences."""
    import open_clip
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from clipret_export.samples import TEXTS

    folder.mkdir(exist_ok=True)
    config: Any = open_clip.get_model_config(name)
    config["text_cfg"]["hf_tokenizer_name"] = str(folder)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="</s>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )
    fast.save_pretrained(folder)
    return folder


def run(*command: str) -> tuple[dict[str, Any], float, float]:
    """The JSON that a command prints, its wall seconds and its CPU seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(output), time.monotonic() - began, cpu


def measure(name: str, precision: str, work: Path, vocab: Path) -> dict[str, Any]:
    source, bundle = source_of(name, work, vocab), work / "bundle"
    option = [] if precision == "fp32" else [f"--{precision}"]
    floor, *_ = run(sys.executable, "-c", FLOOR, source)
    report, wall, cpu = run("clipret-export", source, str(bundle), *option, "--overwrite", "--json")
    shutil.rmtree(bundle)
    result = {
        "model": name,
        "precision": precision,
        "seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "floor_seconds": round(floor["seconds"], 1),
        "peak_memory_gib": round(report["peak_memory_bytes"] / 2**30, 2),
        "size_mb": round(report["bytes"] / 1e6, 1),
        "nodes": report["nodes"],
        "min_cosine": {tower: report[tower]["min_cosine"] for tower in ("image", "text")},
        "relative_error": {tower: report[tower]["relative_error"] for tower in ("image", "text")},
        "float32_layers": len(report["float32_layers"]),
    }
    worst = min(result["min_cosine"].values())
    print(
        f"{name:24} {precision}  {wall:6.0f} s (floor {floor['seconds']:4.0f})  {result['peak_memory_gib']:5.1f} GiB  "
        f"{result['size_mb']:8.1f} MB  {report['nodes']['image']}+{report['nodes']['text']} nodes  cosine {worst:.8f}",
        file=sys.stderr,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", nargs="+", default=list(MODELS))
    parser.add_argument("--precision", nargs="+", default=["fp32", "fp16"], choices=["fp32", "fp16", "bf16"])
    parser.add_argument("--vocab", type=Path, default=Path("../shared/data/tokenizers/chinese_clip_vocab.txt"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = [
        measure(name, precision, arguments.work, arguments.vocab)
        for name in arguments.model
        for precision in arguments.precision
    ]
    keep("export", {"exports": results})


if __name__ == "__main__":
    main()
