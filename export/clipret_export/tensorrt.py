"""TensorRT engines for a bundle: TensorRT 10 and 11, and TensorRT for RTX, through one path.

The networks are strongly typed: every layer computes in the type that its ONNX node has, so fp16, bf16 and int8
graphs keep what the export's check has approved. A plan runs on the version that built it, see
`clipret.inference.tensorrt`.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from clipret.backends import BACKENDS, TensorRTLibrary
from clipret.bundle import Engine, Manifest
from clipret.console import stages
from clipret.errors import ClipretError
from clipret.files import new_folder, write_file
from clipret.hardware.cuda import gpu_arch
from clipret.inference.tensorrt import error_log, load_library

__all__ = ["ANY_AMPERE", "build_engines", "check_request"]

ANY_AMPERE = "sm_80+"  # what TensorRT for RTX builds unless told otherwise: one plan for Ampere and everything later
_USUAL_TOKENS = 16  # of a query or a caption; texts are cut to the longest of their batch

Shape = tuple[int, ...]
Profile = tuple[Shape, Shape, Shape]  # smallest, tuned for, largest


def build_engines(
    folder: Path,
    manifest: Manifest,
    library: TensorRTLibrary,
    *,
    archs: Sequence[str] | None = None,
    batch: Sequence[int] = (1, 64),
    timing_cache: Path | None = None,
) -> dict[str, Engine]:
    """Build image.onnx and text.onnx of the bundle `folder` into `folder`/engines/KEY/{image,text}.plan.

    `archs`: like "sm_89". TensorRT builds for the GPU of this machine only. TensorRT for RTX needs no GPU; its default
    is `ANY_AMPERE`. `batch`: the batch sizes to tune for, the largest is the limit of a call. `timing_cache`: a file
    that makes the next build of TensorRT faster; made where it is missing.

    Returns KEY -> Engine for the manifest. A folder engines/KEY is whole or absent. Raises ClipretError where the
    library or the GPU is missing, an architecture is unknown, the parser or the builder refuses a graph, or the disk
    is full.
    """
    wanted = check_request(library, archs, batch, timing_cache)
    trt, sizes = load_library(library), sorted(set(batch))
    made: dict[str, Engine] = {}
    with stages() as stage:
        for arch in wanted:
            engine = Engine(library, trt.__version__, arch, sizes)
            key = f"{'trt' if library == 'tensorrt' else 'rtx'}-{engine.version}-{arch}"
            with new_folder(folder / "engines" / key, overwrite=True) as place:
                for kind in ("image", "text"):
                    show = partial(_show, stage, f"{kind}.plan for {arch}")
                    profiles = tower_profiles(kind, manifest, sizes, library)
                    plan = _build(trt, library, folder / f"{kind}.onnx", arch, profiles, timing_cache, show)
                    (place / f"{kind}.plan").write_bytes(plan)
            made[key] = engine
    return made


def check_request(
    library: TensorRTLibrary, archs: Sequence[str] | None, batch: Sequence[int], timing_cache: Path | None
) -> list[str]:
    """The architectures that `build_engines` would build for. Raises ClipretError for what it would refuse at once."""
    trt = load_library(library)
    if not batch or min(batch) < 1:
        raise ClipretError(f"batch sizes {list(batch)} make no plan: give one or more that are at least 1")
    if timing_cache is not None and library == "tensorrt_rtx":
        raise ClipretError("TensorRT for RTX times nothing while it builds: leave the timing cache out")
    return _architectures(trt, library, archs)


def tower_profiles(kind: str, manifest: Manifest, sizes: Sequence[int], library: TensorRTLibrary) -> list[Profile]:
    """The optimisation profiles of a tower, by ascending batch.

    TensorRT picks its kernels by timing them at one shape a profile, so each batch size gets its own. TensorRT for RTX
    makes the kernels for a shape when it first meets one, so more profiles would buy nothing for their size and time
    (ViT-B-32's image tower with three: 214 MB instead of 186, built in 5.5 s instead of 2).
    """
    text = manifest.text
    smallest, usual, largest = (text.context_length,) * 3
    if text.pad_to == "longest":
        smallest, usual = 1, min(_USUAL_TOKENS, text.context_length)
    size = manifest.image.size

    def shape(count: int, length: int) -> Shape:
        return (count, size, size, 3) if kind == "image" else (count, length)

    if library == "tensorrt_rtx":
        return [(shape(1, smallest), shape(sizes[-1], usual), shape(sizes[-1], largest))]
    below = [0, *sizes]
    return [
        (shape(low + 1, smallest), shape(high, usual), shape(high, largest))
        for low, high in zip(below, sizes, strict=False)
    ]


def _architectures(trt: Any, library: TensorRTLibrary, archs: Sequence[str] | None) -> list[str]:
    """`archs` checked, or the default, each once."""
    if library == "tensorrt":
        here = gpu_arch()
        if other := [arch for arch in archs or () if arch != here]:
            raise ClipretError(
                f"TensorRT builds for the GPU of this machine ({here}), not for {other[0]}: run it on such a machine, "
                "or use TensorRT for RTX"
            )
        return [here]
    numbered = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    known = [ANY_AMPERE, *(name.replace("SM", "sm_") for name in numbered)]
    for arch in archs or ():
        if arch not in known:
            raise ClipretError(
                f"TensorRT for RTX {trt.__version__} builds nothing for {arch!r}: choose from {', '.join(known)}"
            )
    return list(dict.fromkeys(archs or [ANY_AMPERE]))


def _build(
    trt: Any,
    library: TensorRTLibrary,
    source: Path,
    arch: str,
    profiles: list[Profile],
    timing_cache: Path | None,
    show: Callable[[str], None],
) -> Any:
    """The plan of one graph, as a buffer."""
    log = error_log(trt)
    builder = trt.Builder(log)
    if builder is None:
        raise ClipretError(f"{BACKENDS[library].label} does not start: {log.reason}")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(source)):
        raise ClipretError(_refusal(trt, library, source, parser))
    config = builder.create_builder_config()
    # TensorFloat-32 has the mantissa of half: a float32 graph, or a layer kept in float32, asked for more.
    config.clear_flag(trt.BuilderFlag.TF32)
    name = network.get_input(0).name
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        shapes.set_shape(name, *profile)
        config.add_optimization_profile(shapes)
    if library == "tensorrt_rtx" and arch != ANY_AMPERE:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, arch.replace("sm_", "SM")), 0)
    if timing_cache is not None:
        _load_timing_cache(config, timing_cache)
    with _until_interrupted() as interrupted:
        config.progress_monitor = _monitor(trt, show, interrupted)
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ClipretError(
            f"{BACKENDS[library].label} {trt.__version__} cannot build {source.name} for {arch}: {log.reason}; "
            "try another architecture or precision"
        )
    if timing_cache is not None:
        write_file(timing_cache, bytes(config.get_timing_cache().serialize()))
    return plan


def _refusal(trt: Any, library: TensorRTLibrary, source: Path, parser: Any) -> str:
    who = f"{BACKENDS[library].label} {trt.__version__}"
    if not parser.num_errors:
        return f"{who} cannot read {source}: is it whole? Export the model again"
    error = parser.get_error(0)
    where = f"operator {error.node_operator()} (node {error.node_name()!r})" if error.node_operator() else "the graph"
    reason = " ".join(error.desc().split())
    return f"{who} refuses {where} of {source.name}: {reason}; try a newer version, or search with onnxruntime"


def _load_timing_cache(config: Any, path: Path) -> None:
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise ClipretError(f"{path} cannot be read: {error.strerror}; choose another timing cache") from None
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise ClipretError(f"{path} is no timing cache of this TensorRT and GPU: delete it or name another file")


def _show(stage: Callable[[str], None], plan: str, phase: str) -> None:
    stage(f"{plan}: {phase.lower()}")


def _monitor(trt: Any, show: Callable[[str], None], interrupted: threading.Event) -> Any:
    """An IProgressMonitor, whose base class exists only once the library is loaded. Its calls may come from any
    thread; an exception in one of them would end the process."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
            self.steps[phase_name] = num_steps
            show(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            show(f"{phase_name} {step + 1}/{self.steps.get(phase_name, step + 1)}")
            return not interrupted.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


@contextmanager
def _until_interrupted() -> Iterator[threading.Event]:
    """Ctrl-C inside the block sets the event, and is raised when the block ends: raised in the middle of a callback
    of the builder it would end the process and leave the temporary folder behind."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # signals arrive elsewhere
        return
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted.is_set():
        raise KeyboardInterrupt
