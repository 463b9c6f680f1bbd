"""Files that are written beside and moved into place, so that a kill or a full disk leaves what stood there."""

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["check_space", "remove_leftovers", "replacing"]

_HOUR = 3600.0


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """The path of a new file, hidden beside `path`, that takes its place when the block ends well.

        with replacing("grid.png") as new:
            image.save(new)

    Where the block raises, the new file is removed and `path` is as it was. A killed process may leave it, as
    `.partial-<process>-<name>`: the next one that writes `path` removes it (`remove_leftovers`). Folders are made as
    needed. If the block makes a folder, its files are moved one by
    one. What is no file, such as a device, is written to as it is.

    Args:
        path: the file to write, where a link leads if it is one; the new one has the same suffixes.
    """
    name, path = Path(path).name, Path(path).resolve()
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.with_name(name))
    new = path.with_name(f".partial-{os.getpid()}-{name}")
    try:
        yield new
        if new.is_dir():
            shutil.copytree(new, path, copy_function=_move, dirs_exist_ok=True)
        else:
            _move(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True) if new.is_dir() else new.unlink(missing_ok=True)


def check_space(path: str | os.PathLike, size: int) -> None:
    """Raises an OSError unless the disk has room for a new file of so many bytes at `path`.

    It is for writers that do not survive a full disk: HDF5 may end the process.
    """
    disk = shutil.disk_usage(next(folder for folder in Path(path).resolve().parents if folder.is_dir()))
    if disk.total and disk.free < size:  # a remote folder may not say its size
        raise OSError(errno.ENOSPC, f"{size / 1e6:.1f} MB are needed, and {disk.free / 1e6:.1f} are free", str(path))


def remove_leftovers(path: Path) -> None:
    """Removes what killed processes left beside `path`, of files and folders that were to take its place.

    That is what nobody has changed for an hour: another process, perhaps of another machine, may be writing.
    """
    pattern = re.compile(rf"(\.partial-[^-]+-)+{re.escape(path.name)}")  # also of a file that a new file took
    for old in [old for old in path.parent.iterdir() if pattern.fullmatch(old.name)]:
        with contextlib.suppress(OSError):  # it is gone, or another's
            if time.time() - old.stat().st_mtime > _HOUR:
                shutil.rmtree(old) if old.is_dir() else old.unlink()


def _move(new: str | os.PathLike, path: str | os.PathLike) -> None:
    """Also of an old file with its permissions, and not before the disk has the new one."""
    if os.path.exists(path):
        shutil.copymode(path, new)
    with open(new, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(new, path)
