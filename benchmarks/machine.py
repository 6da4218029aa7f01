"""What every result file says of the machine, and where it is kept."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

RESULTS = Path(os.environ.get("CLIPRET_RESULTS") or Path(__file__).parent / "results")  # the suite keeps its own


def describe() -> dict[str, Any]:
    """Processor, cores that this process may use, Python, date."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "machine": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def keep(name: str, result: dict[str, Any]) -> None:
    """Write results/NAME.json and print the same as the last line, as JSON."""
    result = {"benchmark": name, **describe(), **result}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(result, ensure_ascii=False))


def sets(**settings: object) -> tuple[str, ...]:
    """Settings of `clipret-train fit` as options: sets(seed=1) is ("--set", "seed=1")."""
    return tuple(word for name, value in settings.items() for word in ("--set", f"{name}={value}"))


def multiplications(width: int, layers: int, patch: int, tokens: int, hidden: int, dim: int) -> int:
    """Of an image in a vision transformer whose last block computes keys and values only but for one token."""
    one = 2 * width**2 + 2 * width * hidden  # what a token is multiplied with, keys and values left out
    block = tokens * (one + 2 * width**2) + 2 * tokens**2 * width
    last = tokens * 2 * width**2 + one + 2 * tokens * width
    patches = (tokens - 1) * 3 * patch**2 * width
    return patches + (layers - 1) * block + last + width * dim
