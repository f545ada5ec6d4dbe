"""The asyncio client. `_client` is its twin; what they share lies in the modules they import."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack
from weakref import WeakSet

import grpc

from headrace import _convert
from headrace._answer import AnswerState, AnswerView
from headrace._connection import (
    CHANNEL_OPTIONS,
    CONTROL_TIMEOUT_S,
    DEFAULT_ADDRESS,
    Connection,
    answer_timeout_s,
    client_closed,
)
from headrace._direct import AsyncDirectChannels, TwoStreams
from headrace._errors import HeadraceError
from headrace._requests import (
    AnswerOptions,
    ChatTurn,
    cancel_request,
    chat_request,
    generate_request,
    get_request,
    tokenize_request,
)
from headrace._retry import Attempts, RetryPolicy
from headrace._types import Delta, Model, RequestInfo
from headrace.v1 import inference_pb2 as wire
from headrace.v1.cluster_pb2 import StatusRequest, StatusResponse
from headrace.v1.cluster_pb2_grpc import ClusterStub
from headrace.v1.inference_pb2_grpc import InferenceStub

_Question = TypeVar("_Question", wire.GenerateRequest, wire.ChatRequest)
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


def _task_is_cancelled() -> bool:
    """Tells a cancelled task from a call that was cancelled on this side: gRPC raises the same for both."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class AsyncAnswer(AnswerView):
    """An answer as it arrives: `async for` gives the text of the first choice, piece by piece.

    Whatever else is read (`text`, `usage`, `choices`, …) must have arrived: iterate to the end, or
    `await answer.read()`, else it raises AnswerIncomplete. Reading raises the HeadraceError with which
    the request failed. Read from one task; cancelling that task while it waits, or dropping the answer,
    closes it.
    """

    def __init__(
        self,
        state: AnswerState,
        attempts: Attempts,
        send: Callable[[AnswerState, float | None], TwoStreams],
        connection: Connection,
        cancel: Callable[[str], Awaitable[bool]],
    ) -> None:
        super().__init__(state, attempts)
        self._send = send
        self._connection = connection
        self._cancel = cancel
        self._hung_up = asyncio.Event()
        self._router = connection.routers.current
        self._events = send(state, answer_timeout_s(attempts))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while (delta := await self._next_delta()) is not None:
            if delta.choice == 0 and delta.text:
                return delta.text
        raise StopAsyncIteration

    async def deltas(self) -> AsyncIterator[Delta]:
        """What is left of the stream, all choices, with token ids."""
        while (delta := await self._next_delta()) is not None:
            yield delta

    async def read(self) -> Self:
        """Waits for the whole answer and returns it."""
        while await self._next_delta() is not None:
            pass
        return self

    async def close(self) -> None:
        """Hangs up, unless the answer is complete. What was read stays readable.

        The cluster then cancels the request: at once, or after its grace if it is resumable.
        """
        self._hang_up()

    async def cancel(self) -> None:
        """Ends the request in the cluster, resumable or not, and hangs up.

        Raises:
            HeadraceError: the router could not be told; the answer is closed all the same.
        """
        if self._state.ended:
            return
        try:
            await self._cancel(self.request_id)
        finally:
            self._hang_up()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _complete(self) -> None:
        self._raise_failure()
        if not self._state.ended:
            raise self._incomplete("iterate over the answer to its end, or `await answer.read()`, first")

    def _hang_up(self) -> None:
        if not self._state.ended:
            self._hung_up.set()
            self._state.hang_up()
            self._events.cancel()

    def _disconnect(self) -> None:
        """Ends the call because the client closes: reading on is an error."""
        self._events.cancel()

    async def _next_delta(self) -> Delta | None:
        self._raise_failure()
        while not self._state.ended:
            try:
                delta = self._state.fold(self._noted(await self._receive()))
            except HeadraceError as error:
                await self._recover(error)
            else:
                if delta is not None:
                    self._attempts.progressed()
                    return delta
        return None

    async def _receive(self) -> wire.GenerateResponse | None:
        if self._state.is_whole:
            self._events.forget_worker()
        try:
            event = await self._events.read()
        except grpc.RpcError as failed:
            raise self._connection.error(failed, self._router, self.request_id) from None
        except asyncio.CancelledError:
            if _task_is_cancelled():
                self._hang_up()
                raise
            raise client_closed() from None
        return event if isinstance(event, wire.GenerateResponse) else None

    def _noted(self, event: wire.GenerateResponse | None) -> wire.GenerateResponse | None:
        """Goes on at the worker that a ticket names; needs neither where nothing is missing."""
        if event is not None and event.HasField("ticket"):
            self._state.split()
            timeout_s = answer_timeout_s(self._attempts)
            self._events.redeem(event.ticket, self._state.next_index, timeout_s)
        return event

    async def _recover(self, error: HeadraceError) -> None:
        # The call is over, unless its events made no sense: then it is not read any further.
        self._events.cancel()
        delay_s = self._delay_s(error)
        if delay_s is None or await self._hung_up_within(delay_s):
            return
        self._state.reconnect()
        self._router = self._connection.routers.current
        self._events = self._send(self._state, answer_timeout_s(self._attempts))

    async def _hung_up_within(self, delay_s: float) -> bool:
        try:
            async with asyncio.timeout(delay_s):
                return await self._hung_up.wait()
        except TimeoutError:
            return False


class AsyncClient:
    """Calls a cluster from asyncio. Belongs to the event loop in which it was made.

    Args:
        address: HOST:PORT of a router, or a list of them: of one cluster's, any. A call goes to another one
            when its router cannot be reached, and an answer goes on there.
        api_key: sent as a bearer token; None where the cluster asks for none.
        timeout_s: seconds an answer may take unless its call says otherwise, repeats included.
            None: what the cluster's profile says.
        retry: how calls are sent again; only where that is safe.
        credentials: TLS, for example `grpc.ssl_channel_credentials()`; None: no encryption.
        direct: whether tokens may come straight from the workers, where the cluster offers that (`router.streaming`).
            Not with `credentials`: workers have none.

    Raises:
        InvalidRequest: an argument that no call could carry.
        RuntimeError: no event loop is running.
    """

    def __init__(
        self,
        address: str | Sequence[str] = DEFAULT_ADDRESS,
        *,
        api_key: str | None = None,
        timeout_s: float | None = None,
        retry: RetryPolicy = RetryPolicy(),
        credentials: grpc.ChannelCredentials | None = None,
        direct: bool = True,
    ) -> None:
        # Without a running loop gRPC would bind the channel to another one than the calls will run in.
        asyncio.get_running_loop()
        self._connection = Connection.of(address, api_key, timeout_s, retry)
        self._channels = [
            grpc.aio.insecure_channel(each, options=CHANNEL_OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(each, credentials, options=CHANNEL_OPTIONS)
            for each in self._connection.routers.addresses
        ]
        self._inferences = [InferenceStub(channel) for channel in self._channels]
        self._clusters = [ClusterStub(channel) for channel in self._channels]
        self._answers: WeakSet[AsyncAnswer] = WeakSet()
        self._direct = direct and credentials is None
        self._direct_channels = AsyncDirectChannels()
        self._closed = False

    def generate(self, prompt: str | Sequence[int], **options: Unpack[AnswerOptions]) -> AsyncAnswer:
        """Starts an answer to a prompt of text or token ids. Options: see AnswerOptions.

        Raises:
            InvalidRequest: an argument cannot be sent. What the cluster refuses comes when reading.
        """
        request = generate_request(prompt, options)
        methods = [stub.Generate for stub in self._inferences]
        return self._answer(methods, request, options.get("timeout_s"))

    def chat(self, messages: Iterable[ChatTurn], **options: Unpack[AnswerOptions]) -> AsyncAnswer:
        """Starts an answer to a conversation: dicts with `role` and `content`, or Messages.

        Raises: as `generate`.
        """
        request = chat_request(messages, options)
        methods = [stub.Chat for stub in self._inferences]
        return self._answer(methods, request, options.get("timeout_s"))

    async def cancel(self, request_id: str, *, timeout_s: float = CONTROL_TIMEOUT_S) -> bool:
        """Ends a request wherever it is; whether it was running. An unknown one is not an error.

        Raises:
            HeadraceError: the router could not be told.
        """
        request = cancel_request(request_id)
        methods = [stub.Cancel for stub in self._inferences]
        response = await self._call(methods, request, timeout_s, request_id)
        return response.was_running

    async def get(self, request_id: str, *, timeout_s: float = CONTROL_TIMEOUT_S) -> RequestInfo:
        """The state of a request that is running or has finished lately.

        Raises:
            NotFound: no such request.
            HeadraceError: the call failed.
        """
        request = get_request(request_id)
        methods = [stub.Get for stub in self._inferences]
        return _convert.request_info(await self._call(methods, request, timeout_s, request_id))

    async def tokenize(
        self,
        text_or_messages: str | Iterable[ChatTurn],
        *,
        model: str | None = None,
        timeout_s: float = CONTROL_TIMEOUT_S,
    ) -> list[int]:
        """The token ids that `generate` makes of a text, or `chat` of a conversation.

        Raises:
            InvalidRequest: not Unicode text, or not a conversation that the model's template takes.
            HeadraceError: the call failed.
        """
        request = tokenize_request(text_or_messages, model)
        response = await self._call([stub.Tokenize for stub in self._inferences], request, timeout_s)
        return list(response.token_ids)

    async def models(self, *, timeout_s: float = CONTROL_TIMEOUT_S) -> list[Model]:
        """The models served.

        Raises:
            HeadraceError: the call failed.
        """
        methods = [stub.Models for stub in self._inferences]
        response = await self._call(methods, wire.ModelsRequest(), timeout_s)
        return [_convert.model(model) for model in response.models]

    async def status(self, *, timeout_s: float = CONTROL_TIMEOUT_S) -> StatusResponse:
        """What the cluster is and does now, as the message of cluster.proto.

        Raises:
            HeadraceError: the call failed.
        """
        return await self._call([stub.Status for stub in self._clusters], StatusRequest(), timeout_s)

    async def close(self) -> None:
        """Closes the connection; answers that are still running are cancelled. May be repeated."""
        self._closed = True
        # gRPC's asyncio channel leaves streams that are being read to wait for ever when it closes.
        for answer in list(self._answers):
            answer._disconnect()
        await self._direct_channels.aclose()
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _answer(
        self,
        methods: "Sequence[grpc.aio.UnaryStreamMultiCallable[_Question, wire.GenerateResponse]]",
        request: _Question,
        timeout_s: float | None,
    ) -> AsyncAnswer:
        def send(state: AnswerState, timeout_s: float | None) -> TwoStreams:
            self._require_open()
            request.resume_handle = state.resume_handle
            method = methods[self._connection.routers.current]
            call = method(request, timeout=timeout_s, metadata=self._connection.metadata)
            return TwoStreams(call, self._direct_channels)

        request.direct = self._direct
        attempts = self._connection.begin(request, timeout_s)
        state = AnswerState(request.request_id, request.sampling.seed, request.sampling.n or 1)
        answer = AsyncAnswer(state, attempts, send, self._connection, self.cancel)
        self._answers.add(answer)
        return answer

    async def _call(
        self,
        methods: "Sequence[grpc.aio.UnaryUnaryMultiCallable[_Request, _Response]]",
        request: _Request,
        timeout_s: float,
        request_id: str = "",
    ) -> _Response:
        attempts = Attempts(self._connection.retry, timeout_s)
        while True:
            self._require_open()
            router = self._connection.routers.current
            method = methods[router]
            try:
                return await method(
                    request, timeout=attempts.remaining_s(), metadata=self._connection.metadata
                )
            except grpc.RpcError as failed:
                error = self._connection.error(failed, router, request_id)
            except asyncio.CancelledError:
                if _task_is_cancelled():
                    raise
                raise client_closed() from None
            delay_s = attempts.delay_s(error)
            if delay_s is None:
                raise error
            await asyncio.sleep(delay_s)

    def _require_open(self) -> None:
        if self._closed:
            raise client_closed() from None
