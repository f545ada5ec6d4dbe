"""A directory that appears whole or not at all: written beside its target, then renamed onto it."""

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from cluster.model_store.errors import ModelStoreError

_STAGING = ".staging-"
_LOCK_NAME = ".lock"
_MAX_SWAPS = 10


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield an empty directory; when the block ends well it becomes `target`, replacing what was there.

    When the block raises it is removed. What a killed process left behind is removed by the next one. Readers
    of the old `target` keep the files that they have open. Raises ModelStoreError if the disk refuses.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target.parent)
        directory, lock = _locked_directory(target)
        try:
            with lock:
                yield directory
                (directory / _LOCK_NAME).unlink()
                _sync(directory)
                _swap(directory, target)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    except OSError as error:
        raise ModelStoreError(f"{target}: cannot be written: {error.strerror or error}") from error


def _locked_directory(target: Path) -> tuple[Path, IO[bytes]]:
    """A new staging directory and its lock, which ends with this process.

    It gets its name when it is locked, so that no other process takes it for abandoned.
    """
    suffix = f"{target.name}-{secrets.token_hex(8)}"
    unnamed = target.parent / f".new-{suffix}"
    unnamed.mkdir()
    lock = (unnamed / _LOCK_NAME).open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return unnamed.rename(target.parent / f"{_STAGING}{suffix}"), lock


def _remove_abandoned(parent: Path) -> None:
    """Remove staging directories whose lock is free: their maker is gone."""
    for directory in parent.glob(f"{_STAGING}*"):
        with suppress(OSError), (directory / _LOCK_NAME).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)


def _sync(directory: Path) -> None:
    for path in (*directory.iterdir(), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(directory: Path, target: Path) -> None:
    """Rename `directory` to `target`; what is there moves aside first. Of several writers the last wins."""
    for _ in range(_MAX_SWAPS):
        aside = target.parent / f".old-{secrets.token_hex(8)}"
        with suppress(FileNotFoundError):
            target.rename(aside)
        try:
            directory.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                with suppress(OSError):
                    aside.rename(target)
                raise
        else:
            return
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    raise ModelStoreError(f"{target}: other processes keep preparing it at the same time; try again")
