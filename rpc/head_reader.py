"""Header blocks read with the connection's table (RFC 7541), by the library `hpack`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final, Generic, TypeVar

from hpack import Decoder
from hpack.exceptions import HPACKError

from rpc.frames import ConnectionFault, ErrorCode
from rpc.heads import BadHead, Header

MAX_HEADER_BYTES: Final = 64 << 10
MAX_KEPT_HEADS: Final = 256

# It would write every header it reads into a debug log, credentials too.
logging.getLogger("hpack").setLevel(logging.WARNING)

HeadT = TypeVar("HeadT")


class HeadReader(Generic[HeadT]):
    """One connection's. Every block must be read, in order: each may change the table that later ones are read with.

    Calls after the first are made of nothing but references into the table: what `parse` gave for such a block is kept
    until the table may have changed.
    """

    def __init__(self, parse: Callable[[Iterable[Header]], HeadT]) -> None:
        self._parse = parse
        self._decoder = Decoder(max_header_list_size=MAX_HEADER_BYTES)
        self._kept: dict[bytes, HeadT | BadHead] = {}

    def read(self, block: bytes) -> HeadT | BadHead:
        """What `parse` makes of the headers, or why it cannot.

        Raises:
            ConnectionFault: they cannot be read; nothing after them can.
        """
        known = self._kept.get(block)
        if known is not None:
            return known
        try:
            headers: Any = self._decoder.decode(block, raw=True)
        except HPACKError as error:
            raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, f"bad header block: {error}") from None
        head: HeadT | BadHead
        try:
            head = self._parse(headers)
        except BadHead as error:
            head = error
        if block and min(block) > 0x80 and max(block) < 0xFF:
            if len(self._kept) < MAX_KEPT_HEADS:
                self._kept[block] = head
        else:
            self._kept.clear()
        return head
