"""Files and folders that are whole or absent: written under a temporary name, synced, renamed."""

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from clipret.errors import ClipretError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["new_folder", "sync_folder", "write_file"]

_YOUNG = 60  # seconds


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file so that `path` holds either its old content or all of the new one, even after a power cut.

    Raises ClipretError when the folder is missing or the disk refuses; the old file is then untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    if not path.name or path.is_dir():
        raise ClipretError(f"{path} is a folder: name a file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise ClipretError(f"{path} cannot be written: {error.strerror}; choose another place or free it") from None
    finally:  # after Ctrl-C too
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable; a no-op where a folder cannot be opened for that (Windows)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except (OSError, AttributeError):
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path` that takes its place when the block ends well.

    After an exception, Ctrl-C included, the temporary folder is gone and `path` is as it was. What a killed process
    left is mended by the next one for the same path. An existing folder that is not empty is refused unless
    `overwrite`, which deletes whatever it holds. Raises ClipretError.
    """
    path = Path(os.path.realpath(path))  # the folder that a link points to, not the link
    _sweep(path)
    if path.exists() and not path.is_dir():
        raise ClipretError(f"{path} is a file: choose another name for the folder")
    if not overwrite and path.exists() and any(path.iterdir()):
        raise ClipretError(f"{path} exists and is not empty: choose another folder or remove it")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ClipretError(f"{temporary.parent} cannot be written: {error.strerror}; choose another place") from None
    held = [_hold(temporary)]
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        # A folder cannot replace a folder that is not empty, so the old one steps aside first.
        aside = temporary.with_suffix(".old")
        if path.exists():
            held.append(_hold(path))
            path.rename(aside)
        temporary.rename(path)
        sync_folder(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise ClipretError(f"{path} cannot be written: {error}; choose another place or free space") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for lock in held:
            if lock is not None:
                os.close(lock)


def _hold(folder: Path) -> int | None:
    """The lock of a folder, as a handle that keeps it until it is closed or its process has ended; None where another
    process holds it, or the system has no such locks (Windows)."""
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _sweep(path: Path) -> None:
    """Delete the temporary folders of killed processes beside `path`; an old `path` that stepped aside comes back."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{8}\.(tmp|old)")
    with contextlib.suppress(OSError):
        for left in [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]:
            # One that was made in this moment is not held yet.
            if time.time() - left.stat().st_ctime < _YOUNG or (handle := _hold(left)) is None:
                continue
            if left.suffix == ".old" and not path.exists():
                left.rename(path)
            shutil.rmtree(left, ignore_errors=True)
            os.close(handle)
