"""The resume handle: what a client carries to another router, or back to this one, to go on with an answer.

Sealed with a key derived from the cluster secret, so that any router of the cluster can read it and nobody
else can make one. It holds no text. Opaque to clients; the layout may change with the leading version byte.
"""

import hmac
import json
from dataclasses import dataclass, fields
from functools import lru_cache

VERSION = b"\x02"
_SEAL_BYTES = 32
MAX_HANDLE_BYTES = 4096


class BadHandle(ValueError):
    """The bytes are no handle of this cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeHandle:
    """Which request of which tenant, the attempt it was at, its seed and its body's digest in hex; and the worker that
    writes the answer, with that incarnation's epoch: empty and 0 until there is one."""

    tenant: str
    request_id: str
    attempt: int
    seed: int
    body: str
    worker_id: str = ""
    epoch: int = 0


_FIELDS = tuple(field.name for field in fields(ResumeHandle))


def seal(handle: ResumeHandle, cluster_secret: bytes) -> bytes:
    """The handle as a client gets it."""
    content = VERSION + json.dumps({name: getattr(handle, name) for name in _FIELDS}).encode()
    return _seal_of(content, cluster_secret) + content


def unseal(sealed: bytes, cluster_secret: bytes) -> ResumeHandle:
    """The handle that a client brought.

    Raises:
        BadHandle: it was not made with this secret, or by a newer version.
    """
    seal_bytes, content = sealed[:_SEAL_BYTES], sealed[_SEAL_BYTES:]
    if len(sealed) > MAX_HANDLE_BYTES or not hmac.compare_digest(
        seal_bytes, _seal_of(content, cluster_secret)
    ):
        raise BadHandle("the resume handle was not made by this cluster")
    if content[:1] != VERSION:
        raise BadHandle("the resume handle is of another version")
    return ResumeHandle(**json.loads(content[1:]))


def _seal_of(content: bytes, cluster_secret: bytes) -> bytes:
    return hmac.digest(_key(cluster_secret), content, "sha256")


@lru_cache(maxsize=4)
def _key(cluster_secret: bytes) -> bytes:
    return hmac.digest(cluster_secret, b"resume-handle", "sha256")
