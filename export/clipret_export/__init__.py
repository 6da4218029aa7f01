"""The export: torch models to ONNX bundles and TensorRT engines."""

import logging

logging.getLogger(__name__).addHandler(logging.NullHandler())
