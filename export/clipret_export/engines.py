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
    """Which plans to build; see `build_engines`."""

    library: TensorRTLibrary
    archs: Sequence[str] | None = None
    batch: Sequence[int] = (1, 64)
    timing_cache: Path | None = None

    def check(self, precision: str) -> None:
        """Raises ClipretError for what cannot be built whatever the model is, before anything is loaded."""
        check_request(self.library, self.archs, self.batch, self.timing_cache)
        if precision == "int8":
            raise ClipretError(
                f"{BACKENDS[self.library].label} takes no asymmetric int8, which this bundle has for CPUs: "
                "export with --fp16"
            )

    def build(self, folder: Path, manifest: Manifest) -> dict[str, Engine]:
        """Write the plans into the bundle `folder`. Raises ClipretError as `check` and `build_engines` do."""
        self.check(manifest.precision)
        return build_engines(
            folder, manifest, self.library, archs=self.archs, batch=self.batch, timing_cache=self.timing_cache
        )


def check_engines(bundle: Bundle, expected: Reference, limits: Limits) -> dict[str, Any]:
    """Run the parity check on the plans that fit this machine: library -> report, or why they could not run here.

    Raises ClipretError when a plan that runs here differs from torch.
    """
    engines = bundle.manifest.engines
    told: dict[str, Any] = {}
    for library in dict.fromkeys(engine.library for engine in engines.values()):
        try:
            arch = gpu_arch()
        except ClipretError as error:
            told[library] = f"not run: {error}"
            continue
        versions = installed()
        if library not in versions or choose_engine(engines, library, versions[library], arch) is None:
            told[library] = f"not run: {explain_mismatch(engines, versions, arch)}"
            continue
        largest = max(size for engine in engines.values() for size in engine.batch)
        report = parity_check(bundle, expected, limits, device="cuda", engine=library, largest=largest)
        if report.problems:
            raise ClipretError(
                f"the {BACKENDS[library].label} plans differ from torch ({report.problem_text()}): nothing was written"
            )
        told[library] = report.to_dict()
    return told


def add_engines(path: Path, request: EngineRequest, limits: Limits | None = None) -> tuple[Bundle, dict[str, Any]]:
    """Build plans into an existing bundle; also returns what `check_engines` told. Needs no torch.

    The bundle stays valid at every instant: plans count once the new manifest, written in one piece, names them. Raises
    ClipretError for a bundle whose towers have changed, and as `EngineRequest.build` and `check_engines` do.
    """
    bundle = Bundle.open(path)
    for name in ("image.onnx", "text.onnx"):
        bundle.file(name)
    engines = request.build(bundle.path, bundle.manifest)
    files = dict(bundle.manifest.files)
    for key in engines:
        for plan in sorted((bundle.path / "engines" / key).iterdir()):
            files[plan.relative_to(bundle.path).as_posix()] = file_entry(plan)
    manifest = replace(bundle.manifest, files=files, engines=bundle.manifest.engines | engines)
    made = Bundle(bundle.path, manifest)
    told = check_engines(made, load_reference(bundle), limits or LIMITS[manifest.precision])
    write_file(bundle.path / "bundle.json", manifest.to_json())
    return made, told
