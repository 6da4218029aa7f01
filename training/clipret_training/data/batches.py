"""From images and captions to batches: images with all their captions, decoded once where they fit."""

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

_AHEAD = 3  # batches decoded ahead of the model when images are streamed: 58 MiB at 224 px and batch 128


@dataclass(frozen=True)
class TextBatch:
    """The captions of a step. `groups` are token ids int64 [T',L'] that together are all T captions, of similar length
    each; `places` says which: the rows of all groups, one behind the other, are the captions places[0], places[1], …"""

    captions: Tensor  # int64 [T]
    groups: tuple[Tensor, ...]
    places: Tensor  # int64 [T]

    def ordered(self, rows: Sequence[Tensor]) -> Tensor:
        """What the text tower made of the groups, [T',D] each -> [T,D] in the order of `captions`."""
        order = torch.empty_like(self.places)
        order[self.places] = torch.arange(len(self.places))
        joined = torch.cat(list(rows))
        return joined[order.to(joined.device)]


@dataclass(frozen=True)
class Batch:
    """What one process adds to a step. images: float32 [B,3,S,S], mean and deviation taken out, on the device.
    image_keys int64 [B,K] and text_keys int64 [T,L]: which belong together, see `LossBatch`; so are the attributes.
    negatives: token ids int64 [N,L] of texts that are no image's."""

    images: Tensor
    texts: TextBatch
    image_keys: Tensor
    text_keys: Tensor
    image_attributes: Tensor | None = None
    text_attributes: Tensor | None = None
    negatives: Tensor | None = None
    negative_keys: Tensor | None = None


class Texts:
    """The captions of a Listing as token ids, made once.

    `of_image[i]` holds the positions of image i's captions, int64.
    """

    def __init__(self, loaded: LoadedModel, annotations: Annotations, seed: int = 0) -> None:
        pairs = annotations.pairs
        self._ids = torch.from_numpy(Tokenizer(loaded.tokenizer_json, loaded.text)(pairs.captions))  # [N,L]
        used = self._ids != loaded.text.pad_id
        # Of a batch only the columns that one of its captions needs go through the text tower.
        trimmed = loaded.text.pad_to == "longest"
        self._lengths = (used * torch.arange(1, used.shape[1] + 1)).amax(dim=1) if trimmed else None
        self.of_image = [torch.tensor(captions) for captions in pairs.of_image]
        draw = generator(seed, "captions")
        self._shuffled = [captions[torch.randperm(len(captions), generator=draw)] for captions in self.of_image]
        self._groups = [torch.tensor(groups, dtype=torch.int64) + len(pairs.captions) for groups in annotations.groups]

    def ids(self, captions: Tensor) -> Tensor:
        """Token ids int64 [T,L] of the captions at these positions, int64 [T]."""
        width = self._ids.shape[1] if self._lengths is None else int(self._lengths[captions].max())
        return self._ids[captions, :width]

    def batch(self, captions: Tensor, parts: int = 1) -> TextBatch:
        """The captions at these positions, int64 [T], in `parts` groups at least; sorted by length into four or more if
        they may be trimmed: a long caption makes a tower compute padding for all that it shares a group with."""
        groups = max(parts, 4)
        if self._lengths is None or len(captions) < 8 * groups:
            return TextBatch(captions, self.ids(captions).tensor_split(parts), torch.arange(len(captions)))
        places = self._lengths[captions].argsort(stable=True)
        sorted_ids = tuple(self.ids(captions[part]) for part in places.tensor_split(groups))
        return TextBatch(captions, sorted_ids, places)

    def sample(self, images: Sequence[int], count: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Positions, int64 [T], of up to `count` captions of each image; and for each of them its image's place in
        `images`, int64 [T]. Epoch by epoch, from 1, an image's captions come in turn, in an order of its own:
        none comes again before all have."""
        drawn, owners = [], []
        for place, image in enumerate(images):
            captions = self._shuffled[image]
            if count < len(captions):
                captions = captions.roll(-count * (epoch - 1))[:count]
            drawn.append(captions)
            owners += [place] * len(captions)
        return torch.cat(drawn), torch.tensor(owners)

    def keys(self, images: Sequence[int], captions: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B,K] and [T,L], as `clipret_training.loss.LossBatch` has them: an image's keys are all its captions
        and its groups, a caption's are itself and the groups of the image that it was drawn for."""
        groups = [self._groups[image] for image in images]
        of_images = [torch.cat([self.of_image[p], mine]) for p, mine in zip(images, groups, strict=True)]
        width = max(len(mine) for mine in groups)
        of_captions = torch.cat([captions[:, None], _padded(groups, width)[owners]], dim=1)  # [T,1+G]
        return _padded(of_images, max(len(keys) for keys in of_images)), of_captions


def _padded(rows: Sequence[Tensor], width: int) -> Tensor:
    """int64 rows of any length as one tensor [N,width], filled up with -1."""
    table = torch.full((len(rows), width), -1)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table


class ImageReader:
    """The decoded images of a Listing as uint8, in memory when they take at most `cache_limit` bytes.

    Otherwise every epoch decodes them again, a few batches ahead of the model, in `threads` threads. `cached` is the
    number of bytes in memory. `fast` decodes as `clipret.images.decode.load` does with it: good enough to learn from. A
    image that cannot be decoded is left out and its reason kept in `skipped`, by its position in the list.
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
        """Positions and pixels uint8 [B,S,S,3] in the given order, unreadable images left out; B <= batch_size."""
        if self._cache is not None:
            usable = iter([position for position in order if position not in self.skipped])
            while batch := list(islice(usable, batch_size)):
                yield batch, self._cache[batch]
            return
        decoded = ((position, pixels) for position, pixels in self._decode(order, batch_size) if pixels is not None)
        while pairs := list(islice(decoded, batch_size)):
            yield [position for position, _ in pairs], torch.from_numpy(np.stack([pixels for _, pixels in pairs]))

    def path(self, position: int) -> Path:
        return self._annotations.pairs.paths[position]

    def skipped_paths(self) -> dict[Path, str]:
        return {self.path(position): reason for position, reason in self.skipped.items()}

    def unreadable(self) -> str | None:
        """None where any image can be decoded, otherwise `example()`. Of streamed images so many are tried."""
        readable = next(self.batches(range(len(self._annotations.pairs.paths)), 1), None)
        return self.example() if readable is None else None

    def example(self) -> str:
        """An unreadable image and its reason, as the end of a sentence; "" where there is none."""
        return next((f", for example {self.path(place)}: {reason}" for place, reason in self.skipped.items()), "")

    def _load(self, position: int) -> Pixels:
        read = self._annotations.read
        source = self.path(position) if read is None else read[position]()
        pixels: Pixels = load(source, self._spec, self._fast)
        return pixels

    def _decode(self, order: Sequence[int], batch_size: int = 32) -> Iterator[tuple[int, Pixels | None]]:
        """Decode in threads, in order, at most a few batches ahead; None for what cannot be decoded."""
        wanted = (position for position in order if position not in self.skipped)
        waiting: deque[tuple[int, Future[Pixels]]] = deque()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:
            try:
                while True:
                    for position in islice(wanted, batch_size * _AHEAD - len(waiting)):
                        waiting.append((position, pool.submit(self._load, position)))
                    if not waiting:
                        return
                    position, future = waiting.popleft()
                    try:
                        yield position, future.result()
                    except ImageError as error:
                        self.skipped[position] = str(error)
                        yield position, None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C must not wait for images nobody will use


def normalise(loaded: LoadedModel, images: Tensor) -> Tensor:
    """float32 [B,3,S,S] in 0..1 less the model's mean, over its deviation, in the layout convolutions like best."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (loaded.mean, loaded.std))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)
