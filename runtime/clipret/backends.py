"""The backends that can run the towers of a bundle, by the names of their Python modules."""

from typing import Literal, NamedTuple, get_args

__all__ = ["BACKENDS", "TENSORRT_LIBRARIES", "Backend", "BackendChoice", "TensorRTLibrary"]

Backend = Literal["onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"]
BackendChoice = Literal["auto", Backend]
TensorRTLibrary = Literal["tensorrt", "tensorrt_rtx"]
"""The libraries that build and run TensorRT engines."""


class _Facts(NamedTuple):
    label: str
    extra: str  # the extra of this package that installs the backend


BACKENDS: dict[Backend, _Facts] = {
    "onnxruntime": _Facts("onnxruntime", "cpu"),
    "openvino": _Facts("OpenVINO", "openvino"),
    "tensorrt": _Facts("TensorRT", "tensorrt"),
    "tensorrt_rtx": _Facts("TensorRT for RTX", "tensorrt-rtx"),
}
TENSORRT_LIBRARIES: tuple[TensorRTLibrary, ...] = get_args(TensorRTLibrary)
