"""Training techniques that only some towers support: gradient checkpointing and patch dropout."""

from typing import Any

from open_clip.transformer import PatchDropout, VisionTransformer
from torch import nn
from transformers import PreTrainedModel

from clipret.errors import ClipretError

__all__ = ["checkpoint_gradients", "drop_patches"]


def checkpoint_gradients(model: nn.Module) -> None:
    """Store only the input of each block, and recompute the rest in the backward pass (Chen et al., 2016).

    Args:
        model: The model to change in place.

    Raises:
        ClipretError: The model has no such blocks.
    """
    enabled = False
    for module in model.modules():
        whole: Any = module
        if isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing:
            # transformers 5 renamed it
            enable: Any = (
                getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
            enabled = True
        elif hasattr(module, "set_grad_checkpointing") and module is not model:
            whole.set_grad_checkpointing(True)
            enabled = True
        elif hasattr(module, "resblocks") and hasattr(module, "grad_checkpointing"):  # open_clip's Transformer
            whole.grad_checkpointing = True
            enabled = True
    if not enabled:
        raise ClipretError(
            "this model has no blocks that support gradient checkpointing: leave checkpoint_gradients out"
        )


def drop_patches(model: Any, share: float) -> None:
    """Leave out random patches of each image in training (Li et al., FLIP, 2023).

    Args:
        model: The model to change in place.
        share: Share of the patches to leave out.

    Raises:
        ClipretError: The image tower is not a vision transformer of open_clip.
    """
    if not isinstance(model.visual, VisionTransformer):
        raise ClipretError(
            f"patch_dropout needs a vision transformer of open_clip, but the image tower is a "
            f"{type(model.visual).__name__}: leave patch_dropout out"
        )
    model.visual.patch_dropout = PatchDropout(share).train(model.training)
