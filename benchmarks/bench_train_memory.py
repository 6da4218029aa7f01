"""Memory of a training step: computed by a formula, measured where it fits, and what fits on a GPU.

    python benchmarks/bench_train_memory.py [--only bigG] [--limit GIB]

Each measurement is two steps (one at batch 1, where the second has no higher peak) of the trainer's own parts (loss,
adapters, gradient checkpointing, fused AdamW, moving average) on random weights and data in a fresh process; its peak
is the kernel's count of resident memory less that before the model was made. The allocator is told to give freed
tensors back to the system at once, lest its leftovers are counted. Steps are run on the CPU, in float32 or with
weights in bfloat16, without autocast, so that formula and measurement mean the same tensors. A step that is estimated
to need more than the memory now free is not begun; the process that runs is the first to be killed if memory runs out
all the same.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from machine import keep

GIB = 2**30
RANK = 16
CONTEXT = 77


@dataclass(frozen=True)
class Tower:
    """tokens: of one image or text. outside: parameters outside the blocks, in matrices of one or more dimensions."""

    width: int
    layers: int
    heads: int
    hidden: int
    tokens: int
    outside: int

    @property
    def block(self) -> int:
        """Parameters of a block: two normalisations, attention, MLP."""
        W, M = self.width, self.hidden
        return 4 * W + (4 * W * W + 4 * W) + (2 * W * M + M + W)

    @property
    def parameters(self) -> int:
        return self.layers * self.block + self.outside


@dataclass(frozen=True)
class Step:
    """adapter: none or lora (rank 16, all four attention projections of both towers). weights: fp32, bf16, or
    autocast, which is fp32 weights with bf16 products on a GPU. optimizer: without it, only gradients."""

    model: str
    batch: int
    adapter: str = "none"
    checkpointing: bool = False
    weights: str = "fp32"
    ema: bool = False
    optimizer: bool = True

    @property
    def name(self) -> str:
        what = "LoRA" if self.adapter == "lora" else "full" if self.optimizer else "full, no optimizer"
        extra = ", checkpointing" * self.checkpointing + ", EMA" * self.ema
        return f"{self.model}, {what}{extra}, {self.weights}, batch {self.batch}"


def config_of(model: str) -> dict[str, Any]:
    """open_clip's own, without importing it: that takes as much memory as the smallest step measured here."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None
    assert package.origin is not None
    config: dict[str, Any] = json.loads((Path(package.origin).parent / "model_configs" / f"{model}.json").read_text())
    return config


def towers(model: str) -> tuple[Tower, Tower]:
    """The image and the text tower of an open_clip model with a vision transformer and its own text tower."""
    config = config_of(model)
    vision, text, dim = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    W, patch = vision["width"], vision["patch_size"]
    tokens = (vision["image_size"] // patch) ** 2 + 1
    outside = 3 * patch * patch * W + W + tokens * W + 4 * W + W * dim
    heads = W // vision.get("head_width", 64)
    image = Tower(W, vision["layers"], heads, int(W * vision.get("mlp_ratio", 4.0)), tokens, outside)
    w = text["width"]
    outside = text["vocab_size"] * w + text["context_length"] * w + 2 * w + w * dim
    return image, Tower(w, text["layers"], text["heads"], 4 * w, text["context_length"], outside)


def activations(tower: Tower, step: Step, quick_gelu: bool) -> tuple[int, int]:
    """Bytes that an image or text keeps for the backward pass: of all blocks, and at most at once beyond that.

    A block of a full step keeps, in values a token: the input and the result of both normalisations (4 W), queries,
    keys and values (3 W), what attention gave (W), the hidden layer before and after its activation (2 M; one more for
    QuickGELU's sigmoid). Frozen layers need not know their inputs: with adapters on attention the second
    normalisation's result and the activation's are not kept, and RANK values for each adapter are, as well as what goes
    into it. Under autocast a normalisation keeps a float32 copy of its input.
    """
    W, M, L = tower.width, tower.hidden, tower.tokens
    size = 4 if step.weights == "fp32" else 2
    inputs = 2 * W * (4 if step.weights == "autocast" else size)
    if step.adapter == "lora":
        block = inputs + (4 * W + 4 * RANK + M + quick_gelu * M) * size
        # What goes into the adapters: the first normalisation's result and what is kept anyway, or, where PEFT changes
        # their type, a copy for each of the four
        block += W * size if step.weights == "fp32" else 4 * W * (4 if step.weights == "bf16" else 2)
    else:
        block = inputs + (6 * W + 2 * M + quick_gelu * M) * size
    block = L * (block + 4 * (tower.heads + 4))  # what attention and normalisations know of each row, float32
    ends = 3 * L * W * size  # embeddings, the first and the last normalisation
    backward = L * (2 * M + 2 * W) * size  # gradients on their way through an MLP
    if step.checkpointing:
        return tower.layers * L * W * size + ends, block + backward
    return tower.layers * block + ends, backward


def estimate(step: Step) -> dict[str, int]:
    """Bytes by what they are for."""
    pair = towers(step.model)
    quick_gelu = bool(config_of(step.model).get("quick_gelu"))
    total = sum(tower.parameters for tower in pair) + 1
    trained = sum(8 * RANK * tower.width * tower.layers for tower in pair) if step.adapter == "lora" else total
    weight = 2 if step.weights == "bf16" else 4
    added = trained * 4 if step.adapter == "lora" else 0  # adapters are float32 in any case
    own = 4 if step.adapter == "lora" else weight
    copies = 0
    if step.weights == "autocast":  # of the matrices, in bf16: one tower's at a time, or until the backward pass
        blocks = [tower.layers * tower.block * 2 for tower in pair]
        copies = sum(blocks) if not step.checkpointing else 0 if step.adapter == "lora" else max(blocks)
    kept, peak = zip(*(activations(tower, step, quick_gelu) for tower in pair), strict=True)
    parts = {
        "weights": total * weight + added,
        "copies": copies,
        "gradients": trained * own,
        "moments": 2 * trained * own * step.optimizer,
        "average": 4 * trained * step.ema,
        "activations": step.batch * sum(kept),
        "backward": step.batch * max(peak),
    }
    # Gradients grow while activations go: what is largest is the end of the forward pass, or that of the backward.
    begun = parts["activations"] + parts["backward"]
    ended = parts["gradients"] + (parts["backward"] if step.checkpointing else 0)
    first = sum(parts[name] for name in ("weights", "copies", "moments", "average"))
    return {**parts, "peak": first + max(begun, ended)}


def run_once(step: Step) -> dict[str, Any]:
    """Two steps in this process: its peak, and the bytes that the forward pass of the second kept."""
    import torch

    from clipret_training.loss import LossBatch, LossConfig, compute_loss
    from clipret_training.optim.averaging import MovingAverage
    from clipret_training.tuning.adapters import AdapterConfig, add_adapters
    from clipret_training.tuning.freezing import parameter_groups
    from clipret_training.tuning.techniques import checkpoint_gradients

    Path("/proc/self/oom_score_adj").write_text("1000")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    base = resident("VmRSS")
    model = build(step.model, torch.float32 if step.weights == "fp32" else torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters())
    if step.adapter == "lora":
        add_adapters(model, AdapterConfig(RANK, 2 * RANK))
    if step.checkpointing:
        checkpoint_gradients(model)
    average = MovingAverage(model, 0.999) if step.ema else None
    groups = parameter_groups(model, lr=1e-5, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True) if step.optimizer else None
    size = model.visual.image_size[0]
    images = torch.randn(step.batch, 3, size, size, dtype=model.visual.conv1.weight.dtype)
    texts = torch.randint(1, 49407, (step.batch, CONTEXT))
    keys = torch.arange(step.batch)[:, None]
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for _ in range(1 if step.batch == 1 else 2):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            rows = [model.encode_image(images).float(), model.encode_text(texts).float()]
        rows = [torch.nn.functional.normalize(part, dim=-1) for part in rows]
        loss = compute_loss(LossConfig(), LossBatch(*rows, keys, keys), model.logit_scale.exp().float())
        loss.backward()
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        if average is not None:
            average.update(model)
        model.zero_grad(set_to_none=True)
    return {
        "parameters": count,
        "trained": sum(parameter.numel() for parameter in trained),
        "kept": sum(kept.values()),
        "peak": resident("VmHWM") - base,
        "loss": loss.item(),
    }


def build(name: str, dtype: Any) -> Any:
    """The model with small random weights, made in its own type: drawing float32 first would be the peak."""
    import open_clip
    import torch

    config = config_of(name)
    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    mask = torch.full((CONTEXT, CONTEXT), float("-inf")).triu(1).to(dtype)
    model = model.to(dtype).to_empty(device="cpu")
    model.attn_mask = mask
    noise = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(dtype)  # billions take minutes
    for parameter_name, parameter in model.named_parameters():
        if "ln_" in parameter_name and parameter_name.endswith("weight"):
            torch.nn.init.ones_(parameter)
        elif parameter.ndim == 0:
            torch.nn.init.constant_(parameter, 2.659)
        else:
            for part in parameter.data.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)])
    return model.train()


def resident(what: str) -> int:
    """VmRSS, now, or VmHWM, the most there was, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


MEASURED = (
    *(Step("ViT-B-32", 8, checkpointing=c) for c in (False, True)),
    Step("ViT-B-32", 8, ema=True),
    *(Step("ViT-B-32", 8, adapter="lora", checkpointing=c) for c in (False, True)),
    *(Step("ViT-L-14", 2, checkpointing=c) for c in (False, True)),
    *(Step("ViT-L-14", 2, adapter="lora", checkpointing=c) for c in (False, True)),
    Step("ViT-L-14", 2, weights="bf16"),
    Step("ViT-H-14", 1, adapter="lora"),
    Step("ViT-H-14", 1, checkpointing=True),
    Step("ViT-bigG-14", 1, adapter="lora", weights="bf16"),
    Step("ViT-bigG-14", 1, adapter="lora", weights="bf16", checkpointing=True),
    Step("ViT-bigG-14", 1, adapter="lora"),
    Step("ViT-bigG-14", 1, weights="bf16", checkpointing=True, optimizer=False),
    Step("ViT-bigG-14", 1, weights="bf16", checkpointing=True),
)

# What nvidia-smi says that a card of this name has, less 2 GiB for the context, workspaces and fragmentation
CARDS = {"24 GB": 24 - 2, "80 GB": 79.6 - 2, "141 GB": 140.4 - 2}


def largest_batch(step: Step, budget: float, share: int = 1) -> int:
    """Pairs that go through the towers at once. share: processes that FSDP spreads the rest over."""
    parts = estimate(replace(step, batch=1))
    spread = sum(parts[name] for name in ("weights", "copies", "gradients", "moments", "average"))
    if share > 1:  # one block of each tower is whole at a time, in fp32 and as a gradient
        spread = spread // share + sum(2 * 4 * tower.block for tower in towers(step.model))
    left = budget * GIB - spread
    return max(int(left // (parts["activations"] + parts["backward"])), 0)


def fits() -> list[dict[str, Any]]:
    rows = []
    for model in ("ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-bigG-14"):
        for adapter, checkpointing, share in (
            ("lora", False, 1), ("lora", True, 1), ("none", False, 1), ("none", True, 1), ("none", True, 8),
        ):  # fmt: skip
            step = Step(model, 1, adapter=adapter, checkpointing=checkpointing, weights="autocast")
            sizes = {card: largest_batch(step, budget, share) for card, budget in CARDS.items()}
            how = ("LoRA" if adapter == "lora" else "full") + ", checkpointing" * checkpointing
            rows.append({"model": model, "step": how + f", FSDP over {share}" * (share > 1), **sizes})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="measure only steps with this in their name")
    parser.add_argument("--limit", type=float, default=21.0, help="most GiB that a step may need to be measured")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_once(Step(**json.loads(args.one)))))
        return
    results = Path(__file__).parent / "results" / "train_memory.json"
    before = json.loads(results.read_text())["steps"] if results.exists() else []
    kept = {row["step"]: row for row in before}
    rows = []
    for step in MEASURED:
        expected = estimate(step)
        row: dict[str, Any] = {"step": step.name, "computed": expected}
        needed = expected["peak"] + GIB // 2
        if args.only not in step.name:
            rows.append(row | {"measured": kept.get(step.name, {}).get("measured")})
            continue
        if needed > min(args.limit * GIB, available()):
            print(f"{step.name}: needs {needed / GIB:.1f} GiB, free are {available() / GIB:.1f}", file=sys.stderr)
            row["measured"] = kept.get(step.name, {}).get("measured")
        else:
            command = [sys.executable, __file__, "--one", json.dumps(asdict(step))]
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
            row["measured"] = json.loads(done.stdout) if done.returncode == 0 else None
            if done.returncode:
                print(f"{step.name}: ended with {done.returncode}, killed for memory?", file=sys.stderr)
        if row["measured"]:
            found, peak = row["measured"]["peak"] / GIB, expected["peak"] / GIB
            kept_found, kept_computed = row["measured"]["kept"] / GIB, expected["activations"] / GIB
            print(
                f"{step.name}: peak {found:.2f} GiB, computed {peak:.2f} ({peak / found - 1:+.0%}); kept by the "
                f"forward pass {kept_found:.3f} GiB, computed {kept_computed:.3f}",
                file=sys.stderr,
            )
        rows.append(row)
    keep("train_memory", {"rank": RANK, "steps": rows, "largest_batch": fits()})


if __name__ == "__main__":
    main()
