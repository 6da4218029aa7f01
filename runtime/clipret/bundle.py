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

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import msgspec

from clipret.backends import TensorRTLibrary
from clipret.errors import ClipretError
from clipret.schema import Amount, Count, Hash, checked

__all__ = [
    "FORMAT",
    "Bundle",
    "Engine",
    "FileEntry",
    "ImageSpec",
    "Manifest",
    "Precision",
    "Resize",
    "TextSpec",
    "check_bundle",
    "file_entry",
    "find_bundle",
]

FORMAT = 1

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Resize = Literal["shortest", "longest", "squash"]


class ImageSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an image becomes uint8 [size,size,3]. What is arithmetic (mean, std) is in the graph instead.

    resize: `shortest` scales the short side to `size` and crops the centre, `longest` scales the long side
    and pads to a square with `fill`, `squash` ignores the aspect ratio.
    """

    size: Count
    resize: Resize = "shortest"
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    fill: Annotated[int, msgspec.Meta(ge=0, le=255)] = 0
    exif: bool = False  # turn the image as its EXIF tag says; the reference preprocessings do not


class TextSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a caption becomes int64 [L], L <= context_length.

    clean: how `text.clean` prepares it; `clip` is the cleaning of CLIP's own tokenizer, `none` leaves it to the
    tokenizer's file. pad_to: `longest` of the batch where the tower's embedding does not depend on
    padding, else `context`.
    """

    context_length: Count
    clean: Literal["clip", "whitespace", "canonicalize", "lower", "none"] = "clip"
    pad_to: Literal["longest", "context"] = "longest"
    pad_id: Annotated[int, msgspec.Meta(ge=0)] = 0


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and sha256 (hex) of one file of the bundle."""

    bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Hash


class Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a folder `engines/KEY` was built by and for: a plan runs with this library and version and on this
    architecture only. `batch`: the batch sizes it was tuned for, ascending; it takes any up to the last."""

    library: TensorRTLibrary
    version: str
    arch: Annotated[str, msgspec.Meta(pattern=r"^sm_\d+\+?$")]  # of the GPU, as sm_89; with + for later ones too
    batch: Annotated[list[Count], msgspec.Meta(min_length=1)]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """bundle.json. `source` and `source_sha256` say which checkpoint the towers come from.

    precision: of the matrix products. `float32_layers`: layers that the export kept in float32 because they
    overflowed or cost too much accuracy, by their names in the torch model, `image.` or `text.` before them.
    """

    format: int
    model: str
    source: str
    source_sha256: str
    precision: Precision
    embedding_dim: Count
    logit_scale: Amount
    image: ImageSpec
    text: TextSpec
    files: dict[str, FileEntry]
    float32_layers: list[str] = []
    engines: dict[str, Engine] = {}

    def to_json(self) -> str:
        return json.dumps(msgspec.to_builtins(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        value = json.loads(text)
        if not isinstance(value, dict) or not isinstance(value.get("format"), int):
            raise ValueError("it has no format version")
        if value["format"] != FORMAT:
            raise ValueError(f"its format is {value['format']}, this clipret reads format {FORMAT}")
        return checked(value, cls)


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

        Two bundles with the same fingerprint give the same rows for the same images and texts, so a gallery
        accepts either; the report, the path and the name of the source do not count. Neither do TensorRT plans: they
        are built from the same graphs, as every other engine's kernels are, and may be added later.
        """
        manifest = self.manifest
        decisive = {
            "image": msgspec.structs.asdict(manifest.image),
            "text": msgspec.structs.asdict(manifest.text),
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
