"""Who may speak to a worker or a store: holders of the cluster secret.

Every call carries the token of cluster_token.py. Health checks and reflection are open: a supervisor has no secret,
and reflection listens on loopback only.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable
from typing import Any

import grpc

from kvtransfer.cluster_token import CLUSTER_METADATA_KEY, cluster_token

_OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.")
REFUSAL = "this call needs the cluster's secret: metadata 'headrace-cluster' is missing or wrong"


class ClusterTokenCheck:
    """Tells callers who know the cluster secret from those who do not."""

    def __init__(self, cluster_secret: bytes) -> None:
        self._token = cluster_token(cluster_secret).encode()

    def admits(self, method: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> bool:
        """Whether a call of `/service/method` with that metadata may be answered."""
        if is_open(method):
            return True
        given = dict(metadata or ()).get(CLUSTER_METADATA_KEY, "")
        given_bytes = given if isinstance(given, bytes) else given.encode()
        return hmac.compare_digest(given_bytes, self._token)


def is_open(method: str) -> bool:
    """Whether anybody may call it."""
    return method.startswith(_OPEN_SERVICES)


class ClusterTokenInterceptor(grpc.ServerInterceptor):
    """Refuses calls without the cluster's token with UNAUTHENTICATED, on a threaded server."""

    def __init__(self, cluster_secret: bytes) -> None:
        self._check = ClusterTokenCheck(cluster_secret)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Pass the call on, or answer it with a refusal."""
        handler = continuation(handler_call_details)
        if handler is None or self._check.admits(
            handler_call_details.method, handler_call_details.invocation_metadata
        ):
            return handler

        def refuse(_request: Any, context: grpc.ServicerContext) -> Any:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, REFUSAL)

        return _same_shape(handler, refuse)


def _same_shape(handler: grpc.RpcMethodHandler[Any, Any], behavior: Any) -> grpc.RpcMethodHandler[Any, Any]:
    """`behavior` as a handler of the same cardinality, which gRPC looks at before it calls."""
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    shaped: grpc.RpcMethodHandler[Any, Any] = make(
        behavior, handler.request_deserializer, handler.response_serializer
    )
    return shaped
