"""An image tower without its weights, and with random ones again: a model of 10 GB that travels as 40 KB.

    python benchmarks/skeleton.py make ViT-bigG-14 benchmarks/skeletons/ViT-bigG-14     # needs the export extra
    python benchmarks/skeleton.py fill benchmarks/skeletons/ViT-bigG-14 BUNDLE          # needs numpy alone

Speed does not depend on what the weights are: each tensor is drawn with the mean and the deviation that open_clip's own
random weights had. The graph is the one that `clipret-export --fp16` writes. A filled bundle holds the image tower
alone; what it can be checked against is itself on another engine.
"""

import argparse
import gzip
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from clipret.bundle import FORMAT, Bundle, Manifest, file_entry

SMALL = 1024  # bytes that stay in the graph
TILE = 1 << 22  # numbers drawn once for each tensor; larger ones repeat them
DATA = "image.onnx.data"


def make(name: str, out: Path) -> None:
    """Export the image tower of open_clip's model `name` in fp16, without its check, and leave the weights out.

    Its blocks are one block, again and again, so that the largest model is exported in a gigabyte; each use of a weight
    becomes a tensor of its own in the skeleton.
    """
    import onnx
    import torch
    from onnx.external_data_helper import set_external_data
    from torch import nn

    from clipret_export.calibration import observe
    from clipret_export.graph import write_onnx
    from clipret_export.precision import convert
    from clipret_export.towers import ImageTower, rewrite
    from clipret_training.models.load import load_model

    with tempfile.TemporaryDirectory() as folder:
        layers = _one_layer(name, Path(folder, "model"))
        loaded = load_model(str(Path(folder, "model")))
        visual: Any = loaded.model.visual
        [block] = visual.transformer.resblocks
        visual.transformer.resblocks = nn.ModuleList([block] * layers)
        rewrite(loaded.model)
        tower = ImageTower(loaded).eval()
        size = loaded.image.size
        one = torch.zeros(1, size, size, 3, dtype=torch.uint8)
        convert(tower, "fp16", observe(tower, [one], samples=False), [])
        path = Path(folder, "image.onnx")
        example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
        write_onnx(tower, example, path, input_name="pixels", dynamic={0: "batch"})
        model = onnx.load(path)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in held]:
        # The exporter turns a weight that several nodes use when the graph runs, and others when it is written.
        turned = onnx.numpy_helper.to_array(held[node.input[0]]).transpose(node.attribute[0].ints)
        tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(turned), node.output[0])
        model.graph.initializer.append(tensor)
        held[tensor.name] = model.graph.initializer[-1]
        model.graph.node.remove(node)
    users = Counter[str]()
    for node in model.graph.node:
        for at, used in enumerate(node.input):
            if used in held and len(held[used].raw_data) >= SMALL:
                users[used] += 1
                if users[used] > 1:
                    node.input[at] = f"{used}.{users[used]}"
                    model.graph.initializer.add().CopyFrom(held[used])
                    model.graph.initializer[-1].name = node.input[at]
    used_still = {name for node in model.graph.node for name in node.input}
    offset, tensors = 0, list[list[object]]()
    for tensor in list(model.graph.initializer):
        if tensor.name not in used_still:
            model.graph.initializer.remove(tensor)
            continue
        array = onnx.numpy_helper.to_array(tensor)
        if array.nbytes < SMALL or array.dtype.kind != "f" or not np.isfinite(array).all():
            continue
        mean, std = float(array.mean(dtype=np.float64)), float(array.std(dtype=np.float64))
        tensors.append([offset, array.dtype.name, array.size, mean, std])
        set_external_data(tensor, DATA, offset=offset, length=array.nbytes)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        offset += -(-array.nbytes // 4096) * 4096
    scale = float(loaded.model.logit_scale.exp())  # type: ignore[operator]
    spec = (visual.output_dim, scale, loaded.image, loaded.text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "image.onnx.gz").write_bytes(gzip.compress(model.SerializeToString(), mtime=0))
    (out / "skeleton.json").write_text(json.dumps(tensors) + "\n", encoding="utf-8")
    (out / "manifest.json").write_text(Manifest(FORMAT, name, "random weights", "", "fp16", *spec, {}).to_json())


def _one_layer(name: str, folder: Path) -> int:
    """The model with a block in each tower, as a folder of open_clip's; returns how many the image tower has."""
    import open_clip
    from safetensors.torch import save_file

    config: Any = open_clip.get_model_config(name)
    layers = int(config["vision_cfg"]["layers"])
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 1
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    return layers


def fill(skeleton: Path, out: Path) -> Bundle:
    """Write a bundle of a skeleton's image tower with random weights."""
    out.mkdir(parents=True)
    normal = np.random.default_rng(0).standard_normal(TILE, dtype=np.float32)
    (out / "image.onnx").write_bytes(gzip.decompress((skeleton / "image.onnx.gz").read_bytes()))
    with (out / DATA).open("wb") as file:
        for number, (offset, dtype, size, mean, std) in enumerate(json.loads((skeleton / "skeleton.json").read_text())):
            tile = (normal[: min(size, TILE)] * np.float32(std) + np.float32(mean)).astype(dtype)
            file.seek(offset)
            start, left = (number * 7919) % len(tile), size  # another part of the tile in each tensor
            while left:
                piece = tile[start : start + left]
                file.write(piece.tobytes())
                left, start = left - len(piece), 0
    content = json.loads((skeleton / "manifest.json").read_text(encoding="utf-8"))
    content["files"] = {name: msgspec.structs.asdict(file_entry(out / name)) for name in ("image.onnx", DATA)}
    (out / "bundle.json").write_text(json.dumps(content), encoding="utf-8")
    return Bundle.open(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "fill"))
    parser.add_argument("source", help="a model's name, or a skeleton")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "make":
        make(arguments.source, arguments.out)
    else:
        fill(Path(arguments.source), arguments.out)
    print(f"{sum(file.stat().st_size for file in arguments.out.iterdir()):,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
