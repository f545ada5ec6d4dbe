"""All of it, driven by a string of bytes: each byte decides what happens next.

Small numbers are what happens by itself, in the order in which it would; large ones are trouble. So a failing
string that hypothesis has made small is a story of few surprises, told by `World.story`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

from tests.lease_world.content import REQUESTS, checksum_of
from tests.lease_world.network import ROUTER, Message, Network, Stream, ghost
from tests.lease_world.router import Router
from tests.lease_world.worker import TTL_S, Worker

MAX_DRAIN_EVENTS = 4000
SWEEP_S = 1.0
REST_S = 26.0  # longer than any deadline

PlacedEvent = tuple[str, str, Callable[[], None]]
"""Where, what, and the doing."""


class OutOfDecisions(Exception):
    """The string of bytes is used up."""


class Decisions:
    def __init__(self, data: bytes) -> None:
        self._data = iter(data)

    def byte(self) -> int:
        for value in self._data:
            return value
        raise OutOfDecisions

    def pick(self, options: int) -> int:
        return self.byte() % options


class World:
    """`decisions`: what happens; the world comes to rest when they are used up."""

    def __init__(self, decisions: bytes, num_workers: int = 3) -> None:
        self.now = 100.0
        self.ttl_s = TTL_S
        self.net = Network()
        self.cut: set[str] = set()  # out of the router's reach
        self.story: list[str] = []
        self._decisions = Decisions(decisions)
        self._epochs = count(1)
        self.names = [f"worker {index}" for index in range(num_workers)]
        self.forgets = self.coin()
        self.remembered = 2 if self.forgets else 64
        self.hasty = self.coin()
        self.router = Router(self)
        self.workers = {name: Worker(self, name, 1000.0 * index) for index, name in enumerate(self.names)}
        for _ in self.names:
            self._happen_one_of(0)  # the router hears of them

    # --- what the parts ask --------------------------------------------------------------------

    def new_epoch(self) -> int:
        return next(self._epochs)

    def joined(self, worker: Worker) -> None:
        self.router.joined(worker)

    def can_dial(self, name: str) -> bool:
        return not self.workers[name].down

    def coin(self) -> bool:
        """Heads or tails; tails once the decisions are used up."""
        try:
            return bool(self._decisions.byte() & 1)
        except OutOfDecisions:
            return False

    # --- driving -------------------------------------------------------------------------------

    def run(self) -> None:
        """Everything that the decisions say, then rest; raises AssertionError when something does not hold."""
        try:
            while True:
                self._decide()
        except OutOfDecisions:
            pass
        self._come_to_rest()

    def _decide(self) -> None:
        what = self._decisions.byte()
        if what < 130:
            self._happen_one_of(self._decisions.pick(64) if what % 4 == 3 else 0)
        elif what < 170:
            for _ in range(4 + what % 16):
                self._happen_one_of(0)
        else:
            chaos = CHAOS[what % len(CHAOS)]
            self.story.append(f"! {chaos.__name__}")
            chaos(self)
            self._check(*self.workers.values())

    def _happen_one_of(self, pick: int) -> None:
        events = list(self._events())
        if events:
            self._happen(events[pick % len(events)])

    def _happen(self, event: PlacedEvent) -> None:
        where, what, act = event
        self.story.append(f"{where}: {what}")
        act()
        if where != ROUTER:
            self._check(self.workers[where])

    def _check(self, *workers: Worker) -> None:
        for worker in workers:
            if not worker.down:
                worker.check()

    def _events(self) -> Iterator[PlacedEvent]:
        """What can happen now by itself, oldest first."""
        for message in self.net.loose:
            if self._can_take(message):
                yield message.to, message.what, partial(self._deliver, message)
        for stream in self.net.streams:
            if stream.acks and self.workers[stream.source].runs:
                yield stream.source, "an acknowledgement comes", partial(_acknowledge, stream)
            if stream.frames and not stream.busy and self.workers[stream.to].runs:
                yield stream.to, "a frame comes", partial(self._hand_over, stream)
        for worker in self.workers.values():
            if worker.runs:
                for what, act in worker.events():
                    yield worker.name, what, act
        for what, act in self.router.events():
            yield ROUTER, what, act

    def _can_take(self, message: Message) -> bool:
        if message.to == ROUTER:
            return message.source not in self.cut
        if message.source == ROUTER and message.to in self.cut:
            return False
        return not self.workers[message.to].frozen

    def _deliver(self, message: Message) -> None:
        self.net.loose.remove(message)
        if message.to == ROUTER:
            message.act(self.router)
            return
        worker = self.workers[message.to]
        if worker.down or message.epoch not in (None, worker.epoch):
            return
        message.act(worker)

    def _hand_over(self, stream: Stream) -> None:
        stream.busy = True
        self.workers[stream.to].decode.take_frame(stream.frames.popleft(), stream.acknowledge)

    # --- by hand -------------------------------------------------------------------------------

    def submit_to(self, decode: str, *, prefill: str) -> None:
        """The first of the requests."""
        self.router.submit(REQUESTS[0], decode, prefill)

    def fetch_from(self, other: str, *, asker: str) -> None:
        """The first request's prefix."""
        self.workers[asker].fetch.ask(REQUESTS[0], other, self.workers[other].epoch)

    def settle(self) -> None:
        """Whatever happens by itself, without any time passing."""
        for _ in range(MAX_DRAIN_EVENTS):
            event = next(self._events(), None)
            if event is None:
                return
            self._happen(event)
        raise AssertionError("the world does not come to rest")

    # --- trouble -------------------------------------------------------------------------------

    def _pick_worker(self) -> Worker:
        return self.workers[self.names[self._decisions.pick(len(self.names))]]

    def _pick_message(self) -> Message | None:
        loose = self.net.loose
        return loose[self._decisions.pick(len(loose))] if loose else None

    def submit(self) -> None:
        request = REQUESTS[self._decisions.pick(len(REQUESTS))]
        decode = self._decisions.pick(len(self.names))
        prefill = (decode + 1 + self._decisions.pick(len(self.names) - 1)) % len(self.names)
        self.router.submit(request, self.names[decode], self.names[prefill])

    def place_anew(self) -> None:
        self.router.place_anew(REQUESTS[self._decisions.pick(len(REQUESTS))])

    def cancel(self) -> None:
        self.router.cancel(REQUESTS[self._decisions.pick(len(REQUESTS))])

    def fetch(self) -> None:
        asker, other = self._pick_worker(), self._pick_worker()
        if asker.runs and asker is not other and not other.down:
            asker.fetch.ask(REQUESTS[self._decisions.pick(len(REQUESTS))], other.name, other.epoch)

    def lose(self) -> None:
        message = self._pick_message()
        if message is not None:
            self.net.loose.remove(message)

    def repeat(self) -> None:
        message = self._pick_message()
        if message is not None:
            self.net.loose.append(message)

    def delay(self) -> None:
        """A copy arrives when everything else is over."""
        message = self._pick_message()
        if message is not None:
            self.net.late.append(message)

    def break_stream(self) -> None:
        streams = self.net.streams
        if streams:
            stream = streams[self._decisions.pick(len(streams))]
            self.net.break_stream(stream, ghosts=self.coin())

    def fail_landing(self) -> None:
        landings = [o for w in self.workers.values() if not w.down for o in w.decode.landings]
        if landings:
            landings[self._decisions.pick(len(landings))].fails = True

    def stall_landings(self) -> None:
        """The threads that write now get no time until everybody wakes."""
        for worker in self.workers.values():
            for landing in worker.decode.landings:
                landing.stalled = True

    def forge(self) -> None:
        """A frame with wrong bytes and one wrong fact: what a mistaken worker might send."""
        frames = [frame for stream in self.net.streams for frame in stream.frames]
        if frames:
            frame = frames[self._decisions.pick(len(frames))]
            ref = frame.ref
            wrong: dict[str, Any] = (
                {"ref": replace(ref, attempt=ref.attempt + 1)},
                {"ref": replace(ref, attempt=ref.attempt - 1)},
                {"ref": replace(ref, sender_epoch=0)},
                {"ref": replace(ref, receiver_epoch=0)},
                {"record": replace(frame.record, checksum=0)},
                {"number": frame.number + 100},  # in no manifest
            )[self._decisions.pick(6)]
            to = next(stream.to for stream in self.net.streams if frame in stream.frames)
            forged = replace(frame, payload=bytes(len(frame.payload)), **wrong)
            if "record" not in wrong:
                checksum = checksum_of(forged.payload, forged.number)
                forged = replace(forged, record=replace(forged.record, checksum=checksum))
            self.net.loose.append(ghost("nobody", to, forged))

    def freeze(self) -> None:
        worker = self._pick_worker()
        if not worker.down:
            worker.frozen = True

    def wake(self) -> None:
        for worker in self.workers.values():
            worker.frozen = False
            for landing in worker.decode.landings:
                landing.stalled = False

    def crash(self) -> None:
        worker = self._pick_worker()
        if not worker.down:
            worker.crash()

    def restart(self) -> None:
        for worker in self.workers.values():
            if worker.down:
                worker.boot()

    def cut_off(self) -> None:
        self.cut ^= {self._pick_worker().name}

    def fence(self) -> None:
        worker = self._pick_worker()
        if worker.runs:
            worker.fence()

    def time_passes(self) -> None:
        """Some seconds, in which some of the workers sweep and others find out at use."""
        seconds = (0.3, 0.5, 1.0, 1.5, 2.0, 4.0, 7.0, 22.0)[self._decisions.pick(8)]
        stalled = self._decisions.byte()
        awake = [w for index, w in enumerate(self.workers.values()) if not stalled >> index & 1]
        self._pass_time(seconds, awake)

    def _pass_time(self, seconds: float, awake: list[Worker]) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + SWEEP_S)
            for worker in awake:
                if worker.runs:
                    worker.sweep()

    # --- rest ----------------------------------------------------------------------------------

    def _come_to_rest(self) -> None:
        """Everybody wakes, everything arrives, all times run out; then once more with what is very late."""
        self.router.closing = True
        self.cut.clear()
        self.wake()
        self.restart()
        self._rest()
        if self.net.late:
            self.net.loose, self.net.late = self.net.late, []
            self._rest()

    def _rest(self) -> None:
        self.settle()
        end = self.now + REST_S
        while self.now < end:
            self._pass_time(2 * SWEEP_S, list(self.workers.values()))
            self.settle()
        for worker in self.workers.values():
            worker.check_idle()


def _acknowledge(stream: Stream) -> None:
    stream.on_ack(stream.acks.popleft())


CHAOS: tuple[Callable[[World], None], ...] = (
    World.submit,
    World.submit,
    World.submit,
    World.submit,
    World.submit,
    World.time_passes,
    World.time_passes,
    World.time_passes,
    World.place_anew,
    World.place_anew,
    World.cancel,
    World.fetch,
    World.fetch,
    World.lose,
    World.repeat,
    World.repeat,
    World.delay,
    World.delay,
    World.break_stream,
    World.break_stream,
    World.fail_landing,
    World.stall_landings,
    World.stall_landings,
    World.forge,
    World.forge,
    World.freeze,
    World.freeze,
    World.wake,
    World.wake,
    World.crash,
    World.restart,
    World.restart,
    World.cut_off,
    World.fence,
)
