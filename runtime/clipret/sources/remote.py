"""Files in object stores and HDFS, by pyarrow's file systems: s3://, gs://, hdfs:// and what else those know.

Where a store lies and who may read it is said outside of names, since a gallery keeps the names: AWS_ENDPOINT_URL,
AWS_REGION, AWS_ACCESS_KEY_ID and the rest of what Amazon's tools read; GOOGLE_APPLICATION_CREDENTIALS; Hadoop's own
configuration. Every error of a store is an OSError here, so that whoever reads local files needs no second way.
"""

import contextlib
import datetime as dt
import io
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, BinaryIO, cast

from clipret.errors import ClipretError, one_line, require
from clipret.images.walk import MOST_BYTES, ImageError, ImageFile
from clipret.locations import is_remote
from clipret.sources.item import Item, Value, image_file

__all__ = [
    "RemoteFile",
    "open_remote",
    "read_remote",
    "remote_item",
    "stats",
    "told",
    "walk_remote",
]

_BUFFER = 8 << 20  # bytes a request, where a file is read from one end to the other
_SECONDS = 20  # until a store that does not answer is given up; tried three times by the libraries


@dataclass(frozen=True)
class RemoteFile:
    """A file of a store by its address, without credentials or options in it. Its size and time are asked for."""

    uri: str

    def __str__(self) -> str:
        return self.uri

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.uri)[1]

    @property
    def name(self) -> str:
        return posixpath.basename(self.uri)

    def modified(self) -> tuple[int, int]:
        """Size in bytes, time in nanoseconds. Raises OSError."""
        system, path = _system(self.uri)
        info = system.get_file_info(path)
        if not info.is_file:
            raise FileNotFoundError(2, "does not exist", self.uri)
        return int(info.size), int(info.mtime_ns or 0)

    def open(self) -> Any:
        """For reading at any place, as pyarrow gives it. Raises OSError."""
        system, path = _system(self.uri)
        return system.open_input_file(path)

    def stream(self) -> BinaryIO:
        """For reading from one end to the other. Raises OSError."""
        return cast(BinaryIO, io.BufferedReader(self.open(), _BUFFER))


def open_remote(uri: str) -> RemoteFile:
    """Raises ClipretError for an address that says more than where a file is, or of a store that is not known."""
    scheme, _, rest = uri.partition("://")
    if "?" in rest or "@" in rest.partition("/")[0]:
        raise ClipretError(
            f"{scheme}://… says who reads or by which server, and a gallery would keep that: set AWS_ENDPOINT_URL, "
            "AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or the store's own variables instead"
        )
    _system(uri)
    return RemoteFile(uri)


def stats(files: Sequence[RemoteFile]) -> list[tuple[int, int]]:
    """Size and time of each, asked for together. Raises ClipretError for one that is not there."""
    with told(str(files[0])):
        system, _ = _system(str(files[0]))
        found = system.get_file_info([_system(file.uri)[1] for file in files])
    for file, info in zip(files, found, strict=True):
        if not info.is_file:
            raise ClipretError(f"{file} does not exist: check the name and the range")
    return [(int(info.size), int(info.mtime_ns or 0)) for info in found]


def walk_remote(uri: str) -> list[tuple[RemoteFile, int, int]]:
    """Every file below an address, sorted, with size and time; hidden ones are left out. Raises ClipretError."""
    fs = require("pyarrow.fs", "parquet")
    with told(uri):
        system, path = _system(uri)
        if system.get_file_info(path.rstrip("/")).type == fs.FileType.NotFound:
            raise ClipretError(f"{uri} does not exist: check the name")
        found = system.get_file_info(fs.FileSelector(path.rstrip("/"), recursive=True))
    top, files = path.rstrip("/") + "/", []
    for info in found:
        inside = info.path.removeprefix(top)
        if info.is_file and not any(part.startswith(".") for part in inside.split("/")):
            files.append((RemoteFile(f"{uri.rstrip('/')}/{inside}"), int(info.size), int(info.mtime_ns or 0)))
    return sorted(files, key=lambda one: one[0].uri)


def remote_item(
    uri: str, metadata: Mapping[str, Value] | None = None, size: int | None = None, mtime_ns: int | None = None
) -> Item:
    """The image at an address. Raises ClipretError as `open_remote` does."""
    return Item(uri, partial(read_remote, open_remote(uri)), size, mtime_ns, metadata or {})


def read_remote(file: RemoteFile) -> ImageFile:
    """The bytes of an image. Raises ImageError."""
    try:
        size, modified = file.modified()
        if size > MOST_BYTES:
            raise ImageError(f"{size} bytes are too many for an image")
        with file.open() as handle:
            content = handle.read()
    except OSError as error:
        raise ImageError(f"cannot be read: {_plain(error)}") from None
    return image_file(bytes(content), modified)


@contextlib.contextmanager
def told(uri: str) -> Iterator[None]:
    """What a store refuses inside the block becomes a ClipretError that says what to do."""
    try:
        yield
    except OSError as error:
        raise ClipretError(f"{uri} cannot be read ({_plain(error)}): {_advice(uri, str(error))}") from None


def _plain(error: OSError) -> str:
    return str(error.strerror or error).split(". Detail:")[0].strip()


def _advice(uri: str, said: str) -> str:
    denied = any(word in said for word in ("ACCESS_DENIED", "credential", "Credential", "Forbidden", "UNAUTH", "403"))
    if uri.startswith("s3:"):
        if denied:
            return "give credentials that may read it, in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile"
        return "check the name, the network, AWS_ENDPOINT_URL and AWS_REGION"
    if uri.startswith(("gs:", "gcs:")):
        return "check the name and the credentials that GOOGLE_APPLICATION_CREDENTIALS names"
    return "check the name, the network and the store's own configuration"


def _system(uri: str) -> tuple[Any, str]:
    """pyarrow's file system of an address and the path in it. Raises ClipretError where there is none."""
    if not is_remote(uri):
        raise ClipretError(f"{uri} is no address of a file")
    scheme, _, rest = uri.partition("://")
    if scheme in ("s3", "gs", "gcs"):
        settings = tuple(os.environ.get(name, "") for name in _SETTINGS)
        return _store(scheme, rest.partition("/")[0], settings), rest
    return _other(f"{scheme}://{rest.partition('/')[0]}"), "/" + rest.partition("/")[2]


# Whoever changes one of these has another store.
_SETTINGS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID")


@lru_cache(maxsize=64)
def _store(scheme: str, bucket: str, settings: tuple[str, ...]) -> Any:
    fs = require("pyarrow.fs", "parquet")
    if scheme != "s3":
        limit = dt.timedelta(seconds=3 * _SECONDS)  # the library's own is a quarter of an hour
        return fs.GcsFileSystem(retry_time_limit=limit)
    endpoint, region = settings[0] or settings[1], settings[2] or settings[3]
    options: dict[str, Any] = {"connect_timeout": _SECONDS, "request_timeout": 3 * _SECONDS}
    if endpoint:
        protocol, _, host = endpoint.rpartition("://")
        options |= {"endpoint_override": host.rstrip("/"), "scheme": protocol or "https"}
    if not region and not endpoint:
        with told(f"s3://{bucket}"):
            region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(region=region or "us-east-1", **options)


@lru_cache(maxsize=64)
def _other(uri: str) -> Any:
    arrow, fs = require("pyarrow", "parquet"), require("pyarrow.fs", "parquet")
    try:
        return fs.FileSystem.from_uri(uri)[0]
    except (OSError, arrow.ArrowException, ValueError) as error:
        raise ClipretError(
            f"{uri} cannot be opened ({one_line(error)}): hdfs:// needs Java and Hadoop's own libraries on "
            "this machine; s3:// and gs:// need neither"
        ) from None
