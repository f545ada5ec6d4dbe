"""HTTP/2 without sockets: both roles of our own against each other, and against another implementation."""

import random
from collections import defaultdict

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpc import frames, heads
from rpc.connection import (
    CONNECTION_WINDOW_BYTES,
    MAX_RESETS,
    STREAM_WINDOW_BYTES,
    Connection,
    Limits,
)
from rpc.frames import ConnectionFault, ErrorCode
from rpc.head_reader import MAX_HEADER_BYTES
from rpc.heads import RequestHead

pytestmark = pytest.mark.unit

PATH = "/headrace.v1.Inference/Generate"
LIMITS = Limits(max_message_bytes=4 << 20)


class Side:
    """One end of a connection, and all that it was told."""

    def __init__(self, is_client, limits=LIMITS):
        parse = heads.parse_status if is_client else heads.parse_request
        self.connection = Connection(is_client, self, parse, limits)
        self.heads = defaultdict(list)
        self.received = defaultdict(list)
        self.done = set()
        self.resets = {}
        self.bad = {}
        self.num_writable = 0
        self.num_outputs = 0
        self.goaway = None
        self.num_pongs = 0

    def output(self):
        self.num_outputs += 1

    def head(self, stream, head):
        self.heads[stream.id].append(head)

    def messages(self, stream, messages):
        self.received[stream.id] += messages

    def bad_message(self, stream, error):
        self.bad[stream.id] = error

    def remote_done(self, stream):
        self.done.add(stream.id)

    def reset(self, stream, code):
        self.resets[stream.id] = code

    def writable(self, stream):
        self.num_writable += 1

    def going_away(self, last_stream_id, reason):
        self.goaway = (last_stream_id, reason)

    def pong(self):
        self.num_pongs += 1


def pair(**limits):
    client, server = Side(True), Side(False, Limits(**({"max_message_bytes": 4 << 20} | limits)))
    client.connection.open()
    server.connection.open()
    deliver(client, server)
    return client, server


def deliver(*sides, rng=None):
    """Carries bytes to and fro until nothing is under way, in pieces of any size."""
    one, other = sides
    while True:
        moved = False
        for sender, receiver in ((one, other), (other, one)):
            data = sender.connection.take()
            moved |= bool(data)
            while data:
                size = len(data) if rng is None else rng.randint(1, 5000)
                receiver.connection.receive(data[:size])
                data = data[size:]
        if not moved:
            return


def call(client, metadata=()):
    return client.connection.begin(heads.request("host:1", PATH, metadata))


def test_a_call_and_its_answer():
    client, server = pair()
    stream = call(client, (("key", "value"), ("some-bin", b"\0\xff")))
    client.connection.send_message(stream, b"question")
    client.connection.half_close(stream)
    deliver(client, server)
    assert server.heads[1] == [RequestHead(PATH, None, (("key", "value"), ("some-bin", b"\0\xff")))]
    assert server.received[1] == [b"question"] and server.done == {1}
    answer = server.connection.streams[1]
    server.connection.send_headers(answer, heads.RESPONSE)
    server.connection.send_message(answer, b"answer")
    server.connection.send_message(answer, b"")
    server.connection.send_headers(answer, heads.trailers(heads.Status(heads.grpc.StatusCode.OK)), ends=True)
    deliver(client, server)
    assert client.received[1] == [b"answer", b""]
    assert [head and head.code.name for head in client.heads[1]] == [None, "OK"]
    assert not client.connection.streams and not server.connection.streams


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_whatever_is_sent_arrives_whole_and_in_order(seed):
    rng = random.Random(seed)
    client, server = pair()
    calls = [call(client) for _ in range(rng.randint(1, 6))]
    deliver(client, server, rng=rng)
    sent = defaultdict(list)
    for _ in range(rng.randint(1, 60)):
        stream = rng.choice(calls)
        sender = rng.choice((client, server))
        message = rng.randbytes(rng.choice((0, 1, 50, 16_379, 16_380, 70_000, 2_000_000)))
        sent[sender, stream.id].append(message)
        if sender is server:
            if (server, stream.id, "head") not in sent:
                sent[server, stream.id, "head"] = [b""]
                server.connection.send_headers(server.connection.streams[stream.id], heads.RESPONSE)
            server.connection.send_message(server.connection.streams[stream.id], message)
        else:
            client.connection.send_message(stream, message)
        if rng.random() < 0.3:
            deliver(client, server, rng=rng)
    for stream in calls:
        client.connection.half_close(stream)
    deliver(client, server, rng=rng)
    for stream in calls:
        assert server.received[stream.id] == sent[client, stream.id]
        assert client.received[stream.id] == sent[server, stream.id]
        ended = server.connection.streams[stream.id]
        trailers = heads.trailers(heads.Status(heads.grpc.StatusCode.NOT_FOUND, "é % \n"))
        server.connection.send_headers(ended, heads.RESPONSE + trailers, ends=True)
    deliver(client, server, rng=rng)
    assert all(client.heads[stream.id][-1].details == "é % \n" for stream in calls)
    assert not client.connection.streams and not server.connection.streams


def test_a_reader_that_pauses_holds_the_writer_up_and_loses_nothing():
    client, server = pair()
    stream = call(client)
    deliver(client, server)
    server.connection.pause(server.connection.streams[1])
    messages = [bytes([number]) * 100_000 for number in range(30)]
    for message in messages:
        client.connection.send_message(stream, message)
    deliver(client, server)
    assert len(server.received[1]) <= STREAM_WINDOW_BYTES // 100_000 and stream.pending
    server.connection.resume(server.connection.streams[1])
    deliver(client, server)
    assert server.received[1] == messages and not stream.pending and client.num_writable == 1


def test_a_stream_that_is_held_up_does_not_hold_up_others():
    client, server = pair()
    slow, quick = call(client), call(client)
    deliver(client, server)
    server.connection.pause(server.connection.streams[slow.id])
    client.connection.send_message(slow, bytes(3 << 20))
    deliver(client, server)
    client.connection.send_message(quick, b"here")
    deliver(client, server)
    assert server.received[quick.id] == [b"here"] and not server.received[slow.id]


def test_a_message_that_is_too_large_is_refused_before_it_has_come():
    client, server = pair(max_message_bytes=1000)
    stream = call(client)
    client.connection.send_message(stream, bytes(1001))
    deliver(client, server)
    assert server.bad[1].is_too_large and not server.received[1]


def test_a_compressed_message_is_refused():
    client, server = pair()
    call(client)
    deliver(client, server)
    server.connection.receive(frames.frame(frames.DATA, 0, 1, b"\x01\0\0\0\x01x"))
    assert not server.bad[1].is_too_large and "compressed" in str(server.bad[1])


def test_a_message_cut_off_by_the_end_of_the_stream_resets_it():
    client, server = pair()
    call(client)
    deliver(client, server)
    server.connection.receive(frames.frame(frames.DATA, frames.END_STREAM, 1, b"\0\0\0\0\x05abc"))
    assert server.resets == {1: ErrorCode.PROTOCOL_ERROR} and not server.received[1]


def test_more_streams_than_are_taken_are_refused_and_the_others_go_on():
    client, server = pair(max_streams=2)
    streams = [call(client) for _ in range(3)]
    deliver(client, server)
    assert client.resets == {5: ErrorCode.REFUSED_STREAM}
    client.connection.send_message(streams[1], b"on")
    deliver(client, server)
    assert server.received[3] == [b"on"]


def test_an_answer_before_the_request_was_whole_ends_the_stream():
    client, server = pair()
    stream = call(client)
    deliver(client, server)
    trailers = heads.trailers(heads.Status(heads.grpc.StatusCode.UNIMPLEMENTED))
    server.connection.send_headers(server.connection.streams[1], heads.RESPONSE + trailers, ends=True)
    client.connection.send_message(stream, b"late")
    deliver(client, server)
    assert client.heads[1][-1].code.name == "UNIMPLEMENTED"
    assert not server.connection.streams and not server.received[1]


def test_what_is_sent_on_a_stream_that_was_reset_goes_nowhere():
    client, server = pair()
    stream = call(client)
    deliver(client, server)
    server.connection.cancel(server.connection.streams[1], ErrorCode.CANCEL)
    client.connection.send_message(stream, b"crossing")
    deliver(client, server)
    assert client.resets == {1: ErrorCode.CANCEL}
    client.connection.send_message(stream, b"late")
    client.connection.half_close(stream)
    assert client.connection.take() == b"" and not server.received[1]


def test_going_away_refuses_new_streams_and_finishes_old_ones():
    client, server = pair()
    stream = call(client)
    deliver(client, server)
    server.connection.go_away(reason="bye")
    call(client)
    client.connection.send_message(stream, b"still")
    deliver(client, server)
    assert client.goaway == (1, "bye")
    assert client.resets == {3: ErrorCode.REFUSED_STREAM} and server.received[1] == [b"still"]


def test_pings_are_answered():
    client, server = pair()
    client.connection.ping()
    deliver(client, server)
    assert (client.num_pongs, server.num_pongs) == (1, 0)


def preface():
    return frames.PREFACE + frames.settings({})


@pytest.mark.parametrize(
    "data, code",
    [
        (b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", ErrorCode.PROTOCOL_ERROR),
        (frames.PREFACE + frames.frame(frames.PING, 0, 0, bytes(8)), ErrorCode.PROTOCOL_ERROR),
        (preface() + frames.frame(frames.DATA, 0, 7, b"x"), ErrorCode.PROTOCOL_ERROR),
        (preface() + frames.frame(frames.PING, 0, 0, b"short"), ErrorCode.FRAME_SIZE_ERROR),
        (preface() + frames.frame(frames.SETTINGS, 0, 0, bytes(5)), ErrorCode.FRAME_SIZE_ERROR),
        (preface() + frames.window_update(0, 2**31 - 1), ErrorCode.FLOW_CONTROL_ERROR),
        (preface() + frames.window_update(0, 0), ErrorCode.PROTOCOL_ERROR),
        (preface() + frames.settings({frames.INITIAL_WINDOW_SIZE: 2**31}), ErrorCode.FLOW_CONTROL_ERROR),
        (preface() + frames.frame(frames.PUSH_PROMISE, 4, 1, bytes(4)), ErrorCode.PROTOCOL_ERROR),
        (preface() + frames.frame(frames.CONTINUATION, 4, 1, b""), ErrorCode.PROTOCOL_ERROR),
        (preface() + frames.frame(frames.HEADERS, 0, 1) + frames.settings({}), ErrorCode.PROTOCOL_ERROR),
        (preface() + frames.headers(2, heads.request("h", PATH, ()), True), ErrorCode.PROTOCOL_ERROR),
        (preface() + frames.frame(frames.HEADERS, 4, 1, b"\xff\xff\xff\xff\x7f"), ErrorCode.COMPRESSION_ERROR),
        (preface() + b"\xff\xff\xff\0\0\0\0\0\1", ErrorCode.FRAME_SIZE_ERROR),
        (preface() + frames.frame(frames.HEADERS, 12, 1, b"\x09abc"), ErrorCode.PROTOCOL_ERROR),
    ],
)  # fmt: skip
def test_a_peer_that_breaks_the_protocol_is_given_up(data, code):
    server = Side(False)
    server.connection.open()
    with pytest.raises(ConnectionFault) as caught:
        server.connection.receive(data)
    assert caught.value.code is code


def test_a_header_block_without_end_is_given_up():
    server = Side(False)
    server.connection.open()
    server.connection.receive(preface() + frames.frame(frames.HEADERS, 0, 1, bytes(100)))
    with pytest.raises(ConnectionFault) as caught:
        for _ in range(MAX_HEADER_BYTES // 10_000 + 1):
            server.connection.receive(frames.frame(frames.CONTINUATION, 0, 1, bytes(10_000)))
    assert caught.value.code is ErrorCode.ENHANCE_YOUR_CALM


def test_calls_begun_and_given_up_without_end_are_stopped():
    client, server = pair()
    with pytest.raises(ConnectionFault) as caught:
        for _ in range(MAX_RESETS + 1):
            client.connection.cancel(call(client), ErrorCode.CANCEL)
            server.connection.receive(client.connection.take())
    assert caught.value.code is ErrorCode.ENHANCE_YOUR_CALM and len(server.resets) == MAX_RESETS


def test_more_than_the_windows_allow_is_not_taken():
    server = Side(False)
    server.connection.open()
    server.connection.receive(preface() + frames.headers(1, heads.request("h", PATH, ()), False))
    server.connection.pause(server.connection.streams[1])
    prefix = b"\0" + (3 << 20).to_bytes(4, "big")
    server.connection.receive(frames.frame(frames.DATA, 0, 1, prefix))
    for _ in range(STREAM_WINDOW_BYTES // 16_384):
        server.connection.receive(frames.frame(frames.DATA, 0, 1, bytes(16_384)))
    assert server.resets == {1: ErrorCode.FLOW_CONTROL_ERROR}
    assert CONNECTION_WINDOW_BYTES > STREAM_WINDOW_BYTES


@settings(deadline=None, max_examples=100)
@given(data=st.binary(max_size=400), pieces=st.integers(1, 50))
def test_bytes_of_any_kind_do_nothing_but_a_fault(data, pieces):
    server = Side(False)
    server.connection.open()
    server.connection.receive(preface() + frames.headers(1, heads.request("h", PATH, ()), False))
    try:
        for at in range(0, len(data), pieces):
            server.connection.receive(data[at : at + pieces])
    except (ConnectionFault, heads.BadHead):
        pass


class Foreign:
    """A client of another implementation, which checks what it is sent."""

    def __init__(self, rng, server):
        self.answers, self.trailers = defaultdict(bytes), {}
        self._rng, self._server = rng, server
        self.peer = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.peer.initiate_connection()

    def resize(self, size):
        self.peer.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: size})

    def ask(self, number, body):
        stream_id = self.peer.get_next_available_stream_id()
        head = [(":method", "POST"), (":scheme", "http"), (":path", PATH), (":authority", "here")]
        head += [("content-type", "application/grpc"), ("te", "trailers"), ("x-number", str(number))]
        self.peer.send_headers(stream_id, head)
        data = b"\0" + len(body).to_bytes(4, "big") + body
        for at in range(0, len(data), 9000):
            self.peer.send_data(stream_id, data[at : at + 9000], pad_length=self._rng.choice((None, 0, 200)))
        self.peer.end_stream(stream_id)
        return stream_id

    def exchange(self):
        while True:
            there, back = self.peer.data_to_send(), self._server.connection.take()
            if not there and not back:
                return
            while there:
                size = self._rng.randint(1, 3000)
                self._server.connection.receive(there[:size])
                there = there[size:]
            for event in self.peer.receive_data(back):
                self._take(event)

    def _take(self, event):
        if isinstance(event, h2.events.DataReceived):
            self.answers[event.stream_id] += event.data
            self.peer.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.TrailersReceived):
            self.trailers[event.stream_id] = dict(event.headers)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_another_implementation_calls_and_understands_every_answer(seed):
    rng, server = random.Random(seed), Side(False)
    foreign, wanted = Foreign(rng, server), {}
    foreign.resize(rng.choice((1000, 65_535)))
    server.connection.open()
    for number in range(rng.randint(1, 12)):
        if rng.random() < 0.5:
            foreign.resize(rng.choice((0, 10, 5000, 65_535, 1 << 20)))
        body = rng.randbytes(rng.randint(0, 20_000))
        stream_id = foreign.ask(number % 3, body)
        foreign.exchange()
        assert server.received[stream_id] == [body] and stream_id in server.done
        assert server.heads[stream_id][0].metadata == (("x-number", str(number % 3)),)
        stream = server.connection.streams[stream_id]
        server.connection.send_headers(stream, heads.RESPONSE)
        replies = [rng.randbytes(rng.choice((0, 3, 500, 30_000))) for _ in range(rng.randint(0, 4))]
        for reply in replies:
            server.connection.send_message(stream, reply)
        wanted[stream_id] = b"".join(b"\0" + len(reply).to_bytes(4, "big") + reply for reply in replies)
        server.connection.send_headers(
            stream, heads.trailers(heads.Status(heads.grpc.StatusCode.OK)), ends=True
        )
        if rng.random() < 0.5:
            foreign.exchange()
    foreign.resize(1 << 20)
    foreign.exchange()
    assert {stream_id: foreign.answers[stream_id] for stream_id in wanted} == wanted
    assert foreign.trailers == {stream_id: {"grpc-status": "0"} for stream_id in wanted}
    assert not server.connection.streams
