"""Direct streams without a network: what readers are sent, how often the router hears, how a client merges both."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decode.answers import Answer
from decode.direct import BULK_S, MAX_WAITING_TOKENS, BulkPace, DirectReader
from engine.request import Drawn, FinishReason
from headrace import Unavailable
from headrace._answer import AnswerState
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import worker_pb2
from router.core.answer import Answer as RouterAnswer
from router.direct import DirectSource
from router.requests import Attachment
from tests.unit.test_decode_answers import ByteTokenizer

pytestmark = pytest.mark.unit

TEXT = "eine Kaskade für Wörter, € und 水, bis zum END und weiter"
KEY = worker_pb2.RequestKey(tenant="t", request_id="r", attempt=1)


@dataclass
class FakeStream:
    """A call with room for what a test allows."""

    is_writable: bool = True
    sent: list[pb.GenerateResponse] = field(default_factory=list)
    status: Any = None
    on_writable: Any = None
    on_over: Any = None

    def send(self, message: pb.GenerateResponse) -> None:
        assert self.status is None
        self.sent.append(message)

    def end(self, status: Any = "OK") -> None:
        assert self.status is None
        self.status = status


def answer(num_choices: int = 1, stop: str = "END", keeps_behind: int = 64) -> Answer:
    task = worker_pb2.GenerationTask(sampling=pb.SamplingParams(n=num_choices, stop=[stop]))
    return Answer(KEY, ByteTokenizer(), task, keeps_behind)  # type: ignore[arg-type]


def draws(text: str) -> list[Drawn]:
    tokens = [Drawn(byte) for byte in text.encode()]
    tokens[-1] = Drawn(tokens[-1].token_id, finish=FinishReason.LENGTH)
    return tokens


def reader(of: Answer, stream: FakeStream, *next_index: int) -> tuple[DirectReader, list[int]]:
    phases: list[int] = []
    made = DirectReader(b"i", stream, of, next_index or (0,), lambda _reader, phase: phases.append(phase))
    return made, phases


# --- the worker's side -----------------------------------------------------------------------------------------


def test_a_reader_gets_each_token_once_with_its_place_in_the_text_and_then_the_end() -> None:
    written, stream = answer(), FakeStream()
    reading, phases = reader(written, stream)
    for drawn in draws("für"):
        written.choices[0].feed(drawn)
        reading.push()
    deltas = [event.delta for event in stream.sent if event.HasField("delta")]
    assert [(list(d.token_ids), d.first_index, d.text_offset) for d in deltas] == [
        ([0x66], 0, 0), ([0xC3], 1, 1), ([0xBC], 2, 1), ([0x72], 3, 2),
    ]  # fmt: skip
    assert "".join(delta.text for delta in deltas) == "für"
    assert stream.sent[-1].choice_finished.num_tokens == 4
    assert (stream.status, phases) == ("OK", [worker_pb2.DIRECT_PHASE_DELIVERED])


def test_what_finds_no_room_goes_out_as_one_message() -> None:
    written, stream = answer(), FakeStream(is_writable=False)
    reading, _ = reader(written, stream)
    for drawn in draws("abc"):
        written.choices[0].feed(drawn)
        reading.push()
    assert not stream.sent
    stream.is_writable = True
    stream.on_writable()
    assert [event.delta.text for event in stream.sent] == ["abc", ""]


def test_a_reader_that_is_too_slow_is_given_up_and_holds_no_more() -> None:
    written, stream = answer(), FakeStream(is_writable=False)
    reading, phases = reader(written, stream)
    for _ in range(MAX_WAITING_TOKENS + 1):
        written.choices[0].feed(Drawn(97))
        reading.push()
    assert phases == [worker_pb2.DIRECT_PHASE_BROKEN]
    assert stream.status.code.name == "ABORTED"


def test_a_reader_that_has_gone_is_told_of_once() -> None:
    written, stream = answer(), FakeStream()
    reading, phases = reader(written, stream)
    stream.on_over()
    reading.give_up("CAUSE", "again")
    assert phases == [worker_pb2.DIRECT_PHASE_BROKEN]
    assert stream.status is None


def test_some_acknowledged_tokens_are_kept_for_readers_until_all_are() -> None:
    choice = answer(keeps_behind=2).choices[0]
    for drawn in draws("abcdef")[:5]:
        choice.feed(drawn)
    choice.take(KEY)
    choice.acknowledge(5)
    assert choice.since(2) is None
    part = choice.since(3)
    assert part is not None
    assert (part.text, part.text_offset) == ("de", 3)
    choice.feed(draws("f")[0])
    choice.take(KEY)
    choice.acknowledge(6)
    assert choice.settled


def test_the_router_hears_at_once_and_then_in_bulk() -> None:
    pace = BulkPace()
    times = [0.0, 0.1, BULK_S - 0.01, BULK_S, BULK_S + 0.1, 2 * BULK_S + 0.01]
    assert [pace.is_due(now) for now in times] == [True, False, False, True, False, True]


# --- the router's side -----------------------------------------------------------------------------------------


def _request(num_choices: int = 1) -> Any:
    request = SimpleNamespace(
        answer=RouterAnswer(num_choices), accepted=pb.Accepted(), num_handles=1, resume_handle=b"",
        is_over=False, failure=None, done=None, attempt=1, key=SimpleNamespace(request_id="r"),
        direct_source=None,
    )  # fmt: skip
    request.direct_source = _source(1)
    return request


def _source(attempt: int) -> DirectSource:
    return DirectSource("t", "r", attempt, 7, "host:1", b"s" * 32, lambda: 0.0)


def _taken(attachment: Attachment) -> list[pb.GenerateResponse]:
    return [pb.GenerateResponse.FromString(message) for message in attachment.take()]


def _kinds(attachment: Attachment) -> list[str]:
    return [str(message.WhichOneof("event")) for message in _taken(attachment)]


def _grow(request: Any, token: int) -> None:
    choice = request.answer.choices[0]
    choice.add(pb.Delta(first_index=len(choice.tokens), token_ids=[token], text=chr(token)))


OPEN, BROKEN = worker_pb2.DIRECT_PHASE_OPEN, worker_pb2.DIRECT_PHASE_BROKEN


def test_an_attachment_keeps_its_place_while_its_client_reads_elsewhere() -> None:
    request = _request()
    attachment = Attachment(request, 0, lambda: 0.0, wants_direct=True)
    _grow(request, 97)
    assert _kinds(attachment) == ["accepted", "delta", "ticket"]
    attachment.direct_changed("another's", OPEN)
    _grow(request, 98)
    assert _kinds(attachment) == ["delta"]
    attachment.direct_changed(attachment._ticket_id, OPEN)
    for token in (99, 100):
        _grow(request, token)
        attachment.wake()
        assert _kinds(attachment) == []
    assert (attachment.lag_bytes, attachment.is_stalled(1e9, 1.0)) == (0, False)
    attachment.direct_changed(attachment._ticket_id, BROKEN)
    [message] = _taken(attachment)
    assert (message.delta.first_index, message.delta.text) == (2, "cd")


def test_a_client_whose_way_is_not_known_is_sent_everything() -> None:
    request = _request()
    attachment = Attachment(request, 0, lambda: 0.0, wants_direct=True)
    attachment.take()
    attachment.direct_changed(attachment._ticket_id, OPEN)
    _grow(request, 97)
    assert _kinds(attachment) == []
    attachment.relay_again()
    assert _kinds(attachment) == ["delta"]


def test_another_attempt_is_relayed_and_brings_another_ticket() -> None:
    request = _request()
    attachment = Attachment(request, 0, lambda: 0.0, wants_direct=True)
    assert _kinds(attachment) == ["accepted", "ticket"]
    attachment.direct_changed(attachment._ticket_id, OPEN)
    _grow(request, 97)
    assert _kinds(attachment) == []
    request.attempt = 2
    assert _kinds(attachment) == ["delta"]
    request.direct_source = _source(2)
    assert _kinds(attachment) == ["ticket"]


def test_who_cannot_stream_from_workers_gets_no_ticket() -> None:
    assert _kinds(Attachment(_request(), 0, lambda: 0.0)) == ["accepted"]


# --- the client's side -----------------------------------------------------------------------------------------


class World:
    """A router that stands still while it believes that the client reads elsewhere, workers' streams that begin where
    the client is and break anywhere, connections that are lost; and the client."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        written = answer()
        for drawn in draws(TEXT):
            written.choices[0].feed(drawn)
        self.choice = written.choices[0]
        self.state = AnswerState("r", 1)
        self.token_ids: list[int] = []
        self.text = ""
        self._relayed = 0
        self._withholds = self._is_relay_over = False
        self._direct: int | None = None

    def run(self) -> None:
        """To the end of the answer."""
        steps = (self.relay, self.relay_ends, self.opens, self.direct, self.direct, self.breaks)
        while not self.state.ended:
            self._rng.choice((*steps, self.router_hears, self.reconnects))()

    def relay(self) -> None:
        if not self._withholds and not self._is_relay_over:
            self._relayed = self._send(self._relayed, is_direct=False)

    def relay_ends(self) -> None:
        if self._relayed == self.choice.num_tokens or self._withholds:
            self._is_relay_over = True
            self.state.fold(pb.GenerateResponse(done=pb.Done()))
            self._both_may_be_over()

    def opens(self) -> None:
        if not self._is_relay_over and self._direct is None and not self._withholds:
            self.state.split()
            [self._direct] = self.state.next_index
            self._withholds = True

    def direct(self) -> None:
        if self._direct is not None:
            self._direct = self._send(self._direct, is_direct=True)
            if self._direct == self.choice.num_tokens:
                self._direct = None
                self._both_may_be_over()

    def breaks(self) -> None:
        if self._direct is not None:
            self._direct = None
            self._both_may_be_over()

    def router_hears(self) -> None:
        self._withholds = self._withholds and self._direct is not None

    def reconnects(self) -> None:
        if self._rng.random() < 0.2:
            self.state.reconnect()
            self._relayed, self._direct = 0, None
            self._withholds = self._is_relay_over = False

    def _both_may_be_over(self) -> None:
        if self._is_relay_over and self._direct is None:
            try:
                self.state.fold(None)
            except Unavailable as error:
                assert error.retryable
                self.state.reconnect()
                self._relayed, self._withholds, self._is_relay_over = 0, False, False

    def _send(self, start: int, *, is_direct: bool) -> int:
        end = self._rng.randint(start, min(start + 20, self.choice.num_tokens))
        part, after = self.choice.since(start), self.choice.since(end)
        assert part is not None and after is not None
        delta = pb.Delta(first_index=start, token_ids=part.token_ids[: end - start])
        delta.text = part.text[: len(part.text) - len(after.text)]
        if is_direct:
            delta.text_offset = part.text_offset
        new = self.state.fold(pb.GenerateResponse(delta=delta))
        if new is not None:
            assert new.first_index == len(self.token_ids)
            self.token_ids += new.token_ids
            self.text += new.text
        if end == self.choice.num_tokens:
            self.state.fold(pb.GenerateResponse(choice_finished=self.choice.finished))
        return end


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 2**32 - 1))
def test_however_two_streams_interleave_each_token_and_character_comes_once(seed: int) -> None:
    world = World(seed)
    world.run()
    part = world.choice.since(0)
    assert part is not None
    assert (tuple(world.token_ids), world.text) == (part.token_ids, part.text)
    assert world.state.choice(0).text == part.text == "eine Kaskade für Wörter, € und 水, bis zum "
