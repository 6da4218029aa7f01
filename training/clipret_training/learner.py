"""The model of a training with its optimiser: what a step changes and a checkpoint holds."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from clipret.errors import ClipretError
from clipret_training.checkpoint import Checkpoints
from clipret_training.config import FitConfig
from clipret_training.distributed import World, average_gradients
from clipret_training.distributed.fsdp import (
    clip_gradients,
    load_shards,
    save_shards,
    shard_model,
    split_groups,
    whole_weights,
)
from clipret_training.filenames import ADAPTER
from clipret_training.loss import SIGLIP_BIAS
from clipret_training.models import LoadedModel, load_model, pool_early
from clipret_training.optim import MovingAverage, make_optimizer
from clipret_training.seeds import seed_of
from clipret_training.tuning import (
    add_adapters,
    base_state,
    checkpoint_gradients,
    drop_patches,
    freeze_unused,
    lock_tower,
    parameter_groups,
    train_mode,
    write_adapter,
)

__all__ = ["Learner"]

_MAX_LOGIT_SCALE = math.log(100)  # as in CLIP: a larger one makes training unstable


class Learner:
    """Loads the model as `config` wants it, or from the checkpoint `last` of this run, and prepares it for training.

    Raises ClipretError when it cannot be loaded, or lacks what `config` asks of it.
    """

    def __init__(self, config: FitConfig, captions: Sequence[str], world: World, last: Path | None) -> None:
        self.config, self.world = config, world
        # Merged weights say nothing of the adapter that is in them.
        source = config.model if last is None or config.adapter != "none" or config.fsdp else str(last)
        self.loaded = _as_wanted(load_model(source, seed=config.seed, captions=captions), config)
        if config.loss == "siglip":
            self.loaded = _with_bias(self.loaded)
        model: Any = self.loaded.model.to(world.device)
        if not config.fsdp:  # which wants its weights contiguous
            model.to(memory_format=torch.channels_last)
        self.model = model
        if config.patch_dropout:
            drop_patches(model, config.patch_dropout)
        if config.checkpoint_gradients:
            checkpoint_gradients(model)
        else:
            pool_early(model)
        _choose_trained(model, config)
        if config.fsdp:
            shard_model(model, world)
        groups = parameter_groups(
            model,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            image_lr_scale=config.image_lr_scale,
            text_lr_scale=config.text_lr_scale,
            muon=config.optimizer == "muon",
        )
        if config.fsdp:
            groups = split_groups(groups)
        betas = (config.beta1, config.beta2)
        self.optimizer = make_optimizer(groups, lr=config.lr, betas=betas, epsilon=config.epsilon)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
        self.average = MovingAverage(model, config.ema) if config.ema else None

    def step(self, lr: float) -> bool:
        """Go a step along the gradients, averaged over the processes and clipped; they are gone afterwards.

        Args:
            lr: The learning rate of the groups with a scale of 1.

        Returns:
            False where half precision overflowed and nothing changed.
        """
        self._average_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.scaler.unscale_(self.optimizer)
        self.clip(self.config.clip)
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.get_scale() < before:
            return False
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=_MAX_LOGIT_SCALE)
        if self.average is not None:
            self.average.update(self.model)
        return True

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block the model has the weights that are measured and kept, the moving average if there is one."""
        return self.average.applied(self.model) if self.average is not None else contextlib.nullcontext()

    def trained(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def logit_scale(self) -> float:
        scale: float = self.model.logit_scale.exp().item()
        return scale

    def train(self) -> None:
        train_mode(self.model)

    def _average_gradients(self) -> None:
        # FSDP has averaged what it spreads.
        average_gradients([p for p in self.trained() if not isinstance(p, DTensor)], self.world)

    def clip(self, limit: float) -> None:
        """Scale the gradients down to a norm of `limit`; 0 is no limit."""
        if limit and self.config.fsdp:
            clip_gradients(self.trained(), limit)
        elif limit:
            nn.utils.clip_grad_norm_(self.trained(), limit)

    def weights(self) -> dict[str, Tensor]:
        """What the run's model is made of, adapters merged. With fsdp every process must call it and rank 0 has it."""
        return whole_weights(self.model) if self.config.fsdp else base_state(self.model)

    def save_best(self, checkpoints: Checkpoints, step: int) -> None:
        weights = self.weights() if self.world.writes or self.config.fsdp else {}
        if self.world.writes:
            checkpoints.save_best(weights, step)
            if self.config.adapter != "none":
                write_adapter(checkpoints.folder.parent / ADAPTER, self.model, self.config.model)

    def consolidate(self, checkpoints: Checkpoints, step: int) -> None:
        """At the end, write what fsdp has spread as one file, which is loaded and exported like any other."""
        if self.config.fsdp:
            weights = self.weights()
            if self.world.writes:
                checkpoints.save_weights(checkpoints.last, weights, step)

    def save_last(self, checkpoints: Checkpoints, state: Mapping[str, Any], step: int, epoch: int) -> None:
        """Write a checkpoint: the weights, `state`, and what `load_state` needs."""
        state = {**state, "scaler": self.scaler.state_dict()}
        if self.config.fsdp:
            name = f"shards-{step:08d}-{epoch:04d}"
            whole = {**state, "identity": checkpoints.identity, "learner": {}}
            save_shards(checkpoints.folder, self.model, self.optimizer, whole, name=name, world=self.world)
        elif self.world.writes:
            learner: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
            if self.config.adapter != "none":
                learner["trained"] = self._trained_state()
            if self.average is not None:
                learner["average"] = self.average.state_dict()
            checkpoints.save_last(self.weights(), {**state, "learner": learner}, step)

    def _trained_state(self) -> dict[str, Tensor]:
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        trained |= {name for name, _ in self.model.named_buffers()}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name in trained}

    def load_state(self, saved: Mapping[str, Any], shards: Path | None) -> None:
        """Undo `save_last`, but for the weights that were loaded with the model. Raises ClipretError."""
        self.scaler.load_state_dict(saved["scaler"])
        state = saved["learner"]
        if shards is not None:
            load_shards(shards, self.model, self.optimizer)
            return
        try:
            if self.config.adapter != "none":
                self.model.load_state_dict(state["trained"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
        except (KeyError, ValueError) as error:
            raise ClipretError(f"the checkpoint's optimiser is of another model: {error}") from None


def _choose_trained(model: Any, config: FitConfig) -> None:
    """Freeze what is not to be trained, and add an adapter where there is to be one."""
    if (adapter := config.adapter_config) is not None:
        torch.manual_seed(seed_of(config.seed, "adapter"))
        add_adapters(model, adapter)
        return
    freeze_unused(model)
    if config.lock_image:
        lock_tower(model, "image", config.unlock_image)
    if config.lock_text:
        lock_tower(model, "text", config.unlock_text)


def _as_wanted(loaded: LoadedModel, config: FitConfig) -> LoadedModel:
    """`loaded` with the resizing and the length of texts that `config` asks for."""
    image = msgspec.structs.replace(
        loaded.image,
        resize=config.resize or loaded.image.resize,
        fill=loaded.image.fill if config.fill is None else config.fill,
    )
    text = msgspec.structs.replace(loaded.text, context_length=config.context_length or loaded.text.context_length)
    if text != loaded.text:
        _check_length(loaded, text.context_length)
    if config.crop_size is not None and config.crop_size != loaded.image.size:
        _check_crop(loaded, config.crop_size)
    kept = loaded.config
    if image != loaded.image and "preprocess_cfg" in kept:  # so that open_clip sees images like us
        preprocess = kept["preprocess_cfg"] | {"resize_mode": image.resize, "fill_color": image.fill}
        kept = kept | {"preprocess_cfg": preprocess}
    return dataclasses.replace(loaded, image=image, text=text, config=kept)


def _with_bias(loaded: LoadedModel) -> LoadedModel:
    """A model of open_clip with a logit bias, which the siglip loss needs; others have one or go without that loss."""
    model: Any = loaded.model
    if getattr(model, "logit_bias", None) is not None or "model_cfg" not in loaded.config:
        return loaded
    model.logit_bias = nn.Parameter(torch.tensor(SIGLIP_BIAS))
    model_cfg = loaded.config["model_cfg"] | {"init_logit_bias": SIGLIP_BIAS}
    return dataclasses.replace(loaded, config=loaded.config | {"model_cfg": model_cfg})


@torch.inference_mode()
def _check_length(loaded: LoadedModel, length: int) -> None:
    """Whether the text tower takes texts of that many tokens is tried."""
    model: Any = loaded.model
    try:
        model.encode_text(torch.ones(1, length, dtype=torch.int64))
    except (RuntimeError, IndexError, ValueError):
        raise ClipretError(
            f"context_length is {length}: the text tower of {loaded.name} was made for {loaded.text.context_length} "
            "tokens and takes no others"
        ) from None


@torch.inference_mode()
def _check_crop(loaded: LoadedModel, size: int) -> None:
    """Whether the image tower takes images of that size is tried."""
    model: Any = loaded.model
    try:
        model.encode_image(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, IndexError, ValueError):
        raise ClipretError(
            f"crop_size is {size}: the image tower of {loaded.name} was made for {loaded.image.size} pixels a side and "
            "takes no others: leave crop_size out"
        ) from None
