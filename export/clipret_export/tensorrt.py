"""TensorRT engines for a bundle, built by TensorRT 10 or 11 or by TensorRT for RTX with the same code.

The networks are strongly typed: every layer computes in the type of its ONNX node, so fp16, bf16 and int8 graphs keep
the precision that passed the parity check. An engine runs only with the version that built it; see
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

ANY_AMPERE = "sm_80+"  # the default of TensorRT for RTX: one engine for Ampere and every later architecture
_USUAL_TOKENS = 16  # typical number of tokens of a query or caption; a batch is padded to its longest text

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
    """Build image.onnx and text.onnx of a bundle into engines/KEY/{image,text}.plan.

    A folder engines/KEY is either complete or absent.

    Args:
        folder: The bundle.
        manifest: Its manifest, which stays as it is.
        library: The library that builds the engines.
        archs: GPU architectures, such as "sm_89". TensorRT builds only for the GPU of this machine. TensorRT for RTX
            needs no GPU and builds for `ANY_AMPERE` by default.
        batch: Batch sizes to tune for; the largest is the maximum of a call.
        timing_cache: File that makes the next build of TensorRT faster; created if missing.

    Returns:
        The new entries of `Manifest.engines`, by KEY.

    Raises:
        ClipretError: The library or the GPU is missing, an architecture is unknown, the parser or builder refuses a
            graph, or the disk is full.
    """
    architectures = check_request(library, archs, batch, timing_cache)
    trt, sizes = load_library(library), sorted(set(batch))
    engines: dict[str, Engine] = {}
    with stages() as stage:
        for arch in architectures:
            engine = Engine(library, trt.__version__, arch, sizes)
            key = f"{'trt' if library == 'tensorrt' else 'rtx'}-{engine.version}-{arch}"
            with new_folder(folder / "engines" / key, overwrite=True) as new:
                for kind in ("image", "text"):
                    show = partial(_show, stage, f"{kind}.plan for {arch}")
                    profiles = tower_profiles(kind, manifest, sizes, library)
                    content = _build(trt, library, folder / f"{kind}.onnx", arch, profiles, timing_cache, show)
                    (new / f"{kind}.plan").write_bytes(content)
            engines[key] = engine
    return engines


def check_request(
    library: TensorRTLibrary, archs: Sequence[str] | None, batch: Sequence[int], timing_cache: Path | None
) -> list[str]:
    """Check the arguments of `build_engines`.

    Args:
        library: As in `build_engines`.
        archs: As in `build_engines`.
        batch: As in `build_engines`.
        timing_cache: As in `build_engines`.

    Returns:
        The architectures to build for.

    Raises:
        ClipretError: `build_engines` would refuse the arguments, whatever the bundle is.
    """
    trt = load_library(library)
    if not batch or min(batch) < 1:
        raise ClipretError(f"no engine can be built for batch sizes {list(batch)}: give one or more, each at least 1")
    if timing_cache is not None and library == "tensorrt_rtx":
        raise ClipretError("TensorRT for RTX does not time kernels while it builds: leave the timing cache out")
    return _architectures(trt, library, archs)


def tower_profiles(kind: str, manifest: Manifest, sizes: Sequence[int], library: TensorRTLibrary) -> list[Profile]:
    """The optimization profiles of a tower.

    TensorRT chooses kernels by timing them at one shape per profile, so each batch size gets a profile. TensorRT for
    RTX compiles the kernels for a shape when it first runs it, so more profiles only cost size and time (ViT-B-32's
    image tower with three profiles: 214 MB instead of 186, built in 5.5 s instead of 2).

    Args:
        kind: "image" or "text".
        manifest: The manifest of the bundle.
        sizes: Batch sizes, ascending.
        library: The library that builds the engine.

    Returns:
        The smallest shape, the shape to tune for and the largest shape of each profile, by ascending batch size.
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
    """The requested architectures without duplicates, or the default of the library."""
    if library == "tensorrt":
        native = gpu_arch()
        if other := [arch for arch in archs or () if arch != native]:
            raise ClipretError(
                f"TensorRT builds only for the GPU of this machine ({native}), not for {other[0]}: run it on a machine "
                "with such a GPU, or use TensorRT for RTX"
            )
        return [native]
    numbered = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    supported = [ANY_AMPERE, *(name.replace("SM", "sm_") for name in numbered)]
    for arch in archs or ():
        if arch not in supported:
            raise ClipretError(
                f"TensorRT for RTX {trt.__version__} does not support {arch!r}: choose from {', '.join(supported)}"
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
    """The serialized engine of one graph, as a buffer."""
    log = error_log(trt)
    builder = trt.Builder(log)
    if builder is None:
        raise ClipretError(f"{BACKENDS[library].label} does not start ({log.reason}): check the driver with nvidia-smi")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(source)):
        raise ClipretError(_refusal(trt, library, source, parser))
    config = builder.create_builder_config()
    # TensorFloat-32 has the mantissa of half precision: too little for layers that were kept in float32.
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
        content = builder.build_serialized_network(network, config)
    if content is None:
        raise ClipretError(
            f"{BACKENDS[library].label} {trt.__version__} cannot build {source.name} for {arch}: {log.reason}; "
            "try another architecture or precision"
        )
    if timing_cache is not None:
        write_file(timing_cache, bytes(config.get_timing_cache().serialize()))
    return content


def _refusal(trt: Any, library: TensorRTLibrary, source: Path, parser: Any) -> str:
    who = f"{BACKENDS[library].label} {trt.__version__}"
    if not parser.num_errors:
        return f"{who} cannot read {source}, which may be incomplete: export the model again"
    error = parser.get_error(0)
    where = f"operator {error.node_operator()} (node {error.node_name()!r})" if error.node_operator() else "the graph"
    reason = " ".join(error.desc().split())
    return f"{who} refuses {where} of {source.name}: {reason}; try a newer version, or search with onnxruntime"


def _load_timing_cache(config: Any, path: Path) -> None:
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise ClipretError(f"{path} cannot be read: {error.strerror}; choose another timing cache") from error
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise ClipretError(f"{path} is not a timing cache of this TensorRT and GPU: delete it or name another file")


def _show(stage: Callable[[str], None], name: str, phase: str) -> None:
    stage(f"{name}: {phase.lower()}")


def _monitor(trt: Any, show: Callable[[str], None], interrupted: threading.Event) -> Any:
    """An IProgressMonitor, whose base class exists only after the library is loaded.

    The builder may call it from any thread; an exception in a call would end the process.
    """

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
    """Ctrl-C inside the block sets the event, and raises KeyboardInterrupt at the end of the block.

    Raised in a callback of the builder, it would end the process and leave the temporary folder behind.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # only the main thread handles signals
        return
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted.is_set():
        raise KeyboardInterrupt
