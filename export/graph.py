"""A tower as an ONNX file: dynamic batch and text length, one file below 2 GB, no trace of the exporting machine."""

import logging
import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

__all__ = ["OPSET", "write_onnx"]

OPSET = 20  # the newest that onnxruntime and both TensorRT builders read without exception
_ONE_FILE = 1_800_000_000  # bytes of weights; protobuf ends at 2 GiB


def write_onnx(tower: nn.Module, example: Tensor, path: Path, *, input_name: str, dynamic: dict[int, str]) -> None:
    """Write `tower` to `path` (and `path`.data past 2 GB).

    `example`: an input of at least two in every dynamic axis. `dynamic` names the axes of the input that stay free.
    """
    weights = sum(t.numel() * t.element_size() for t in [*tower.parameters(), *tower.buffers()])
    shapes = {axis: torch.export.Dim(name, min=1) for axis, name in dynamic.items()}
    tower.eval()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of the exporter's own making; what matters is checked afterwards
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            tower,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[input_name],
            output_names=["rows"],  # a name like `embedding` collides with a node's
            dynamic_shapes=(shapes,),
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces: the exporting machine's paths, larger than a small tower
    program.model.metadata_props.clear()
    program.model.graph.metadata_props.clear()
    for value in program.model.graph.initializers.values():
        value.metadata_props.clear()
    program.save(str(path), external_data=weights > _ONE_FILE)
    onnx.checker.check_model(str(path))
