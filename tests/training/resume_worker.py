"""A training in a process of its own, for test_resume.py. Run with the globals params, out, connection and limit.

`connection` is told of each step. With `limit` a file can grow to that many bytes only, from the step 5 on.
"""

import resource
from pathlib import Path
from typing import Any

import clipret_training.fit as module
from clipret.errors import ClipretError
from clipret_training.config import FitConfig

here: Any = globals()
original = module._Training._step


def step(self: Any, *arguments: Any) -> Any:
    if here["limit"] and self.at.step == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (here["limit"], resource.RLIM_INFINITY))
    result = original(self, *arguments)
    here["connection"].send(self.at.step)
    return result


module._Training._step = step  # type: ignore[method-assign]
try:
    module.fit(FitConfig.read(Path(here["params"])), Path(here["out"]), resume=True)
except ClipretError as error:
    here["connection"].send(str(error))
here["connection"].close()
