"""The bundle: the folder that export hands to the runtime.

    bundle.json         the manifest (`Manifest` below), format version first
    image.onnx (.data)  uint8 [B,S,S,3] -> float32 [B,D], unit norm
    text.onnx  (.data)  int64 [B,L]     -> float32 [B,D], unit norm
    tokenizer.json      Hugging Face `tokenizers` file
    engines/KEY/        optional TensorRT engines, image.plan and text.plan; see `Engine`
    verify.json         the report of the parity check against torch
    reference.npz       torch's outputs for the inputs of the parity check, so that any machine can repeat it

A bundle is complete: the runtime reads nothing else.
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
    """How an image becomes uint8 [size,size,3]. Normalization (mean, std) is part of the graph.

    Attributes:
        size: Side of the square in pixels.
        resize: `shortest` scales the short side to `size` and crops the centre, `longest` scales the long side and pads
            to a square with `fill`, `squash` ignores the aspect ratio.
        interpolation: Filter of the resizing.
        fill: Grey level of the padding, 0 to 255.
        exif: Rotate the image as its EXIF tag says; the reference preprocessings do not.
    """

    size: Count
    resize: Resize = "shortest"
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    fill: Annotated[int, msgspec.Meta(ge=0, le=255)] = 0
    exif: bool = False


class TextSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a text becomes token ids int64 [L], L <= context_length.

    Attributes:
        context_length: Maximum number of tokens.
        clean: How `inference.tokenizer.clean` prepares the text; `clip` is the cleaning of CLIP's own tokenizer, `none`
            leaves it to the tokenizer file.
        pad_to: `longest` pads to the longest text of the batch, for towers whose embeddings do not depend on padding;
            `context` pads to `context_length`.
        pad_id: Token id of the padding.
    """

    context_length: Count
    clean: Literal["clip", "whitespace", "canonicalize", "lower", "none"] = "clip"
    pad_to: Literal["longest", "context"] = "longest"
    pad_id: Annotated[int, msgspec.Meta(ge=0)] = 0


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and sha256 (hex) of a file of the bundle."""

    bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Hash


class Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The TensorRT engines in a folder `engines/KEY`, which run with one library version and GPU architecture only.

    Attributes:
        library: The library that built the engines.
        version: Its exact version.
        arch: GPU architecture, such as `sm_89`; `sm_80+` also covers later ones.
        batch: The batch sizes that the engines were tuned for, ascending. They take any size up to the last.
    """

    library: TensorRTLibrary
    version: str
    arch: Annotated[str, msgspec.Meta(pattern=r"^sm_\d+\+?$")]
    batch: Annotated[list[Count], msgspec.Meta(min_length=1)]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of bundle.json.

    Attributes:
        format: Version of the format.
        model: Name of the model.
        source: The checkpoint that the towers come from.
        source_sha256: Its digest.
        precision: Precision of the matrix products.
        embedding_dim: D of the embeddings.
        logit_scale: The model's factor from cosine similarities to logits.
        image: The image preprocessing.
        text: The text preprocessing.
        files: The files of the bundle by their relative paths.
        float32_layers: Layers that the export kept in float32 because they overflowed or cost too much accuracy, by
            their names in the torch model with the prefix `image.` or `text.`.
        engines: TensorRT engines by their folder's name.
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
        """Serialize the manifest."""
        return json.dumps(msgspec.to_builtins(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse a manifest.

        Raises:
            ValueError: The text is not JSON, has another format version, or does not match the schema.
        """
        value = json.loads(text)
        if not isinstance(value, dict) or not isinstance(value.get("format"), int):
            raise ValueError("it has no format version")
        if value["format"] != FORMAT:
            raise ValueError(f"its format is {value['format']}, this clipret reads format {FORMAT}")
        return checked(value, cls)


def _decisive(name: str) -> bool:
    """Whether a file of the bundle decides the embeddings."""
    return name not in ("verify.json", "reference.npz") and not name.startswith("engines/")


def file_entry(path: Path) -> FileEntry:
    """Compute the size and sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(path.stat().st_size, digest)


class Bundle:
    """An opened bundle folder.

    A file is checked against its sha256 when `file` first returns it: a query does not hash the image tower, and no
    backend runs changed bytes.

    Attributes:
        path: Absolute path of the folder.
        manifest: The content of bundle.json.

    Examples:
        >>> bundle = Bundle.open("bundle/")  # doctest: +SKIP
        >>> bundle.manifest.embedding_dim  # doctest: +SKIP
        512
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._checked: set[str] = set()

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a bundle and read its manifest.

        Raises:
            ClipretError: `path` is not a bundle, or has another format version.
        """
        folder = Path(path).absolute()
        file = folder / "bundle.json"
        try:
            manifest = Manifest.from_json(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ClipretError(f"{folder} is not a bundle (no bundle.json): create one with clipret-export") from error
        except (ValueError, UnicodeDecodeError) as error:
            raise ClipretError(f"{file} cannot be used: {error}; export the model again") from error
        return cls(folder, manifest)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides an embedding (hex, 64 digits).

        Two bundles with the same fingerprint give the same embeddings for the same images and texts, so a gallery
        accepts either. The report, the path and the name of the source do not count. Neither do TensorRT engines: they
        are built from the same graphs and may be added later.
        """
        manifest = self.manifest
        decisive = {
            "image": msgspec.structs.asdict(manifest.image),
            "text": msgspec.structs.asdict(manifest.text),
            "files": {name: entry.sha256 for name, entry in sorted(manifest.files.items()) if _decisive(name)},
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def file(self, name: str) -> Path:
        """Return the path of a file after checking its bytes, and those of its `.data` file, against the manifest.

        Args:
            name: Path relative to the bundle, as in the manifest.

        Raises:
            ClipretError: The file is missing, is not in the manifest, or has changed.
        """
        if name not in self.manifest.files:
            raise ClipretError(f"bundle {self.path} has no {name}: export the model again")
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
            sha256 = file_entry(path).sha256
        except OSError as error:
            raise ClipretError(f"{path} cannot be read ({error.strerror}): {advice}") from error
        if sha256 != expected.sha256:
            raise ClipretError(
                f"{path} has changed since the export (sha256 {sha256[:12]}…, not {expected.sha256[:12]}…): {advice}"
            )


def check_bundle(bundle: Bundle, fingerprint: str, owner: str) -> None:
    """Check that a bundle gives the embeddings of a gallery or collection.

    Args:
        bundle: The bundle.
        fingerprint: Fingerprint of the bundle that the embeddings were made with.
        owner: What the embeddings belong to, for the message.

    Raises:
        ClipretError: The fingerprints differ.
    """
    if bundle.fingerprint != fingerprint:
        raise ClipretError(
            f"{owner} was made with another bundle (fingerprint {fingerprint[:12]}…, "
            f"{bundle.path} has {bundle.fingerprint[:12]}…): use that one or index into a new gallery"
        )


def find_bundle(path: str | Path | None, candidates: Sequence[Path], fingerprint: str, owner: str) -> Bundle:
    """Open the bundle that embeddings were made with.

    Args:
        path: Its folder, if the caller knows it.
        candidates: Folders to look at otherwise, of which the first bundle is used; the last one is where the bundle
            was when the embeddings were made.
        fingerprint: Fingerprint of that bundle.
        owner: What the embeddings belong to, for messages.

    Raises:
        ClipretError: No bundle is found, or it has another fingerprint.
    """
    if path is not None:
        folders = [Path(path)]
    else:
        folders = [folder.resolve() for folder in candidates if (folder / "bundle.json").is_file()]
    if not folders:
        raise ClipretError(f"the bundle of {owner} is no longer at {candidates[-1]}: name it with --bundle")
    bundle = Bundle.open(folders[0])
    check_bundle(bundle, fingerprint, owner)
    return bundle
