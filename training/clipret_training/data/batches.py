"""Batches of images and captions. Images are decoded once if they fit in memory."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipret.arrays import Pixels
from clipret.bundle import ImageSpec
from clipret.console import progress
from clipret.images.decode import load
from clipret.images.walk import ImageError
from clipret.inference.tokenizer import Tokenizer
from clipret_training.annotations import Annotations
from clipret_training.models import LoadedModel
from clipret_training.seeds import generator

__all__ = ["Batch", "ImageReader", "TextBatch", "Texts", "normalise"]

_AHEAD = 3  # batches decoded ahead of the model: 58 MiB at 224 px and batch size 128


@dataclass(frozen=True)
class TextBatch:
    """The captions of a step, in groups of similar length.

    Args:
        captions: Positions of the T captions, int64 [T].
        groups: Token ids of each group, int64 [T',L'].
        places: int64 [T]. The rows of all groups in sequence are the captions places[0], places[1], …
    """

    captions: Tensor
    groups: tuple[Tensor, ...]
    places: Tensor

    def ordered(self, embeddings: Sequence[Tensor]) -> Tensor:
        """Put embeddings in the order of `captions`.

        Args:
            embeddings: Those of each group, [T',D].

        Returns:
            [T,D].
        """
        order = torch.empty_like(self.places)
        order[self.places] = torch.arange(len(self.places))
        joined = torch.cat(list(embeddings))
        return joined[order.to(joined.device)]


@dataclass(frozen=True)
class Batch:
    """The images and texts of one process in a step.

    Args:
        images: float32 [B,3,S,S], normalized, on the device.
        texts: The captions.
        image_keys: int64 [B,K]; see `clipret_training.loss.LossBatch`, as for the following.
        text_keys: int64 [T,L].
        image_attributes: bool [B,A].
        text_attributes: bool [T,A].
        negatives: Token ids of hard negative texts, int64 [N,L].
        negative_keys: int64 [N,1].
    """

    images: Tensor
    texts: TextBatch
    image_keys: Tensor
    text_keys: Tensor
    image_attributes: Tensor | None = None
    text_attributes: Tensor | None = None
    negatives: Tensor | None = None
    negative_keys: Tensor | None = None


class Texts:
    """The captions of annotations as token ids. All are tokenized at construction.

    `of_image[i]` has the positions of the captions of image i, int64.

    Args:
        loaded: The model, whose tokenizer is used.
        annotations: The images and captions.
        seed: Decides the order in which the captions of an image take turns.
    """

    def __init__(self, loaded: LoadedModel, annotations: Annotations, seed: int = 0) -> None:
        pairs = annotations.pairs
        self._ids = torch.from_numpy(Tokenizer(loaded.tokenizer_json, loaded.text)(pairs.captions))  # [N,L]
        used = self._ids != loaded.text.pad_id
        # The text tower processes only as many tokens as the longest caption of a batch has.
        trimmed = loaded.text.pad_to == "longest"
        self._lengths = (used * torch.arange(1, used.shape[1] + 1)).amax(dim=1) if trimmed else None
        self.of_image = [torch.tensor(captions) for captions in pairs.of_image]
        draw = generator(seed, "captions")
        self._shuffled = [captions[torch.randperm(len(captions), generator=draw)] for captions in self.of_image]
        self._groups = [torch.tensor(groups, dtype=torch.int64) + len(pairs.captions) for groups in annotations.groups]

    def ids(self, captions: Tensor) -> Tensor:
        """Return token ids.

        Args:
            captions: Positions of captions, int64 [T].

        Returns:
            int64 [T,L].
        """
        width = self._ids.shape[1] if self._lengths is None else int(self._lengths[captions].max())
        return self._ids[captions, :width]

    def batch(self, captions: Tensor, parts: int = 1) -> TextBatch:
        """Group captions for the text tower.

        If the tower accepts texts of any length, the captions are sorted by length into at least four groups, because a
        long caption costs padding for all captions of its group.

        Args:
            captions: Positions of captions, int64 [T].
            parts: The smallest number of groups.
        """
        groups = max(parts, 4)
        if self._lengths is None or len(captions) < 8 * groups:
            return TextBatch(captions, self.ids(captions).tensor_split(parts), torch.arange(len(captions)))
        places = self._lengths[captions].argsort(stable=True)
        sorted_ids = tuple(self.ids(captions[part]) for part in places.tensor_split(groups))
        return TextBatch(captions, sorted_ids, places)

    def sample(self, images: Sequence[int], count: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Choose captions for images. The captions of an image take turns from epoch to epoch, in an order of its own.

        Args:
            images: Positions of images.
            count: The most captions per image.
            epoch: The number of the epoch, from 1.

        Returns:
            Positions of captions, int64 [T], and for each of them the index of its image in `images`, int64 [T].
        """
        sampled, owners = [], []
        for index, image in enumerate(images):
            captions = self._shuffled[image]
            if count < len(captions):
                captions = captions.roll(-count * (epoch - 1))[:count]
            sampled.append(captions)
            owners += [index] * len(captions)
        return torch.cat(sampled), torch.tensor(owners)

    def keys(self, images: Sequence[int], captions: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys of `clipret_training.loss.LossBatch`.

        The keys of an image are all its captions and its groups. The keys of a caption are the caption itself and the
        groups of the image for which it was sampled.

        Args:
            images: Positions of B images.
            captions: Positions of captions, int64 [T], as from `sample`.
            owners: For each caption the index of its image in `images`, int64 [T].

        Returns:
            int64 [B,K] and int64 [T,L], padded with -1.
        """
        groups = [self._groups[image] for image in images]
        of_images = [torch.cat([self.of_image[image], keys]) for image, keys in zip(images, groups, strict=True)]
        width = max(len(keys) for keys in groups)
        of_captions = torch.cat([captions[:, None], _padded(groups, width)[owners]], dim=1)  # [T,1+G]
        return _padded(of_images, max(len(keys) for keys in of_images)), of_captions


def _padded(keys: Sequence[Tensor], width: int) -> Tensor:
    """int64 tensors of any length as one tensor [N,width], padded with -1."""
    padded = torch.full((len(keys), width), -1)
    for number, values in enumerate(keys):
        padded[number, : len(values)] = values
    return padded


class ImageReader:
    """Decodes the images of annotations, and caches them if all fit in memory.

    Without the cache, threads decode the images in every epoch, a few batches ahead of the model. An image that cannot
    be decoded is skipped. `skipped` has its position and the reason; `cached` is the size of the cache in bytes.

    Args:
        annotations: The images.
        spec: Size, resizing and fill of the images.
        threads: How many threads decode.
        cache_limit: Largest size of the cache in bytes.
        fast: Whether to decode faster and less exactly, which is good enough for training; see
            `clipret.images.decode.load`.
    """

    def __init__(
        self, annotations: Annotations, spec: ImageSpec, *, threads: int, cache_limit: int, fast: bool = False
    ) -> None:
        self.skipped: dict[int, str] = {}
        self._annotations, self._spec, self._threads, self._fast = annotations, spec, threads, fast
        self._cache: Tensor | None = None
        count = len(annotations.pairs.paths)
        bytes_needed = count * spec.size * spec.size * 3
        self.cached = bytes_needed if bytes_needed <= cache_limit else 0
        if self.cached:
            cache = np.zeros((count, spec.size, spec.size, 3), dtype=np.uint8)
            decoded = self._decode(range(count))
            for position, pixels in progress(decoded, total=count, desc="reading images", unit="image"):
                if pixels is not None:
                    cache[position] = pixels
            self._cache = torch.from_numpy(cache)

    def batches(self, order: Sequence[int], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Decode images in batches.

        Args:
            order: Positions of images.
            batch_size: Largest number of images in a batch.

        Yields:
            Positions of B images and their pixels, uint8 [B,S,S,3], in this order, without unreadable images.
        """
        if self._cache is not None:
            usable = iter([position for position in order if position not in self.skipped])
            while batch := list(islice(usable, batch_size)):
                yield batch, self._cache[batch]
            return
        decoded = ((position, pixels) for position, pixels in self._decode(order, batch_size) if pixels is not None)
        while pairs := list(islice(decoded, batch_size)):
            yield [position for position, _ in pairs], torch.from_numpy(np.stack([pixels for _, pixels in pairs]))

    def path(self, position: int) -> Path:
        """Return the path of an image."""
        return self._annotations.pairs.paths[position]

    def skipped_paths(self) -> dict[Path, str]:
        """Return the paths of skipped images, with the reason."""
        return {self.path(position): reason for position, reason in self.skipped.items()}

    def unreadable(self) -> str | None:
        """Return None if any image can be decoded, otherwise `example()`. Decodes images until one succeeds."""
        readable = next(self.batches(range(len(self._annotations.pairs.paths)), 1), None)
        return self.example() if readable is None else None

    def example(self) -> str:
        """Return an unreadable image and its reason as the end of a sentence, or "" if there is none."""
        return next((f", for example {path}: {reason}" for path, reason in self.skipped_paths().items()), "")

    def _load(self, position: int) -> Pixels:
        read = self._annotations.read
        source = self.path(position) if read is None else read[position]()
        pixels: Pixels = load(source, self._spec, self._fast)
        return pixels

    def _decode(self, order: Sequence[int], batch_size: int = 32) -> Iterator[tuple[int, Pixels | None]]:
        """Decode in threads, in order, at most a few batches ahead. None for an image that cannot be decoded."""
        positions = (position for position in order if position not in self.skipped)
        pending: deque[tuple[int, Future[Pixels]]] = deque()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:
            try:
                while True:
                    for position in islice(positions, batch_size * _AHEAD - len(pending)):
                        pending.append((position, pool.submit(self._load, position)))
                    if not pending:
                        return
                    position, future = pending.popleft()
                    try:
                        yield position, future.result()
                    except ImageError as error:
                        self.skipped[position] = str(error)
                        yield position, None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for the pending images


def normalise(loaded: LoadedModel, images: Tensor) -> Tensor:
    """Subtract the model's mean and divide by its standard deviation.

    Args:
        loaded: The model.
        images: float32 [B,3,S,S], 0 to 1.

    Returns:
        float32 [B,3,S,S] in channels-last memory format.
    """
    mean, std = (images.new_tensor(values)[:, None, None] for values in (loaded.mean, loaded.std))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)
