"""Peers that are measured with clipret on a card, where it is installed: open_clip eager and compiled, torch's
ranking."""

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from gpu_clock import HostClock, seconds_on

__all__ = ["OpenClip", "missing", "product_rate", "ranking", "towers"]


def _torch() -> Any:
    """torch with a GPU, or None."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch if torch.cuda.is_available() else None


def missing(small: bool) -> dict[str, str]:
    """What takes no part here, and why."""
    if small:
        return {"peers, CUDA graphs, TensorRT, decoding on a GPU": "no GPU: the reduced form"}
    found = {}
    if _torch() is None:
        found["torch, open_clip"] = "no torch that sees this GPU"
    elif importlib.util.find_spec("open_clip") is None:
        found["open_clip, eager and compiled"] = "not installed"
    faiss = importlib.util.find_spec("faiss") is not None
    if not faiss or not hasattr(importlib.import_module("faiss"), "StandardGpuResources"):
        found["faiss on the GPU"] = "faiss without GPU support" if faiss else "not installed"
    for module, name in (("nvidia.nvimgcodec", "nvImageCodec"), ("tensorrt", "TensorRT")):
        try:
            there = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            there = False
        if not there:
            found[name] = "not installed"
    return found


def product_rate(device: str, side: int) -> float | None:
    """Operations a second of torch's half-precision product, None where torch has no GPU."""
    if (torch := _torch()) is None:
        return None
    a = torch.randn(side, side, device=device, dtype=torch.float16)
    return 2 * side**3 / seconds_on(_TorchClock(torch), lambda: a @ a, 1.0)


class _TorchClock(HostClock):
    """Events in torch's stream."""

    def __init__(self, torch: Any) -> None:
        super().__init__()
        self._torch = torch
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def elapsed(self, run: Callable[[], object], count: int) -> float:
        self._begin.record()
        for _ in range(count):
            run()
        self._end.record()
        self._end.synchronize()
        milliseconds: float = self._begin.elapsed_time(self._end)
        return milliseconds / 1000


class OpenClip:
    """open_clip's image tower in half precision; images are copied to the card in each run, as ours are."""

    def __init__(self, name: str, device: str, compiled: bool) -> None:
        import open_clip

        self._torch, self._device = _torch(), device
        with self._torch.device(device):
            model = open_clip.create_model(name, precision="fp16", device=device)
        visual = model.visual.eval()
        self._visual = self._torch.compile(visual, dynamic=False) if compiled else visual

    def run(self, batch: np.ndarray) -> np.ndarray:
        rows: np.ndarray = self._encode(self._torch.from_numpy(batch).to(self._device)).cpu().numpy()
        return rows

    def device_seconds(self, batch: np.ndarray, least: float) -> float:
        """Of a batch that is on the card already, by the card's clock."""
        given = self._torch.from_numpy(batch).to(self._device)
        return seconds_on(_TorchClock(self._torch), lambda: self._encode(given), least)

    def _encode(self, batch: Any) -> Any:
        torch = self._torch
        with torch.inference_mode():
            pixels = batch.permute(0, 3, 1, 2).half() / 127.5 - 1
            return torch.nn.functional.normalize(self._visual(pixels).float(), dim=-1)


def towers(name: str, device: str, failed: dict[str, str]) -> dict[str, Callable[[], Any]]:
    """Ways of running open_clip's own tower, each of which opens it."""
    if _torch() is None or importlib.util.find_spec("open_clip") is None:
        failed["open_clip"] = "torch with a GPU and open_clip are not both installed"
        return {}
    return {
        "open_clip eager": lambda: OpenClip(name, device, compiled=False),
        "open_clip compiled": lambda: OpenClip(name, device, compiled=True),
    }


def faiss_ranking(
    shards: list[np.ndarray], queries: np.ndarray, k: int, median: Callable[[Callable[[], object]], float]
) -> dict[str, Any]:
    """faiss's flat index on the card, rows in half."""
    if importlib.util.find_spec("faiss") is None:
        return {"failed": "faiss is not installed"}
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        return {"failed": "faiss without GPU support"}
    options = faiss.GpuIndexFlatConfig()
    options.useFloat16 = True
    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), shards[0].shape[1], options)
    for shard in shards:
        index.add(shard.astype(np.float32))
    single = queries.astype(np.float32)
    found = {}
    for count in (1, len(queries)):
        taken = median(lambda count=count: index.search(single[:count], k))  # type: ignore[misc]
        found["1 query" if count == 1 else f"{count} queries"] = {"ms": round(1000 * taken, 3)}
    return found


def ranking(
    device: str,
    shards: list[np.ndarray],
    queries: np.ndarray,
    k: int,
    flops: float,
    bandwidth: float,
    median: Callable[[Callable[[], object]], float],
) -> dict[str, Any]:
    """A product and topk over the rows in blocks, the best of the blocks joined: approximate, in half."""
    if (torch := _torch()) is None:
        return {"failed": "no torch that sees this GPU"}
    began = time.perf_counter()
    blocks = [torch.from_numpy(np.ascontiguousarray(shard)).to(device) for shard in shards]
    found: dict[str, Any] = {"upload_seconds": round(time.perf_counter() - began, 2)}
    rows, dim = sum(map(len, shards)), shards[0].shape[1]
    for count in (1, len(queries)):
        asked = torch.from_numpy(queries[:count].astype(np.float16)).to(device)

        def run(asked: Any = asked) -> None:
            best = [torch.topk(asked @ block.T, k) for block in blocks]
            torch.topk(torch.cat([one.values for one in best], dim=1), k)
            torch.cuda.synchronize()

        taken = median(run)
        found["1 query" if count == 1 else f"{count} queries"] = {
            "ms": round(1000 * taken, 3),
            "share_of_bandwidth": round(rows * dim * 2 / taken / bandwidth, 3),
            "share_of_matrix_peak": round(2 * count * rows * dim / taken / flops, 3),
        }
    return found
