"""Who may speak to a worker: holders of the cluster secret. As for a store: kvtransfer/transports/auth.py."""

from __future__ import annotations

from kvtransfer.cluster_token import CLUSTER_METADATA_KEY, cluster_metadata, cluster_token
from kvtransfer.transports.auth import AsyncClusterTokenInterceptor, ClusterTokenInterceptor

__all__ = [
    "CLUSTER_METADATA_KEY",
    "AsyncClusterTokenInterceptor",
    "ClusterTokenInterceptor",
    "cluster_metadata",
    "cluster_token",
]
