"""A training in a process of its own, for test_resume.py. Run with the globals params, out, connection and limit.

`connection` is told of each step. With `limit` a file can grow to that many bytes only, from the step 5 on.
"""

import resource
from pathlib import Path
from typing import Any

from clipret.errors import ClipretError
from clipret_training.config import FitConfig
from clipret_training.fit import fit
from clipret_training.step import GradientStep

here: Any = globals()
original = GradientStep.__call__


def step(self: GradientStep, batch: Any, number: int, *scale: Any) -> Any:
    if here["limit"] and number == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (here["limit"], resource.RLIM_INFINITY))
    result = original(self, batch, number, *scale)
    here["connection"].send(number)
    return result


GradientStep.__call__ = step  # type: ignore[method-assign]
try:
    fit(FitConfig.read(Path(here["params"])), Path(here["out"]), resume=True)
except ClipretError as error:
    here["connection"].send(str(error))
here["connection"].close()
