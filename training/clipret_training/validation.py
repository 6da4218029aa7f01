"""Recall on held-out images, measured as the search will measure it: whole images, float32, exact ranking."""

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

__all__ = ["WAYS", "quality", "recall"]

WAYS = ("text_to_image", "image_to_text")

_BATCH = 128


def quality(metrics: dict[str, Any]) -> tuple[float, float]:
    """What decides which epoch is the best: recall@10 by text, then the mean recall."""
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
    """`text_to_image` and `image_to_text` as dictionaries of `Metrics`, and `mean_recall`, the mean of both ways'
    recall@1, 5 and 10; images that cannot be read do not count.

    A caption is one query however many images it has. `images` are all of `pairs` or, with `world`, those whose
    position is this process's rank modulo the number of processes; each then encodes its share, and all
    get the result. Leaves the model in eval mode. Raises ClipretError when no image can be read.
    """
    world = world or World(0, 1, device)
    loaded.model.eval()
    mine = range(world.rank, len(pairs.paths), world.size)
    rounds = _rounds(len(pairs.paths), world)
    shares = gather_objects(_encode_images(loaded, reader, len(mine), rounds, device), world)
    # Every rank's images by their positions in `pairs`, and the captions that any readable one has.
    row_of: dict[int, int] = {}
    for rank, (chosen, _) in enumerate(shares):
        row_of |= {rank + world.size * place: len(row_of) + n for n, place in enumerate(chosen)}
    if not row_of:
        raise ClipretError(
            f"none of the {len(pairs.paths)} held-out images can be read{reader.example()}; check --image-root"
        )
    found = [[row_of[image] for image in owners if image in row_of] for owners in pairs.of_caption()]
    asked = [caption for caption, embeddings in enumerate(found) if embeddings]
    encoded = gather_objects(_encode_captions(loaded, texts, asked, device, world), world)
    if not world.writes:
        result: dict[str, Any] = gather_objects(None, world)[0]
        return result
    image_embeddings = np.concatenate([embeddings for _, embeddings in shares if len(embeddings)])
    text_embeddings = np.empty((len(asked), image_embeddings.shape[1]), dtype=np.float32)
    for rank, embeddings in enumerate(encoded):
        text_embeddings[rank :: world.size] = embeddings
    place_of = {caption: place for place, caption in enumerate(asked)}
    of_image = [[place_of[caption] for caption in pairs.of_image[image]] for image in row_of]
    result = {
        "text_to_image": _measure(image_embeddings, text_embeddings, [found[caption] for caption in asked]),
        "image_to_text": _measure(text_embeddings, image_embeddings, of_image),
    }
    shares_found = [result[way][f"recall_at_{k}"] for way in WAYS for k in (1, 5, 10)]
    result["mean_recall"] = sum(shares_found) / len(shares_found)
    gather_objects(result, world)
    return result


def _encode_images(
    loaded: LoadedModel, reader: ImageReader, count: int, rounds: int, device: torch.device
) -> tuple[list[int], Embeddings]:
    """Places among this process's images, and their embeddings."""
    model: Any = loaded.model
    places: list[int] = []
    embeddings: list[Embeddings] = []
    batches = iter(reader.batches(range(count), _BATCH))
    for _ in range(rounds):
        # All processes run the model equally often: sharded weights are collected in it.
        chosen, pixels = next(batches, ([], torch.zeros(1, loaded.image.size, loaded.image.size, 3, dtype=torch.uint8)))
        images = pixels.to(device).permute(0, 3, 1, 2).float() / 255  # [B,3,S,S]
        encoded = model.encode_image(normalise(loaded, images), normalize=True).float().cpu().numpy()
        if chosen:
            places += chosen
            embeddings.append(encoded)
    return places, np.concatenate(embeddings) if embeddings else np.empty((0, 0), np.float32)


def _encode_captions(
    loaded: LoadedModel, texts: Texts, asked: Sequence[int], device: torch.device, world: World
) -> Embeddings:
    """The embeddings of every size-th of the captions."""
    model: Any = loaded.model
    mine = list(asked[world.rank :: world.size])
    embeddings: list[Embeddings] = []
    for number in range(_rounds(len(asked), world)):
        captions = torch.tensor(mine[number * _BATCH : (number + 1) * _BATCH] or asked[:1])
        encoded = model.encode_text(texts.ids(captions).to(device), normalize=True).float().cpu().numpy()
        embeddings.append(encoded[: max(len(mine) - number * _BATCH, 0)])
    return np.concatenate(embeddings)


def _rounds(count: int, world: World) -> int:
    """Batches of the process that has most of `count` things."""
    most = -(-count // world.size)
    return -(-most // _BATCH)


def _measure(embeddings: Embeddings, queries: Embeddings, relevant: list[list[int]]) -> dict[str, float]:
    metrics: Metrics = evaluate(Ranker(embeddings.astype(np.float16)), queries, relevant)
    return metrics.to_dict()
