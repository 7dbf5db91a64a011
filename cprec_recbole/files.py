"""Files that are whole at every moment: written beside, flushed, then put in place in one step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from cprec_recbole.config import CompressionError


def make_folder(out: Path) -> None:
    """Make a folder for results; a CompressionError where that cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError("it cannot be written")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CompressionError(
            f"Expected `out` to be a folder that can be written, but got {out}: {reason}."
        ) from error


def flush(path: Path) -> None:
    """Have the system write a file or a folder to its disk."""
    try:
        # Windows flushes nothing that was opened for reading, POSIX opens no folder for writing
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:  # a folder, on Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` write a file so that a crash leaves the old one or the new one; an OSError where
    that cannot be."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}.tmp")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file so, in a folder that is made where it is missing."""
    make_folder(path.parent)
    write_whole(path, lambda to: to.write_text(text, encoding="utf-8"))


def remove_leftovers(path: Path) -> None:
    """Remove what runs that were killed while they wrote a file left beside it."""
    for left in path.parent.glob(f".{path.name}-*.tmp"):
        left.unlink(missing_ok=True)


@contextmanager
def held(folder: Path, option: str = "out") -> Iterator[None]:
    """Within: no other process that asks for it gets this folder, until this one dies. Refuses a
    folder that another process has; the error names the option."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CompressionError(
                f"Expected `{option}` to be a folder that nothing else writes to, but one does: "
                f"{folder}."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
