"""Images in .tar (webdataset) and .zip files, streamed without unpacking and with bounded memory."""

import itertools
import json
import posixpath
import re
import tarfile
import weakref
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, NoReturn

from clipret.errors import ClipretError
from clipret.images.formats import EXTENSIONS
from clipret.images.walk import MAX_BYTES, ImageError, ImageFile
from clipret.sources.item import Item, PreloadedRead, Value, broken_item, free_names, image_file, is_plain, scalar
from clipret.sources.remote import RemoteFile, open_remote

__all__ = ["SUFFIXES", "expand", "expand_remote", "members", "modified", "prefix_of", "read_member"]

SUFFIXES = (".tar", ".zip")
_SIDECARS = frozenset({".json", ".txt", ".cls"})
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tar\.\w+)$", re.IGNORECASE)
_LINK, _HOLES = "a link inside its archive: store the image itself", "stored as a sparse file in its archive"


def expand(pattern: Path) -> list[Path]:
    """Expand ranges in a file name: `shards/{000..127}.tar` stands for 128 files, in order.

    Raises:
        ClipretError: One of the files does not exist, or is compressed as a whole.
    """
    if _COMPRESSED.search(str(pattern)):
        raise _compressed(str(pattern))
    files = []
    for name in iter([str(pattern)]) if pattern.exists() else _names(str(pattern)):
        if not Path(name).is_file():  # checked one by one: a range with a digit too many is long
            ranges = _RANGE.search(str(pattern))
            raise ClipretError(f"{name} does not exist: check the name{' and the range' if ranges else ''}")
        files.append(Path(name))
    return files


def expand_remote(pattern: str) -> list[RemoteFile]:
    """Expand ranges in a URI such as s3://bucket/shards/{000..127}.tar, without checking that the files exist.

    Raises:
        ClipretError: The files are compressed as a whole, or the URI is invalid.
    """
    if _COMPRESSED.search(pattern):
        raise _compressed(pattern)
    return [open_remote(name) for name in _names(pattern)]


def _compressed(pattern: str) -> ClipretError:
    return ClipretError(f"{pattern} is compressed as a whole, so members cannot be read at random: make it a .tar")


def _names(text: str) -> Iterator[str]:
    ranges = list(_RANGE.finditer(text))
    return map("".join, itertools.product(*_alternatives(text, ranges))) if ranges else iter([text])


def _alternatives(text: str, ranges: list[re.Match[str]]) -> Iterator[Iterator[str]]:
    """The parts of a name: the text between the ranges, and the numbers of each range in a shell's notation."""
    end = 0
    for match in ranges:
        first, last = match.groups()
        if int(last) < int(first):
            raise ClipretError(f"{match.group()} in {text} runs backwards: write {{{last}..{first}}}")
        if int(last) - int(first) > 999_999:  # itertools.product keeps all of them in memory
            raise ClipretError(f"{match.group()} in {text} means {int(last) - int(first) + 1} files: check the range")
        width = max(len(first), len(last)) if any(n.startswith("0") and len(n) > 1 for n in (first, last)) else 0
        yield iter([text[end : match.start()]])
        yield (f"{number:0{width}d}" for number in range(int(first), int(last) + 1))
        end = match.end()
    yield iter([text[end:]])


def prefix_of(file: Path | RemoteFile, root: Path) -> str:
    """The prefix of the paths of an archive's images: the archive's path, relative to `root` if it is below it."""
    if isinstance(file, RemoteFile):
        return file.uri
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else file.absolute().as_posix()


def modified(file: Path | RemoteFile) -> tuple[int, int]:
    """Size of a file in bytes and its modification time in nanoseconds. Raises OSError."""
    if isinstance(file, RemoteFile):
        return file.modified()
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def members(file: Path | RemoteFile, root: Path) -> Iterator[Item]:
    """Iterate over the images of an archive. If a tar contains a name twice, both images are yielded.

    Args:
        file: The archive.
        root: The folder that the paths of the items are relative to.

    Raises:
        ClipretError: The archive is damaged. The items before the damage have been yielded.
    """
    prefix = prefix_of(file, root)
    try:
        _, mtime = modified(file)
        if file.suffix.lower() == ".zip":
            if isinstance(file, RemoteFile):
                raise ClipretError(f"{file} is a .zip in an object store, which cannot be streamed: make it a .tar")
            yield from _zip_items(file, prefix, mtime)
            return
        for group in _groups(_tar_members(file)):
            yield from _sample(file, prefix, mtime, group)
    except (OSError, tarfile.TarError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        _damaged(file, error)


def _damaged(file: Path | RemoteFile, error: Exception) -> NoReturn:
    raise ClipretError(
        f"{file} is damaged or not an archive ({error}): the images before the damage are done; create it again"
    ) from error


def read_member(file: Path | RemoteFile, name: str) -> ImageFile:
    """Read a member again by its name. Raises ImageError if there is no such member, or the archive is gone."""
    try:
        _, mtime = modified(file)
        if file.suffix.lower() == ".zip" and isinstance(file, Path):
            archive = _open_zip(file, mtime)
            return _read_zip(archive, _zip_names(archive)[name], mtime)
        member = _tar_names(file, mtime)[name]
        return _read_tar(file, member.offset, member.size, mtime)
    except KeyError as error:
        raise ImageError(f"{file} has no member {name}") from error
    except ImageError:
        raise
    except (OSError, tarfile.TarError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ImageError(f"its archive cannot be read: {error}") from error


def _name(name: str) -> str:
    """Normalize a member's name: ./a.jpg, /a.jpg and b/../a.jpg all become a.jpg, and no path leaves the archive."""
    return posixpath.normpath("/" + name).lstrip("/")


def _kind(name: str) -> str:
    """The extension in lower case; "" for hidden files and files in hidden folders (macOS adds a ._a.jpg per a.jpg)."""
    *_, last = parts = name.split("/")
    return "" if any(part[:1] == "." for part in parts) else last[last.rfind(".") :].lower()


@dataclass(frozen=True)
class _Member:
    """Bytes `offset` to `offset + size` of a tar, or `fault`, the reason why they are not an image.

    `content` has these bytes if the tar is streamed from an object store, where a second request is slow.
    """

    name: str
    kind: str
    offset: int
    size: int
    fault: str | None
    content: bytes | None = None


def _handle(file: Path | RemoteFile) -> BinaryIO:
    return file.stream() if isinstance(file, RemoteFile) else file.open("rb")


def _tar_members(file: Path | RemoteFile) -> Iterator[_Member]:
    """Images and their sidecar files in the order of the archive."""
    with _handle(file) as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header of a large shard
            name = _name(info.name)
            kind = _kind(name)
            if not info.isdir() and (kind in EXTENSIONS or kind in _SIDECARS):
                fault = _LINK if not info.isreg() else _HOLES if info.issparse() else None
                member = _Member(name, kind, info.offset_data, info.size, fault)
                if isinstance(file, RemoteFile) and fault is None and info.size <= MAX_BYTES:
                    handle.seek(info.offset_data)
                    member = replace(member, content=handle.read(info.size))
                yield member
        # After the first header, tarfile mistakes a damaged one for the end.
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"no header at byte {tar.offset}")


def _key(member: _Member) -> str:
    """What the members of a sample share: the name up to the first dot after the last slash."""
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _groups(stream: Iterator[_Member]) -> Iterator[list[_Member]]:
    """Group consecutive members into samples; where the archive is damaged, the last sample ends."""
    group: list[_Member] = []
    failure: Exception | None = None
    try:
        for member in stream:
            if group and _key(group[0]) != _key(member):
                yield group
                group = []
            group.append(member)
    except (OSError, tarfile.TarError, ValueError) as error:
        failure = error
    if group:
        yield group
    if failure is not None:
        raise failure


def _sample(file: Path | RemoteFile, prefix: str, mtime: int, group: list[_Member]) -> Iterator[Item]:
    images = [member for member in group if member.kind in EXTENSIONS]
    fields: dict[str, Value] = {}
    if images:
        for member in group:
            if member.kind in _SIDECARS and member.fault is None:
                content = member.content
                content = _bytes(file, member.offset, member.size) if content is None else content
                fields |= _sidecar(member.kind, content)
    names = free_names(list(fields))
    metadata = {names[key]: value for key, value in fields.items()}
    for member in images:
        path = f"{prefix}/{member.name}"
        if member.fault is not None:
            yield broken_item(path, member.fault, metadata)
        else:
            read: Callable[[], ImageFile] = partial(_read_tar, file, member.offset, member.size, mtime)
            if member.content is not None:
                read = PreloadedRead(member.content, mtime, read)
            yield Item(path, read, member.size, mtime, metadata)


def _sidecar(kind: str, content: bytes) -> dict[str, Value]:
    """The metadata in a sidecar file of an image; none if the file cannot be parsed."""
    try:
        text = content.decode("utf-8-sig").strip()
        if kind == ".txt":
            return {"text": text}
        if kind == ".cls":
            return {"cls": scalar(int(text))}
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    return {key: scalar(field) for key, field in value.items() if is_plain(field)}


def _bytes(file: Path | RemoteFile, offset: int, size: int) -> bytes:
    with file.open() if isinstance(file, RemoteFile) else file.open("rb") as handle:
        handle.seek(offset)
        return bytes(handle.read(size))


def _read_tar(file: Path | RemoteFile, offset: int, size: int, mtime: int) -> ImageFile:
    """Read a member in any thread: each call opens the file, 15 microseconds compared to milliseconds of decoding."""
    if size > MAX_BYTES:
        raise ImageError(f"{size} bytes are too many for an image")
    try:
        content = _bytes(file, offset, size)
    except OSError as error:
        raise ImageError(f"its archive cannot be read: {error.strerror or error}") from error
    if len(content) < size:
        raise ImageError("its archive is truncated in the middle of it")
    return image_file(content, mtime)


@lru_cache(maxsize=8)
def _tar_names(file: Path | RemoteFile, mtime: int) -> dict[str, _Member]:  # noqa: ARG001 (tells archives apart)
    images = (member for member in _tar_members(file) if member.kind in EXTENSIONS and not member.fault)
    return {member.name: replace(member, content=None) for member in images}


def _zip_items(file: Path, prefix: str, mtime: int) -> Iterator[Item]:
    archive = _open_zip(file, mtime)
    for info in archive.infolist():
        name = _name(info.filename)
        if not info.is_dir() and _kind(name) in EXTENSIONS:
            yield Item(f"{prefix}/{name}", partial(_read_zip, archive, info, mtime), info.file_size, mtime, {})


@lru_cache(maxsize=8)
def _open_zip(file: Path, mtime: int) -> zipfile.ZipFile:  # noqa: ARG001 (the time tells archives apart)
    """Open an archive, which stays open at least as long as an item that reads from it."""
    handle = file.open("rb")
    try:
        # With our own handle: ZipFile counts the readers of its own handle without a lock, and closes it at zero.
        archive = zipfile.ZipFile(handle)
    except BaseException:
        handle.close()
        raise
    weakref.finalize(archive, handle.close)
    return archive


@lru_cache(maxsize=8)
def _zip_names(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    return {_name(info.filename): info for info in archive.infolist()}


def _read_zip(archive: zipfile.ZipFile, info: zipfile.ZipInfo, mtime: int) -> ImageFile:
    """Read a member in any thread: ZipFile locks only the reading, not the decompression."""
    if info.file_size > MAX_BYTES:
        raise ImageError(f"{info.file_size} bytes are too many for an image")
    try:
        with archive.open(info) as stream:
            # Not read(), which would decompress up to 2 GiB of a member that is larger than its header says.
            content = stream.read(info.file_size + 1)
    except Exception as error:  # errors of zlib, a wrong checksum, an unknown method, a password
        raise ImageError(f"cannot be read from its archive: {error}") from error
    return image_file(content, mtime)
