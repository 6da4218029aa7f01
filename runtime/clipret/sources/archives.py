"""Images inside .tar (webdataset) and .zip files, streamed without unpacking and without holding their bytes."""

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
from clipret.images.walk import MOST_BYTES, ImageError, ImageFile
from clipret.sources.item import Held, Item, Value, broken_item, free_names, image_file, is_plain, scalar
from clipret.sources.remote import RemoteFile, open_remote

__all__ = ["SUFFIXES", "expand", "expand_remote", "members", "modified", "prefix_of", "read_member"]

SUFFIXES = (".tar", ".zip")
_SIDECARS = frozenset({".json", ".txt", ".cls"})
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tar\.\w+)$", re.IGNORECASE)
_LINK, _HOLES = "a link inside its archive: store the image itself", "stored with holes (sparse) in its archive"


def expand(pattern: Path) -> list[Path]:
    """The files that a name means: `shards/{000..127}.tar` is 128 of them, in order, and any other name itself.

    Raises ClipretError when one of them does not exist, or is compressed as a whole.
    """
    if _COMPRESSED.search(str(pattern)):
        raise _compressed(str(pattern))
    found = []
    for name in iter([str(pattern)]) if pattern.exists() else _names(str(pattern)):
        if not Path(name).is_file():  # one by one: the range may have a digit too many
            ranges = _RANGE.search(str(pattern))
            raise ClipretError(f"{name} does not exist: check the name{' and the range' if ranges else ''}")
        found.append(Path(name))
    return found


def expand_remote(pattern: str) -> list[RemoteFile]:
    """The same of an address, such as s3://bucket/shards/{000..127}.tar. Whether the files exist is not asked."""
    if _COMPRESSED.search(pattern):
        raise _compressed(pattern)
    return [open_remote(name) for name in _names(pattern)]


def _compressed(pattern: str) -> ClipretError:
    return ClipretError(f"{pattern} is compressed as a whole, which cannot be read from the middle: make it a .tar")


def _names(text: str) -> Iterator[str]:
    ranges = list(_RANGE.finditer(text))
    return map("".join, itertools.product(*_alternatives(text, ranges))) if ranges else iter([text])


def _alternatives(text: str, ranges: list[re.Match[str]]) -> Iterator[Iterator[str]]:
    """The pieces of a name: what stands between the ranges, and the numbers of each, as a shell writes them."""
    end = 0
    for match in ranges:
        first, last = match.groups()
        if int(last) < int(first):
            raise ClipretError(f"{match.group()} in {text} runs backwards: write {{{last}..{first}}}")
        if int(last) - int(first) > 999_999:  # itertools.product holds all of them
            raise ClipretError(f"{match.group()} in {text} means {int(last) - int(first) + 1} files: check the range")
        width = max(len(first), len(last)) if any(n.startswith("0") and len(n) > 1 for n in (first, last)) else 0
        yield iter([text[end : match.start()]])
        yield (f"{number:0{width}d}" for number in range(int(first), int(last) + 1))
        end = match.end()
    yield iter([text[end:]])


def prefix_of(file: Path | RemoteFile, root: Path) -> str:
    """What the paths of an archive's images begin with: its own, relative to `root` where it lies below it."""
    if isinstance(file, RemoteFile):
        return file.uri
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else file.absolute().as_posix()


def modified(file: Path | RemoteFile) -> tuple[int, int]:
    """Size in bytes, time in nanoseconds. Raises OSError."""
    if isinstance(file, RemoteFile):
        return file.modified()
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def members(file: Path | RemoteFile, root: Path) -> Iterator[Item]:
    """The images of one archive, as items relative to `root`. A tar may hold one name twice: both come.

    Raises ClipretError where the archive is damaged, after the items before that place.
    """
    prefix = prefix_of(file, root)
    try:
        _, mtime = modified(file)
        if file.suffix.lower() == ".zip":
            if isinstance(file, RemoteFile):
                raise ClipretError(f"{file} is a .zip in a store, which cannot be streamed: make it a .tar")
            yield from _zip_items(file, prefix, mtime)
            return
        for group in _groups(_tar_members(file)):
            yield from _sample(file, prefix, mtime, group)
    except (OSError, tarfile.TarError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        _damaged(file, error)


def _damaged(file: Path | RemoteFile, error: Exception) -> NoReturn:
    raise ClipretError(
        f"{file} is damaged or no archive ({error}): the images before that place are done; make it anew"
    ) from None


def read_member(file: Path | RemoteFile, name: str) -> ImageFile:
    """The bytes of one member again. Raises ImageError when there is no such member or the archive is gone."""
    try:
        _, mtime = modified(file)
        if file.suffix.lower() == ".zip" and isinstance(file, Path):
            archive = _open_zip(file, mtime)
            return _read_zip(archive, _zip_names(archive)[name], mtime)
        member = _tar_names(file, mtime)[name]
        return _read_tar(file, member.offset, member.size, mtime)
    except KeyError:
        raise ImageError(f"{file} has no member {name}") from None
    except ImageError:
        raise
    except (OSError, tarfile.TarError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ImageError(f"its archive cannot be read: {error}") from None


def _name(name: str) -> str:
    """A member's name as a path below its archive's: neither ./a.jpg nor /a.jpg nor b/../a.jpg, and never above it."""
    return posixpath.normpath("/" + name).lstrip("/")


def _kind(name: str) -> str:
    """The extension, "" for what is hidden or lies in a hidden folder (as macOS's copies of images' names do)."""
    *_, last = parts = name.split("/")
    return "" if any(part[:1] == "." for part in parts) else last[last.rfind(".") :].lower()


@dataclass(frozen=True)
class _Member:
    """Bytes `offset` to `offset + size` of a tar, unless `fault` says why they are no image. `content` are those
    bytes where the tar is read from one end to the other, since a store answers a second request slowly."""

    name: str
    kind: str
    offset: int
    size: int
    fault: str | None
    content: bytes | None = None


def _handle(file: Path | RemoteFile) -> BinaryIO:
    return file.stream() if isinstance(file, RemoteFile) else file.open("rb")


def _tar_members(file: Path | RemoteFile) -> Iterator[_Member]:
    """Images and their sidecars in the order of the file."""
    with _handle(file) as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # would keep every header of a large shard
            name = _name(info.name)
            kind = _kind(name)
            if not info.isdir() and (kind in EXTENSIONS or kind in _SIDECARS):
                fault = _LINK if not info.isreg() else _HOLES if info.issparse() else None
                member = _Member(name, kind, info.offset_data, info.size, fault)
                if isinstance(file, RemoteFile) and fault is None and info.size <= MOST_BYTES:
                    handle.seek(info.offset_data)
                    member = replace(member, content=handle.read(info.size))
                yield member
        # Past the first one, tarfile takes a damaged header for the end.
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"no header at byte {tar.offset}")


def _key(member: _Member) -> str:
    """What the members of one sample share: the name up to the first dot behind the last slash."""
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _groups(found: Iterator[_Member]) -> Iterator[list[_Member]]:
    """Members of one sample follow one another. Where the archive breaks off, what has come of the last one counts."""
    group: list[_Member] = []
    failure: Exception | None = None
    try:
        for member in found:
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
    said: dict[str, Value] = {}
    if images:
        for member in group:
            if member.kind in _SIDECARS and member.fault is None:
                content = member.content
                said |= _sidecar(member.kind, _bytes(file, member.offset, member.size) if content is None else content)
    names = free_names(list(said))
    metadata = {names[key]: value for key, value in said.items()}
    for member in images:
        path = f"{prefix}/{member.name}"
        if member.fault is not None:
            yield broken_item(path, member.fault, metadata)
        else:
            read: Callable[[], ImageFile] = partial(_read_tar, file, member.offset, member.size, mtime)
            if member.content is not None:
                read = Held(member.content, mtime, read)
            yield Item(path, read, member.size, mtime, metadata)


def _sidecar(kind: str, content: bytes) -> dict[str, Value]:
    """What a file beside an image says of it; one that cannot be read says nothing."""
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
    return {key: scalar(one) for key, one in value.items() if is_plain(one)}


def _bytes(file: Path | RemoteFile, offset: int, size: int) -> bytes:
    with file.open() if isinstance(file, RemoteFile) else file.open("rb") as handle:
        handle.seek(offset)
        return bytes(handle.read(size))


def _read_tar(file: Path | RemoteFile, offset: int, size: int, mtime: int) -> ImageFile:
    """In any thread: each opens the file for itself, 15 microseconds beside the milliseconds of decoding."""
    if size > MOST_BYTES:
        raise ImageError(f"{size} bytes are too many for an image")
    try:
        content = _bytes(file, offset, size)
    except OSError as error:
        raise ImageError(f"its archive cannot be read: {error.strerror or error}") from None
    if len(content) < size:
        raise ImageError("its archive ends in the middle of it")
    return image_file(content, mtime)


@lru_cache(maxsize=8)
def _tar_names(file: Path | RemoteFile, mtime: int) -> dict[str, _Member]:  # noqa: ARG001 (tells archives apart)
    images = (one for one in _tar_members(file) if one.kind in EXTENSIONS and not one.fault)
    return {one.name: replace(one, content=None) for one in images}


def _zip_items(file: Path, prefix: str, mtime: int) -> Iterator[Item]:
    archive = _open_zip(file, mtime)
    for info in archive.infolist():
        name = _name(info.filename)
        if not info.is_dir() and _kind(name) in EXTENSIONS:
            yield Item(f"{prefix}/{name}", partial(_read_zip, archive, info, mtime), info.file_size, mtime, {})


@lru_cache(maxsize=8)
def _open_zip(file: Path, mtime: int) -> zipfile.ZipFile:  # noqa: ARG001 (the time tells archives apart)
    """Stays open as long as an item that reads from it is alive, and a little longer."""
    handle = file.open("rb")
    try:
        # From a handle of ours, because ZipFile counts the readers of its own without a lock, and closes it at zero.
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
    """In any thread: only reading the file is behind ZipFile's lock, inflating is not."""
    if info.file_size > MOST_BYTES:
        raise ImageError(f"{info.file_size} bytes are too many for an image")
    try:
        with archive.open(info) as stream:
            # Not read(): that would inflate up to 2 GiB of a member that is larger than it says.
            content = stream.read(info.file_size + 1)
    except Exception as error:  # zlib's own, a wrong checksum, an unknown method, a password
        raise ImageError(f"cannot be read from its archive: {error}") from None
    return image_file(content, mtime)
