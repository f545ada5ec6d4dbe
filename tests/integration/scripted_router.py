"""A router whose answers are written down beforehand, on a real gRPC server, and a wire that can be cut."""

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc

from headrace.v1 import inference_pb2 as wire
from headrace.v1.cluster_pb2 import RegisterResponse, StatusResponse
from headrace.v1.cluster_pb2_grpc import ClusterServicer, add_ClusterServicer_to_server
from headrace.v1.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

# How long a script waits for a client that should act at once. A test that is right never waits for it.
PATIENCE_S = 20.0


@dataclass(frozen=True)
class Fail:
    """The call fails: with a detail as the router sends it, or without one as a lost connection does."""

    code: grpc.StatusCode
    message: str = ""
    detail: wire.ErrorDetail | None = None


@dataclass(frozen=True)
class Hold:
    """Nothing comes until the client hangs up."""


Step = wire.GenerateResponse | wire.TokenizeResponse | Fail | Hold | Callable[[], None]
LOST = Fail(grpc.StatusCode.UNAVAILABLE, "Socket closed")


def accepted(**facts: Any) -> wire.GenerateResponse:
    return wire.GenerateResponse(accepted=wire.Accepted(**facts))


def delta(first_index: int, token_ids: Sequence[int], text: str, choice: int = 0) -> wire.GenerateResponse:
    return wire.GenerateResponse(
        delta=wire.Delta(choice=choice, first_index=first_index, token_ids=token_ids, text=text)
    )


def finished(reason: wire.FinishReason = wire.FINISH_REASON_STOP, choice: int = 0) -> wire.GenerateResponse:
    return wire.GenerateResponse(choice_finished=wire.ChoiceFinished(choice=choice, reason=reason))


def done(prompt_tokens: int = 3, completion_tokens: int = 2) -> wire.GenerateResponse:
    usage = wire.Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
    return wire.GenerateResponse(done=wire.Done(usage=usage, timing=wire.Timing(total_s=0.25)))


def failure(code: grpc.StatusCode, **detail: Any) -> Fail:
    return Fail(code, "status message", wire.ErrorDetail(**detail))


HELLO = (delta(0, [10], "Hel"), delta(1, [11], "lo"), finished(), done())


@dataclass
class ScriptedRouter(InferenceServicer, ClusterServicer):
    """Plays one script per call, in the order the calls come, and keeps what it was asked."""

    scripts: deque[Sequence[Step]] = field(default_factory=deque)
    requests: list[Any] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    time_left_s: list[float] = field(default_factory=list)
    cancelled_ids: list[str] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)
    address: str = ""

    def will(self, *steps: Step) -> None:
        """Adds the script of one more call."""
        self.scripts.append(steps)

    def Generate(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        return self._play(request, context)

    def Chat(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        return self._play(request, context)

    def Cancel(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.cancelled_ids.append(request.request_id)
        return wire.CancelResponse(was_running=request.request_id != "unknown")

    def Get(self, request: Any, context: grpc.ServicerContext) -> Any:
        return next(self._play(request, context), wire.GetResponse())

    def Tokenize(self, request: Any, context: grpc.ServicerContext) -> Any:
        return next(self._play(request, context), wire.TokenizeResponse())

    def Models(self, request: Any, context: grpc.ServicerContext) -> Any:
        model = wire.Model(name="tiny", architecture="llama", max_context=2048, digest="abc")
        return wire.ModelsResponse(models=[model])

    def Register(self, request: Any, context: grpc.ServicerContext) -> Any:
        return RegisterResponse()

    def Status(self, request: Any, context: grpc.ServicerContext) -> Any:
        return StatusResponse(router_id="router-0", running_requests=2)

    def _play(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        over, played = threading.Event(), threading.Event()

        def note_end() -> None:
            over.set()
            if not played.is_set():
                self.hung_up.set()

        context.add_callback(note_end)
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.time_left_s.append(context.time_remaining())
        for step in self.scripts.popleft():
            match step:
                case Fail():
                    played.set()
                    if step.detail is not None:
                        detail = ("headrace-error-bin", step.detail.SerializeToString())
                        context.set_trailing_metadata((detail,))
                    context.abort(step.code, step.message)
                case Hold():
                    over.wait(PATIENCE_S)
                case _ if callable(step):
                    step()
                case _:
                    yield step
        played.set()


def serve(router: ScriptedRouter, credentials: grpc.ServerCredentials | None = None) -> grpc.Server:
    """Starts the router on a free port of the loopback device and notes its address."""
    server = grpc.server(ThreadPoolExecutor(8))
    add_InferenceServicer_to_server(router, server)
    add_ClusterServicer_to_server(router, server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    router.address = f"127.0.0.1:{port}"
    server.start()
    return server


class Wire:
    """A TCP relay to `address` whose connections can be cut at any moment, as a network does it."""

    def __init__(self, address: str) -> None:
        host, port = address.split(":")
        self._target = (host, int(port))
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = self._listen(0)
        self._port = self._listener.getsockname()[1]
        self.address = f"127.0.0.1:{self._port}"

    def cut(self) -> None:
        """Breaks every connection; new ones are taken."""
        with self._lock:
            for end in self._sockets:
                with suppress(OSError):  # its peer may have closed it before
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
            self._sockets.clear()

    def stay_down(self, down_s: float) -> None:
        """Breaks every connection and takes none for a while; returns when it does again."""
        self._stop_listening()
        self.cut()
        time.sleep(down_s)
        self._listener = self._listen(self._port)

    def close(self) -> None:
        self._stop_listening()
        self.cut()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port))
        accept = threading.Thread(target=self._accept, args=(listener,), daemon=True)
        self._threads.append(accept)
        accept.start()
        return listener

    def _stop_listening(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            with self._lock:
                self._sockets += [client, server]
            for source, sink in ((client, server), (server, client)):
                pump = threading.Thread(target=self._pump, args=(source, sink), daemon=True)
                self._threads.append(pump)
                pump.start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
        except OSError:
            return
