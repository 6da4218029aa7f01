"""One of the processes that torchrun starts, and starts again, for test_cluster.py: PARAMS OUT STEP.

Process 1 is killed after that step, the first time that it gets there.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import clipret_training.fit as module
from clipret_training.config import FitConfig


def main(params: Path, out: Path, last: int) -> None:
    original = module._Training._step

    def step(self: Any, *arguments: Any) -> Any:
        if self.at.step > last and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments)

    module._Training._step = step  # type: ignore[method-assign]
    module.fit(FitConfig.read(params), out, resume=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
