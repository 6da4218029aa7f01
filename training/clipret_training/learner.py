"""The model of a training with its optimiser: what training steps change and checkpoints store."""

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
    """A model with its optimiser, ready to train.

    Args:
        config: The settings of the training.
        captions: All training captions. A new small model learns its tokenizer from them.
        world: The processes that train together.
        last: The weights of this run's last checkpoint, None for a new run.

    Raises:
        ClipretError: The model cannot be loaded or does not support a setting.
    """

    def __init__(self, config: FitConfig, captions: Sequence[str], world: World, last: Path | None) -> None:
        self.config, self.world = config, world
        # A checkpoint has the adapter merged into the weights, so it cannot be loaded with the adapter.
        source = config.model if last is None or config.adapter != "none" or config.fsdp else str(last)
        self.loaded = _with_settings(load_model(source, seed=config.seed, captions=captions), config)
        if config.loss == "siglip":
            self.loaded = _with_bias(self.loaded)
        model: Any = self.loaded.model.to(world.device)
        if not config.fsdp:  # FSDP needs contiguous weights
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
        """Average the gradients over the processes, clip them, update the weights and clear the gradients.

        Args:
            lr: The learning rate of parameter groups with `lr_scale` 1.

        Returns:
            False if the gradients overflowed in half precision, so that the weights did not change.
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
        """Return a context in which the model has the weights to validate: the moving average if there is one."""
        return self.average.applied(self.model) if self.average is not None else contextlib.nullcontext()

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that are trained."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def logit_scale(self) -> float:
        """Return the factor on the cosine similarities."""
        scale: float = self.model.logit_scale.exp().item()
        return scale

    def train(self) -> None:
        """Put the model in training mode."""
        train_mode(self.model)

    def _average_gradients(self) -> None:
        # FSDP averages the gradients of sharded parameters itself.
        average_gradients([p for p in self.trained() if not isinstance(p, DTensor)], self.world)

    def clip(self, limit: float) -> None:
        """Scale the gradients down to a norm of at most `limit`; 0 is no limit."""
        if limit and self.config.fsdp:
            clip_gradients(self.trained(), limit)
        elif limit:
            nn.utils.clip_grad_norm_(self.trained(), limit)

    def weights(self) -> dict[str, Tensor]:
        """Return all weights by name, with adapters merged.

        With FSDP every process must call this method, and only rank 0 gets the weights.
        """
        return whole_weights(self.model) if self.config.fsdp else base_state(self.model)

    def save_best(self, checkpoints: Checkpoints, step: int) -> None:
        """Write the weights of the best epoch, and the adapter if there is one.

        Args:
            checkpoints: Where to write them.
            step: The number of the last step.

        Raises:
            ClipretError: Writing failed.
        """
        weights = self.weights() if self.world.writes or self.config.fsdp else {}
        if self.world.writes:
            checkpoints.save_best(weights, step)
            if self.config.adapter != "none":
                write_adapter(checkpoints.folder.parent / ADAPTER, self.model, self.config.model)

    def consolidate(self, checkpoints: Checkpoints, step: int) -> None:
        """After a training with FSDP, write the sharded weights as one file, which can be loaded and exported."""
        if self.config.fsdp:
            weights = self.weights()
            if self.world.writes:
                checkpoints.save_weights(checkpoints.last, weights, step)

    def save_last(self, checkpoints: Checkpoints, state: Mapping[str, Any], step: int, epoch: int) -> None:
        """Write a checkpoint.

        Args:
            checkpoints: Where to write it.
            state: What to store in addition to the weights and the optimiser.
            step: The number of the last step.
            epoch: The number of the epoch.

        Raises:
            ClipretError: Writing failed.
        """
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
        """Restore the optimiser, the loss scale, the moving average and the adapter.

        Args:
            saved: The state of a checkpoint.
            shards: With FSDP the folder of the sharded weights and optimiser, otherwise None.

        Raises:
            ClipretError: The checkpoint does not fit the model.
        """
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
            raise ClipretError(
                f"the optimiser state of the checkpoint is from another model: {error}; train into a new folder"
            ) from error


def _choose_trained(model: Any, config: FitConfig) -> None:
    """Add the adapter, or freeze the parameters that are not trained."""
    if (adapter := config.adapter_config) is not None:
        torch.manual_seed(seed_of(config.seed, "adapter"))
        add_adapters(model, adapter)
        return
    freeze_unused(model)
    if config.lock_image:
        lock_tower(model, "image", config.unlock_image)
    if config.lock_text:
        lock_tower(model, "text", config.unlock_text)


def _with_settings(loaded: LoadedModel, config: FitConfig) -> LoadedModel:
    """The model with the configured resizing and context length."""
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
    model_config = loaded.config
    if image != loaded.image and "preprocess_cfg" in model_config:  # so that open_clip preprocesses images in this way
        preprocess = model_config["preprocess_cfg"] | {"resize_mode": image.resize, "fill_color": image.fill}
        model_config = model_config | {"preprocess_cfg": preprocess}
    return dataclasses.replace(loaded, image=image, text=text, config=model_config)


def _with_bias(loaded: LoadedModel) -> LoadedModel:
    """Add the logit bias that the siglip loss needs to an open_clip model. Other models stay as they are."""
    model: Any = loaded.model
    if getattr(model, "logit_bias", None) is not None or "model_cfg" not in loaded.config:
        return loaded
    model.logit_bias = nn.Parameter(torch.tensor(SIGLIP_BIAS))
    model_cfg = loaded.config["model_cfg"] | {"init_logit_bias": SIGLIP_BIAS}
    return dataclasses.replace(loaded, config=loaded.config | {"model_cfg": model_cfg})


@torch.inference_mode()
def _check_length(loaded: LoadedModel, length: int) -> None:
    """Try the text tower with texts of this many tokens."""
    model: Any = loaded.model
    try:
        model.encode_text(torch.ones(1, length, dtype=torch.int64))
    except (RuntimeError, IndexError, ValueError) as error:
        raise ClipretError(
            f"context_length is {length}: the text tower of {loaded.name} was made for {loaded.text.context_length} "
            "tokens and takes no others: leave context_length out"
        ) from error


@torch.inference_mode()
def _check_crop(loaded: LoadedModel, size: int) -> None:
    """Try the image tower with images of this size."""
    model: Any = loaded.model
    try:
        model.encode_image(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, IndexError, ValueError) as error:
        raise ClipretError(
            f"crop_size is {size}: the image tower of {loaded.name} was made for {loaded.image.size} pixels per side "
            "and takes no others: leave crop_size out"
        ) from error
