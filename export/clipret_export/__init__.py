"""The export room: torch models to ONNX bundles."""
