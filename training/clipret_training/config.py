"""The configuration of a training: the same names and values as flags, recipe, params.toml and checkpoint.

Types and ranges are msgspec's (`clipret_training.schema`); what two options must have in common is checked by hand.
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
    """Everything that decides a training. Raises ClipretError for a value of another type or out of its range.

    Of `val` (an annotations file), `val_where` (an SQL expression over the rows of `val` or `data`) and `val_split` (a
    share of the images) the first that is set decides what is held out.
    """

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("adapter_targets", "adapter_towers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # TOML has lists only
        if self.batch_size % self.accumulate:
            raise ClipretError(f"batch_size {self.batch_size} does not split into {self.accumulate} equal parts")
        if self.adapter != "none" and (self.lock_image or self.lock_text):
            raise ClipretError("an adapter locks both towers by itself: leave lock_image and lock_text out")
        _ = self.loss_config, self.adapter_config  # which check themselves
        if self.fsdp and self.adapter != "none":
            raise ClipretError("fsdp spreads weights that are trained, an adapter's are few: leave one of them out")
        if self.fsdp and self.ema:
            raise ClipretError("ema keeps a copy of the weights, which fsdp has spread: leave one of them out")
        if self.fsdp and self.precision == "fp16":
            raise ClipretError("precision fp16 scales the loss, which fsdp does not support: use bf16")

    @classmethod
    def for_model(cls, data: str | None, model: str | None, *, recipe: str | None = None, **given: Any) -> Self:
        """The defaults of the model's family, below those of `recipe`, below what is given and not None.

        `recipe`: a name or a TOML file, a run's params.toml included; it may name `data` and `model` too. Wherever a
        path comes from, it is seen from the working folder and kept absolute: a run is resumed from any other.
        Raises ClipretError for what `read_recipe`, an unknown name or a wrong value raise, and without a model.
        """
        chosen = {"data": data, "model": model, **given}
        values = dict(read_recipe(recipe)) if recipe is not None else {}
        values |= {key: value for key, value in chosen.items() if value is not None}
        _refuse_unknown(values, recipe)
        for needed, hint in (("data", "name a list"), ("model", "pass --model, or a recipe with one")):
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
        """A configuration from a run's params.toml, as it was. Raises ClipretError."""
        if not path.is_file():
            raise ClipretError(f"{path.parent} is no run folder (no {path.name}): name one that clipret-train fit made")
        values = read_recipe(str(path))
        _refuse_unknown(values, str(path))
        try:
            return cls(**values)
        except TypeError:
            raise ClipretError(f"{path} lacks data or model: it is no params.toml of a run") from None

    @property
    def loss_config(self) -> LossConfig:
        names = ("label_smoothing", "drop_worst", "soft_weight", "soft_temperature", "local_loss")
        return LossConfig(kind=self.loss, **{name: getattr(self, name) for name in names})

    @property
    def adapter_config(self) -> AdapterConfig | None:
        if self.adapter == "none":
            return None
        names = ("rank", "alpha", "dropout", "targets", "towers")
        given: dict[str, Any] = {name: getattr(self, f"adapter_{name}") for name in names}
        return AdapterConfig(**given, dora=self.adapter == "dora")

    def to_dict(self) -> dict[str, Any]:
        """Names and values as TOML knows them: what is None is left out."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def decisive(self) -> dict[str, Any]:
        """What decides the weights that a training ends with: the rest may differ when a run is resumed."""
        return {name: value for name, value in self.to_dict().items() if name not in _MACHINE}

    def identity(self, processes: int) -> str:
        """What a checkpoint says of the run that it is of. Options that are newer than the first runs do not count
        where they are left out, so that an older run is still its own."""
        values = {name: value for name, value in self.decisive().items() if (name, value) not in _LATER}
        return f"{seed_of(json.dumps(values), processes):016x}"


_MACHINE = ("cache_limit", "device", "save_every", "tensorboard", "threads")
_LATER = {("optimizer", "adamw")}


_PATHS = ("data", "val", "image_root", "attributes")


def parse_value(name: str, text: str) -> Any:
    """What `--set NAME=TEXT` means: `text` as TOML, or as it stands where the option is a text.

    Raises ClipretError for an unknown name; types are checked by FitConfig.
    """
    _refuse_unknown({name: text}, None)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if takes_text(hints(FitConfig)[name]) and not isinstance(value, str | list) else value


def _absolute(path: str) -> str:
    return path if is_remote(path) else str(Path(path).absolute())


# What other trainers call them, where difflib would look for something else.
_ELSEWHERE = {
    "accum_freq": "accumulate",
    "grad_checkpointing": "checkpoint_gradients",
    "grad_clip_norm": "clip",
    "learning_rate": "lr",
    "wd": "weight_decay",
    "workers": "threads",
}


def _refuse_unknown(values: Mapping[str, Any], origin: str | None) -> None:
    known = hints(FitConfig)
    if {"soup", "ingredients"} <= values.keys() and origin is not None:
        folder = Path(origin).parent
        raise ClipretError(f"{folder} is a soup, which no training made: train from it with  --model {folder}")
    for name in values:
        if name not in known:
            near = [_ELSEWHERE[name]] if name in _ELSEWHERE else []
            near = near or difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            where = f" in {origin}" if origin is not None else ""
            raise ClipretError(
                f"there is no option {name!r}{where}: "
                + (f"did you mean {', '.join(near)}?" if near else "see  clipret-train fit --help")
            )
