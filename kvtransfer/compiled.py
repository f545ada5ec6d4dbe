"""Loops over numbers in host memory, compiled by numba: one pass where single tensor operations take several.

They let other threads run meanwhile. The first call of a loop compiles it, about a second; the result is kept beside
the source, or in the user's cache directory, for the processes that follow. What is kept is made anew only when the
file of the loop itself changes, so that a loop and all that it calls belong into one file.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numba
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

Array = np.ndarray[Any, np.dtype[Any]]

_Loop = TypeVar("_Loop", bound="Callable[..., Any]")


def compiled(loop: _Loop, any_order: bool = False) -> _Loop:
    """`loop` in machine code, without the interpreter's lock. any_order: floats may be added up in any order, as
    vectors demand."""
    jit = partial(numba.njit, nogil=True, error_model="numpy", fastmath={"reassoc"} if any_order else False)
    try:
        return cast("_Loop", jit(loop, cache=True))
    except RuntimeError:  # no directory to keep it in
        return cast("_Loop", jit(loop))
