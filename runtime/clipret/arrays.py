"""Type aliases for the arrays in signatures, named after what they hold."""

import numpy as np
import numpy.typing as npt

__all__ = ["Embeddings", "Floats", "Ids", "Mask", "Pixels", "StoredEmbeddings"]

Embeddings = npt.NDArray[np.float32]
"""float32 [N,D], each of unit length: the output of a tower."""
StoredEmbeddings = npt.NDArray[np.float16]
"""float16 [N,D], as a gallery stores them."""
Floats = npt.NDArray[np.float64]
"""Exact scores, and everything else that is computed in float64."""
Ids = npt.NDArray[np.int64]
"""Ids of images, or positions in an embeddings array."""
Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]
"""uint8 [H,W,3], or [B,S,S,3] for a batch."""
