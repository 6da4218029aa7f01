"""The configuration of a training, with the same names and values in flags, recipes, params.toml and checkpoints.

msgspec checks types and ranges (`clipret_training.schema`). `FitConfig` checks which settings exclude each other.
"""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from clipret.errors import ClipretError
from clipret.locations import is_remote
from clipret_training.loss import LossConfig
from clipret_training.models import SMALL, anchored, architecture
from clipret_training.recipe import read_recipe
from clipret_training.schema import (
    check,
    check_fields,
    hints,
    takes_text,
)
from clipret_training.seeds import seed_of
from clipret_training.settings import Settings
from clipret_training.tuning import AdapterConfig, native_precision, open_device

__all__ = ["FitConfig", "parse_value"]


@dataclass(frozen=True)
class FitConfig(Settings):
    """All settings of a training, checked.

    The first of these that is set decides which images are held out: `val` (an annotations file), `val_where` (an SQL
    expression over the rows of `val` or `data`), `val_split` (a share of the images).

    Raises:
        ClipretError: A value has the wrong type or is out of range, or two settings exclude each other.

    Examples:
        >>> config = FitConfig(data="captions.csv", model="ViT-B-32", lr=1e-4)
        >>> config.epochs
        5
        >>> FitConfig(data="captions.csv", model="ViT-B-32", epochs=0)
        Traceback (most recent call last):
        clipret.errors.ClipretError: epochs is 0: it must be a whole number from 1 to 1e+09
    """

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("adapter_targets", "adapter_towers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # TOML has lists only
        if self.batch_size % self.accumulate:
            raise ClipretError(f"batch_size {self.batch_size} does not split into {self.accumulate} equal parts")
        if self.adapter != "none" and (self.lock_image or self.lock_text):
            raise ClipretError("an adapter freezes both towers: leave lock_image and lock_text out")
        _ = self.loss_config, self.adapter_config  # both check their values
        if self.fsdp and self.adapter != "none":
            raise ClipretError("fsdp does not support adapters, which have few weights to shard: leave one of them out")
        if self.fsdp and self.ema:
            raise ClipretError("ema does not work with sharded weights: leave ema or fsdp out")
        if self.fsdp and self.precision == "fp16":
            raise ClipretError("precision fp16 needs loss scaling, which does not work with fsdp: use bf16")

    @classmethod
    def for_model(cls, data: str | None, model: str | None, *, recipe: str | None = None, **settings: Any) -> Self:
        """Combine the settings of several origins.

        A value in `settings` wins over one in `recipe`, and this over the default of the model's family. Relative paths
        start from the working folder and become absolute, so that a run can be resumed from any folder.

        Args:
            data: An annotations file or archives; None if the recipe has it.
            model: What `--model` names; None if the recipe has it.
            recipe: The name of a recipe, or a TOML file such as a run's params.toml.
            settings: Other settings by name. None means that a setting is not set.

        Raises:
            ClipretError: The recipe cannot be read, a name is unknown, a value is wrong, or data or model is missing.
        """
        explicit = {"data": data, "model": model, **settings}
        values = dict(read_recipe(recipe)) if recipe is not None else {}
        values |= {key: value for key, value in explicit.items() if value is not None}
        _refuse_unknown(values, recipe)
        for needed, hint in (
            ("data", "pass an annotations file or archives"),
            ("model", "pass --model, or a recipe with one"),
        ):
            if values.get(needed) is None:
                raise ClipretError(f"there is no {needed}: {hint}")
        kinds = hints(cls)
        for key, value in values.items():
            check(key, value, kinds[key])
        values |= {key: _absolute(values[key]) for key in _PATHS if values.get(key) is not None}
        values["model"] = anchored(values["model"])
        name, has_weights = architecture(values["model"])
        family = "small" if name == SMALL else "fine-tune" if has_weights else "from-scratch"
        device = open_device(values.get("device", "cpu"))
        machine = {"precision": native_precision(device), "threads": torch.get_num_threads()}
        return cls(**(machine | read_recipe(family) | values))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the configuration of a run.

        Args:
            path: The params.toml of a run folder.

        Raises:
            ClipretError: The file cannot be read or is not a params.toml.
        """
        if not path.is_file():
            raise ClipretError(
                f"{path.parent} is no run folder (no {path.name}): pass one that clipret-train fit created"
            )
        values = read_recipe(str(path))
        _refuse_unknown(values, str(path))
        try:
            return cls(**values)
        except TypeError as error:
            raise ClipretError(
                f"{path} has no data or no model, so it is not the params.toml of a run: pass another run folder"
            ) from error

    @property
    def loss_config(self) -> LossConfig:
        """The settings of the loss."""
        names = ("label_smoothing", "drop_worst", "soft_weight", "soft_temperature", "local_loss")
        return LossConfig(kind=self.loss, **{name: getattr(self, name) for name in names})

    @property
    def adapter_config(self) -> AdapterConfig | None:
        """The settings of the adapter, or None without one."""
        if self.adapter == "none":
            return None
        names = ("rank", "alpha", "dropout", "targets", "towers")
        adapter: dict[str, Any] = {name: getattr(self, f"adapter_{name}") for name in names}
        return AdapterConfig(**adapter, dora=self.adapter == "dora")

    def to_dict(self) -> dict[str, Any]:
        """Return names and values for a TOML file, which has no null: settings that are None are left out."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide the trained weights. Only the others may change when a run is resumed."""
        return {name: value for name, value in self.to_dict().items() if name not in _MACHINE}

    def identity(self, processes: int) -> str:
        """Return a hash that tells this run from others; checkpoints store it.

        Newer settings count only if they differ from their default, so that older runs keep their identity.

        Args:
            processes: How many processes train together.
        """
        values = {name: value for name, value in self.decisive().items() if (name, value) not in _LATER}
        return f"{seed_of(json.dumps(values), processes):016x}"


_MACHINE = ("cache_limit", "device", "save_every", "tensorboard", "threads")
_LATER = {("optimizer", "adamw")}


_PATHS = ("data", "val", "image_root", "attributes")


def parse_value(name: str, text: str) -> Any:
    """Parse the value of `--set NAME=TEXT`. `FitConfig` checks its type and range.

    Args:
        name: The name of a setting.
        text: Its value in TOML; a string needs no quotes.

    Raises:
        ClipretError: There is no such setting.

    Examples:
        >>> parse_value("epochs", "10"), parse_value("where", "split = 'train'")
        (10, "split = 'train'")
    """
    _refuse_unknown({name: text}, None)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if takes_text(hints(FitConfig)[name]) and not isinstance(value, str | list) else value


def _absolute(path: str) -> str:
    return path if is_remote(path) else str(Path(path).absolute())


# Names of other trainers that difflib does not find.
_SYNONYMS = {
    "accum_freq": "accumulate",
    "grad_checkpointing": "checkpoint_gradients",
    "grad_clip_norm": "clip",
    "learning_rate": "lr",
    "wd": "weight_decay",
    "workers": "threads",
}


def _refuse_unknown(values: Mapping[str, Any], origin: str | None) -> None:
    """Raise ClipretError if a name is no setting. `origin` is the file that the values come from."""
    names = hints(FitConfig)
    if {"soup", "ingredients"} <= values.keys() and origin is not None:
        folder = Path(origin).parent
        raise ClipretError(f"{folder} is a soup and not the run of a training: train from it with  --model {folder}")
    for name in values:
        if name not in names:
            near = [_SYNONYMS[name]] if name in _SYNONYMS else []
            near = near or difflib.get_close_matches(name, names, n=3, cutoff=0.4)
            where = f" in {origin}" if origin is not None else ""
            raise ClipretError(
                f"there is no option {name!r}{where}: "
                + (f"did you mean {', '.join(near)}?" if near else "see  clipret-train fit --help")
            )
