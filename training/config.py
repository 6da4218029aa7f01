"""The configuration of a training, and the recipes that fill in what the user leaves open."""

from dataclasses import dataclass
from typing import Any, Self

import torch

from clipret.training.augment import Augment
from clipret.training.models import SMALL, architecture
from clipret.training.precision import Precision, native_precision, open_device

__all__ = ["FitConfig"]

# Flickr8k's 6,000 pictures from scratch on one core: figures in benchmarks/README.md.
_SMALL = {
    "epochs": 60,
    "batch_size": 128,
    "lr": 2e-3,
    "weight_decay": 0.1,
    "warmup": 0.05,
    "captions": 5,
    "crop_size": 64,
    "crop_area": 0.35,
    "validate_every": 5,  # as long as half an epoch
}
_FINE_TUNE = {
    "epochs": 5,
    "batch_size": 64,
    "lr": 1e-5,
    "weight_decay": 0.1,
    "warmup": 0.05,
    "captions": 1,
    "crop_size": None,
    "crop_area": 0.7,
    "validate_every": 1,
}
_FROM_SCRATCH = _FINE_TUNE | {"epochs": 30, "lr": 5e-4, "weight_decay": 0.2, "crop_area": 0.5}


@dataclass(frozen=True)
class FitConfig:
    """Everything that decides a training; written to the run's params.toml as it is.

    Of `val` (a list of its own), `val_where` (an SQL expression over the rows of `val` or `data`) and `val_split` (a
    share of the pictures) the first that is given decides what is held out; pictures that are held out are never
    trained on. `validate_every` counts epochs. `captions` is how many titles of a picture take part in a step,
    `warmup` the share of all steps until `lr` is reached, `crop_size` the side in pixels of what the image tower sees
    in training (None: the model's own), `crop_area` the least share of a picture that a crop keeps, `jitter` how
    far brightness, contrast and saturation may move from 1.
    """

    data: str
    model: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup: float
    captions: int
    crop_size: int | None
    crop_area: float
    validate_every: int
    precision: Precision
    threads: int
    jitter: float = 0.3
    augment: Augment = "photo"
    image_root: str | None = None
    image_column: str | None = None
    title_column: str | None = None
    where: str | None = None
    val: str | None = None
    val_where: str | None = None
    val_split: float = 0.1
    device: str = "cpu"
    cache_limit: float = 4.0  # GiB of decoded pictures
    seed: int = 0

    @classmethod
    def for_model(cls, data: str, model: str, **given: Any) -> Self:
        """A configuration in which the model's recipe stands for every value that is not given or is None."""
        name, has_weights = architecture(model)
        recipe: dict[str, Any] = _SMALL if name == SMALL else _FINE_TUNE if has_weights else _FROM_SCRATCH
        device = open_device(given.get("device") or "cpu")
        values = {"precision": native_precision(device), "threads": torch.get_num_threads(), **recipe}
        values |= {key: value for key, value in given.items() if value is not None}
        return cls(data=data, model=model, **values)
