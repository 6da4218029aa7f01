"""The reference of the parity check: embeddings of the original model in torch and float32."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipret.arrays import Embeddings
from clipret.console import progress
from clipret.errors import ClipretError
from clipret.images.decode import load
from clipret.images.walk import ImageError
from clipret.inference.tokenizer import Tokenizer
from clipret.pairs import PairSet
from clipret_export.parity import Reference
from clipret_export.samples import TEXTS, sample_images
from clipret_training.models import LoadedModel

__all__ = ["inputs", "reference", "texts"]

_BATCH = 16
Batches = list[Tensor]


def reference(loaded: LoadedModel, pairs: PairSet | None = None) -> tuple[Reference, list[tuple[Path, str]]]:
    """Compute embeddings with the model's own encode_image and encode_text, texts padded to the context length.

    Args:
        loaded: The model, before it is rewritten.
        pairs: Images and captions of the user, in addition to the built-in ones.

    Returns:
        The embeddings, and the images that could not be decoded with the reason. These images are left out.

    Raises:
        ClipretError: None of the user's images can be decoded.
    """
    model = loaded.model.float().eval()
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (loaded.mean, loaded.std))

    def image(pixels: Tensor) -> Tensor:
        x = pixels.permute(0, 3, 1, 2).float() / 255
        return F.normalize(model.encode_image((x - mean) / std), dim=-1)  # type: ignore[operator]

    def text(tokens: Tensor) -> Tensor:
        return F.normalize(model.encode_text(tokens), dim=-1)  # type: ignore[operator]

    image_embeddings = _embeddings(image, inputs(loaded, sample_images()), "")
    text_embeddings = _embeddings(text, _texts(loaded, TEXTS), "")
    if pairs is None:
        return Reference(image_embeddings, text_embeddings), []
    skipped: dict[int, str] = {}
    data_image = _embeddings(image, inputs(loaded, pairs.paths, skipped), "images in torch")
    if len(skipped) == len(pairs.paths):
        raise ClipretError(
            f"none of the {len(skipped)} images to check with can be read, for example {pairs.paths[0]}: "
            f"{skipped[0]}; check the paths and --verify image_root=…"
        )
    kept = pairs.subset([at for at in range(len(pairs.paths)) if at not in skipped])
    data_text = _embeddings(text, _texts(loaded, kept.captions), "captions in torch")
    named = [(pairs.paths[at], reason) for at, reason in skipped.items()]
    return Reference(image_embeddings, text_embeddings, kept, data_image, data_text), named


def inputs(loaded: LoadedModel, items: Sequence[Image.Image | Path], skipped: dict[int, str] | None = None) -> Batches:
    """Preprocess images in batches.

    Args:
        loaded: The model.
        items: Images or their paths.
        skipped: Gets the reason for each image that cannot be decoded, by its position in `items`.

    Returns:
        Batches uint8 [B,S,S,3].

    Raises:
        ImageError: An image cannot be decoded, and `skipped` is None.
    """
    pixels: list[npt.NDArray[np.uint8]] = []
    for at, item in enumerate(items):
        try:
            pixels.append(load(item, loaded.image))
        except ImageError as error:
            if skipped is None:
                raise
            skipped[at] = str(error)
    return [torch.from_numpy(np.stack(pixels[at : at + _BATCH])) for at in range(0, len(pixels), _BATCH)]


def texts(loaded: LoadedModel, captions: Sequence[str]) -> Batches:
    """Tokenize captions in batches.

    Args:
        loaded: The model.
        captions: The captions.

    Returns:
        Batches int64 [B,L], padded to the longest caption of the batch if the model allows it.
    """
    tokenize = Tokenizer(loaded.tokenizer_json, loaded.text)
    return [torch.from_numpy(tokenize(captions[at : at + _BATCH])) for at in range(0, len(captions), _BATCH)]


def _texts(loaded: LoadedModel, captions: Sequence[str]) -> Batches:
    """Captions as int64 [B,L] with L the context length, as in the model's training."""
    short = [loaded.text.context_length - batch.shape[1] for batch in texts(loaded, captions)]
    return [
        F.pad(batch, (0, missing), value=loaded.text.pad_id)
        for batch, missing in zip(texts(loaded, captions), short, strict=True)
    ]


def _embeddings(encode: Callable[[Tensor], Tensor], batches: Batches, desc: str) -> Embeddings:
    shown = progress(batches, desc=desc, unit="batch") if desc else batches
    with torch.inference_mode():
        embeddings = [encode(batch) for batch in shown]
    return torch.cat(embeddings).numpy() if embeddings else np.empty((0, 0), dtype=np.float32)
