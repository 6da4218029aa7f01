"""The model of a training with its optimiser: what a step changes and a checkpoint holds."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipret.errors import ClipretError
from clipret.training.checkpoint import Checkpoints
from clipret.training.config import FitConfig
from clipret.training.distributed import World, average_gradients
from clipret.training.loaded import LoadedModel
from clipret.training.models import load_model
from clipret.training.pooled import pool_early
from clipret.training.techniques import checkpoint_gradients, drop_patches

__all__ = ["Learner"]


class Learner:
    """Loads the model as `config` wants it, or from the checkpoint `last` of this run, and prepares it for training.

    Raises ClipretError when it cannot be loaded, or lacks what `config` asks of it.
    """

    def __init__(self, config: FitConfig, titles: Sequence[str], world: World, last: Path | None) -> None:
        self.config, self.world, self.lr = config, world, 0.0
        source = config.model if last is None else str(last)
        self.loaded = _as_wanted(load_model(source, seed=config.seed, captions=titles), config)
        model: Any = self.loaded.model.to(world.device).to(memory_format=torch.channels_last)
        self.model = model
        if config.patch_dropout:
            drop_patches(model, config.patch_dropout)
        if config.checkpoint_gradients:
            checkpoint_gradients(model)
        else:
            pool_early(model)
        self.optimizer = _optimizer(model, config)

    def trained(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def logit_scale(self) -> float:
        scale: float = self.model.logit_scale.exp().item()
        return scale

    def set_lr(self, lr: float) -> None:
        self.lr = lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def average_gradients(self) -> None:
        average_gradients(self.trained(), self.world)

    def clip(self, limit: float) -> None:
        """Scale the gradients down to a norm of `limit`; 0 is no limit."""
        if limit:
            nn.utils.clip_grad_norm_(self.trained(), limit)

    def weights(self) -> dict[str, Tensor]:
        """What the run's model is made of."""
        weights: dict[str, Tensor] = self.model.state_dict()
        return weights

    def save_best(self, checkpoints: Checkpoints, step: int) -> None:
        if self.world.writes:
            checkpoints.save_best(self.weights(), step)

    def save_last(self, checkpoints: Checkpoints, state: Mapping[str, Any], step: int) -> None:
        if self.world.writes:
            learner = {"optimizer": self.optimizer.state_dict()}
            checkpoints.save_last(self.weights(), {**state, "learner": learner}, step)

    def load_state(self, state: dict[str, Any]) -> None:
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError) as error:
            raise ClipretError(f"the checkpoint's optimiser is of another model: {error}") from None


def _as_wanted(loaded: LoadedModel, config: FitConfig) -> LoadedModel:
    """`loaded` with the resizing and the length of texts that `config` asks for."""
    image = dataclasses.replace(
        loaded.image,
        resize=config.resize or loaded.image.resize,
        fill=loaded.image.fill if config.fill is None else config.fill,
    )
    text = dataclasses.replace(loaded.text, context_length=config.context_length or loaded.text.context_length)
    if text != loaded.text:
        _check_length(loaded, text.context_length)
    kept = loaded.config
    if image != loaded.image and "preprocess_cfg" in kept:  # so that open_clip sees pictures like us
        preprocess = kept["preprocess_cfg"] | {"resize_mode": image.resize, "fill_color": image.fill}
        kept = kept | {"preprocess_cfg": preprocess}
    return dataclasses.replace(loaded, image=image, text=text, config=kept)


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


def _optimizer(model: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """AdamW without decay on what is no matrix: biases, normalisations, the logit scale."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # The fused kernel is six times faster on a CPU.
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True)
