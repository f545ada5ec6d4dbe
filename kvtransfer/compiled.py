"""Loops over numbers in host memory, compiled by numba: one pass where single tensor operations take several.

They let other threads run meanwhile. The first call of a loop compiles it, about a second; the result is kept beside
the source, or in the user's cache directory, for the processes that follow, until a file in the loop's folder changes:
loops call those of files beside theirs only.
"""

from __future__ import annotations

import os
from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numba
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

Array = np.ndarray[Any, np.dtype[Any]]

_Loop = TypeVar("_Loop", bound="Callable[..., Any]")


def compiled(loop: _Loop, any_order: bool = False, counts_references: bool = True) -> _Loop:
    """`loop` in machine code, without the interpreter's lock.

    any_order: floats may be added up in any order, as vectors demand. counts_references: False for loops that make no
    arrays, to which counting who holds one is a good part of the work.
    """
    jit = partial(
        numba.njit,
        nogil=True,
        error_model="numpy",
        _nrt=counts_references,
        fastmath={"reassoc"} if any_order else False,
    )
    config: Any = numba.config
    before, config.CACHE_DIR = config.CACHE_DIR, str(_kept_in(Path(loop.__code__.co_filename).parent))
    try:
        return cast("_Loop", jit(loop, cache=True))
    except RuntimeError:  # no directory to keep it in
        return cast("_Loop", jit(loop))
    finally:
        config.CACHE_DIR = before


@lru_cache
def _kept_in(folder: Path) -> Path:
    """Where the compiled loops of a folder as it is now are kept."""
    digest = blake2b(digest_size=8)
    for source in sorted(folder.glob("*.py")):
        digest.update(source.read_bytes())
    beside = folder / "__pycache__"
    if os.access(folder, os.W_OK):
        beside.mkdir(exist_ok=True)
    home = beside if os.access(beside, os.W_OK) else Path.home() / ".cache" / "headrace"
    return home / f"loops-{digest.hexdigest()}"
