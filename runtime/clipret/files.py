"""Atomic writes of files and folders: written under a temporary name, synced, renamed."""

import contextlib
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from clipret.errors import ClipretError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["new_folder", "sync_folder", "write_file"]

_MIN_AGE = 60  # seconds
_SYNC_MODE = "r+b" if sys.platform == "win32" else "rb"  # Windows syncs only files that are open for writing


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file atomically: even after a power cut, `path` has either its old or its new content.

    Args:
        path: The file.
        content: Its content; a string is written as UTF-8.

    Raises:
        ClipretError: The folder is missing or cannot be written. The old file is then unchanged.
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
        raise ClipretError(f"{path} cannot be written: {error.strerror}; free space or choose another path") from error
    finally:  # also after Ctrl-C
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable. Does nothing where folders cannot be opened (Windows)."""
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
    """Create a folder atomically: yield an empty temporary folder that becomes `path` when the block succeeds.

    After an exception or Ctrl-C the temporary folder is deleted and `path` is unchanged. The temporary folders of a
    killed process are cleaned up by the next call for the same path.

    Args:
        path: The folder to create.
        overwrite: Replace an existing folder that is not empty, with everything in it.

    Raises:
        ClipretError: `path` is a file, is not empty, or cannot be written.
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
        raise ClipretError(f"{temporary.parent} cannot be written: {error.strerror}; choose another path") from error
    locks = [_lock(temporary)]
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open(_SYNC_MODE) as handle:
                    os.fsync(handle.fileno())
        # A rename cannot replace a folder that is not empty, so the old folder is renamed first.
        old = temporary.with_suffix(".old")
        if path.exists():
            locks.append(_lock(path))
            path.rename(old)
        temporary.rename(path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ClipretError(f"{path} cannot be written: {error}; free space or choose another path") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for lock in locks:
            if lock is not None:
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder until the returned handle is closed or the process ends.

    Returns None if another process has the lock, or the system has no such locks (Windows).
    """
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
    """Delete the temporary folders that killed processes left next to `path`, and restore an old `path` from them."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{8}\.(tmp|old)")
    with contextlib.suppress(OSError):
        for left in [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]:
            # A folder that was created just now may not be locked yet.
            if time.time() - left.stat().st_ctime < _MIN_AGE or (handle := _lock(left)) is None:
                continue
            if left.suffix == ".old" and not path.exists():
                left.rename(path)
            shutil.rmtree(left, ignore_errors=True)
            os.close(handle)
