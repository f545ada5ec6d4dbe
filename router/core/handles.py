"""The resume handle: what a client carries to another router, or back to this one, to go on with an answer.

Sealed with a key derived from the cluster secret, so that any router of the cluster can read it and nobody
else can make one. It holds no text. Opaque to clients; the layout may change with the leading version byte.
"""

import json
from dataclasses import dataclass, fields

from kvtransfer import sealing

VERSION = b"\x02"
_PURPOSE = b"resume-handle"


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
    return sealing.seal(content, _PURPOSE, cluster_secret)


def unseal(sealed: bytes, cluster_secret: bytes) -> ResumeHandle:
    """The handle that a client brought.

    Raises:
        BadHandle: it was not made with this secret, or by a newer version.
    """
    try:
        content = sealing.unseal(sealed, _PURPOSE, cluster_secret)
    except sealing.BrokenSeal:
        raise BadHandle("the resume handle was not made by this cluster") from None
    if content[:1] != VERSION:
        raise BadHandle("the resume handle is of another version")
    return ResumeHandle(**json.loads(content[1:]))
