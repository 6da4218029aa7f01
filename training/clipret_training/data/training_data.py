"""The images and captions of one process, in the order of epochs and steps."""

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
    """The share of the training data that belongs to this process, augmented and prepared for a model.

    Args:
        config: Augmentation, batch size, captions per image and cache limit.
        annotations: The training data of all processes.
        loaded: The model, which decides image size, normalization and tokens.
        world: The processes.

    Raises:
        ClipretError: A process can read none of its images. This is before anything is written.
    """

    def __init__(self, config: FitConfig, annotations: Annotations, loaded: LoadedModel, world: World) -> None:
        self._config, self._loaded, self._world = config, loaded, world
        self._share = range(world.rank, len(annotations.pairs.paths), world.size)
        self._paths = annotations.pairs.paths
        self._texts = Texts(loaded, annotations, config.seed)
        more = Path(config.attributes) if config.attributes is not None else None
        use_attributes = config.negatives or config.loss == "soft"
        self._attributes = Attributes(loaded, annotations, more) if use_attributes else None
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
            annotations.subset(self._share), larger, threads=config.threads, cache_limit=limit, fast=True
        )
        if reasons := [reason for reason in gather_objects(self.reader.unreadable(), world) if reason is not None]:
            raise ClipretError(
                f"none of the {len(self._share)} images can be read{reasons[0]}; check image_root (--set image_root=…)"
            )

    def batch_size(self) -> int:
        """Return the number of images of this process in a step, from the images that are readable as far as known."""
        readable = max(len(self._share) - len(self.reader.skipped), 1)
        return min(self._config.batch_size // self._world.size, smallest(readable, self._world))

    def steps(self) -> int:
        """Return the number of steps of all epochs, from the images that are readable as far as known."""
        readable = smallest(len(self._share) - len(self.reader.skipped), self._world)
        return max(self._config.epochs * readable // self.batch_size(), self._config.epochs)

    def epoch(self, position: Position) -> Iterator[tuple[list[int], Tensor, int]]:
        """Decode the rest of an epoch in a random order that seed, epoch and rank decide.

        Args:
            position: Where the training is. This method sets its `size` and, at the end, its `left`.

        Yields:
            For each step the indices of B images among those of this process; their pixels, uint8 [B,S,S,3]; and the
            value of `position.consumed` after the step. All processes have the same number of steps.

        Raises:
            ClipretError: No image can be read any more.
        """
        random = generator(self._config.seed, "order", position.epoch, self._world.rank)
        order: list[int] = position.left + torch.randperm(len(self._share), generator=random).tolist()
        position.size = position.size or self.batch_size()
        yield from self._whole_batches(order, position.consumed, position.size)
        # Images that are not cached may turn out to be unreadable only now, so that too few are left for a batch.
        while not position.losses and (size := self.batch_size()) < position.size:
            position.size = size
            yield from self._whole_batches(order, position.consumed, size)
        if not position.losses:
            raise ClipretError(f"none of the {len(self._share)} images can be read any more{self.reader.example()}")
        position.left = [image for image in order[position.consumed :] if image not in self.reader.skipped]

    def _whole_batches(self, order: Sequence[int], consumed: int, size: int) -> Iterator[tuple[list[int], Tensor, int]]:
        """Batches until a process has no full one, because a smaller one would have too few negatives. The images that
        are left start the next epoch."""
        batches = self.reader.batches(order[consumed:], size)
        while True:
            images, pixels = next(batches, ([], torch.empty(0)))
            if not smallest(len(images) == size, self._world):
                return
            for image in images:  # unreadable images between them are consumed, too
                consumed = order.index(image, consumed) + 1
            yield images, pixels, consumed

    def batch(self, images: Sequence[int], pixels: Tensor, position: Position) -> Batch:
        """Prepare a batch for a step.

        Args:
            images: The indices that `epoch` yields.
            pixels: uint8 [B,S,S,3].
            position: Where the training is. Its step and epoch decide the random numbers.

        Returns:
            The augmented images on the device, and their sampled captions.
        """
        config = self._config
        random = generator(config.seed, "step", position.step, self._world.rank)
        numbers = [self._share[index] for index in images]  # positions among the images of all processes
        captions, owners = self._texts.sample(numbers, config.captions, position.epoch)  # [T]
        augmented = normalise(self._loaded, self._augment(pixels.to(self._world.device), random))  # [B,3,S,S]
        texts = self._texts.batch(captions, config.accumulate)
        extra: dict[str, Tensor] = {}
        if config.negatives and self._attributes is not None:
            negatives = self._attributes.negatives(numbers, captions, owners, random)
            extra |= dict(zip(("negatives", "negative_keys"), negatives, strict=True))
        if config.loss == "soft" and self._attributes is not None:
            attributes = self._attributes.of(numbers, captions)
            extra |= dict(zip(("image_attributes", "text_attributes"), attributes, strict=True))
        return Batch(augmented, texts, *self._texts.keys(numbers, captions, owners), **extra)

    def paths(self, images: Sequence[int]) -> list[Path]:
        """Return the paths of images by the indices that `epoch` yields."""
        return [self._paths[self._share[index]] for index in images]


def open_held_out(
    config: FitConfig, annotations: Annotations, loaded: LoadedModel, world: World, *, cached: int
) -> tuple[ImageReader, Texts]:
    """Open the held-out images of this process, and all held-out captions.

    Args:
        config: Threads and cache limit.
        annotations: The held-out images and captions of all processes.
        loaded: The model, which decides image size and tokens.
        world: The processes.
        cached: Bytes of the cache that are already used.

    Returns:
        The images of this process and all captions.

    Raises:
        ClipretError: No process can read any of its images.
    """
    share = range(world.rank, len(annotations.pairs.paths), world.size)
    cache_left = max(_cache_limit(config, world) - cached, 0)
    reader = ImageReader(annotations.subset(share), loaded.image, threads=config.threads, cache_limit=cache_left)
    reasons = [reason for reason in gather_objects(reader.unreadable(), world) if reason is not None]
    if len(reasons) == world.size:  # a single process may have no readable image
        raise ClipretError(
            f"none of the {len(annotations.pairs.paths)} images held out for validation can be read{reasons[0]}: "
            "hold out others with --val, or --set val_where=…, val_split=… or seed=…"
        )
    return reader, Texts(loaded, annotations)


def _cache_limit(config: FitConfig, world: World) -> int:
    return int(config.cache_limit * 2**30) // world.size
