"""The bundle: the folder that export hands to the runtime.

    bundle.json         the manifest (`Manifest` below), format version first
    image.onnx (.data)  uint8 [B,S,S,3] -> float32 [B,D], unit norm
    text.onnx  (.data)  int64 [B,L]     -> float32 [B,D], unit norm
    tokenizer.json      Hugging Face `tokenizers` file
    engines/KEY/        optional TensorRT plans, image.plan and text.plan; see `Engine`
    verify.json         the report of the export's own check against torch
    reference.npz       what torch made of the check's inputs, so that any machine can repeat it

Everything that the runtime needs is in it and nothing is looked up anywhere else.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from clipret.errors import ClipretError

__all__ = [
    "FORMAT",
    "Bundle",
    "Engine",
    "FileEntry",
    "ImageSpec",
    "Manifest",
    "TextSpec",
    "check_bundle",
    "file_entry",
    "find_bundle",
]

FORMAT = 1


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes uint8 [size,size,3]. What is arithmetic (mean, std) is in the graph instead.

    resize: `shortest` scales the short side to `size` and crops the centre, `longest` scales the long side
    and pads to a square with `fill`, `squash` ignores the aspect ratio.
    """

    size: int
    resize: Literal["shortest", "longest", "squash"] = "shortest"
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    fill: int = 0
    exif: bool = False  # turn the picture as its EXIF tag says; the reference preprocessings do not


@dataclass(frozen=True)
class TextSpec:
    """How a caption becomes int64 [L], L <= context_length.

    clean: how `text.clean` prepares it; `clip` is the cleaning of CLIP's own tokenizer, `none` leaves it to the
    tokenizer's file. pad_to: `longest` of the batch where the tower's embedding does not depend on
    padding, else `context`.
    """

    context_length: int
    clean: Literal["clip", "whitespace", "canonicalize", "lower", "none"] = "clip"
    pad_to: Literal["longest", "context"] = "longest"
    pad_id: int = 0


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 (hex) of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Engine:
    """What a folder `engines/KEY` was built by and for: a plan runs with this library and version and on this
    architecture only. `batch`: the batch sizes it was tuned for, ascending; it takes any up to the last."""

    library: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    arch: str  # of the GPU, as sm_89
    batch: list[int]


@dataclass(frozen=True)
class Manifest:
    """bundle.json. `source` and `source_sha256` say which checkpoint the towers come from.

    precision: of the matrix products. `float32_layers`: layers that the export kept in float32 because they
    overflowed or cost too much accuracy, by their names in the torch model, `image.` or `text.` before them.
    """

    format: int
    model: str
    source: str
    source_sha256: str
    precision: Literal["fp32", "fp16", "bf16", "int8"]
    embedding_dim: int
    logit_scale: float
    image: ImageSpec
    text: TextSpec
    files: dict[str, FileEntry]
    float32_layers: list[str] = field(default_factory=list)
    engines: dict[str, Engine] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        value = json.loads(text)
        if not isinstance(value, dict) or not isinstance(value.get("format"), int):
            raise ValueError("it has no format version")
        if value["format"] != FORMAT:
            raise ValueError(f"its format is {value['format']}, this clipret reads format {FORMAT}")
        made: Self = _build(cls, value, "manifest")
        return made


def _build(cls: type, value: Any, where: str) -> Any:
    """Dataclass from parsed JSON; unknown, missing and ill-typed fields are errors that name the field."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object")
    hints = get_type_hints(cls)
    if unknown := sorted(set(value) - set(hints)):
        raise ValueError(f"{where} has an unknown field {unknown[0]!r}")
    made: dict[str, Any] = {}
    for entry in dataclasses.fields(cls):
        if entry.name not in value:
            if entry.default is entry.default_factory is dataclasses.MISSING:
                raise ValueError(f"{where} has no field {entry.name!r}")
            continue
        made[entry.name] = _convert(hints[entry.name], value[entry.name], f"{where}.{entry.name}")
    return cls(**made)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, where)
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is not an object")
        return {key: _convert(get_args(hint)[1], item, f"{where}.{key}") for key, item in value.items()}
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError(f"{where} is not a list")
        return [_convert(get_args(hint)[0], item, f"{where}[{at}]") for at, item in enumerate(value)]
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{where} is {value!r}, not one of {', '.join(map(str, get_args(hint)))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {value!r}, not {hint.__name__}")
    return value


def _decisive(name: str) -> bool:
    return name not in ("verify.json", "reference.npz") and not name.startswith("engines/")


def file_entry(path: Path) -> FileEntry:
    """Size and sha256 of a file, read in one pass."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(path.stat().st_size, digest)


class Bundle:
    """An opened bundle folder.

    Attributes: `path` (absolute), `manifest`. A file is checked against its sha256 when it is first asked for with
    `file()`, so a query never pays for hashing the image tower and no engine ever runs on changed bytes.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._checked: set[str] = set()

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read the manifest. Raises ClipretError when `path` is no bundle or is one of another format."""
        folder = Path(path).absolute()
        file = folder / "bundle.json"
        try:
            manifest = Manifest.from_json(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise ClipretError(
                f"{folder} is not a bundle: it has no bundle.json; make one with clipret-export"
            ) from None
        except (ValueError, UnicodeDecodeError) as error:
            raise ClipretError(f"{file} cannot be used: {error}; export the model again") from None
        return cls(folder, manifest)

    @property
    def fingerprint(self) -> str:
        """Hash over everything that decides an embedding (hex, 64 digits).

        Two bundles with the same fingerprint give the same rows for the same pictures and texts, so a gallery
        accepts either; the report, the path and the name of the source do not count. Neither do TensorRT plans: they
        are built from the same graphs, as every other engine's kernels are, and may be added later.
        """
        manifest = self.manifest
        decisive = {
            "image": dataclasses.asdict(manifest.image),
            "text": dataclasses.asdict(manifest.text),
            "files": {name: entry.sha256 for name, entry in sorted(manifest.files.items()) if _decisive(name)},
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def file(self, name: str) -> Path:
        """Path of a file of the bundle, after its bytes (and its `.data` file's) were compared with the manifest.

        Raises ClipretError when the file is missing, not in the manifest, or changed.
        """
        if name not in self.manifest.files:
            raise ClipretError(f"bundle {self.path} holds no {name}: export the model again")
        for part in (name, name + ".data"):
            if part in self.manifest.files and part not in self._checked:
                self._check(part)
                self._checked.add(part)
        return self.path / name

    def _check(self, name: str) -> None:
        path, expected = self.path / name, self.manifest.files[name]
        advice = "copy the bundle again or export the model again"
        try:
            # The size first: it costs nothing and catches most broken copies.
            if (size := path.stat().st_size) != expected.bytes:
                raise ClipretError(f"{path} has {size} bytes, the manifest says {expected.bytes}: {advice}")
            found = file_entry(path).sha256
        except OSError as error:
            raise ClipretError(f"{path} cannot be read ({error.strerror}): {advice}") from None
        if found != expected.sha256:
            raise ClipretError(
                f"{path} has changed since the export (sha256 {found[:12]}…, not {expected.sha256[:12]}…): {advice}"
            )


def check_bundle(bundle: Bundle, fingerprint: str, owner: str) -> None:
    """Raise ClipretError unless a bundle gives the embeddings that `owner` holds, which have this fingerprint."""
    if bundle.fingerprint != fingerprint:
        raise ClipretError(
            f"{owner} was made with another bundle (fingerprint {fingerprint[:12]}…, "
            f"{bundle.path} has {bundle.fingerprint[:12]}…): use that one or index into a new gallery"
        )


def find_bundle(given: str | Path | None, places: Sequence[Path], fingerprint: str, owner: str) -> Bundle:
    """The bundle of embeddings: the one that is given, else the first that is there.

    Args:
        given: Its folder, where somebody says it.
        places: Where it may lie; the last is where it was when the embeddings were made.
        fingerprint: That of the embeddings.
        owner: What holds them, for messages.

    Raises:
        ClipretError: There is none, or it has another fingerprint.
    """
    folders = [Path(given)] if given is not None else [one for one in places if (one / "bundle.json").is_file()]
    if not folders:
        raise ClipretError(f"the bundle of {owner} is not at {places[-1]} any more: name it with --bundle")
    bundle = Bundle.open(folders[0] if given is not None else folders[0].resolve())
    check_bundle(bundle, fingerprint, owner)
    return bundle
