"""What works on this machine: packages, backends, devices, and the exactness of the ranking, each by trying it."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from clipret.backends import BACKENDS, Backend, TensorRTLibrary
from clipret.errors import ClipretError, require
from clipret.hardware.cpu import cpu_count, int8_saturates
from clipret.hardware.cuda import device_name, gpu_count
from clipret.inference.tensorrt import TensorRTTower, error_log, load_library
from clipret.inference.tower import OnnxTower, OpenVinoTower, Tower
from clipret.ort.graph import Node, Value, model
from clipret.ort.session import CUDA, has_device
from clipret.ranking.quantization import mean, quantize
from clipret.ranking.ranker import Ranker, snap

__all__ = ["Extra", "Finding", "check_backends", "check_exactness", "extras", "machine"]

State = Literal["works", "idle", "absent", "fails"]

_PATIENCE = 180.0  # seconds for a backend to answer; building a TensorRT engine takes five on one core
_INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


@dataclass(frozen=True)
class Finding:
    """The result of a trial. `state` "idle": installed and intact, but its device is missing."""

    name: str
    state: State
    detail: str


@dataclass(frozen=True)
class Extra:
    """An extra of the package: the version of each package that it asks for, None where that is missing; `old` names
    those that are older than it asks for."""

    name: str
    packages: dict[str, str | None]
    old: list[str]

    @property
    def complete(self) -> bool:
        return not self.old and None not in self.packages.values()


def extras() -> list[Extra]:
    """Every extra of the installed package, and its own requirements under the name ""."""
    wanted = defaultdict[str, dict[str, SpecifierSet]](dict)
    for line in importlib.metadata.requires("clipret") or ():
        requirement = Requirement(line)
        match = re.search(r'extra == "([\w-]+)"', str(requirement.marker))
        extra = match[1] if match else ""
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):  # of this system
            wanted[extra][requirement.name] = requirement.specifier
    found = []
    for name, packages in wanted.items():
        versions = {package: _version(package) for package in packages}
        old = [
            package
            for package, version in versions.items()
            if version and not packages[package].contains(version, prereleases=True)
        ]
        found.append(Extra(name, versions, old))
    return found


def _version(package: str) -> str | None:
    # The two are one module; with its CUDA variant installed the other must not be.
    for name in (package, "onnxruntime-gpu") if package == "onnxruntime" else (package,):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def machine(folder: Path) -> dict[str, Any]:
    """Processor, memory, GPUs, and the disk of `folder`; sizes in bytes, None if the system does not say.

    `vnni`: whether 8-bit products are exact without a slower method (always on processors other than x86).
    """
    facts = _read("/proc/cpuinfo")
    flags = set((re.search(r"^flags\s*:(.*)$", facts, re.MULTILINE) or ["", ""])[1].split())
    named = re.search(r"^model name\s*:\s*(.*)$", facts, re.MULTILINE)
    memory = {name: int(size) << 10 for name, size in re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.M)}
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "processor": named[1] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": cpu_count(),
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "vnni": not int8_saturates(),
        "memory": memory.get("MemTotal"),
        "memory_available": memory.get("MemAvailable"),
        "memory_limit": int(limit) if limit.isdecimal() else None,
        "disk_free": shutil.disk_usage(folder).free,
        "gpus": [device_name(number) for number in range(gpu_count())],
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system
        return ""


def check_backends(names: Iterable[Backend] = BACKENDS) -> Iterator[Finding]:
    """Run a tower of three products on each installed backend, in the code that searches.

    In a process of its own, because a library that does not fit its driver can end the process, or hang.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            yield Finding(name, "absent", f"pip install 'clipret[{BACKENDS[name].extra}]'")
            continue
        command = [
            sys.executable,
            "-P",
            "-m",
            "clipret.diagnostics.doctor",
            name,
        ]  # -P: import nothing from the current folder
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
        except subprocess.TimeoutExpired:
            yield Finding(name, "fails", f"does not answer within {_PATIENCE:g} s")
            continue
        if done.returncode == 0:
            state, detail = json.loads(done.stdout.splitlines()[-1])
            yield Finding(name, state, detail)
        else:
            messages = done.stderr.strip().splitlines() or ["no message"]
            how = f"crashes (signal {-done.returncode})" if done.returncode < 0 else "does not run"
            yield Finding(name, "fails", f"{how}: {messages[-1]}")


def _probe(name: str) -> tuple[State, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tower.onnx")
        path.write_bytes(_tower())
        if name == "onnxruntime":
            return _probe_onnxruntime(path)
        if name == "openvino":
            return _probe_openvino(path)
        return _probe_tensorrt(path, "tensorrt_rtx" if name == "tensorrt_rtx" else "tensorrt")


def _tower() -> bytes:
    """uint8 [B,4,4,3] -> float32 [B,8] of unit length: the shape of an image tower."""
    nodes = [
        Node("Cast", ["pixels"], ["values"], {"to": 1}),
        Node("ReduceMean", ["values", "places"], ["colour"], {"keepdims": 0}),
        Node("MatMul", ["colour", "weights"], ["mixed"]),
        Node("ReduceL2", ["mixed", "last"], ["length"], {"keepdims": 1}),
        Node("Div", ["mixed", "length"], ["row"]),
    ]
    constants = {"places": np.array([1, 2]), "last": np.array([1]), "weights": _weights()}
    return model(nodes, [Value("pixels", "uint8", ("B", 4, 4, 3))], [Value("row", "float32", ("B", 8))], constants)


def _weights() -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)


def _checked(tower: Tower, most: float) -> None:
    """Raises ClipretError unless the tower returns the right embeddings, to within `most`, for batches of several
    sizes.
    """
    for count in (1, 5):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
        expected = pixels.mean(axis=(1, 2)) @ _weights()
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        error = float(np.abs(tower.run(pixels) - expected).max())
        if not error <= most:
            raise ClipretError(
                f"the embeddings of a tower are wrong by {error:.1e}: reinstall this backend or use another"
            )


def _probe_onnxruntime(path: Path) -> tuple[State, str]:
    import onnxruntime as ort

    _checked(OnnxTower(path, "cpu", 1), 1e-5)
    ran = ["CPU"]
    if CUDA in ort.get_available_providers():
        for gpu in range(gpu_count()):
            _checked(OnnxTower(path, f"cuda:{gpu}", 1), 1e-3)
            ran.append(f"cuda:{gpu}")
        if not gpu_count():
            ran.append("CUDA without a GPU")
    return "works", f"{ort.__version__} on {', '.join(ran)}"


def _probe_openvino(path: Path) -> tuple[State, str]:
    openvino = require("openvino", "openvino")
    _checked(OpenVinoTower(path, 1, bf16=False), 1e-5)
    native = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if native:
        _checked(OpenVinoTower(path, 1, bf16=True), 0.03)
    return "works", f"{openvino.__version__.partition('-')[0]} on CPU, {'bf16' if native else 'no bf16 here: float32'}"


def _probe_tensorrt(path: Path, library: TensorRTLibrary) -> tuple[State, str]:
    trt, gpus = load_library(library), gpu_count()
    if library == "tensorrt" and not gpus:
        return "idle", f"{trt.__version__}, but there is no GPU"
    log = error_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    if not trt.OnnxParser(network, log).parse_from_file(str(path)):
        raise ClipretError(f"{BACKENDS[library].label} cannot read a tower: {log.reason}")
    profile = builder.create_optimization_profile()
    profile.set_shape("pixels", (1, 4, 4, 3), (4, 4, 4, 3), (8, 4, 4, 3))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ClipretError(f"{BACKENDS[library].label} cannot build an engine: {log.reason}")
    if not gpus:
        return "idle", f"{trt.__version__} builds engines, but there is no GPU to run them"
    file = path.with_suffix(".plan")
    file.write_bytes(engine)
    for gpu in range(gpus):
        _checked(TensorRTTower(file, library, gpu), 1e-3)
    return "works", f"{trt.__version__} on {', '.join(f'cuda:{gpu}' for gpu in range(gpus))}"


def check_exactness(count: int = 40000, seed: int = 0) -> Iterator[Finding]:
    """Compare every method of the ranking on this machine with a float64 brute force over the same embeddings.

    The embeddings, float16 [count,64], are hard to order: two thirds of them are duplicates, and many more tie. A tenth
    is deleted. A method that is wrong or fails is a finding, not an error.
    """
    rng = np.random.default_rng(seed)
    distinct = rng.standard_normal((count // 3, 64))
    distinct[::2] = np.rint(distinct[::2])  # products of small integers tie
    distinct /= np.maximum(np.linalg.norm(distinct, axis=1, keepdims=True), 1e-9)
    distinct[1::4] = np.rint(distinct[1::4] * 8) / 8
    embeddings = distinct.astype(np.float16)[rng.integers(0, len(distinct), count)]
    shards = np.split(embeddings, [count // 7, count // 2])
    center = mean(shards[0])
    quantized = [quantize(shard, center) for shard in shards]
    live = rng.random(count) > 0.1
    few = rng.random(count) < 0.05
    queries = snap(np.concatenate([rng.standard_normal((20, 64)) / 8, embeddings[rng.integers(0, count, 28)]]))
    scores = queries @ embeddings.T.astype(np.float64)  # without a rounding, see clipret.ranking.ranker
    forms: dict[str, Callable[[], int]] = {}

    def compare(ranker: Ranker, number: int, among: npt.NDArray[np.bool_] | None = None) -> int:
        allowed = live if among is None else live & among
        positions, ranked = np.flatnonzero(allowed), 0
        for k in (1, 10, 100):
            for low in range(0, len(queries), number):
                part = slice(low, low + number)
                results = ranker.rank(queries[part], k, among=among)
                for query, values, line in zip(range(low, low + number), *results, strict=False):
                    best = positions[np.lexsort((positions, -scores[query, positions]))[:k]]
                    if not (np.array_equal(line, best) and np.array_equal(values, scores[query, best])):
                        at = int(np.flatnonzero(line != best)[0]) + 1 if (line != best).any() else 1
                        raise ClipretError(f"query {query}, k = {k}: wrong from rank {at} on")
                    ranked += k
        return ranked

    def on_device(device: str) -> int:
        return compare(Ranker(shards, live, quantized, device=device), 48)

    plain = Ranker(shards, live)
    forms["float32, streamed"] = lambda: compare(plain, 48)
    forms["few embeddings, all in float64"] = lambda: compare(plain, 48, few)
    if importlib.util.find_spec("onnxruntime"):
        forms["quantized, streamed, a query at a time"] = lambda: compare(Ranker(shards, live, quantized), 1)
        forms["quantized, streamed, 48 queries"] = lambda: compare(Ranker(shards, live, quantized), 48)
        forms["quantized, resident, a query at a time"] = lambda: compare(
            Ranker(shards, live, quantized, resident=True), 1
        )
        forms["quantized, resident, 16 queries"] = lambda: compare(Ranker(shards, live, quantized, resident=True), 16)
    for gpu in range(gpu_count()):
        if has_device(device := f"cuda:{gpu}"):
            forms[f"half precision on {device}"] = partial(on_device, device)
    for name, check in forms.items():
        try:
            yield Finding(name, "works", f"{check():,} ranks equal the brute force")
        except Exception as error:  # a broken library may raise anything
            yield Finding(name, "fails", str(error) or type(error).__name__)


if __name__ == "__main__":
    try:
        print(json.dumps(_probe(sys.argv[1])))
    except ClipretError as error:
        sys.exit(str(error))
