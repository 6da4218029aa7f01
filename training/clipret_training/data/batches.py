"""From pictures and titles to batches: pictures with all their titles, decoded once where they fit."""

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
from clipret.images.walk import PictureError
from clipret.inference.tokenizer import Tokenizer
from clipret_training.listing import Listing
from clipret_training.models import LoadedModel
from clipret_training.seeds import generator

__all__ = ["Batch", "Pictures", "TextBatch", "Texts", "normalise"]

_AHEAD = 3  # batches decoded ahead of the model when pictures are streamed: 58 MiB at 224 px and batch 128


@dataclass(frozen=True)
class TextBatch:
    """The titles of a step. `groups` are token ids int64 [T',L'] that together are all T titles, of similar length
    each; `places` says which: the rows of all groups, one behind the other, are the titles places[0], places[1], …"""

    titles: Tensor  # int64 [T]
    groups: tuple[Tensor, ...]
    places: Tensor  # int64 [T]

    def ordered(self, rows: Sequence[Tensor]) -> Tensor:
        """What the text tower made of the groups, [T',D] each -> [T,D] in the order of `titles`."""
        order = torch.empty_like(self.places)
        order[self.places] = torch.arange(len(self.places))
        joined = torch.cat(list(rows))
        return joined[order.to(joined.device)]


@dataclass(frozen=True)
class Batch:
    """What one process adds to a step. images: float32 [B,3,S,S], mean and deviation taken out, on the device.
    image_keys int64 [B,K] and text_keys int64 [T,L]: which belong together, see `LossBatch`; so are the attributes.
    negatives: token ids int64 [N,L] of texts that are no picture's."""

    images: Tensor
    texts: TextBatch
    image_keys: Tensor
    text_keys: Tensor
    image_attributes: Tensor | None = None
    text_attributes: Tensor | None = None
    negatives: Tensor | None = None
    negative_keys: Tensor | None = None


class Texts:
    """The titles of a Listing as token ids, made once.

    `of_picture[i]` holds the positions of picture i's titles, int64.
    """

    def __init__(self, loaded: LoadedModel, listing: Listing, seed: int = 0) -> None:
        pairs = listing.pairs
        self._ids = torch.from_numpy(Tokenizer(loaded.tokenizer_json, loaded.text)(pairs.titles))  # [N,L]
        used = self._ids != loaded.text.pad_id
        # Of a batch only the columns that one of its titles needs go through the text tower.
        trimmed = loaded.text.pad_to == "longest"
        self._lengths = (used * torch.arange(1, used.shape[1] + 1)).amax(dim=1) if trimmed else None
        self.of_picture = [torch.tensor(titles) for titles in pairs.of_picture]
        draw = generator(seed, "captions")
        self._shuffled = [titles[torch.randperm(len(titles), generator=draw)] for titles in self.of_picture]
        self._groups = [torch.tensor(groups, dtype=torch.int64) + len(pairs.titles) for groups in listing.groups]

    def ids(self, titles: Tensor) -> Tensor:
        """Token ids int64 [T,L] of the titles at these positions, int64 [T]."""
        width = self._ids.shape[1] if self._lengths is None else int(self._lengths[titles].max())
        return self._ids[titles, :width]

    def batch(self, titles: Tensor, parts: int = 1) -> TextBatch:
        """The titles at these positions, int64 [T], in `parts` groups at least; sorted by length into four or more if
        they may be trimmed: a long caption makes a tower compute padding for all that it shares a group with."""
        groups = max(parts, 4)
        if self._lengths is None or len(titles) < 8 * groups:
            return TextBatch(titles, self.ids(titles).tensor_split(parts), torch.arange(len(titles)))
        places = self._lengths[titles].argsort(stable=True)
        sorted_ids = tuple(self.ids(titles[part]) for part in places.tensor_split(groups))
        return TextBatch(titles, sorted_ids, places)

    def sample(self, pictures: Sequence[int], count: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Positions, int64 [T], of up to `count` titles of each picture; and for each of them its picture's place in
        `pictures`, int64 [T]. Epoch by epoch, from 1, a picture's titles come in turn, in an order of its own:
        none comes again before all have."""
        drawn, owners = [], []
        for place, picture in enumerate(pictures):
            titles = self._shuffled[picture]
            if count < len(titles):
                titles = titles.roll(-count * (epoch - 1))[:count]
            drawn.append(titles)
            owners += [place] * len(titles)
        return torch.cat(drawn), torch.tensor(owners)

    def keys(self, pictures: Sequence[int], titles: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B,K] and [T,L], as `clipret_training.loss.LossBatch` has them: a picture's keys are all its titles and
        its groups, a title's are itself and the groups of the picture that it was drawn for."""
        groups = [self._groups[picture] for picture in pictures]
        of_images = [torch.cat([self.of_picture[p], mine]) for p, mine in zip(pictures, groups, strict=True)]
        width = max(len(mine) for mine in groups)
        of_titles = torch.cat([titles[:, None], _padded(groups, width)[owners]], dim=1)  # [T,1+G]
        return _padded(of_images, max(len(keys) for keys in of_images)), of_titles


def _padded(rows: Sequence[Tensor], width: int) -> Tensor:
    """int64 rows of any length as one tensor [N,width], filled up with -1."""
    table = torch.full((len(rows), width), -1)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table


class Pictures:
    """The decoded pictures of a Listing as uint8, in memory when they take at most `cache_limit` bytes.

    Otherwise every epoch decodes them again, a few batches ahead of the model, in `threads` threads. `cached` is the
    number of bytes in memory. `fast` decodes as `clipret.images.decode.load` does with it: good enough to learn from. A
    picture that cannot be decoded is left out and its reason kept in `skipped`, by its position in the list.
    """

    def __init__(
        self, listing: Listing, spec: ImageSpec, *, threads: int, cache_limit: int, fast: bool = False
    ) -> None:
        self.skipped: dict[int, str] = {}
        self._listing, self._spec, self._threads, self._fast = listing, spec, threads, fast
        self._cache: Tensor | None = None
        count = len(listing.pairs.paths)
        bytes_needed = count * spec.size * spec.size * 3
        self.cached = bytes_needed if bytes_needed <= cache_limit else 0
        if self.cached:
            cache = np.zeros((count, spec.size, spec.size, 3), dtype=np.uint8)
            decoded = self._decode(range(count))
            for position, pixels in progress(decoded, total=count, desc="reading pictures", unit="picture"):
                if pixels is not None:
                    cache[position] = pixels
            self._cache = torch.from_numpy(cache)

    def batches(self, order: Sequence[int], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Positions and pixels uint8 [B,S,S,3] in the given order, unreadable pictures left out; B <= batch_size."""
        if self._cache is not None:
            usable = iter([position for position in order if position not in self.skipped])
            while batch := list(islice(usable, batch_size)):
                yield batch, self._cache[batch]
            return
        decoded = ((position, pixels) for position, pixels in self._decode(order, batch_size) if pixels is not None)
        while pairs := list(islice(decoded, batch_size)):
            yield [position for position, _ in pairs], torch.from_numpy(np.stack([pixels for _, pixels in pairs]))

    def path(self, position: int) -> Path:
        return self._listing.pairs.paths[position]

    def skipped_paths(self) -> dict[Path, str]:
        return {self.path(position): reason for position, reason in self.skipped.items()}

    def unreadable(self) -> str | None:
        """None where any picture can be decoded, otherwise `example()`. Of streamed pictures so many are tried."""
        readable = next(self.batches(range(len(self._listing.pairs.paths)), 1), None)
        return self.example() if readable is None else None

    def example(self) -> str:
        """An unreadable picture and its reason, as the end of a sentence; "" where there is none."""
        return next((f", for example {self.path(place)}: {reason}" for place, reason in self.skipped.items()), "")

    def _load(self, position: int) -> Pixels:
        read = self._listing.read
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
                    except PictureError as error:
                        self.skipped[position] = str(error)
                        yield position, None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C must not wait for pictures nobody will use


def normalise(loaded: LoadedModel, images: Tensor) -> Tensor:
    """float32 [B,3,S,S] in 0..1 less the model's mean, over its deviation, in the layout convolutions like best."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (loaded.mean, loaded.std))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)
