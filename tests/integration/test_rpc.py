"""Servers and channels of `rpc` on real sockets, with grpcio at the other end."""

import asyncio
import logging
import socket
from contextlib import asynccontextmanager, suppress

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from headrace.v1 import inference_pb2 as pb
from headrace.v1 import inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from rpc import frames, heads
from rpc.channel import Channel
from rpc.heads import Status
from rpc.server import Server, ServerSettings

pytestmark = pytest.mark.integration

WAIT_S = 10.0


class Inference(inference_pb2_grpc.InferenceServicer):
    """Pushes numbered answers; `Cancel` fails in the ways that are asked for; `Get` never ends."""

    def __init__(self):
        self.num_sent = 0
        self.over = asyncio.Event()
        self.cancelled = asyncio.Event()

    def Generate(self, request, call):
        call.on_over = self.over.set
        index = 0

        def go_on():
            nonlocal index
            while call.is_writable and index < request.sampling.max_tokens:
                call.send(pb.GenerateResponse(delta=pb.Delta(first_index=index, text="x" * 1000)))
                index += 1
                self.num_sent = index
            if index >= request.sampling.max_tokens:
                call.end(Status(grpc.StatusCode.OK, "", (("last", "word"),)))

        call.on_writable = go_on
        go_on()

    async def Cancel(self, request, context):
        match request.request_id:
            case "abort":
                await context.abort(grpc.StatusCode.NOT_FOUND, "nobody: é %", (("why-bin", b"\0\1"),))
            case "defect":
                raise KeyError(request.request_id * 2)
            case "metadata":
                assert dict(context.invocation_metadata())["key"] == "value"
                assert 0 < context.time_remaining() <= 30
        return pb.CancelResponse(was_running=True)

    async def Get(self, request, context):
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()


class Echo(worker_pb2_grpc.WorkerServicer):
    async def Session(self, request_iterator, context):
        async for message in request_iterator:
            if message.hello.router_id == "end":
                return
            yield worker_pb2.WorkerMessage(hello=worker_pb2.WorkerHello(worker_id=message.hello.router_id))


@asynccontextmanager
async def serving(**settings):
    server, inference = Server(ServerSettings(**settings)), Inference()
    inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)
    worker_pb2_grpc.add_WorkerServicer_to_server(Echo(), server)
    health_pb2_grpc.add_HealthServicer_to_server(health_aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            yield server, inference, channel, f"127.0.0.1:{port}"
        finally:
            await server.stop(0)


def hello(router_id):
    return worker_pb2.RouterMessage(hello=worker_pb2.RouterHello(router_id=router_id))


def generate(num_tokens, text=""):
    return pb.GenerateRequest(text=text, sampling=pb.SamplingParams(max_tokens=num_tokens))


async def hung_up(writer):
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def test_an_answer_of_many_messages_to_a_large_request():
    async with serving() as (_, _, channel, _):
        call = inference_pb2_grpc.InferenceStub(channel).Generate(generate(3000, "y" * 3_000_000))
        indices = [message.delta.first_index async for message in call]
        assert indices == list(range(3000))
        assert dict(tuple(await call.trailing_metadata())) == {"last": "word"}


async def test_calls_of_one_connection_run_at_the_same_time():
    async with serving() as (_, _, channel, _):
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def ask(number):
            return [message.delta.first_index async for message in stub.Generate(generate(number))]

        found = await asyncio.gather(*(ask(number) for number in range(100)))
        assert found == [list(range(number)) for number in range(100)]


async def test_a_client_that_does_not_read_stops_the_servicer_and_not_the_others():
    async with serving() as (_, inference, channel, address):
        stub = inference_pb2_grpc.InferenceStub(channel)
        call = stub.Generate(generate(100_000))
        await call.read()
        async with grpc.aio.insecure_channel(address) as other:
            assert await inference_pb2_grpc.InferenceStub(other).Cancel(pb.CancelRequest())
        assert (await stub.Cancel(pb.CancelRequest())).was_running
        stopped_at = inference.num_sent
        assert stopped_at < 50_000
        for index in range(1, stopped_at + 100):
            assert (await call.read()).delta.first_index == index
        assert inference.num_sent > stopped_at
        call.cancel()
        await asyncio.wait_for(inference.over.wait(), WAIT_S)


async def test_failures_are_told_as_they_were_meant(caplog):
    async with serving() as (_, _, channel, _):
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Cancel(pb.CancelRequest(request_id="abort"))
        error = caught.value
        assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "nobody: é %")
        assert dict(tuple(error.trailing_metadata()))["why-bin"] == b"\0\1"
        with caplog.at_level(logging.DEBUG), pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Cancel(pb.CancelRequest(request_id="defect"), metadata=(("authorization", "S3CRET"),))
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INTERNAL, "internal error")
        assert "KeyError" in caplog.text and "defectdefect" not in caplog.text
        assert "S3CRET" not in caplog.text
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Models(pb.ModelsRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        unknown = channel.unary_unary("/no.Such/Method")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unknown(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_metadata_and_deadlines_reach_the_servicer():
    async with serving() as (_, _, channel, _):
        stub = inference_pb2_grpc.InferenceStub(channel)
        for _ in range(5):  # later ones are told in references to the first
            request = pb.CancelRequest(request_id="metadata")
            await stub.Cancel(request, timeout=20, metadata=(("key", "value"),))


async def test_a_servicer_ends_with_its_caller():
    async with serving() as (_, inference, channel, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await inference_pb2_grpc.InferenceStub(channel).Get(pb.GetRequest(), timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(inference.cancelled.wait(), WAIT_S)


async def test_requests_that_are_too_large_or_too_many_are_refused():
    async with serving(max_message_bytes=1000, max_calls=2) as (_, _, channel, _):
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Cancel(pb.CancelRequest(request_id="x" * 100_000))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        running = [stub.Generate(generate(1_000_000)) for _ in range(2)]
        for call in running:
            await call.read()
        refused = asyncio.ensure_future(stub.Cancel(pb.CancelRequest()))
        # The client knows how many streams a connection takes, and waits.
        done, _ = await asyncio.wait((refused,), timeout=0.2)
        assert not done
        running[0].cancel()
        assert (await asyncio.wait_for(refused, WAIT_S)).was_running


async def test_the_limit_holds_for_all_connections_together():
    async with serving(max_calls=1) as (_, _, channel, address):
        call = inference_pb2_grpc.InferenceStub(channel).Generate(generate(1_000_000))
        await call.read()
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(address, options=options) as other:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await inference_pb2_grpc.InferenceStub(other).Cancel(pb.CancelRequest())
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_stopping_waits_for_calls_and_cuts_those_that_go_on():
    async with serving() as (server, _, channel, _):
        stub = inference_pb2_grpc.InferenceStub(channel)
        endless = asyncio.ensure_future(stub.Get(pb.GetRequest()))
        long = stub.Generate(generate(5000))
        assert (await anext(aiter(long))).delta.first_index == 0
        stopping = asyncio.ensure_future(server.stop(3.0))
        assert len([message async for message in long]) == 4999
        await asyncio.wait_for(stopping, WAIT_S)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await endless
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_who_speaks_no_http2_is_sent_away():
    async with serving() as (_, _, _, address):
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        said = await asyncio.wait_for(reader.read(), WAIT_S)
        assert b"this is not HTTP/2" in said
        await hung_up(writer)


async def test_a_client_that_vanished_is_found():
    async with serving(keepalive_s=0.2) as (_, inference, _, address):
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        block = heads.request("h", "/headrace.v1.Inference/Generate", ())
        body = generate(1_000_000).SerializeToString()
        writer.write(frames.PREFACE + frames.settings({}) + frames.headers(1, block, False))
        writer.write(frames.message_frame(1, body) + frames.frame(frames.DATA, frames.END_STREAM, 1))
        await reader.readexactly(100)  # and then not another word
        await asyncio.wait_for(inference.over.wait(), WAIT_S)
        await hung_up(writer)


async def test_a_client_that_asks_all_the_time_and_reads_nothing_is_cut_off():
    async with serving() as (_, _, _, address):
        host, port = address.split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(frames.PREFACE + frames.settings({}))
        ping = frames.frame(frames.PING, 0, 0, bytes(8)) * 10_000
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                writer.write(ping)
                await asyncio.wait_for(writer.drain(), WAIT_S)
        await hung_up(writer)


async def test_small_frames_go_out_at_once():
    async with serving() as (server, _, channel, _):
        await inference_pb2_grpc.InferenceStub(channel).Cancel(pb.CancelRequest())
        sockets = [each._transport.get_extra_info("socket") for each in server._connections]
        assert sockets and all(s.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for s in sockets)


async def test_health_is_told():
    async with serving() as (_, _, channel, _):
        stub = health_pb2_grpc.HealthStub(channel)
        response = await stub.Check(health_pb2.HealthCheckRequest())
        assert response.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="unknown"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


async def test_an_address_that_is_taken_is_said():
    async with serving() as (_, _, _, address):
        with pytest.raises(RuntimeError, match=f"cannot listen on {address}"):
            Server(ServerSettings()).add_insecure_port(address)


@pytest.fixture(params=["ours", "grpcio's"])
async def echo_address(request):
    if request.param == "ours":
        async with serving() as (_, _, _, address):
            yield address
        return
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


def channel_to(address):
    return Channel(address, max_message_bytes=8 << 20, keepalive_s=5.0)


async def test_a_channel_sends_and_reads_messages_of_any_size(echo_address):
    async with channel_to(echo_address) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Session()
        for size in (0, 1, 1000, 3_000_000):
            await call.write(hello("x" * size))
            assert (await call.read()).hello.worker_id == "x" * size
        await call.write(hello("end"))
        assert await call.read() is grpc.aio.EOF


async def test_a_channel_that_does_not_read_holds_the_peer_up_and_loses_nothing(echo_address):
    async with channel_to(echo_address) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Session()
        texts = [f"{number:06d}" * 20_000 for number in range(300)]

        async def write():
            for text in texts:
                await call.write(hello(text))

        writing = asyncio.ensure_future(write())
        await asyncio.wait((writing,), timeout=0.5)
        assert not writing.done()
        for text in texts:
            assert (await asyncio.wait_for(call.read(), WAIT_S)).hello.worker_id == text
        await writing


async def test_a_call_that_was_cancelled_here_says_so(echo_address):
    async with channel_to(echo_address) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Session()
        await call.write(hello("a"))
        await call.read()
        reading = asyncio.ensure_future(call.read())
        await asyncio.sleep(0)
        assert call.cancel() and not call.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reading
        assert caught.value.code() is grpc.StatusCode.CANCELLED


async def test_a_port_that_nobody_listens_on_is_said():
    async with channel_to("127.0.0.1:1") as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Session()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.write(hello("a"))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "Connection refused" in caught.value.details()


async def test_a_peer_that_is_silent_is_given_up():
    is_over = asyncio.Event()

    async def silent(reader, writer):
        with suppress(ConnectionError):
            while await reader.read(1000):
                pass
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        is_over.set()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with Channel(f"127.0.0.1:{port}", max_message_bytes=1000, keepalive_s=0.2) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Session()
        await call.write(hello("a"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call.read(), WAIT_S)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE and "silent" in caught.value.details()
    await asyncio.wait_for(is_over.wait(), WAIT_S)
    server.close()
    await server.wait_closed()
