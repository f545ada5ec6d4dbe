"""The secret of the clusters that one user starts from one HEADRACE_HOME: made once, kept for this user only.

Workers know each other by it, and cached blocks are named and sealed with keys derived from it. It outlives
`down`, so that what a disk tier holds can be found again by the next cluster.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from cluster.errors import ClusterError

SECRET_BYTES = 32


def cluster_secret(run_dir: Path) -> bytes:
    """32 bytes: what is kept in `run_dir`/secret, else new ones, kept from now on.

    Raises ClusterError for a file that cannot be trusted.
    """
    path = run_dir / "secret"
    if not os.path.lexists(path):
        _make(path)
    return _read(path)


def kept_secret(run_dir: Path) -> bytes | None:
    """What is kept in `run_dir`/secret, or None. Raises ClusterError for a file that cannot be trusted."""
    path = run_dir / "secret"
    return _read(path) if os.path.lexists(path) else None


def _make(path: Path) -> None:
    draft = path.with_name(f"secret.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(SECRET_BYTES))
    # A link, unlike a rename, leaves the secret alone that another `up` has made meanwhile.
    with contextlib.suppress(FileExistsError):
        os.link(draft, path)
    draft.unlink()


def _read(path: Path) -> bytes:
    try:
        found = path.stat(follow_symlinks=False)
        secret = path.read_bytes()
    except OSError as error:
        raise ClusterError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ClusterError(
            f"{path} must be a file of yours that nobody else can read: chmod 600, or remove it"
        )
    if len(secret) != SECRET_BYTES:
        raise ClusterError(
            f"{path} has {len(secret)} bytes, not {SECRET_BYTES}; remove it, and cached blocks are lost"
        )
    return secret
