"""The disk tier's directory: what lies in it, and that one store at a time works on it.

Names: `<32 hex digits>.kv` is a segment, the same with `.tmp` one that was being written, `LOCK` says who has the
directory open. Whatever else lies there is somebody else's and is left alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO

LOCK_NAME = "LOCK"
DIRECTORY_MODE = 0o700

_SEGMENT = re.compile(r"[0-9a-f]{32}\.kv")
_TEMPORARY = re.compile(r"[0-9a-f]{32}\.tmp")


class DirectoryInUse(RuntimeError):
    """Another store has the directory open; the message says which."""


class DirectoryLock:
    """Held from construction to `close`, or until the process dies, however it dies."""

    def __init__(self, directory: Path) -> None:
        """Makes the directory if need be. Raises DirectoryInUse, or OSError."""
        directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        self._file: IO[str] = os.fdopen(_open_lock(directory / LOCK_NAME), "r+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._file.read(256).strip() or "another process"
            self._file.close()
            raise DirectoryInUse(
                f"{directory} is in use by {holder}; two stores must not share a directory: give each its own"
            ) from None
        except BaseException:
            self._file.close()
            raise
        self._say_who()

    def close(self) -> None:
        """Idempotent."""
        self._file.close()

    def _say_who(self) -> None:
        # For people only: on a full disk the lock holds without it.
        with suppress(OSError):
            self._file.truncate(0)
            self._file.seek(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # what was written before can still be served


def lock_holder(directory: Path) -> str | None:
    """Who has the directory open, in words; None when nobody has. Changes nothing. Raises OSError."""
    try:
        with (directory / LOCK_NAME).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read(256).strip() or "another process"
    except FileNotFoundError:
        pass
    return None


def new_segment_path(directory: Path) -> Path:
    """A name that nobody has."""
    return directory / f"{secrets.token_hex(16)}.kv"


def temporary_of(segment: Path) -> Path:
    """Under which name a segment is written."""
    return segment.with_suffix(".tmp")


def segment_paths(directory: Path) -> list[Path]:
    """In the order of their names. Raises OSError."""
    return sorted(path for path in directory.iterdir() if _SEGMENT.fullmatch(path.name))


def temporary_paths(directory: Path) -> list[Path]:
    """What was being written when a store died, or is at this moment. Raises OSError."""
    return sorted(path for path in directory.iterdir() if _TEMPORARY.fullmatch(path.name))
