"""Files in object stores and HDFS, through pyarrow's file systems: s3://, gs://, hdfs:// and others.

Endpoints and credentials are not part of the URIs, because a gallery stores the URIs. They come from AWS_ENDPOINT_URL,
AWS_REGION, AWS_ACCESS_KEY_ID and the other variables of Amazon's tools, GOOGLE_APPLICATION_CREDENTIALS, and Hadoop's
configuration. Errors of a store are OSErrors, so code for local files handles them too.
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
from clipret.images.walk import MAX_BYTES, ImageError, ImageFile
from clipret.locations import is_remote
from clipret.sources.item import Item, Value, image_file

__all__ = [
    "RemoteFile",
    "open_remote",
    "read_remote",
    "remote_item",
    "stat_files",
    "store_errors",
    "walk_remote",
]

_BUFFER = 8 << 20  # bytes per request when a file is streamed
_TIMEOUT = 20  # seconds to connect to a store; the libraries try three times


@dataclass(frozen=True)
class RemoteFile:
    """A file in a store.

    Attributes:
        uri: Its URI, without credentials or options.
    """

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
        """Request the size in bytes and the modification time in nanoseconds. Raises OSError."""
        system, path = _system(self.uri)
        info = system.get_file_info(path)
        if not info.is_file:
            raise FileNotFoundError(2, "does not exist", self.uri)
        return int(info.size), int(info.mtime_ns or 0)

    def open(self) -> Any:
        """Open the file for random access, as a pyarrow file. Raises OSError."""
        system, path = _system(self.uri)
        return system.open_input_file(path)

    def stream(self) -> BinaryIO:
        """Open the file for sequential reading. Raises OSError."""
        return cast(BinaryIO, io.BufferedReader(self.open(), _BUFFER))


def open_remote(uri: str) -> RemoteFile:
    """Check a URI.

    Raises:
        ClipretError: The URI contains credentials or options, or its store is unknown.
    """
    scheme, _, rest = uri.partition("://")
    if "?" in rest or "@" in rest.partition("/")[0]:
        raise ClipretError(
            f"{scheme}://… contains credentials or options, which a gallery would store: set AWS_ENDPOINT_URL, "
            "AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or the store's own variables instead"
        )
    _system(uri)
    return RemoteFile(uri)


def stat_files(files: Sequence[RemoteFile]) -> list[tuple[int, int]]:
    """Size in bytes and modification time in nanoseconds of each file, in one request.

    Raises:
        ClipretError: A file does not exist, or the store refuses.
    """
    with store_errors(str(files[0])):
        system, _ = _system(str(files[0]))
        infos = system.get_file_info([_system(file.uri)[1] for file in files])
    for file, info in zip(files, infos, strict=True):
        if not info.is_file:
            raise ClipretError(f"{file} does not exist: check the name and the range")
    return [(int(info.size), int(info.mtime_ns or 0)) for info in infos]


def walk_remote(uri: str) -> list[tuple[RemoteFile, int, int]]:
    """List the files below a URI, sorted, without hidden ones.

    Returns:
        Each file with its size in bytes and its modification time in nanoseconds.

    Raises:
        ClipretError: The folder does not exist, or the store refuses.
    """
    fs = require("pyarrow.fs", "parquet")
    with store_errors(uri):
        system, path = _system(uri)
        if system.get_file_info(path.rstrip("/")).type == fs.FileType.NotFound:
            raise ClipretError(f"{uri} does not exist: check the name")
        infos = system.get_file_info(fs.FileSelector(path.rstrip("/"), recursive=True))
    top, files = path.rstrip("/") + "/", []
    for info in infos:
        inside = info.path.removeprefix(top)
        if info.is_file and not any(part.startswith(".") for part in inside.split("/")):
            files.append((RemoteFile(f"{uri.rstrip('/')}/{inside}"), int(info.size), int(info.mtime_ns or 0)))
    return sorted(files, key=lambda entry: entry[0].uri)


def remote_item(
    uri: str, metadata: Mapping[str, Value] | None = None, size: int | None = None, mtime_ns: int | None = None
) -> Item:
    """Make the item of the image at a URI. Raises ClipretError as `open_remote`."""
    return Item(uri, partial(read_remote, open_remote(uri)), size, mtime_ns, metadata or {})


def read_remote(file: RemoteFile) -> ImageFile:
    """The bytes of an image. Raises ImageError."""
    try:
        size, modified = file.modified()
        if size > MAX_BYTES:
            raise ImageError(f"{size} bytes are too many for an image")
        with file.open() as handle:
            content = handle.read()
    except OSError as error:
        raise ImageError(f"cannot be read: {_plain(error)}") from error
    return image_file(bytes(content), modified)


@contextlib.contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Convert errors of a store inside the block to a ClipretError that says what to do."""
    try:
        yield
    except OSError as error:
        raise ClipretError(f"{uri} cannot be read ({_plain(error)}): {_advice(uri, str(error))}") from error


def _plain(error: OSError) -> str:
    return str(error.strerror or error).split(". Detail:")[0].strip()


def _advice(uri: str, message: str) -> str:
    words = ("ACCESS_DENIED", "credential", "Credential", "Forbidden", "UNAUTH", "403")
    if uri.startswith("s3:"):
        if any(word in message for word in words):
            return "set credentials that may read it, with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile"
        return "check the name, the network, AWS_ENDPOINT_URL and AWS_REGION"
    if uri.startswith(("gs:", "gcs:")):
        return "check the name and the credentials in GOOGLE_APPLICATION_CREDENTIALS"
    return "check the name, the network and the configuration of the store"


def _system(uri: str) -> tuple[Any, str]:
    """pyarrow's file system for a URI, and the path in it; raises ClipretError if there is none."""
    if not is_remote(uri):
        raise ClipretError(f"{uri} is not a URI of a file: write it as s3://BUCKET/KEY")
    scheme, _, rest = uri.partition("://")
    if scheme in ("s3", "gs", "gcs"):
        settings = tuple(os.environ.get(name, "") for name in _SETTINGS)
        return _store(scheme, rest.partition("/")[0], settings), rest
    return _other(f"{scheme}://{rest.partition('/')[0]}"), "/" + rest.partition("/")[2]


# Another value of one of these means another store.
_SETTINGS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID")


@lru_cache(maxsize=64)
def _store(scheme: str, bucket: str, settings: tuple[str, ...]) -> Any:
    fs = require("pyarrow.fs", "parquet")
    if scheme != "s3":
        limit = dt.timedelta(seconds=3 * _TIMEOUT)  # the library's default is 15 minutes
        return fs.GcsFileSystem(retry_time_limit=limit)
    endpoint, region = settings[0] or settings[1], settings[2] or settings[3]
    options: dict[str, Any] = {"connect_timeout": _TIMEOUT, "request_timeout": 3 * _TIMEOUT}
    if endpoint:
        protocol, _, host = endpoint.rpartition("://")
        options |= {"endpoint_override": host.rstrip("/"), "scheme": protocol or "https"}
    if not region and not endpoint:
        with store_errors(f"s3://{bucket}"):
            region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(region=region or "us-east-1", **options)


@lru_cache(maxsize=64)
def _other(uri: str) -> Any:
    arrow, fs = require("pyarrow", "parquet"), require("pyarrow.fs", "parquet")
    try:
        return fs.FileSystem.from_uri(uri)[0]
    except (OSError, arrow.ArrowException, ValueError) as error:
        raise ClipretError(
            f"{uri} cannot be opened ({one_line(error)}): hdfs:// needs Java and Hadoop's libraries on this machine; "
            "s3:// and gs:// need neither"
        ) from error
