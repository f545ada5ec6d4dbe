"""Channels and servers for bulk transfer, with the options that both ends must agree on.

Bulk has channels and a server of its own: a stream of 2 MiB messages on a shared connection would
delay tokens. The server is the threaded one: landing copies megabytes and must not hold an event loop.
"""

from __future__ import annotations

from concurrent import futures
from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from collections.abc import Sequence

BULK_SERVICE = "headrace.v1.KvBulk"

# The last message up a stream that ends in order. gRPC itself does not tell for sure: where a sender cancels or
# dies, its messages may just end.
LAST_WORD = b""

# A piece is about 2 MiB, more only where one entry of one layer already is.
MAX_MESSAGE_BYTES = 16 << 20

_COMMON_OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A peer that is gone without a FIN is found within 15 s even when no lease is waiting for it.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
]
_CLIENT_OPTIONS = [
    *_COMMON_OPTIONS,
    # Channels to one address would share one connection otherwise.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
_SERVER_OPTIONS = [
    *_COMMON_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # Two workers must never share a port by accident.
    ("grpc.so_reuseport", 0),
]


def open_bulk_channel(address: str) -> grpc.Channel:
    """A channel to a worker's kv address, with a connection of its own. Connects on first use."""
    return grpc.insecure_channel(address, options=_CLIENT_OPTIONS)


def make_bulk_server(
    max_calls: int = 256, interceptors: Sequence[grpc.ServerInterceptor] = ()
) -> grpc.Server:
    """A server for Push and the lease calls; add the services, bind a port, start it.

    Each running call holds a thread: an open push for as long as its prefill takes, a commit while
    frames are missing. So `max_calls` bounds both; a call beyond it fails at once with
    RESOURCE_EXHAUSTED instead of waiting behind streams that wait for it.
    """
    return grpc.server(
        futures.ThreadPoolExecutor(max_workers=max_calls, thread_name_prefix="kv-bulk"),
        interceptors=list(interceptors),
        options=_SERVER_OPTIONS,
        maximum_concurrent_rpcs=max_calls,
    )
