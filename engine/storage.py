"""How a plane's entries lie in memory: the fields of an entry side by side, as numbers of one dtype, or as bytes where
the dtypes differ."""

from __future__ import annotations

import torch

from kvtransfer.layouts import Plane

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def is_record(plane: Plane) -> bool:
    """Whether entries are kept as bytes."""
    return len(set(plane.dtypes)) > 1 or plane.dtypes[0] not in DTYPES


def plane_width(plane: Plane) -> int:
    """Numbers, or bytes, in one entry of one layer and head."""
    return plane.record_bytes if is_record(plane) else sum(field.width for field in plane.fields)


def plane_dtype(plane: Plane) -> torch.dtype:
    """Of an entry in memory."""
    return torch.uint8 if is_record(plane) else DTYPES[plane.dtypes[0]]
