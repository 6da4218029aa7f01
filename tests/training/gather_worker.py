"""One of several gloo processes of test_loss.py: RANK WORLD FOLDER. Writes FOLDER/RANK.pt."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from clipret.errors import ClipretError
from clipret_training.loss import LossBatch, LossConfig, compute_loss


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    cases = torch.load(folder / "cases.pt", weights_only=False)
    results = []
    for config, parts, weights in cases:
        results.append(run(config, parts[rank], weights, world))
    # A part that one process has and the other lacks is an error on both, not a process that waits forever.
    config, parts, _ = cases[0]
    odd = {**parts[rank], "negative_inputs": parts[rank]["image_inputs"] if rank else None}
    try:
        run(LossConfig(), odd, cases[0][2], world)
        refused = ""
    except ClipretError as error:
        refused = str(error)
    torch.save((results, refused), folder / f"{rank}.pt")
    dist.destroy_process_group()


def run(
    config: LossConfig, part: dict[str, torch.Tensor | None], weights: torch.Tensor, world: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of a tower of one layer, a logit scale and a bias, averaged over the processes."""
    layer = nn.Linear(*reversed(weights.shape), bias=False)
    layer.weight = nn.Parameter(weights.clone())
    scale, bias = nn.Parameter(torch.tensor(9.0)), nn.Parameter(torch.tensor(-2.0))
    embeddings = {
        name.replace("inputs", "embeddings"): nn.functional.normalize(layer(value), dim=-1)
        for name, value in part.items()
        if name.endswith("inputs") and value is not None
    }
    rest = {name: value for name, value in part.items() if not name.endswith("inputs")}
    loss = compute_loss(config, LossBatch(**embeddings, **rest), scale, bias if config.kind == "siglip" else None)
    loss.backward()
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in (layer.weight, scale, bias)]
    value = loss.detach().clone()
    if world > 1:
        for tensor in (value, *gradients):
            dist.all_reduce(tensor)
            tensor /= world
    return value, gradients


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
