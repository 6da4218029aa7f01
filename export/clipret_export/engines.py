"""TensorRT engines in a bundle: built, run through the parity check where a GPU fits them, added to the manifest."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from clipret.backends import BACKENDS, TensorRTLibrary
from clipret.bundle import Bundle, Engine, Manifest, file_entry
from clipret.errors import ClipretError
from clipret.files import write_file
from clipret.hardware.cuda import gpu_arch
from clipret.inference.tensorrt import choose_engine, explain_mismatch, installed
from clipret_export.parity import LIMITS, Limits, Reference, load_reference, parity_check
from clipret_export.tensorrt import build_engines, check_request

__all__ = ["EngineRequest", "add_engines", "check_engines"]


@dataclass(frozen=True)
class EngineRequest:
    """TensorRT engines to build; see `build_engines`.

    Attributes:
        library: The library that builds them.
        archs: GPU architectures, such as "sm_89"; None for the default of the library.
        batch: Batch sizes to tune the engines for.
        timing_cache: File with the kernel timings of earlier builds.
    """

    library: TensorRTLibrary
    archs: Sequence[str] | None = None
    batch: Sequence[int] = (1, 64)
    timing_cache: Path | None = None

    def check(self, precision: str) -> None:
        """Check the request before anything is loaded.

        Args:
            precision: Precision of the bundle.

        Raises:
            ClipretError: The request cannot be built, whatever the model is.
        """
        check_request(self.library, self.archs, self.batch, self.timing_cache)
        if precision == "int8":
            raise ClipretError(
                f"{BACKENDS[self.library].label} does not support asymmetric int8, which int8 bundles use for CPUs: "
                "export with --fp16"
            )

    def build(self, folder: Path, manifest: Manifest) -> dict[str, Engine]:
        """Build the engines into a bundle folder.

        Args:
            folder: The bundle, with image.onnx and text.onnx.
            manifest: Its manifest, which stays as it is.

        Returns:
            The new entries of `Manifest.engines`.

        Raises:
            ClipretError: As `check` and `build_engines`.
        """
        self.check(manifest.precision)
        return build_engines(
            folder, manifest, self.library, archs=self.archs, batch=self.batch, timing_cache=self.timing_cache
        )


def check_engines(bundle: Bundle, expected: Reference, limits: Limits) -> dict[str, Any]:
    """Run the parity check on the engines that fit this machine.

    Args:
        bundle: A bundle with TensorRT engines.
        expected: The embeddings of torch.
        limits: The largest differences allowed.

    Returns:
        For each library the report of the parity check, or the reason why its engines could not run here.

    Raises:
        ClipretError: An engine runs here and differs from torch.
    """
    engines = bundle.manifest.engines
    reports: dict[str, Any] = {}
    for library in dict.fromkeys(engine.library for engine in engines.values()):
        try:
            arch = gpu_arch()
        except ClipretError as error:
            reports[library] = f"not run: {error}"
            continue
        versions = installed()
        if library not in versions or choose_engine(engines, library, versions[library], arch) is None:
            reports[library] = f"not run: {explain_mismatch(engines, versions, arch)}"
            continue
        largest = max(size for engine in engines.values() for size in engine.batch)
        report = parity_check(bundle, expected, limits, device="cuda", backend=library, largest=largest)
        if report.problems:
            raise ClipretError(
                f"the {BACKENDS[library].label} engines differ from torch ({report.problem_text()}): nothing was "
                "written; export in a higher precision, or without these engines"
            )
        reports[library] = report.to_dict()
    return reports


def add_engines(path: Path, request: EngineRequest, limits: Limits | None = None) -> tuple[Bundle, dict[str, Any]]:
    """Build TensorRT engines into an existing bundle. Does not need torch.

    The bundle stays valid at every moment: engines count only when the new manifest, which is written atomically,
    names them.

    Args:
        path: The bundle.
        request: The engines to build.
        limits: The largest differences from torch allowed; by default those of the bundle's precision.

    Returns:
        The bundle with its new manifest, and the reports of `check_engines`.

    Raises:
        ClipretError: The towers do not match their checksums, or as `EngineRequest.build` and `check_engines`.
    """
    bundle = Bundle.open(path)
    for name in ("image.onnx", "text.onnx"):
        bundle.file(name)
    engines = request.build(bundle.path, bundle.manifest)
    files = dict(bundle.manifest.files)
    for key in engines:
        for file in sorted((bundle.path / "engines" / key).iterdir()):
            files[file.relative_to(bundle.path).as_posix()] = file_entry(file)
    manifest = replace(bundle.manifest, files=files, engines=bundle.manifest.engines | engines)
    extended = Bundle(bundle.path, manifest)
    reports = check_engines(extended, load_reference(bundle), limits or LIMITS[manifest.precision])
    write_file(bundle.path / "bundle.json", manifest.to_json())
    return extended, reports
