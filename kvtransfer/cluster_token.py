"""How a process shows that it belongs to the cluster: a token made from the cluster secret, in every call's metadata.

The token does not reveal the secret. Who checks it: transports/auth.py for workers and stores, the router's front
door for operators. Knows no gRPC.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

CLUSTER_METADATA_KEY = "headrace-cluster"


def cluster_token(cluster_secret: bytes) -> str:
    """The metadata value that proves knowledge of `cluster_secret`: lower-case hex of HMAC-SHA256."""
    return hmac.new(cluster_secret, b"cluster-token", hashlib.sha256).hexdigest()


def cluster_metadata(cluster_secret: bytes) -> tuple[tuple[str, str], ...]:
    """What a client passes as `metadata`."""
    return ((CLUSTER_METADATA_KEY, cluster_token(cluster_secret)),)


class ClusterTokenCheck:
    """Tells callers who know the cluster secret from those who do not."""

    def __init__(self, cluster_secret: bytes) -> None:
        self._token = cluster_token(cluster_secret).encode()

    def admits(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> bool:
        """Whether a call with that metadata may be answered where not everybody's may."""
        given = dict(metadata or ()).get(CLUSTER_METADATA_KEY, "")
        given_bytes = given if isinstance(given, bytes) else given.encode()
        return hmac.compare_digest(given_bytes, self._token)
