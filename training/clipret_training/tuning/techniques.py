"""What some towers offer for training and others do not: less memory, fewer patches."""

from typing import Any

from open_clip.transformer import PatchDropout, VisionTransformer
from torch import nn
from transformers import PreTrainedModel

from clipret.errors import ClipretError

__all__ = ["checkpoint_gradients", "drop_patches"]


def checkpoint_gradients(model: nn.Module) -> None:
    """Keep only the input of each block and compute the rest again in the backward pass (Chen et al., 2016).

    Raises ClipretError for a model without such blocks.
    """
    asked = False
    for module in model.modules():
        whole: Any = module
        if isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing:
            # transformers 5 renamed it
            enable: Any = (
                getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
            asked = True
        elif hasattr(module, "set_grad_checkpointing") and module is not model:
            whole.set_grad_checkpointing(True)
            asked = True
        elif hasattr(module, "resblocks") and hasattr(module, "grad_checkpointing"):  # open_clip's Transformer
            whole.grad_checkpointing = True
            asked = True
    if not asked:
        raise ClipretError(
            "this model has no blocks whose activations could be computed again: leave checkpoint_gradients out"
        )


def drop_patches(model: Any, share: float) -> None:
    """Leave out that share of the patches in each training step, others for each image (Li et al., Scaling
    Language-Image Pre-training via Masking (FLIP), 2023). Raises ClipretError for another tower than a ViT."""
    if not isinstance(model.visual, VisionTransformer):
        raise ClipretError(
            f"patch_dropout needs a vision transformer of open_clip, the image tower is a {type(model.visual).__name__}"
        )
    model.visual.patch_dropout = PatchDropout(share).train(model.training)
