"""What one process of the cluster gives to a client and another reads again: sealed with a key of its purpose, derived
from the cluster secret (HMAC-SHA256). Not secret, but nobody else can make or change it. Knows no gRPC.
"""

from __future__ import annotations

import hmac
from functools import lru_cache

MAX_SEALED_BYTES = 4096
_SEAL_BYTES = 32


class BrokenSeal(ValueError):
    """The bytes were not sealed for this purpose by this cluster."""


def seal(content: bytes, purpose: bytes, cluster_secret: bytes) -> bytes:
    """The content behind its seal."""
    return _seal_of(content, purpose, cluster_secret) + content


def unseal(sealed: bytes, purpose: bytes, cluster_secret: bytes) -> bytes:
    """The content.

    Raises:
        BrokenSeal: it is too long, or was not made for this purpose with this secret.
    """
    given, content = sealed[:_SEAL_BYTES], sealed[_SEAL_BYTES:]
    if len(sealed) > MAX_SEALED_BYTES or not hmac.compare_digest(
        given, _seal_of(content, purpose, cluster_secret)
    ):
        raise BrokenSeal("not made by this cluster")
    return content


def _seal_of(content: bytes, purpose: bytes, cluster_secret: bytes) -> bytes:
    return hmac.digest(_key(purpose, cluster_secret), content, "sha256")


@lru_cache(maxsize=8)
def _key(purpose: bytes, cluster_secret: bytes) -> bytes:
    return hmac.digest(cluster_secret, purpose, "sha256")
