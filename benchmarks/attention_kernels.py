"""Which kernels onnxruntime runs a tower with: where each node was placed, and what computes the attention.

    python benchmarks/attention_kernels.py BUNDLE/image.onnx [--device cuda] [--batch 8]

Placement and time come from onnxruntime's own profile. On CUDA its attention operators print which kernel they chose
(ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO): FLASH_ATTENTION and CUDNN_FLASH_ATTENTION are flash kernels,
EFFICIENT_ATTENTION reads the scores in blocks too, MATH writes them out. A graph without an attention operator has none
to choose: its scores are written out whole. `clipret-export --fused` puts the operator in.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ATTENTION = ("MultiHeadAttention", "Attention", "PackedMultiHeadAttention")


def inside(path: Path, device: str, batch: int, folder: Path) -> None:
    """A process of its own, whose whole output is read: three runs with the profile on."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    options.log_severity_level = 3
    provider = "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    assert provider in session.get_providers(), f"onnxruntime could not start {provider}"
    given = session.get_inputs()[0]
    rng = np.random.default_rng(0)
    if "uint8" in given.type:
        side = given.shape[1]
        values = rng.integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    else:
        values = rng.integers(1, 4, (batch, 16)).astype(np.int64)
    for _ in range(3):
        session.run(None, {given.name: values})
    session.end_profiling()


def kernels(path: Path, device: str, batch: int) -> dict[str, Any]:
    """Nodes by provider, the share of time of each kind of operator, the attention kernels chosen."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, __file__, str(path), "--device", device, "--batch", str(batch), "--inside", name]
        environment = os.environ | {"ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{path} did not run on {device}: {done.stderr.strip().splitlines()[-1:]}")
        [profile] = folder.glob("profile*.json")
        events = json.loads(profile.read_text(encoding="utf-8"))
    providers, seconds = defaultdict[str, set[str]](set), Counter[str]()
    for event in events:
        arguments = event.get("args", {})
        if event.get("cat") == "Node" and "op_name" in arguments and event["name"].endswith("_kernel_time"):
            providers[arguments.get("provider") or "?"].add(event["name"])
            seconds[arguments["op_name"]] += event["dur"]
    chosen = Counter(re.findall(r"SdpaKernel=(\w+)", done.stdout + done.stderr))
    total = sum(seconds.values()) or 1
    operators = {name: round(taken / total, 3) for name, taken in seconds.most_common(8)}
    held = [name for name in ATTENTION if name in seconds]
    return {
        "device": device,
        "nodes by provider": {name: len(nodes) for name, nodes in providers.items()},
        "part of the time": operators,
        "attention operator": ", ".join(held) or "none: scores are written out whole",
        "kernels": dict(chosen),
        "flash": any("FLASH" in name for name in chosen),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tower", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        inside(arguments.tower, arguments.device, arguments.batch, arguments.inside)
        return
    print(json.dumps(kernels(arguments.tower, arguments.device, arguments.batch), indent=2))


if __name__ == "__main__":
    main()
