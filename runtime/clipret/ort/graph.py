"""Serialize small ONNX models, to use onnxruntime's operators without the onnx package.

The format is a protocol buffer. Field and type numbers are those of onnx.proto3 in the ONNX specification.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["Node", "Value", "model"]

_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float16": 10}
_IR_VERSION, _OPSET = 10, 21


@dataclass(frozen=True)
class Value:
    """An input or output of a graph.

    Attributes:
        name: Its name.
        dtype: Name of the numpy dtype.
        shape: Each dimension as a size, or as a name if it varies.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Node:
    """An operator of the standard domain with integer attributes.

    Attributes:
        operator: Its type, such as "MatMul".
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        attributes: Integers or sequences of integers by name.
    """

    operator: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, int | Sequence[int]] = field(default_factory=dict)


def model(
    nodes: Sequence[Node],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    constants: Mapping[str, npt.NDArray[np.generic]] | None = None,
) -> bytes:
    """Serialize a ModelProto.

    Args:
        nodes: The operators, in the order in which they run.
        inputs: Inputs of the graph.
        outputs: Outputs of the graph.
        constants: Initializers by name.

    Examples:
        >>> value = [Value(name, "float32", ("N",)) for name in "ab"]
        >>> len(model([Node("Neg", ["a"], ["b"])], value[:1], value[1:]))
        66
    """
    graph = b"".join(
        [
            *(_bytes(1, _node(node)) for node in nodes),
            _bytes(2, b"clipret"),
            *(_bytes(5, _tensor(name, array)) for name, array in (constants or {}).items()),
            *(_bytes(11, _value(value)) for value in inputs),
            *(_bytes(12, _value(value)) for value in outputs),
        ]
    )
    return _number(1, _IR_VERSION) + _bytes(8, _number(2, _OPSET)) + _bytes(7, graph)


def _node(node: Node) -> bytes:
    return b"".join(
        [
            *(_bytes(1, name.encode()) for name in node.inputs),
            *(_bytes(2, name.encode()) for name in node.outputs),
            _bytes(4, node.operator.encode()),
            *(_bytes(5, _attribute(name, value)) for name, value in node.attributes.items()),
        ]
    )


def _attribute(name: str, value: int | Sequence[int]) -> bytes:
    if isinstance(value, int):
        return _bytes(1, name.encode()) + _number(3, value) + _number(20, 2)
    return _bytes(1, name.encode()) + b"".join(_number(8, integer) for integer in value) + _number(20, 7)


def _tensor(name: str, array: npt.NDArray[np.generic]) -> bytes:
    dims = b"".join(_number(1, size) for size in array.shape)
    return dims + _number(2, _TYPES[array.dtype.name]) + _bytes(8, name.encode()) + _bytes(9, array.tobytes())


def _value(value: Value) -> bytes:
    dims = (_number(1, size) if isinstance(size, int) else _bytes(2, size.encode()) for size in value.shape)
    shape = b"".join(_bytes(1, dim) for dim in dims)
    return _bytes(1, value.name.encode()) + _bytes(2, _bytes(1, _number(1, _TYPES[value.dtype]) + _bytes(2, shape)))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value & (1 << 64) - 1)  # the format stores negative numbers as ten bytes


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
