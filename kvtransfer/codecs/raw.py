"""Codec `raw`: the canonical bytes as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtransfer.codecs.base import Fidelity
from kvtransfer.codecs.memory import readable

if TYPE_CHECKING:
    import torch
    from typing_extensions import Buffer

    from kvtransfer.layouts import Piece, Plane


class RawCodec:
    """Lossless, and copies nothing."""

    name = "raw"
    version = 1
    fidelity = Fidelity.EXACT

    def encode(self, raw: torch.Tensor, plane: Plane, piece: Piece) -> Buffer:
        return raw.cpu().numpy().data

    def decode(self, payload: Buffer, plane: Plane, piece: Piece) -> torch.Tensor:
        return readable(payload)
