"""From pictures and titles to batches: pictures with all their titles, decoded once where they fit."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipret.bundle import ImageSpec
from clipret.console import progress
from clipret.errors import ClipretError
from clipret.images import PictureError, load
from clipret.pairs import PairSet
from clipret.text import Tokenizer
from clipret.training.loaded import LoadedModel

Pixels = npt.NDArray[np.uint8]

__all__ = ["Pictures", "Texts", "positives", "split_pairs"]

_AHEAD = 3  # batches decoded ahead of the model when pictures are streamed: 58 MiB at 224 px and batch 128


def split_pairs(pairs: PairSet, share: float, seed: int) -> tuple[PairSet, PairSet]:
    """Training and validation part, split by picture: no picture is in both.

    Raises ClipretError when one of the two would be empty.
    """
    held_out = round(len(pairs.paths) * share)
    if not 0 < held_out < len(pairs.paths):
        raise ClipretError(
            f"a validation share of {share} of {len(pairs.paths)} pictures leaves one part empty: change --val-split"
        )
    order = torch.randperm(len(pairs.paths), generator=torch.Generator().manual_seed(seed)).tolist()
    return pairs.subset(sorted(order[held_out:])), pairs.subset(sorted(order[:held_out]))


class Texts:
    """The titles of a PairSet as token ids, made once.

    `of_picture[i]` holds the positions of picture i's titles, int64.
    """

    def __init__(self, loaded: LoadedModel, pairs: PairSet) -> None:
        self._ids = torch.from_numpy(Tokenizer(loaded.tokenizer_json, loaded.text)(pairs.titles))  # [N,L]
        used = self._ids != loaded.text.pad_id
        # Of a batch only the columns that one of its titles needs go through the text tower.
        trimmed = loaded.text.pad_to == "longest"
        self._lengths = (used * torch.arange(1, used.shape[1] + 1)).amax(dim=1) if trimmed else None
        self.of_picture = [torch.tensor(titles) for titles in pairs.of_picture]

    def ids(self, titles: Tensor) -> Tensor:
        """Token ids int64 [T,L] of the titles at these positions, int64 [T]."""
        width = self._ids.shape[1] if self._lengths is None else int(self._lengths[titles].max())
        return self._ids[titles, :width]

    def sample(self, pictures: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
        """Positions, int64 [T], of up to `count` titles of each picture, drawn without replacement."""
        drawn = []
        for picture in pictures:
            titles = self.of_picture[picture]
            drawn.append(titles[torch.randperm(len(titles), generator=generator)[:count]])
        return torch.cat(drawn)


def positives(of_picture: Sequence[Tensor], titles: Tensor) -> Tensor:
    """bool [B,T]: whether a row of the list pairs picture b (its titles: of_picture[b]) with titles[t]."""
    return torch.stack([torch.isin(titles, mine) for mine in of_picture])


class Pictures:
    """The decoded pictures of a PairSet as uint8, in memory when they take at most `cache_limit` bytes.

    Otherwise every epoch decodes them again, a few batches ahead of the model, in `threads` threads. `cached` is the
    number of bytes in memory. A picture that cannot be decoded is left out and its reason kept in `skipped`, by its
    position in `paths`. Raises ClipretError when all are decoded at once and none can be.
    """

    def __init__(self, paths: Sequence[Path], spec: ImageSpec, *, threads: int, cache_limit: int) -> None:
        self.skipped: dict[int, str] = {}
        self._paths, self._spec, self._threads = paths, spec, threads
        self._cache: Tensor | None = None
        bytes_needed = len(paths) * spec.size * spec.size * 3
        self.cached = bytes_needed if bytes_needed <= cache_limit else 0
        if self.cached:
            cache = np.zeros((len(paths), spec.size, spec.size, 3), dtype=np.uint8)
            decoded = self._decode(range(len(paths)))
            for position, pixels in progress(decoded, total=len(paths), desc="reading pictures", unit="picture"):
                if pixels is not None:
                    cache[position] = pixels
            if len(self.skipped) == len(paths):
                raise ClipretError(f"none of the {len(paths)} pictures can be read, {self.example()}")
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

    def skipped_paths(self) -> dict[Path, str]:
        return {self._paths[position]: reason for position, reason in self.skipped.items()}

    def example(self) -> str:
        """One unreadable picture and its reason, for a message."""
        position, reason = next(iter(self.skipped.items()))
        return f"for example {self._paths[position]}: {reason}; check --image-root"

    def _decode(self, order: Sequence[int], batch_size: int = 32) -> Iterator[tuple[int, Pixels | None]]:
        """Decode in threads, in order, at most a few batches ahead; None for what cannot be decoded."""
        wanted = (position for position in order if position not in self.skipped)
        waiting: deque[tuple[int, Future[Pixels]]] = deque()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:
            try:
                while True:
                    for position in islice(wanted, batch_size * _AHEAD - len(waiting)):
                        waiting.append((position, pool.submit(load, self._paths[position], self._spec)))
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
