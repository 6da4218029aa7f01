"""Files and folders that are whole or absent: written under a temporary name, synced, renamed."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from clipret.errors import ClipretError

__all__ = ["new_folder", "sync_folder", "write_file"]


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file so that `path` holds either its old content or all of the new one, even after a power cut.

    Raises ClipretError when the folder is missing or the disk refuses; the old file is then untouched.
    """
    data = content.encode() if isinstance(content, str) else content
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

    After an exception, Ctrl-C included, the temporary folder is gone and `path` is as it was. An existing
    folder that is not empty is refused unless `overwrite`. Raises ClipretError.
    """
    path = path.absolute()
    if path.exists() and not path.is_dir():
        raise ClipretError(f"{path} is a file: choose another name for the folder")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise ClipretError(f"{path} exists and is not empty: choose another folder, remove it, or pass --overwrite")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ClipretError(f"{temporary.parent} cannot be written: {error.strerror}; choose another place") from None
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        # A folder cannot replace a folder that is not empty, so the old one steps aside first.
        aside = temporary.with_suffix(".old")
        if path.exists():
            path.rename(aside)
        temporary.rename(path)
        sync_folder(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise ClipretError(f"{path} cannot be written: {error}; choose another place or free space") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
