"""The sender's end of a stream's landing slots: the carrier in use, and which of its slots are free.

Every way in which a carrier can fail ends here: the stream then carries the payloads itself.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from kvtransfer.frames import SlotRef
from kvtransfer.transports.carriers import CarrierFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from kvtransfer.transports.carriers import SlotWriter

    OpenWriter = Callable[[dict[str, Any]], SlotWriter]

_log = logging.getLogger(__name__)


class StreamSlots:
    """The slots of the first offer that can be used, by carrier `kind`. After a failure (`has_failed`) a write may
    still reach them, so that the stream must not end as a clean one. Not thread-safe but for `buffer` and `flush`:
    the caller's lock is held for the rest."""

    def __init__(self, offer: int, kind: str, writer: SlotWriter) -> None:
        self.kind = kind
        self._offer = offer
        self._writer = writer
        self._free = list(range(writer.num_slots))
        self._taken: dict[int, int] = {}  # by frame
        self._being_filled: set[int] = set()  # frames
        self._is_usable = True
        self._is_over = False
        self.has_failed = False

    @property
    def has_room(self) -> bool:
        """A frame may be taken: there is a slot for it, or it will not need one."""
        return bool(self._free) or not self._is_usable

    def take(self, number: int, num_bytes: int) -> int | None:
        """A free slot for a frame of up to `num_bytes`; None where it must travel in its message. `filled` must
        follow a slot."""
        if not self._is_usable or not self._free or num_bytes > self._writer.slot_bytes:
            return None
        self._taken[number] = self._free.pop()
        self._being_filled.add(number)
        return self._taken[number]

    def filled(self, number: int) -> None:
        """Nobody writes into the frame's slot any more."""
        self._being_filled.discard(number)
        if self._is_over and not self._being_filled:
            self._writer.close()

    def give_back(self, number: int) -> bool:
        """The frame was acknowledged; whether it lay in a slot."""
        slot = self._taken.pop(number, None)
        if slot is not None:
            self._free.append(slot)
        return slot is not None

    def buffer(self, slot: int) -> torch.Tensor:
        """uint8 [slot_bytes] to fill."""
        return self._writer.buffer(slot)

    def flush(self, slot: int, num_bytes: int, deadline: float) -> SlotRef:
        """How a frame names the slot, once the receiver sees what is in it. Raises CarrierFailed."""
        self._writer.flush(slot, num_bytes, deadline)
        return SlotRef(self._offer, slot, num_bytes)

    def fail(self, number: int, error: CarrierFailed) -> None:
        """The carrier broke with that frame: no more slots are taken."""
        self._taken.pop(number, None)  # never free again: a late write may still reach it
        if self._is_usable:
            _log.warning("landing slots fail, frames go on over gRPC: %s", error)
        self._is_usable = False
        self.has_failed = True

    def close(self) -> None:
        """The stream is over; the memory goes when nobody fills a slot any more."""
        self._is_usable = False
        self._is_over = True
        if not self._being_filled:
            self._writer.close()


def open_first(open_writer: OpenWriter, offers: Sequence[dict[str, Any]]) -> StreamSlots | None:
    """The first offer that opens, in the receiver's order of preference."""
    for number, offer in enumerate(offers):
        try:
            return StreamSlots(number, str(offer.get("kind")), open_writer(offer))
        except CarrierFailed as error:
            _log.info("landing slots by %r cannot be used: %s", offer.get("kind"), error)
        except Exception:  # noqa: BLE001 - whatever a carrier's libraries raise, the stream goes on
            _log.exception("landing slots by %r cannot be opened", offer.get("kind"))
    return None
