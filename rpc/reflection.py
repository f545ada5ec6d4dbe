"""Server reflection (grpc.reflection.v1alpha) on a server of this package."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc  # type: ignore[import-untyped]

from rpc.server import Server

REFLECTION_SERVICE: Final[str] = reflection.SERVICE_NAME


class _Reflection:
    """Asks grpcio's servicer, which is made for threads, one request at a time."""

    def __init__(self, services: Sequence[str]) -> None:
        self._servicer = reflection.ReflectionServicer(services)

    async def ServerReflectionInfo(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Tells of services and their messages."""
        async for request in requests:
            for response in self._servicer.ServerReflectionInfo(iter((request,)), context):
                yield response


def add_reflection(services: Sequence[str], server: Server) -> None:
    """Lets callers ask which services there are."""
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(_Reflection(services), server)
