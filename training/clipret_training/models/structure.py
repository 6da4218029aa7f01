"""Which part of a CLIP model a weight belongs to, told from its name."""

from clipret_training.choices import Tower

__all__ = ["tower_of"]

_SHARED = ("logit_scale", "logit_bias")
_UNUSED = ("text_decoder.",)  # CoCa's captioner, which no embedding goes through


def tower_of(name: str) -> Tower | None:
    """The tower of a parameter or module; None for the logit scale and bias and for what no embedding needs.

    Everything under `visual` is the image tower; open_clip.CLIP and Chinese-CLIP keep the parts of the text tower
    next to it, under many names.
    """
    if name == "visual" or name.startswith("visual."):
        return "image"
    return None if not name or name in _SHARED or f"{name}.".startswith(_UNUSED) else "text"
