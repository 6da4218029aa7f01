"""Training with several processes: communication between them, and sharded weights (FSDP)."""

from clipret_training.distributed.world import World, average_gradients, gather_objects, join, smallest

__all__ = ["World", "average_gradients", "gather_objects", "join", "smallest"]
