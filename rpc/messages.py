"""gRPC's length-prefixed messages, cut out of a stream's DATA (gRPC over HTTP/2, "Length-Prefixed-Message")."""

from __future__ import annotations

from typing import Final

PREFIX_BYTES: Final = 5


class BadMessage(Exception):
    """What came is no message that can be taken; `is_too_large`, or in an encoding that was not offered."""

    def __init__(self, reason: str, is_too_large: bool = False) -> None:
        super().__init__(reason)
        self.is_too_large = is_too_large


class MessageReader:
    """One stream's. Holds at most one message that is not whole yet, of at most `max_bytes`."""

    __slots__ = ("_max_bytes", "_partial")

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._partial = bytearray()

    @property
    def is_between_messages(self) -> bool:
        """Whether a stream that ends here has ended in order."""
        return not self._partial

    @property
    def num_buffered_bytes(self) -> int:
        return len(self._partial)

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are whole now.

        Raises:
            BadMessage: it is too large, or compressed.
        """
        if not self._partial:
            length = self._length(data)
            if length + PREFIX_BYTES == len(data):
                return [data[PREFIX_BYTES:]]
        self._partial += data
        messages: list[bytes] = []
        at, end = 0, len(self._partial)
        while (length := self._length(self._partial, at)) >= 0 and at + PREFIX_BYTES + length <= end:
            begin = at + PREFIX_BYTES
            at = begin + length
            messages.append(bytes(self._partial[begin:at]))
        del self._partial[:at]
        return messages

    def _length(self, data: bytes | bytearray, at: int = 0) -> int:
        """Of the message that begins there; negative where its prefix is not whole."""
        if len(data) - at < PREFIX_BYTES:
            return -PREFIX_BYTES - 1
        if data[at]:
            raise BadMessage("the message is compressed, and no encoding but identity is accepted")
        length = int.from_bytes(data[at + 1 : at + PREFIX_BYTES], "big")
        if length > self._max_bytes:
            raise BadMessage(
                f"the message has {length} bytes, and at most {self._max_bytes} are accepted",
                is_too_large=True,
            )
        return length
