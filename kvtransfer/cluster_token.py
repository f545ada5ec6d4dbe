"""How a process shows that it belongs to the cluster: a token made from the cluster secret, in every call's metadata.

The token does not reveal the secret. Who checks it: transports/auth.py for workers and stores, the router's front
door for operators. Knows no gRPC.
"""

from __future__ import annotations

import hashlib
import hmac

CLUSTER_METADATA_KEY = "headrace-cluster"


def cluster_token(cluster_secret: bytes) -> str:
    """The metadata value that proves knowledge of `cluster_secret`: lower-case hex of HMAC-SHA256."""
    return hmac.new(cluster_secret, b"cluster-token", hashlib.sha256).hexdigest()


def cluster_metadata(cluster_secret: bytes) -> tuple[tuple[str, str], ...]:
    """What a client passes as `metadata`."""
    return ((CLUSTER_METADATA_KEY, cluster_token(cluster_secret)),)
