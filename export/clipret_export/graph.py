"""A tower as an ONNX file: dynamic batch and text length, one file below 2 GB, no paths of the exporting machine."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from clipret_export.layers import attention_as

__all__ = ["OPSET", "write_onnx"]

OPSET = 20  # the newest that onnxruntime, OpenVINO and both TensorRT libraries support completely
_ONE_FILE = 1_800_000_000  # bytes of weights; the limit of protobuf is 2 GiB
_MOVES = {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Slice", "Gather", "Identity"}  # keep all values


def write_onnx(tower: nn.Module, example: Tensor, path: Path, *, input_name: str, dynamic: dict[int, str]) -> int:
    """Write a tower as an ONNX file.

    Args:
        tower: The tower, with one input and one output.
        example: An input, uint8 [B,S,S,3] or int64 [B,L], with at least 2 in every dynamic axis.
        path: The file. Weights of more than 1.8 GB go to `path`.data.
        input_name: Name of the graph's input.
        dynamic: Names of the dynamic axes of the input, by axis.

    Returns:
        The number of nodes.
    """
    shapes = {axis: torch.export.Dim(name, min=1) for axis, name in dynamic.items()}
    tower.eval()
    with warnings.catch_warnings(), torch.inference_mode(), attention_as(_two_products):
        warnings.simplefilter("ignore")  # the exporter's own; the parity check covers the result
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            tower,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[input_name],
            output_names=["rows"],  # a name like `embedding` collides with that of a node
            dynamic_shapes=(shapes,),
            verbose=False,
        )
    assert program is not None
    graph = program.model.graph
    _drop_cast_pairs(graph)
    for node in graph.all_nodes():
        node.metadata_props.clear()  # stack traces with paths of this machine, larger than a small tower
    program.model.metadata_props.clear()
    graph.metadata_props.clear()
    for value in graph.initializers.values():
        value.metadata_props.clear()
    weights = sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
    program.save(str(path), external_data=weights > _ONE_FILE)
    onnx.checker.check_model(str(path))
    return sum(1 for _ in graph.all_nodes())


def _two_products(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """scaled_dot_product_attention in seven nodes; the exporter's own decomposition computes shapes at run time."""
    scale = options.pop("scale", None) or q.shape[-1] ** -0.5
    if any(options.values()) or (attn_mask is not None and not attn_mask.is_floating_point()):
        return attend(q, k, v, attn_mask=attn_mask, scale=scale, **options)
    scores = (q * scale) @ k.transpose(-2, -1)  # scaled first: unscaled scores may overflow in half precision
    if attn_mask is not None:
        scores = scores + attn_mask
    attended: Tensor = scores.softmax(dim=-1) @ v
    return attended


def _drop_cast_pairs(graph: ir.Graph) -> None:
    """Remove casts from half (or bfloat16) to float32 and back, also around reshapes. They change no value.

    A projection in half precision ends with a cast to float32, and the attention after it begins with a cast to half.
    Backends keep both, and each cast reads and writes all queries once.
    """
    for last in [node for node in graph if node.op_type == "Cast"]:
        dtype = ir.DataType(last.attributes["to"].as_int())
        if dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            continue
        chain: list[ir.Node] = []
        first = _producer(last.inputs[0])
        while first is not None and first.op_type in _MOVES and _uses(first.outputs[0]) == 1:
            chain.append(first)
            first = _producer(first.inputs[0])
        if first is None or first.op_type != "Cast" or first.inputs[0] is None or first.inputs[0].dtype != dtype:
            continue
        source: ir.Value = first.inputs[0]
        for node in reversed(chain):
            node.replace_input_with(0, source)
            source = node.outputs[0]
            source.dtype = dtype
        ir.convenience.replace_all_uses_with(last.outputs[0], source)
        graph.remove(last, safe=True)
        if not _uses(first.outputs[0]):
            graph.remove(first, safe=True)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _uses(value: ir.Value) -> int:
    return len(value.uses()) + value.is_graph_output()
