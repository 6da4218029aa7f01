"""Seeds and generators of random numbers.

Every step has its own generators. Their seeds derive from the seed of the training, the step and the purpose. So no
random state has to be saved: a step that is computed twice has the same dropout, and a resumed run the same crops.
"""

import hashlib

import torch

__all__ = ["generator", "seed_of"]


def seed_of(*parts: int | str) -> int:
    """Hash these values to a seed from 0 to 2^63 - 1.

    Examples:
        >>> seed_of(0, "captions") == seed_of(0, "captions") != seed_of(1, "captions")
        True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator with the seed `seed_of(*parts)`."""
    return torch.Generator().manual_seed(seed_of(*parts))
