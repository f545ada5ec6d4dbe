"""Bytes of somebody else's as tensors, without a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from typing_extensions import Buffer


def readable(data: Buffer) -> torch.Tensor:
    """`data` as uint8 [n]. gRPC gives read-only memory, which torch warns of; nothing may write through this."""
    array = np.frombuffer(memoryview(data), dtype=np.uint8)
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Borrowed(array)))


class _Borrowed:
    """Memory of somebody else's, as an array that calls itself writable."""

    def __init__(self, array: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self._array = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}
