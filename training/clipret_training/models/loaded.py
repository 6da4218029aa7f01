"""A model in memory with everything that its embeddings depend on. Training and export work with it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipret.bundle import ImageSpec, TextSpec

__all__ = ["LoadedModel", "file_sha256", "weights_sha256"]


@dataclass
class LoadedModel:
    """A CLIP model with its preprocessing.

    Attributes:
        model: The module. It has encode_image(float32 [B,3,S,S], normalize=False) -> float32 [B,D],
            encode_text(int64 [B,L], normalize=False) -> float32 [B,D] for every L that `text.pad_to` allows, and a
            parameter logit_scale with the logarithm of the scale.
        name: Name of the architecture.
        config: Rebuilds the architecture without weights.
        image: Preprocessing of images to uint8 [S,S,3]. Pixels are then divided by 255 and normalized.
        mean: Mean of the normalization, for each channel.
        std: Standard deviation of the normalization, for each channel.
        text: Preprocessing of texts.
        tokenizer_json: Content of the tokenizer's file.
        source: The source that the user named.
        source_sha256: Digest of the checkpoint file, or of the weights themselves if there is no file.
    """

    model: nn.Module
    name: str
    config: dict[str, Any]
    image: ImageSpec
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    text: TextSpec
    tokenizer_json: str
    source: str
    source_sha256: str


def file_sha256(path: Path) -> str:
    """Digest of a file.

    Args:
        path: The file.

    Returns:
        The SHA-256 in hexadecimal.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(model: nn.Module) -> str:
    """Digest of the names and bytes of all parameters and buffers, for weights that do not come from a file.

    Args:
        model: The module.

    Returns:
        The SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
