"""Copies between an accelerator's cache and host memory beside the steps: on a stream of their own, through pages
that stay where they are.

What must come after what, in three rules: a copy out waits for what the steps had written when it was asked for, not
for what they were given since; a copy in waits for the same, whose reads of a block it must not overtake; a step
waits for every copy in that was begun before it (`fence`). On a card this has not been run by the project's tests; the
rules have, with streams that keep books.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch


class Event(Protocol):
    """A point in a stream, as torch.cuda.Event."""

    def record(self) -> None:
        """The point is here, in this thread's current stream."""
        ...

    def wait(self) -> None:
        """This thread's current stream goes on when the point is reached."""
        ...

    def synchronize(self) -> None:
        """This thread goes on when the point is reached."""
        ...


class Streams(Protocol):
    """What a lane needs of a device."""

    def event(self) -> Event:
        """One that nobody has recorded."""
        ...

    def beside(self) -> AbstractContextManager[object]:
        """Inside, this thread's work goes to the stream of copies."""
        ...

    def staging(self, num_bytes: int) -> torch.Tensor:
        """uint8 in host memory that the device copies from and to while both go on."""
        ...

    def on_device(self, staged: torch.Tensor) -> torch.Tensor:
        """A copy of it, begun."""
        ...


class CardStreams:
    """Of a CUDA device. torch keeps pinned pages for the next who asks, and until copies that use them are through."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)

    def event(self) -> Event:
        """See Streams."""
        event: Event = torch.cuda.Event()
        return event

    def beside(self) -> AbstractContextManager[object]:
        """See Streams."""
        context: AbstractContextManager[object] = torch.cuda.stream(self._copies)
        return context

    def staging(self, num_bytes: int) -> torch.Tensor:
        """See Streams."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def on_device(self, staged: torch.Tensor) -> torch.Tensor:
        """See Streams."""
        return staged.to(self._device, non_blocking=True)


class CopyLane:
    """May be used by any thread; `steps_wrote` by the one that runs steps."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._lock = threading.Lock()
        self._written = self._recorded()
        self._landed: Event | None = None

    def steps_wrote(self) -> None:
        """What this thread has given the device so far may be copied out."""
        self._written = self._recorded()

    def to_host(self, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `read` makes on the device, uint8, in host memory; returns when it is there."""
        with self._streams.beside():
            self._written.wait()
            raw = read()
            staged = self._streams.staging(raw.numel())
            staged.copy_(raw, non_blocking=True)
            copied = self._recorded()
        copied.synchronize()
        return staged

    def to_card(self, data: torch.Tensor, write: Callable[[torch.Tensor], None]) -> None:
        """`write` is given the bytes on the device; returns before they are there."""
        staged = self._streams.staging(data.numel())
        staged.copy_(data)
        # One after the other, so that the last that was recorded stands for all before it.
        with self._lock, self._streams.beside():
            self._written.wait()
            write(self._streams.on_device(staged))
            self._landed = self._recorded()

    def fence(self) -> None:
        """What this thread gives the device from now on comes after everything that `to_card` was given."""
        with self._lock:
            landed = self._landed
        if landed is not None:
            landed.wait()

    def _recorded(self) -> Event:
        event = self._streams.event()
        event.record()
        return event
