"""Recall on held-out images, measured as in the search: whole images, float32, exact ranking."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from clipret.arrays import Embeddings
from clipret.errors import ClipretError
from clipret.evaluation.metrics import Metrics, evaluate
from clipret.pairs import PairSet
from clipret.ranking.ranker import Ranker
from clipret_training.data import ImageReader, Texts, normalise
from clipret_training.distributed import World, gather_objects
from clipret_training.models import LoadedModel

__all__ = ["DIRECTIONS", "quality", "recall"]

DIRECTIONS = ("text_to_image", "image_to_text")

_BATCH = 128


def quality(metrics: dict[str, Any]) -> tuple[float, float]:
    """Return the key by which the best epoch is chosen: recall@10 from text to image, then mean recall."""
    return metrics["text_to_image"]["recall_at_10"], metrics["mean_recall"]


@torch.no_grad()
def recall(
    loaded: LoadedModel,
    pairs: PairSet,
    reader: ImageReader,
    texts: Texts,
    device: torch.device,
    world: World | None = None,
) -> dict[str, Any]:
    """Measure recall from text to image and from image to text.

    A caption is one query, however many images it has. Images that cannot be read do not count. Every process encodes a
    share of the images and captions, and all processes get the result. The model is in eval mode afterwards.

    Args:
        loaded: The model, on `device`.
        pairs: All held-out images and captions.
        reader: The images of this process: those whose position modulo the number of processes is its rank.
        texts: All captions.
        device: Where to run the model.
        world: The processes; None for this process alone.

    Returns:
        `text_to_image` and `image_to_text`, each a dictionary of `clipret.evaluation.metrics.Metrics`, and
        `mean_recall`, the mean of recall@1, 5 and 10 in both directions.

    Raises:
        ClipretError: No image can be read.
    """
    world = world or World(0, 1, device)
    loaded.model.eval()
    mine = range(world.rank, len(pairs.paths), world.size)
    rounds = _rounds(len(pairs.paths), world)
    shares = gather_objects(_encode_images(loaded, reader, len(mine), rounds, device), world)
    # The index of each image's embedding, by the position of the image in `pairs`
    image_index: dict[int, int] = {}
    for rank, (readable, _) in enumerate(shares):
        image_index |= {rank + world.size * place: len(image_index) + n for n, place in enumerate(readable)}
    if not image_index:
        raise ClipretError(
            f"none of the {len(pairs.paths)} held-out images can be read{reader.example()}; "
            "check image_root (--set image_root=…)"
        )
    relevant = [[image_index[image] for image in images if image in image_index] for images in pairs.of_caption()]
    captions = [caption for caption, images in enumerate(relevant) if images]  # those with a readable image
    encoded = gather_objects(_encode_captions(loaded, texts, captions, device, world), world)
    if not world.writes:
        result: dict[str, Any] = gather_objects(None, world)[0]
        return result
    image_embeddings = np.concatenate([embeddings for _, embeddings in shares if len(embeddings)])
    text_embeddings = np.empty((len(captions), image_embeddings.shape[1]), dtype=np.float32)
    for rank, embeddings in enumerate(encoded):
        text_embeddings[rank :: world.size] = embeddings
    caption_index = {caption: index for index, caption in enumerate(captions)}
    of_image = [[caption_index[caption] for caption in pairs.of_image[image]] for image in image_index]
    result = {
        "text_to_image": _measure(image_embeddings, text_embeddings, [relevant[caption] for caption in captions]),
        "image_to_text": _measure(text_embeddings, image_embeddings, of_image),
    }
    recalls = [result[direction][f"recall_at_{k}"] for direction in DIRECTIONS for k in (1, 5, 10)]
    result["mean_recall"] = sum(recalls) / len(recalls)
    gather_objects(result, world)
    return result


def _encode_images(
    loaded: LoadedModel, reader: ImageReader, count: int, rounds: int, device: torch.device
) -> tuple[list[int], Embeddings]:
    """Positions among this process's images, and their embeddings."""
    model: Any = loaded.model
    readable: list[int] = []
    embeddings: list[Embeddings] = []
    batches = iter(reader.batches(range(count), _BATCH))
    for _ in range(rounds):
        # All processes run the model equally often, because FSDP gathers sharded weights in it.
        batch, pixels = next(batches, ([], torch.zeros(1, loaded.image.size, loaded.image.size, 3, dtype=torch.uint8)))
        images = pixels.to(device).permute(0, 3, 1, 2).float() / 255  # [B,3,S,S]
        encoded = model.encode_image(normalise(loaded, images), normalize=True).float().cpu().numpy()
        if batch:
            readable += batch
            embeddings.append(encoded)
    return readable, np.concatenate(embeddings) if embeddings else np.empty((0, 0), np.float32)


def _encode_captions(
    loaded: LoadedModel, texts: Texts, captions: Sequence[int], device: torch.device, world: World
) -> Embeddings:
    """The embeddings of this process's share of the captions."""
    model: Any = loaded.model
    share = list(captions[world.rank :: world.size])
    embeddings: list[Embeddings] = []
    for number in range(_rounds(len(captions), world)):
        batch = torch.tensor(share[number * _BATCH : (number + 1) * _BATCH] or captions[:1])
        encoded = model.encode_text(texts.ids(batch).to(device), normalize=True).float().cpu().numpy()
        embeddings.append(encoded[: max(len(share) - number * _BATCH, 0)])
    return np.concatenate(embeddings)


def _rounds(count: int, world: World) -> int:
    """The number of batches of the process with the largest share of `count` items."""
    largest = -(-count // world.size)
    return -(-largest // _BATCH)


def _measure(embeddings: Embeddings, queries: Embeddings, relevant: list[list[int]]) -> dict[str, float]:
    metrics: Metrics = evaluate(Ranker(embeddings.astype(np.float16)), queries, relevant)
    return metrics.to_dict()
