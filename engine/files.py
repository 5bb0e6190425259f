"""Files that are whole or not there, and the folder for what can be made again."""

import functools
import os
import tempfile
from pathlib import Path

from utils import log

WRITING = ".writing-"  # in the names of files and folders that are not complete


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until a folder is on the disk, with all that it holds."""
    for item in sorted(folder.rglob("*"), reverse=True):
        sync(item)
    sync(folder)


def nearest(path: Path) -> Path:
    """The path where it exists, else the nearest above it that does. Raises OSError."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def check_writable(folder: Path) -> None:
    """Raise OSError where nothing can be written to a folder."""
    tempfile.TemporaryFile(dir=folder).close()


def cache_dir() -> Path:
    """The folder for what can be made again: coconut in the user's cache folder or, where that
    cannot be written, a temporary one of this process."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(base).expanduser() / "coconut"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return _temporary_cache(folder)


@functools.cache
def _temporary_cache(instead_of: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="coconut-"))
    log.warning(f"{instead_of} cannot be written (XDG_CACHE_HOME names another); cache: {folder}")
    return folder


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    writing = path.with_name(path.name + WRITING + "file")
    try:
        writing.write_text(text, encoding="utf-8")
        sync(writing)
        writing.rename(path)
    finally:
        writing.unlink(missing_ok=True)
    sync(path.parent)
