"""How a call of Headrace's own services fails: a status, and the contract's ErrorDetail in the trailing metadata."""

from __future__ import annotations

from typing import Final

import grpc

from headrace.v1 import inference_pb2
from rpc.heads import Status

ERROR_DETAIL_KEY: Final = "headrace-error-bin"


def failed(code: grpc.StatusCode, detail: inference_pb2.ErrorDetail) -> Status:
    """The status with its detail."""
    return Status(code, detail.message, ((ERROR_DETAIL_KEY, detail.SerializeToString()),))
