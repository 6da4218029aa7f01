"""Recall on held-out pictures, measured as the search will measure it: whole pictures, float32, exact ranking."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipret.errors import ClipretError
from clipret.metrics import Metrics, evaluate
from clipret.pairs import PairSet
from clipret.ranker import Ranker
from clipret.training.data import Pictures, Texts
from clipret.training.loaded import LoadedModel

__all__ = ["normalise", "recall"]

_BATCH = 128


def normalise(loaded: LoadedModel, images: Tensor) -> Tensor:
    """float32 [B,3,S,S] in 0..1 less the model's mean, over its deviation, in the layout convolutions like best."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (loaded.mean, loaded.std))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def recall(
    loaded: LoadedModel, pairs: PairSet, pictures: Pictures, texts: Texts, device: torch.device
) -> dict[str, Any]:
    """`text_to_image` and `image_to_text` as dictionaries of `Metrics`; pictures that cannot be read do not count.

    A title is one query however many pictures it has. Leaves the model in eval mode. Raises ClipretError when
    no picture can be read.
    """
    model: Any = loaded.model.eval()
    image_rows: list[npt.NDArray[np.float32]] = []
    readable: list[int] = []
    for chosen, pixels in pictures.batches(range(len(pairs.paths)), _BATCH):
        images = pixels.to(device).permute(0, 3, 1, 2).float() / 255  # [B,3,S,S]
        image_rows.append(model.encode_image(normalise(loaded, images), normalize=True).float().cpu().numpy())
        readable += chosen
    if not readable:
        raise ClipretError(f"none of the {len(pairs.paths)} held-out pictures can be read, {pictures.example()}")

    row_of = {picture: row for row, picture in enumerate(readable)}
    found = [[row_of[picture] for picture in owners if picture in row_of] for owners in pairs.of_title()]
    asked = [title for title, rows in enumerate(found) if rows]
    text_rows = [
        model.encode_text(texts.ids(torch.tensor(asked[low : low + _BATCH])).to(device), normalize=True)
        .float()
        .cpu()
        .numpy()
        for low in range(0, len(asked), _BATCH)
    ]
    place_of = {title: place for place, title in enumerate(asked)}
    of_picture = [[place_of[title] for title in pairs.of_picture[picture]] for picture in readable]
    images_, titles_ = np.concatenate(image_rows), np.concatenate(text_rows)
    return {
        "text_to_image": _measure(images_, titles_, [found[title] for title in asked]),
        "image_to_text": _measure(titles_, images_, of_picture),
    }


def _measure(
    rows: npt.NDArray[np.float32], queries: npt.NDArray[np.float32], relevant: list[list[int]]
) -> dict[str, float]:
    metrics: Metrics = evaluate(Ranker(rows.astype(np.float16)), queries, relevant)
    return metrics.to_dict()
