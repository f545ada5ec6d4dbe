"""Which codec the next frame takes. The seam; `FixedCodec` is the choice of a profile that names one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kvtransfer.codecs import Codec


@dataclass(frozen=True, slots=True)
class CodecChoice:
    """A codec and why it was taken, in words that a person can check ("exact link 12 MB/s: 1.4 x fewer bytes")."""

    codec: Codec
    reason: str


class CodecChooser(Protocol):
    """One transfer's chooser. Called by the sender's threads under its lock; never waits."""

    def choose(self, bytes_left: int) -> CodecChoice:
        """For the next frame. `bytes_left`: raw bytes of this transfer that are known and not yet sent."""

    def note_encoded(self, codec: str, raw_bytes: int, payload_bytes: int, encode_s: float) -> None:
        """A frame was gathered and encoded in `encode_s`."""

    def note_landed(
        self, codec: str, raw_bytes: int, payload_bytes: int, in_flight_s: float, landing_s: float
    ) -> None:
        """A frame was acknowledged `in_flight_s` after it was handed to the transport, or after the one before it
        was acknowledged, whichever is later; the receiver decoded and wrote it in `landing_s`."""


class FixedCodec:
    """Always the same codec."""

    def __init__(self, codec: Codec, reason: str) -> None:
        self._choice = CodecChoice(codec, reason)

    def choose(self, bytes_left: int) -> CodecChoice:
        return self._choice

    def note_encoded(self, codec: str, raw_bytes: int, payload_bytes: int, encode_s: float) -> None:
        """Nothing depends on it."""

    def note_landed(
        self, codec: str, raw_bytes: int, payload_bytes: int, in_flight_s: float, landing_s: float
    ) -> None:
        """Nothing depends on it."""
