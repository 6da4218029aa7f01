"""Which part of a CLIP model a weight belongs to, by its name."""

from clipret_training.choices import Tower

__all__ = ["tower_of"]

_SHARED = ("logit_scale", "logit_bias")
_UNUSED = ("text_decoder.",)  # CoCa's captioner, which the embeddings do not use


def tower_of(name: str) -> Tower | None:
    """Find the tower of a parameter or module.

    Everything under `visual` is the image tower. The parts of the text tower have many names in open_clip.CLIP and
    Chinese-CLIP.

    Args:
        name: Dotted name in the model.

    Returns:
        The tower; None for the logit scale and bias, and for parts that the embeddings do not use.
    """
    if name == "visual" or name.startswith("visual."):
        return "image"
    return None if not name or name in _SHARED or f"{name}.".startswith(_UNUSED) else "text"
