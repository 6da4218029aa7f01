"""A process that torchrun starts for test_distributed.py.

FOLDER: writes FOLDER/gradients-RANK.pt. PARAMS OUT STEP: trains, and exits abruptly after that step.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from clipret_training.config import FitConfig
from clipret_training.data.batches import Batch, TextBatch
from clipret_training.distributed.world import World, average_gradients, join
from clipret_training.fit import fit
from clipret_training.loss import LossConfig
from clipret_training.models.load import load_model
from clipret_training.step import GradientStep


def gradients(folder: Path, world: World, *, local_loss: bool, parts: int) -> dict[str, torch.Tensor]:
    """The gradients of this process's share of a batch, averaged over the processes."""
    model = load_model(str(folder / "tiny-clip")).model.train()
    saved = torch.load(folder / "batch.pt", weights_only=True)
    mine = slice(world.rank, None, world.size)
    ids = saved["ids"][mine]
    texts = TextBatch(torch.arange(len(ids)), tuple(ids.tensor_split(parts)), torch.arange(len(ids)))
    keys = torch.arange(len(saved["images"]))[mine, None]
    batch = Batch(saved["images"][mine], texts, keys, keys)
    step = GradientStep(
        model, LossConfig(local_loss=local_loss), precision="fp32", device=torch.device("cpu"), parts=parts
    )
    step(batch, 1)
    average_gradients(model.parameters(), world)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with join("cpu") as world:
        cases = [(local, parts) for local in (False, True) for parts in (1, 2)]
        results = [gradients(folder, world, local_loss=local, parts=parts) for local, parts in cases]
        torch.save(results, folder / f"gradients-{world.rank}.pt")


def die(params: Path, out: Path, last: int) -> None:
    original = GradientStep.__call__

    def step(self: GradientStep, batch: Any, number: int, *scale: Any) -> Any:
        if number > last:
            os._exit(9)
        return original(self, batch, number, *scale)

    GradientStep.__call__ = step  # type: ignore[method-assign]
    fit(FitConfig.read(params), out)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        die(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
