"""The router of the simulated cluster: places requests, raises attempts, cancels."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kvtransfer.lease_types import RequestId
from tests.lease_world.network import ROUTER
from tests.lease_world.prefill import Target

if TYPE_CHECKING:
    from tests.lease_world.worker import Event, Worker
    from tests.lease_world.world import World

REMAINING_S = 20.0
MAX_ATTEMPTS = 12


@dataclass(eq=False, slots=True)
class Placed:
    """One request as the router sees it. `decode` and `prefill`: worker and epoch."""

    request: RequestId
    attempt: int = 0
    active: bool = False
    reserved: bool = False
    decode: tuple[str, int] = ("", 0)
    prefill: tuple[str, int] = ("", 0)


class Router:
    def __init__(self, world: World) -> None:
        self._world = world
        self._epochs: dict[str, int] = {}
        self._placed: dict[RequestId, Placed] = {}
        self._news: deque[tuple[str, int]] = deque()
        self.closing = False
        self.num_finished = 0

    def events(self) -> Iterator[Event]:
        if self._news:
            yield "the router hears of an incarnation", self._hear

    def joined(self, worker: Worker) -> None:
        self._news.append((worker.name, worker.epoch))

    def _hear(self) -> None:
        name, epoch = self._news.popleft()
        self._epochs[name] = epoch
        for placed in self._placed.values():
            if placed.active and any(n == name and e != epoch for n, e in (placed.decode, placed.prefill)):
                self.place_anew(placed.request)

    @property
    def attempts(self) -> list[int]:
        """How many each request took so far."""
        return [placed.attempt for placed in self._placed.values()]

    # --- decisions -----------------------------------------------------------------------------

    def submit(self, request: RequestId, decode: str, prefill: str) -> None:
        placed = self._placed.setdefault(request, Placed(request))
        if not placed.active and not self.closing:
            self._place(placed, decode, prefill)

    def place_anew(self, request: RequestId) -> None:
        """Give the attempt up, for whatever reason, and make another one elsewhere."""
        placed = self._placed.get(request)
        if placed is None or not placed.active:
            return
        if self._world.coin():  # else the newer attempt tells the worker soon enough
            self._cancel(placed)
        names = self._world.names
        turned = names[(names.index(placed.decode[0]) + 1) % len(names)]
        self._place(placed, turned, placed.prefill[0] if placed.prefill[0] != turned else placed.decode[0])

    def cancel(self, request: RequestId) -> None:
        placed = self._placed.get(request)
        if placed is not None and placed.active:
            placed.active = False
            self._cancel(placed)

    def _place(self, placed: Placed, decode: str, prefill: str) -> None:
        if placed.attempt >= MAX_ATTEMPTS or self.closing:
            placed.active = False
            return
        placed.attempt += 1
        placed.active, placed.reserved = True, False
        placed.decode = decode, self._epochs.get(decode, 0)
        placed.prefill = prefill, self._epochs.get(prefill, 0)
        attempt, request = placed.attempt, placed.request
        self._send(placed.decode, "reserve", lambda w: w.decode.reserve(request, attempt, REMAINING_S))

    def _cancel(self, placed: Placed) -> None:
        attempt, request = placed.attempt, placed.request
        self._send(placed.decode, "cancel", lambda w: w.decode.cancel(request, attempt))
        self._send(placed.prefill, "cancel", lambda w: w.prefill.cancel(request, attempt))

    def _send(self, to: tuple[str, int], what: str, act: Callable[[Worker], None]) -> None:
        name, epoch = to
        self._world.net.post(ROUTER, name, what, act, epoch)

    # --- what workers say ----------------------------------------------------------------------

    def reserved(
        self, request: RequestId, attempt: int, worker: str, epoch: int, lease_id: bytes, cached_tokens: int
    ) -> None:
        placed = self._placed[request]
        if not placed.active or placed.attempt != attempt or placed.decode != (worker, epoch):
            return
        placed.reserved = True
        target = Target(worker, epoch, lease_id, cached_tokens, self._world.ttl_s)
        start = partial(_start, request=request, attempt=attempt, target=target)
        # Without an epoch: a repeat may reach the next incarnation, which then is a second sender.
        self._world.net.post(ROUTER, placed.prefill[0], "start", start)

    def failed(self, request: RequestId, attempt: int) -> None:
        placed = self._placed[request]
        if placed.active and placed.attempt == attempt:
            self.place_anew(request)

    def finished(self, request: RequestId, attempt: int) -> None:
        placed = self._placed[request]
        if placed.active and placed.attempt == attempt:
            placed.active = False
            self.num_finished += 1


def _start(worker: Worker, request: RequestId, attempt: int, target: Target) -> None:
    worker.prefill.start(request, attempt, REMAINING_S, target)
