"""How a plane's entries lie in memory: the fields of an entry side by side, in one dtype."""

from __future__ import annotations

import torch

from kvtransfer.layouts import Plane

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def plane_width(plane: Plane) -> int:
    """Numbers in one entry of one layer and head."""
    return sum(field.width for field in plane.fields)


def plane_dtype(plane: Plane) -> torch.dtype:
    """Raises ValueError for a plane whose fields differ, or that the engine does not compute with."""
    dtypes = set(plane.dtypes)
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        raise ValueError(
            f"plane {plane.name!r} is of {', '.join(plane.dtypes)}; one of {', '.join(DTYPES)} is needed"
        )
    return DTYPES[dtypes.pop()]
