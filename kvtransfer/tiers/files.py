"""The few things that the disk tier does with files, behind a seam: tests put a failing disk there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Buffer

FILE_MODE = 0o600


class FileFacts(NamedTuple):
    """`size`: length in bytes. `disk_bytes`: what the file takes of the file system."""

    size: int
    disk_bytes: int
    modified: float


class Files(Protocol):
    """All methods raise OSError. Any thread may call."""

    def write_new(self, path: Path, parts: Iterable[Buffer]) -> FileFacts:
        """Makes a file that was not there, mode 0600, with these bytes, and returns once they are on the medium."""

    def publish(self, temporary: Path, path: Path) -> None:
        """Renames, and returns once the directory says so on the medium."""

    def read(self, path: Path, offset: int, num_bytes: int) -> bytearray:
        """Exactly so many bytes; fewer in the file are an OSError."""

    def remove(self, path: Path) -> None:
        """The file is gone, whether it was there or not."""

    def facts(self, path: Path) -> FileFacts: ...

    def block_bytes(self, directory: Path) -> int:
        """In what units the file system gives out space."""


class OsFiles:
    """The operating system's."""

    def write_new(self, path: Path, parts: Iterable[Buffer]) -> FileFacts:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            for part in parts:
                view = memoryview(part).cast("B")
                while view:
                    view = view[file.write(view) or 0 :]
            os.fsync(descriptor)
            return _facts(os.fstat(descriptor))

    def publish(self, temporary: Path, path: Path) -> None:
        temporary.rename(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def read(self, path: Path, offset: int, num_bytes: int) -> bytearray:
        data = bytearray(num_bytes)
        view = memoryview(data)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while view:
                count = os.preadv(descriptor, [view], offset)
                if count == 0:
                    raise OSError(errno.EIO, f"the file ends at {offset}, {len(view)} bytes early", str(path))
                view = view[count:]
                offset += count
        finally:
            os.close(descriptor)
        return data

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def facts(self, path: Path) -> FileFacts:
        return _facts(path.stat())

    def block_bytes(self, directory: Path) -> int:
        return os.statvfs(directory).f_frsize


def _facts(status: os.stat_result) -> FileFacts:
    return FileFacts(status.st_size, status.st_blocks * 512, status.st_mtime)
