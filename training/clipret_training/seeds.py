"""Where a step's random numbers come from.

Every step draws from generators of its own, seeded by the training's seed and the place they are for. So the place in
the training is all the random state there is: nothing of it has to be saved, a step that is computed twice meets the
same dropout, and a resumed run the same crops.
"""

import hashlib

import torch

__all__ = ["generator", "seed_of"]


def seed_of(*parts: int | str) -> int:
    """A seed, 0 to 2^63 - 1, that these parts decide."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator that is seeded with `seed_of(*parts)`."""
    return torch.Generator().manual_seed(seed_of(*parts))
