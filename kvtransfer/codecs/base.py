"""What a codec is: bytes of a piece in, bytes for the wire out, and back; its class says what is lost."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from typing_extensions import Buffer

    from kvtransfer.layouts import Piece, Plane


class Fidelity(StrEnum):
    """What a codec loses. A bound allows its own class and the better ones."""

    EXACT = "exact"
    NEAR = "near"
    COMPACT = "compact"

    @property
    def rank(self) -> int:
        """0 exact, 1 near, 2 compact: the number that frames and leases carry."""
        return list(Fidelity).index(self)

    def allows(self, other: Fidelity) -> bool:
        return other.rank <= self.rank


class Codec(Protocol):
    """Stateless, safe to call from several threads, and a function of its inputs alone: a frame sent
    again must become the same bytes.

    `plane` (with the dtypes that the bytes have) and `piece` tell how to read the canonical bytes
    [layer, entry, head, field]. What a codec cannot shrink it passes on (fields that are no floats, say).
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def fidelity(self) -> Fidelity: ...

    def encode(self, raw: torch.Tensor, plane: Plane, piece: Piece) -> Buffer:
        """The payload, in host memory; `raw` is uint8 [plane.num_bytes(piece)] on any device. May be a view."""

    def decode(self, payload: Buffer, plane: Plane, piece: Piece) -> torch.Tensor:
        """The canonical bytes: uint8 [plane.num_bytes(piece)] in host memory. May be a view of `payload`, and
        is then not to be written to.

        Raises ValueError for a payload that is not one of this codec for this piece, before it
        allocates more than the piece needs.
        """
