"""A training of several processes: what they exchange, and weights that are spread over them."""

from clipret_training.distributed.world import World, average_gradients, gather_objects, join, smallest

__all__ = ["World", "average_gradients", "gather_objects", "join", "smallest"]
