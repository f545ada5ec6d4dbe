"""One number for a set of block keys, by which two who should have the same set find out when they do not.

The exclusive or of the first 8 bytes of every key, little endian: adding and removing a key are the same operation,
so it is kept up to date without the set, in any order. Keys are keyed hashes, so that a chance of 2⁻⁶⁴ of not
noticing is all there is; it is no defence against who makes keys to collide, and needs none between workers and
routers of one cluster.
"""

from __future__ import annotations

import sys
from array import array
from functools import reduce
from operator import xor
from typing import TYPE_CHECKING

from kvtransfer.keys import KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

_WORDS_PER_KEY = KEY_BYTES // 8


def key_digest(keys: Iterable[bytes]) -> int:
    """Of keys of 16 bytes each, none of them twice; 0 for no keys. Raises ValueError where they are not of that size
    taken together."""
    joined = b"".join(keys)
    if len(joined) % KEY_BYTES:
        raise ValueError(f"{len(joined)} bytes are not a whole number of keys of {KEY_BYTES} bytes")
    words = array("Q", joined)
    if sys.byteorder == "big":
        words.byteswap()
    return reduce(xor, words[::_WORDS_PER_KEY], 0)


def split_keys(joined: bytes) -> list[bytes]:
    """Keys that were sent one behind the other. Raises ValueError where the last one is not whole."""
    if len(joined) % KEY_BYTES:
        raise ValueError(f"{len(joined)} bytes are not a whole number of keys of {KEY_BYTES} bytes")
    return [joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES)]
