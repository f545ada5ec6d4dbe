"""What a process of a chaos cluster can be made to suffer from within, through the seams that its parts have.

A worker's clock that jumps; messages between router and worker that come twice or late; a store's disk that is full.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from headrace.v1 import worker_pb2
from kvtransfer.tiers.files import FileFacts, OsFiles
from worker.link import RouterLink, TokenSource
from worker.service import RoleService, ServiceFactory, WorkerContext

REPEAT_SHARE = 0.5
LATE_SHARE = 0.3
LONGEST_DELAY_S = 1.5
FREE_BYTES = 4096
"""What a disk that is full still takes of a file: a write is torn, not refused."""


@dataclass(slots=True)
class Jump:
    """By how much the clocks of a worker are ahead of the machine's; they jump where that changes."""

    ahead_s: float = 0.0

    def over(self, clock: Callable[[], float]) -> Callable[[], float]:
        """A clock that is ahead of `clock`."""
        return lambda: clock() + self.ahead_s


class FullDisk(OsFiles):
    """A disk that has no room while `is_full`."""

    def __init__(self) -> None:
        self.is_full = False

    def write_new(self, path: Path, parts: Iterable[Any]) -> FileFacts:
        """As on a disk that fills up in mid-file."""
        return super().write_new(path, self._torn(parts) if self.is_full else parts)

    @staticmethod
    def _torn(parts: Iterable[Any]) -> Iterator[Any]:
        left = FREE_BYTES
        for part in parts:
            view = memoryview(part).cast("B")
            yield view[:left]
            left -= len(view)
            if left <= 0:
                break
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@dataclass(slots=True)
class Mischief:
    """Whether messages are repeated and held up now. `rng` decides which."""

    rng: random.Random
    is_on: bool = False

    def repeats(self) -> bool:
        """Whether this one comes twice."""
        return self.is_on and self.rng.random() < REPEAT_SHARE

    def is_late(self) -> bool:
        """Whether this one comes late."""
        return self.is_on and self.rng.random() < LATE_SHARE

    def delay_s(self) -> float:
        """How much later."""
        return self.rng.uniform(0.0, LONGEST_DELAY_S)


class Disturbed:
    """A `ServiceFactory` whose service gets messages twice and late, and whose answers come twice."""

    def __init__(self, factory: ServiceFactory, mischief: Mischief) -> None:
        self.receives_kv = factory.receives_kv
        self._factory = factory
        self._mischief = mischief

    def __call__(self, context: WorkerContext) -> RoleService:
        """A `RoleService`."""
        return DisturbedService(self._factory(context), context.loop, self._mischief)


class DisturbedService:
    """Passes everything on. What is late here overtakes what came after it, as no stream allows: attempts, epochs
    and tombstones must do without that. A ResumeStream is not held up, since its answer is due at once."""

    _MAY_BE_LATE = ("reserve", "start_prefill", "cancel")

    def __init__(self, service: RoleService, loop: asyncio.AbstractEventLoop, mischief: Mischief) -> None:
        self._service = service
        self._loop = loop
        self._mischief = mischief
        self._links: WeakKeyDictionary[RouterLink, DisturbedLink] = WeakKeyDictionary()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._service, name)

    def handle(self, link: RouterLink, message: worker_pb2.RouterMessage) -> bool:
        """Now, or later, or both."""
        disturbed = self._disturbed(link)
        if message.WhichOneof("message") in self._MAY_BE_LATE and self._mischief.is_late():
            self._later(disturbed, message)
            return True
        is_known = self._service.handle(disturbed, message)  # type: ignore[arg-type]
        if self._mischief.repeats():
            self._later(disturbed, message)
        return is_known

    def disown(self, link: RouterLink, cause: str, before_generation: int) -> None:
        """Of the link as the service knows it."""
        self._service.disown(self._disturbed(link), cause, before_generation)  # type: ignore[arg-type]

    def _later(self, link: DisturbedLink, message: worker_pb2.RouterMessage) -> None:
        def deliver() -> None:
            if not link.closed:
                self._service.handle(link, message)  # type: ignore[arg-type]

        self._loop.call_later(self._mischief.delay_s(), deliver)

    def _disturbed(self, link: RouterLink) -> DisturbedLink:
        found = self._links.get(link)
        if found is None:
            found = self._links[link] = DisturbedLink(link, self._loop, self._mischief)
        return found


class DisturbedLink:
    """A `RouterLink` on which control messages and tokens are said twice, the second time late."""

    def __init__(self, link: RouterLink, loop: asyncio.AbstractEventLoop, mischief: Mischief) -> None:
        self._link = link
        self._loop = loop
        self._mischief = mischief

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def send(self, message: worker_pb2.WorkerMessage) -> None:
        """In order; a repeat comes behind whatever was said meanwhile."""
        self._link.send(message)
        if self._mischief.repeats():
            self._loop.call_later(self._mischief.delay_s(), self._say_again, message)

    def mark(self, source: TokenSource, step_s: float = 0.0) -> None:
        """With tokens that may come twice."""
        self._link.mark(RepeatedTokens(source, self._mischief), step_s)

    def unmark(self, source: TokenSource) -> None:
        """The same source, however it was wrapped."""
        self._link.unmark(RepeatedTokens(source, self._mischief))

    def _say_again(self, message: worker_pb2.WorkerMessage) -> None:
        if not self._link.closed:
            self._link.send(message)


class RepeatedTokens:
    """A `TokenSource` that is equal to the one it wraps and may give what it has twice in one message."""

    def __init__(self, source: TokenSource, mischief: Mischief) -> None:
        self._source = source
        self._mischief = mischief

    def __hash__(self) -> int:
        return hash(self._source)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RepeatedTokens) and other._source is self._source

    def take(self) -> list[worker_pb2.ChoiceOutput]:
        """New tokens, and them again."""
        outputs = self._source.take()
        return outputs * 2 if self._mischief.repeats() else outputs
