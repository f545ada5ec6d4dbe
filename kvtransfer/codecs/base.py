"""What a codec is: bytes of a piece in, bytes for the wire out, and back; its class says what is lost."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvtransfer.layouts import Piece, Plane


class Fidelity(StrEnum):
    """What a codec loses. A bound allows its own class and the better ones."""

    EXACT = "exact"
    NEAR = "near"
    COMPACT = "compact"

    def allows(self, other: Fidelity) -> bool:
        order = list(Fidelity)
        return order.index(other) <= order.index(self)


class Codec(Protocol):
    """Stateless, safe to call from several threads, and a function of its inputs alone: a frame sent
    again must become the same bytes.

    `plane` and `piece` tell how to read the canonical bytes: [layer, entry, head, field].
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def fidelity(self) -> Fidelity: ...

    def encode(self, raw: Buffer, plane: Plane, piece: Piece) -> Buffer:
        """The payload. May be a view of `raw`."""

    def decode(self, payload: Buffer, plane: Plane, piece: Piece) -> Buffer:
        """The canonical bytes; exactly the piece's length. May be a view of `payload`.

        Raises ValueError for a payload that is not one of this codec for this piece, before it
        allocates more than the piece needs.
        """
