"""A model in memory with everything that decides its embeddings; what training and export pass around."""

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

    `model` has encode_image(float32 [B,3,S,S], normalize=False) -> [B,D], encode_text(int64 [B,L], normalize=False)
    -> [B,D] for every L that `text.pad_to` allows, and logit_scale, a parameter that holds the logarithm. Images
    are uint8 as `image` says, divided by 255, minus `mean`, over `std`.

    `name` is the architecture and `config` what rebuilds it without weights. `source` is what the user named,
    `source_sha256` the hash of the checkpoint's bytes or, where there is no file, of the weights themselves.
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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(model: nn.Module) -> str:
    """Hash of the names and bytes of all parameters and buffers, for weights that come from no file."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
