"""Messages in a bag, and streams that keep their order until they break."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvtransfer.frames import Ack, FrameRecord, LeaseRef
from kvtransfer.layouts import Piece

if TYPE_CHECKING:
    from tests.lease_world.worker import Worker

ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Message:
    """On its way to `to`. `epoch`: of the incarnation whose session it travels on; another one never gets it."""

    source: str
    to: str
    what: str
    act: Callable[[Any], None]
    epoch: int | None = None


@dataclass(frozen=True, slots=True)
class FrameMessage:
    ref: LeaseRef
    number: int
    record: FrameRecord
    piece: Piece
    payload: bytes


@dataclass(eq=False, slots=True)
class Stream:
    """Frames one way and their acknowledgements the other. The receiver takes a frame when the last one is done."""

    source: str
    to: str
    on_ack: Callable[[Ack], None]
    on_broken: Callable[[], None]
    frames: deque[FrameMessage] = field(default_factory=deque)
    acks: deque[Ack] = field(default_factory=deque)
    busy: bool = False
    broken: bool = False

    def acknowledge(self, ack: Ack) -> None:
        self.busy = False
        if not self.broken:
            self.acks.append(ack)


class Network:
    def __init__(self) -> None:
        self.loose: list[Message] = []
        self.late: list[Message] = []  # delayed for so long that everything else is over
        self.streams: list[Stream] = []

    def post(
        self, source: str, to: str, what: str, act: Callable[[Any], None], epoch: int | None = None
    ) -> None:
        self.loose.append(Message(source, to, what, act, epoch))

    def open(self, stream: Stream) -> Stream:
        self.streams.append(stream)
        return stream

    def break_stream(self, stream: Stream, *, ghosts: bool) -> None:
        """Both ends go on without it. `ghosts`: the frames under way arrive after all, in any order."""
        if stream.broken:
            return
        stream.broken = True
        self.streams.remove(stream)
        if ghosts:
            self.loose.extend(ghost(stream.source, stream.to, frame) for frame in stream.frames)
        stream.frames.clear()
        stream.acks.clear()
        stream.on_broken()


def ghost(source: str, to: str, frame: FrameMessage) -> Message:
    """A frame of a stream that nobody listens to any more."""

    def act(worker: Worker) -> None:
        worker.decode.take_frame(frame, lambda _ack: None)

    return Message(source, to, f"ghost of frame {frame.number}", act)
