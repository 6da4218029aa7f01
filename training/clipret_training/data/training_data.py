"""What a training learns from, in the order of its epochs: the images and captions of one process, step by step."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from clipret.errors import ClipretError
from clipret_training.annotations import Annotations
from clipret_training.checkpoint import Position
from clipret_training.config import FitConfig
from clipret_training.data.attributes import Attributes
from clipret_training.data.augment import Augmenter
from clipret_training.data.batches import Batch, ImageReader, Texts, normalise
from clipret_training.distributed import World, gather_objects, smallest
from clipret_training.models import LoadedModel
from clipret_training.seeds import generator

__all__ = ["TrainingData", "open_held_out"]


class TrainingData:
    """The share of a listing that belongs to this process, varied and prepared for a model.

    Args:
        config: How images are varied, how many of them and of their captions take part in a step.
        listing: What all processes learn from.
        loaded: The model, which decides size, mean, deviation and tokens.
        world: The processes.

    Raises:
        ClipretError: A process can read none of its images. It is said before anything is written.
    """

    def __init__(self, config: FitConfig, annotations: Annotations, loaded: LoadedModel, world: World) -> None:
        self._config, self._loaded, self._world = config, loaded, world
        self._mine = range(world.rank, len(annotations.pairs.paths), world.size)
        self._paths = annotations.pairs.paths
        self._texts = Texts(loaded, annotations, config.seed)
        more = Path(config.attributes) if config.attributes is not None else None
        wanted = config.negatives or config.loss == "soft"
        self._attributes = Attributes(loaded, annotations, more) if wanted else None
        image = loaded.image
        self._augment = Augmenter(
            config.augment,
            config.crop_size or image.size,
            config.crop_area,
            config.jitter,
            flip=config.flip,
            rotation=config.rotation,
            random_ops=config.random_ops,
            magnitude=config.magnitude,
            fill=image.fill if config.repad and image.resize == "longest" else None,
        )
        larger = msgspec.structs.replace(image, size=round(image.size * config.decode_scale))
        limit = _cache_limit(config, world)
        self.reader = ImageReader(
            annotations.subset(self._mine), larger, threads=config.threads, cache_limit=limit, fast=True
        )
        if bad := [reason for reason in gather_objects(self.reader.unreadable(), world) if reason is not None]:
            raise ClipretError(f"none of the {len(self._mine)} images can be read{bad[0]}; check --image-root")

    def batch_size(self) -> int:
        """Images of this process in a step, as far as is known which can be read."""
        readable = max(len(self._mine) - len(self.reader.skipped), 1)
        return min(self._config.batch_size // self._world.size, smallest(readable, self._world))

    def steps(self) -> int:
        """Those of all epochs, as far as is known which images can be read."""
        readable = smallest(len(self._mine) - len(self.reader.skipped), self._world)
        return max(self._config.epochs * readable // self.batch_size(), self._config.epochs)

    def epoch(self, at: Position) -> Iterator[tuple[list[int], Tensor, int]]:
        """The rest of the epoch that the training is at, in an order that its number decides.

        Args:
            at: Where the training is. Its `size` and, at the end, its `left` are set here.

        Yields:
            For each step the images, by their positions among this process's; their pixels, uint8 [B,S,S,3]; and what
            `at.consumed` is after the step. Every process has as many steps.

        Raises:
            ClipretError: No image can be read any more.
        """
        draw = generator(self._config.seed, "order", at.epoch, self._world.rank)
        order: list[int] = at.left + torch.randperm(len(self._mine), generator=draw).tolist()
        at.size = at.size or self.batch_size()
        yield from self._whole_batches(order, at.consumed, at.size)
        # Of streamed images only now is known which can be read: they may be too few for the batch that was tried.
        while not at.losses and (size := self.batch_size()) < at.size:
            at.size = size
            yield from self._whole_batches(order, at.consumed, size)
        if not at.losses:
            raise ClipretError(f"none of the {len(self._mine)} images can be read any more{self.reader.example()}")
        at.left = [image for image in order[at.consumed :] if image not in self.reader.skipped]

    def _whole_batches(self, order: Sequence[int], consumed: int, size: int) -> Iterator[tuple[list[int], Tensor, int]]:
        """Batches as long as every process has a whole one: a smaller one would have too few negatives. What is left
        over begins the next epoch."""
        batches = self.reader.batches(order[consumed:], size)
        while True:
            chosen, pixels = next(batches, ([], torch.empty(0)))
            if not smallest(len(chosen) == size, self._world):
                return
            for image in chosen:  # the unreadable ones between them are behind us, too
                consumed = order.index(image, consumed) + 1
            yield chosen, pixels, consumed

    def batch(self, chosen: Sequence[int], pixels: Tensor, at: Position) -> Batch:
        """What a step learns from.

        Args:
            chosen: The images, by their positions, as `epoch` yields them.
            pixels: uint8 [B,S,S,3].
            at: Where the training is: the numbers of its step and epoch decide what is drawn.

        Returns:
            Images on the device, the captions drawn for them, and what belongs together.
        """
        config = self._config
        draw = generator(config.seed, "step", at.step, self._world.rank)
        numbers = [self._mine[position] for position in chosen]  # as the texts number them
        captions, owners = self._texts.sample(numbers, config.captions, at.epoch)  # [T]
        images = normalise(self._loaded, self._augment(pixels.to(self._world.device), draw))  # [B,3,S,S]
        texts = self._texts.batch(captions, config.accumulate)
        extra: dict[str, Tensor] = {}
        if config.negatives and self._attributes is not None:
            swapped = self._attributes.negatives(numbers, captions, owners, draw)
            extra |= dict(zip(("negatives", "negative_keys"), swapped, strict=True))
        if config.loss == "soft" and self._attributes is not None:
            named = self._attributes.named(numbers, captions)
            extra |= dict(zip(("image_attributes", "text_attributes"), named, strict=True))
        return Batch(images, texts, *self._texts.keys(numbers, captions, owners), **extra)

    def paths(self, chosen: Sequence[int]) -> list[Path]:
        """Those of images that `epoch` chose."""
        return [self._paths[self._mine[position]] for position in chosen]


def open_held_out(
    config: FitConfig, annotations: Annotations, loaded: LoadedModel, world: World, *, cached: int
) -> tuple[ImageReader, Texts]:
    """The share of the held-out images that belongs to this process, and all captions.

    Args:
        config: Threads, and what the cache of decoded images may take.
        listing: What is held out.
        loaded: The model, which decides size and tokens.
        world: The processes.
        cached: Bytes of the cache that are taken already.

    Raises:
        ClipretError: No process can read any of its images.
    """
    mine = range(world.rank, len(annotations.pairs.paths), world.size)
    left = max(_cache_limit(config, world) - cached, 0)
    reader = ImageReader(annotations.subset(mine), loaded.image, threads=config.threads, cache_limit=left)
    bad = [reason for reason in gather_objects(reader.unreadable(), world) if reason is not None]
    if len(bad) == world.size:  # one process alone may have none
        raise ClipretError(
            f"none of the {len(annotations.pairs.paths)} images held out for validation can be read{bad[0]}: "
            "hold out others with --val, --val-where, --val-split or --seed"
        )
    return reader, Texts(loaded, annotations)


def _cache_limit(config: FitConfig, world: World) -> int:
    return int(config.cache_limit * 2**30) // world.size
