"""What both clients need to call a router over gRPC: address, key, channel options, errors."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self, cast

import grpc
from google.protobuf.message import DecodeError

from headrace import _convert
from headrace._errors import CLIENT_STAGE, Cancelled, HeadraceError, Unavailable, bad_argument, error_class
from headrace._retry import Attempts, RetryPolicy
from headrace._routers import Routers
from headrace.v1 import inference_pb2 as wire

DEFAULT_ADDRESS = "127.0.0.1:8460"
# What a call that only asks or cancels may take unless the caller says otherwise.
CONTROL_TIMEOUT_S = 30.0
ERROR_DETAIL_KEY = "headrace-error-bin"

CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.primary_user_agent", "headrace-python"),
    # The token ids of a prompt of 10 MiB fit.
    ("grpc.max_receive_message_length", 64 << 20),
    # A router that vanished without a word is noticed while a long prompt is read and no token comes.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Below the waits of RetryPolicy, so that a repeat does dial again.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

# The router ends a request at its deadline and says in which stage it was. gRPC's own deadline, which
# knows no stage, comes this much later and matters only when the router says nothing.
_DEADLINE_GRACE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Where and how a client calls. Times are in seconds; `timeout_s` None leaves them to the cluster."""

    routers: Routers
    metadata: tuple[tuple[str, str], ...]
    timeout_s: float | None
    retry: RetryPolicy

    @classmethod
    def of(
        cls, address: str | Sequence[str], api_key: str | None, timeout_s: float | None, retry: RetryPolicy
    ) -> Self:
        """The connection that a client's arguments describe.

        Raises:
            InvalidRequest: no address, or no port in one, an API key that no header can carry, a timeout
                that is not positive.
        """
        addresses = [address] if isinstance(address, str) else list(address)
        if not addresses or not all(isinstance(each, str) and ":" in each for each in addresses):
            raise bad_argument(
                f"address must be HOST:PORT, such as {DEFAULT_ADDRESS}, or several of them; got {address!r}"
            )
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key):
            raise bad_argument("api_key must be printable ASCII and not empty")
        Attempts(retry, timeout_s)  # refuses a bad timeout now and not at the first call
        metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        return cls(routers=Routers(addresses), metadata=metadata, timeout_s=timeout_s, retry=retry)

    def begin(self, request: wire.GenerateRequest | wire.ChatRequest, timeout_s: float | None) -> Attempts:
        """Writes the time limit into the request; the attempts that it may take.

        Raises:
            InvalidRequest: `timeout_s` is not a positive, finite number of seconds.
        """
        if timeout_s is None:
            timeout_s = self.timeout_s
        attempts = Attempts(self.retry, timeout_s)
        request.timeout_s = timeout_s or 0.0
        return attempts

    def error(self, failed: grpc.RpcError, router: int, request_id: str = "") -> HeadraceError:
        """The typed error for a failed call to a router; the next call goes to another one where it is gone."""
        error = self._typed(failed, router, request_id)
        self.routers.failed(router, error)
        return error

    def _typed(self, failed: grpc.RpcError, router: int, request_id: str) -> HeadraceError:
        code = failed.code().name
        detail = _detail_of(failed)
        if detail is not None:
            detail.request_id = detail.request_id or request_id
            return _convert.error_from_detail(detail, error_class(code), code=code, message=code)
        # Without a detail it was not the router that spoke, but gRPC on either side.
        if code == "UNAVAILABLE":
            return self._unreachable(failed.details() or "", router, request_id)
        return error_class(code)(
            failed.details() or code, request_id=request_id, stage=CLIENT_STAGE, cause=code, code=code
        )

    def _unreachable(self, reason: str, router: int, request_id: str) -> Unavailable:
        address = self.routers.addresses[router]
        return Unavailable(
            f"no connection to a router at {address} ({reason}); is the cluster up?",
            request_id=request_id,
            stage=CLIENT_STAGE,
            cause="NO_CONNECTION",
            code="UNAVAILABLE",
            retryable=True,
        )


def client_closed() -> Cancelled:
    """The error for a call through a client that was closed."""
    return Cancelled("the client is closed", stage=CLIENT_STAGE, cause="CLIENT_CLOSED")


def answer_timeout_s(attempts: Attempts) -> float | None:
    """The gRPC deadline of an answer's next attempt, in seconds from now."""
    remaining_s = attempts.remaining_s()
    return None if remaining_s is None else remaining_s + _DEADLINE_GRACE_S


def _detail_of(failed: grpc.RpcError) -> wire.ErrorDetail | None:
    # The stubs describe neither that both kinds of metadata iterate over pairs nor that either may be None.
    pairs = cast("Iterable[tuple[str, str | bytes]] | None", failed.trailing_metadata()) or ()
    for key, value in pairs:
        if key == ERROR_DETAIL_KEY and isinstance(value, bytes):
            try:
                return wire.ErrorDetail.FromString(value)
            except DecodeError:
                return None
    return None
