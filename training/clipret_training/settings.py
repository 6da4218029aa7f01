"""The settings of a training: their names, types, ranges and defaults, and what each does. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from clipret.bundle import Resize
from clipret_training.choices import TOWERS, Adapter, Augment, LossKind, Optimizer, Precision, Schedule, Tower
from clipret_training.schema import (
    MANY,
    Count,
    Degrees,
    Factor,
    Number,
    PartialShare,
    Positive,
    PositiveShare,
    Share,
    Whole,
)

__all__ = ["HELP", "Settings"]

# Ranges of one option each
SplitShare = Annotated[float, Meta(gt=0, lt=1)]
Enlargement = Annotated[float, Meta(ge=1, le=8)]
Gigabytes = Annotated[float, Meta(ge=0, le=MANY)]
Grey = Annotated[int, Meta(ge=0, le=255)]
TokenCount = Annotated[int, Meta(ge=3, le=MANY)]
PixelCount = Annotated[int, Meta(ge=8, le=MANY)]
BatchSize = Annotated[int, Meta(ge=2, le=MANY)]
Threads = Annotated[int, Meta(ge=1, le=1024)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]


@dataclass(frozen=True)
class Settings:
    """All settings of a training. HELP describes each of them."""

    data: str
    model: str
    image_root: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    group_column: str | None = None
    where: str | None = None
    val: str | None = None
    val_where: str | None = None
    val_split: SplitShare = 0.1
    validate_every: Count = 1
    resize: Resize | None = None
    fill: Grey | None = None
    context_length: TokenCount | None = None
    augment: Augment = "photo"
    crop_size: PixelCount | None = None
    decode_scale: Enlargement = 1.0
    crop_area: PositiveShare = 0.7
    jitter: Share = 0.3
    repad: bool = False
    flip: Share | None = None
    rotation: Degrees | None = None
    random_ops: Whole = 0
    magnitude: Share = 0.5
    captions: Count = 1
    adapter: Adapter = "none"
    adapter_rank: Count = 16
    adapter_alpha: Positive = 32.0
    adapter_dropout: PartialShare = 0.0
    adapter_targets: tuple[str, ...] = ("attention",)
    adapter_towers: tuple[Tower, ...] = TOWERS
    lock_image: bool = False
    lock_text: bool = False
    unlock_image: int = 0
    unlock_text: int = 0
    loss: LossKind = "infonce"
    label_smoothing: PartialShare = 0.0
    drop_worst: PartialShare = 0.0
    soft_weight: Share = 0.5
    soft_temperature: Positive = 0.1
    negatives: bool = False
    attributes: str | None = None
    epochs: Count = 5
    batch_size: BatchSize = 64
    accumulate: Count = 1
    optimizer: Optimizer = "adamw"
    lr: Factor = 1e-5
    schedule: Schedule = "cosine"
    warmup: Share = 0.05
    weight_decay: Factor = 0.1
    layer_decay: Number = 1.0
    image_lr_scale: Number = 1.0
    text_lr_scale: Number = 1.0
    beta1: PartialShare = 0.9
    beta2: PartialShare = 0.98
    epsilon: Share = 1e-6
    clip: Factor = 1.0
    ema: PartialShare = 0.0
    precision: Precision = "fp32"
    checkpoint_gradients: bool = False
    compile: bool = False
    patch_dropout: PartialShare = 0.0
    local_loss: bool = False
    fsdp: bool = False
    device: str = "cpu"
    threads: Threads = 1
    cache_limit: Gigabytes = 4.0
    save_every: Whole = 0
    tensorboard: bool = True
    seed: Seed = 0


HELP: dict[str, dict[str, str]] = {
    "Data": {
        "data": "an annotations file (CSV, TSV, JSON lines), or .tar files (webdataset)",
        "model": "what --model names",
        "image_root": "what relative paths start from; default: the folder of the annotations file",
        "image_column": "column of the image paths; default: detected",
        "caption_column": "column of the captions; default: detected",
        "group_column": "images and captions with the same value in this column are right answers to each other",
        "where": "SQL expression: only rows for which it holds are used",
    },
    "Validation": {
        "val": "an annotations file of its own to validate on",
        "val_where": "SQL expression: rows to validate on, of val or of the data itself",
        "val_split": "share of the images to validate on, where neither of the two is given",
        "validate_every": "epochs between two validations",
    },
    "Model input": {
        "resize": "shortest: resize and crop to a square; longest: pad to a square with fill; default: the model's own",
        "fill": "grey value of the padding",
        "context_length": "tokens of a caption; default: the model's own",
    },
    "Augmentation": {
        "augment": "none, photo (crop, flip, colour) or surveillance (also blur, noise, low resolution, compression)",
        "crop_size": "pixels per side in training; default: the model's image size",
        "decode_scale": "keep images this many times larger than the crop size, so that crops stay sharp",
        "crop_area": "smallest share of the image area that a random crop keeps",
        "jitter": "how far brightness, contrast and saturation vary around 1",
        "repad": "draw the padding again around each crop; worse when training from scratch",
        "flip": "share of images flipped horizontally; default: 0.5, and 0 without augmentation",
        "rotation": "largest rotation in degrees; default: 3 for surveillance, else 0",
        "random_ops": "operations per image as in RandAugment, where colours do not matter",
        "magnitude": "their strength",
        "captions": "captions of each image in a step",
    },
    "Adapters and frozen layers": {
        "adapter": "train a LoRA or DoRA adapter instead of all weights",
        "adapter_rank": "rank of the adapter's matrices",
        "adapter_alpha": "scale of the adapter",
        "adapter_dropout": "dropout at the adapter's input",
        "adapter_targets": "layers that get an adapter: attention, mlp, q, k, v, out, fc1, fc2 or the end of a name",
        "adapter_towers": "towers that get an adapter",
        "lock_image": "freeze the image tower",
        "lock_text": "freeze the text tower",
        "unlock_image": "groups at the end of a frozen image tower to train: 1 projection, 2 also the last block, …",
        "unlock_text": "the same for the text tower",
    },
    "Loss": {
        "loss": "infonce (CLIP), siglip, or soft (shared attributes make soft labels)",
        "label_smoothing": "of infonce",
        "drop_worst": "share of the largest losses that a step ignores, for noisy captions",
        "soft_weight": "weight of the soft labels",
        "soft_temperature": "temperature of the soft labels",
        "negatives": "add each caption with one attribute swapped (a red car, a blue car) as a hard negative",
        "attributes": "JSON file of further attributes, for negatives and for the soft loss",
    },
    "Optimisation": {
        "epochs": "passes over the images",
        "batch_size": "images of a step, over all processes",
        "accumulate": "parts in which a batch is computed: less memory, the same loss",
        "optimizer": "adamw, or muon, which learns faster from scratch",
        "lr": "highest learning rate",
        "schedule": "how the learning rate falls",
        "warmup": "share of all steps until the learning rate is reached",
        "weight_decay": "on matrices only",
        "layer_decay": "factor on the learning rate from each group of layers to the one before it",
        "image_lr_scale": "factor on the learning rate of the image tower",
        "text_lr_scale": "factor on the learning rate of the text tower",
        "beta1": "of the optimizer",
        "beta2": "of the optimizer",
        "epsilon": "of the optimizer",
        "clip": "largest norm of the gradient; 0: no limit",
        "ema": "decay of a moving average of the weights, which is then validated and kept; 0: none",
    },
    "Computation": {
        "precision": "fp32, bf16 or fp16; default: bf16 where the device has it",
        "checkpoint_gradients": "compute activations twice: less memory, a third more time",
        "compile": "torch.compile",
        "patch_dropout": "share of the image patches that a step leaves out (FLIP)",
        "local_loss": "each process compares its own images with all captions, instead of the whole loss in each",
        "fsdp": "spread weights, gradients and optimizer state over the processes",
        "device": "cpu, cuda or cuda:N",
        "threads": "processor threads; default: all",
        "cache_limit": "GiB of memory for decoded images; the rest is decoded in every epoch",
        "save_every": "steps between checkpoints; 0: after each epoch",
        "tensorboard": "write metrics for TensorBoard",
        "seed": "decides weights, order and augmentation",
    },
}
