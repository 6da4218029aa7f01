"""Arrays by what they hold: the aliases that signatures use, each once."""

import numpy as np
import numpy.typing as npt

__all__ = ["Embeddings", "Floats", "Ids", "Mask", "Pixels", "StoredEmbeddings"]

Embeddings = npt.NDArray[np.float32]
"""[N,D], each of unit length, as a tower gives them."""
StoredEmbeddings = npt.NDArray[np.float16]
"""[N,D], as a gallery keeps them."""
Floats = npt.NDArray[np.float64]
"""Exact scores, and whatever else is computed in float64."""
Ids = npt.NDArray[np.int64]
"""Ids of images, or positions among embeddings."""
Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]
"""[H,W,3] or, of a batch, [B,S,S,3]."""
