"""A process that torchrun starts and restarts for test_cluster.py: PARAMS OUT STEP.

Process 1 is killed when it first completes that step.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from clipret_training.config import FitConfig
from clipret_training.fit import fit
from clipret_training.step import GradientStep


def main(params: Path, out: Path, last: int) -> None:
    original = GradientStep.__call__

    def step(self: GradientStep, batch: Any, number: int, *scale: Any) -> Any:
        if number > last and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, batch, number, *scale)

    GradientStep.__call__ = step  # type: ignore[method-assign]
    fit(FitConfig.read(params), out, resume=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
