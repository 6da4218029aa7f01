"""A training of several processes: what they exchange, and weights that are spread over them."""

from typing import TYPE_CHECKING

from clipret._faces import lazy_face

if TYPE_CHECKING:
    from clipret_training.distributed.fsdp import (
        clip_gradients,
        latest_shards,
        load_shards,
        save_shards,
        shard_model,
        split_groups,
        whole_weights,
    )
    from clipret_training.distributed.gather import exchange_shapes, gather_rows
    from clipret_training.distributed.world import World, average_gradients, gather_objects, join, smallest

__all__ = [
    "World",
    "average_gradients",
    "clip_gradients",
    "exchange_shapes",
    "gather_objects",
    "gather_rows",
    "join",
    "latest_shards",
    "load_shards",
    "save_shards",
    "shard_model",
    "smallest",
    "split_groups",
    "whole_weights",
]

__getattr__ = lazy_face(
    __name__,
    {
        "fsdp": [
            "clip_gradients",
            "latest_shards",
            "load_shards",
            "save_shards",
            "shard_model",
            "split_groups",
            "whole_weights",
        ],
        "gather": ["exchange_shapes", "gather_rows"],
        "world": ["World", "average_gradients", "gather_objects", "join", "smallest"],
    },
)
