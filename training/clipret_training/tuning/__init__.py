"""What is trained in a model, and in which precision: adapters, locked towers, techniques."""

from clipret_training.tuning.adapters import AdapterConfig, add_adapters, base_state, write_adapter
from clipret_training.tuning.freezing import freeze_unused, lock_tower, parameter_groups, train_mode
from clipret_training.tuning.precision import autocast, float32_attention, native_precision, open_device
from clipret_training.tuning.techniques import checkpoint_gradients, drop_patches

__all__ = [
    "AdapterConfig",
    "add_adapters",
    "autocast",
    "base_state",
    "checkpoint_gradients",
    "drop_patches",
    "float32_attention",
    "freeze_unused",
    "lock_tower",
    "native_precision",
    "open_device",
    "parameter_groups",
    "train_mode",
    "write_adapter",
]
