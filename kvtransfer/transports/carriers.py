"""How a frame's payload may travel beside the gRPC stream: through landing slots that the receiver owns.

The stream carries everything else: leases, headers, acknowledgements, and the payload itself wherever a
carrier is missing or has failed. A slot is written by the sender, named in a frame, read by the receiver, and
free again when that frame is acknowledged. Slots are bounded and are never pool blocks (design §5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


# A frame costs both ends about as much in Python and gRPC as a megabyte costs them in copies. Where its bytes do
# not pass through gRPC, larger ones pay: 4 MiB took half of the CPU that 1 MiB took. A frame that is larger than
# a slot goes inline.
CARRIED_FRAME_BYTES = 4 << 20
DEFAULT_NUM_SLOTS = 4
DEFAULT_SLOT_BYTES = CARRIED_FRAME_BYTES + (64 << 10)
DEFAULT_CARRIER_BYTES = 128 << 20


class CarrierFailed(Exception):
    """The carrier cannot be used, or no longer; the transfer goes on over gRPC. The message says why."""


class Slots(Protocol):
    """Either end's slots, as far as their number and size go."""

    num_slots: int
    slot_bytes: int


def check_slot(slots: Slots, slot: int, num_bytes: int) -> None:
    """Raises CarrierFailed for what is not within one of the slots."""
    if not 0 <= slot < slots.num_slots or not 0 <= num_bytes <= slots.slot_bytes:
        text = f"{num_bytes} bytes in slot {slot}"
        raise CarrierFailed(f"{text}, where {slots.num_slots} slots have {slots.slot_bytes} bytes each")


class LandingSlots(Protocol):
    """The receiver's end for one stream: `num_slots` slots of `slot_bytes` each."""

    num_slots: int
    slot_bytes: int

    def offer(self) -> dict[str, Any]:
        """What the sender needs to write into the slots, in msgpack's types; its key "kind" names the carrier.

        Nests at most two deep; texts have at most 4,096 bytes, binaries 65,536.
        """

    def read(self, slot: int, num_bytes: int) -> memoryview:
        """The slot's first bytes as the sender left them, without a copy. Raises CarrierFailed."""

    def close(self, *, clean: bool) -> None:
        """The stream is over. `clean`: the sender has said so, and writes no more; otherwise a sender that wakes
        up may still write, and the memory must not be used for another stream. Idempotent."""


class SlotWriter(Protocol):
    """The sender's end of the same slots."""

    num_slots: int
    slot_bytes: int

    def buffer(self, slot: int) -> torch.Tensor:
        """uint8 [slot_bytes] in host memory, to be filled. Only for a slot that is free. Raises CarrierFailed."""

    def flush(self, slot: int, num_bytes: int, deadline: float) -> None:
        """Returns when the receiver sees the slot's first `num_bytes` (the transport's fence), at the latest at
        `deadline` on time.monotonic(). Raises CarrierFailed."""

    def close(self) -> None:
        """Idempotent."""
