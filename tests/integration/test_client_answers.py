"""Answers against a real gRPC server: what holds for both clients alike."""

import asyncio
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

import headrace
from headrace import Answer, AsyncAnswer, AsyncClient, Client, FinishReason, HeadraceError, RetryPolicy
from headrace.v1 import inference_pb2 as wire
from tests.integration.scripted_router import (
    HELLO,
    LOST,
    Fail,
    Hold,
    ScriptedRouter,
    Wire,
    accepted,
    delta,
    done,
    failure,
    finished,
    serve,
)

pytestmark = pytest.mark.integration

QUICK = RetryPolicy(max_attempts=4, base_delay_s=0.01, max_delay_s=0.05)


@dataclass
class Read:
    """What an application saw of an answer: pieces of text, then its end or an error."""

    answer: Answer | AsyncAnswer
    texts: list[str]
    error: HeadraceError | None


Ask = Callable[..., Read]


def ask_blocking(
    address: str, prompt: Any, client_options: Mapping[str, Any], options: Mapping[str, Any]
) -> Read:
    with Client(address, **{"retry": QUICK} | client_options) as client:
        start = client.generate if isinstance(prompt, str) else client.chat
        read = Read(start(prompt, **options), [], None)
        try:
            read.texts.extend(read.answer)
        except HeadraceError as error:
            read.error = error
        return read


async def ask_asyncio(
    address: str, prompt: Any, client_options: Mapping[str, Any], options: Mapping[str, Any]
) -> Read:
    async with AsyncClient(address, **{"retry": QUICK} | client_options) as client:
        start = client.generate if isinstance(prompt, str) else client.chat
        read = Read(start(prompt, **options), [], None)
        try:
            async for text in read.answer:
                read.texts.append(text)
        except HeadraceError as error:
            read.error = error
        return read


@pytest.fixture
def router() -> Iterator[ScriptedRouter]:
    router = ScriptedRouter()
    server = serve(router)
    yield router
    server.stop(None).wait()


@pytest.fixture(params=["blocking", "asyncio"])
def ask(request: pytest.FixtureRequest, router: ScriptedRouter) -> Ask:
    def ask(
        prompt: Any = "Hi", address: str = "", client: Mapping[str, Any] | None = None, **options: Any
    ) -> Read:
        arguments = (address or router.address, prompt, client or {}, options)
        if request.param == "blocking":
            return ask_blocking(*arguments)
        return asyncio.run(ask_asyncio(*arguments))

    return ask


def test_an_answer_streams_and_then_has_everything(ask: Ask, router: ScriptedRouter) -> None:
    router.will(accepted(prompt_tokens=3, seed=5), *HELLO)
    read = ask("Say hello", max_tokens=8, seed=5)
    assert (read.texts, read.error) == (["Hel", "lo"], None)
    answer = read.answer
    assert (answer.text, answer.token_ids, answer.seed) == ("Hello", (10, 11), 5)
    assert answer.finish_reason is FinishReason.STOP
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 2)
    assert answer.timing.total_s == 0.25
    [request] = router.requests
    assert (request.text, request.sampling.max_tokens) == ("Say hello", 8)
    assert request.request_id == answer.request_id


def test_a_conversation_goes_to_chat(ask: Ask, router: ScriptedRouter) -> None:
    router.will(*HELLO)
    read = ask([{"role": "user", "content": "Hi"}])
    assert read.answer.text == "Hello"
    assert list(router.requests[0].messages) == [wire.ChatMessage(role="user", content="Hi")]


def test_of_several_choices_iteration_shows_the_first(ask: Ask, router: ScriptedRouter) -> None:
    router.will(
        delta(0, [1], "one", choice=1),
        delta(0, [2], "zero", choice=0),
        finished(wire.FINISH_REASON_LENGTH, choice=1),
        finished(choice=0),
        done(),
    )
    read = ask(n=2)
    assert read.texts == ["zero"]
    assert [(choice.text, choice.finish_reason) for choice in read.answer.choices] == [
        ("zero", FinishReason.STOP),
        ("one", FinishReason.LENGTH),
    ]


def test_hundreds_of_waiting_events_are_all_read(ask: Ask, router: ScriptedRouter) -> None:
    router.will(*(delta(index, [index], f"{index} ") for index in range(500)), finished(), done())
    read = ask()
    assert read.error is None
    assert read.answer.token_ids == tuple(range(500))


def test_the_api_key_goes_along_as_a_bearer_token(ask: Ask, router: ScriptedRouter) -> None:
    router.will(*HELLO)
    ask(client={"api_key": "key-1"})
    assert router.metadata[0]["authorization"] == "Bearer key-1"


def test_the_router_gets_the_time_limit_and_grpc_a_little_more(ask: Ask, router: ScriptedRouter) -> None:
    router.will(*HELLO)
    router.will(*HELLO)
    ask(timeout_s=1000.0, client={"timeout_s": 5.0})
    ask(client={"timeout_s": 2000.0})
    assert [request.timeout_s for request in router.requests] == [1000.0, 2000.0]
    # Magnitudes only: gRPC rounds a deadline up when it writes it into the header.
    assert 500 < router.time_left_s[0] < 1500 < router.time_left_s[1] < 2500


def test_without_a_time_limit_the_cluster_decides(ask: Ask, router: ScriptedRouter) -> None:
    router.will(*HELLO)
    ask()
    assert router.requests[0].timeout_s == 0
    assert router.time_left_s[0] > 1e6


def test_bad_timeouts_never_leave(ask: Ask, router: ScriptedRouter) -> None:
    for timeout_s in (0, -1.0, math.nan):
        with pytest.raises(headrace.InvalidRequest, match="timeout_s"):
            ask(timeout_s=timeout_s)
    assert router.requests == []


def test_a_refusal_becomes_its_class_with_everything_the_router_said(
    ask: Ask, router: ScriptedRouter
) -> None:
    router.will(
        failure(
            grpc.StatusCode.INVALID_ARGUMENT,
            request_id="r-1",
            stage="admission",
            cause="PROMPT_TOO_LONG",
            message="the prompt has 9000 tokens; the context holds 8192",
            attempt=1,
        )
    )
    error = ask(request_id="r-1").error
    assert type(error) is headrace.InvalidRequest
    assert error.message == "the prompt has 9000 tokens; the context holds 8192"
    assert (error.request_id, error.stage, error.cause) == ("r-1", "admission", "PROMPT_TOO_LONG")
    assert (error.code, error.retryable, error.attempt) == ("INVALID_ARGUMENT", False, 1)
    assert error.__cause__ is None
    assert error.__suppress_context__


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, headrace.Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, headrace.PermissionDenied),
        (grpc.StatusCode.NOT_FOUND, headrace.NotFound),
        (grpc.StatusCode.ALREADY_EXISTS, headrace.AlreadyExists),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, headrace.ResourceExhausted),
        (grpc.StatusCode.DEADLINE_EXCEEDED, headrace.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, headrace.Cancelled),
        (grpc.StatusCode.UNAVAILABLE, headrace.Unavailable),
        (grpc.StatusCode.ABORTED, headrace.RequestFailed),
        (grpc.StatusCode.INTERNAL, headrace.InternalError),
    ],
)
def test_each_status_of_the_router_has_its_class(
    ask: Ask, router: ScriptedRouter, code: grpc.StatusCode, kind: type[HeadraceError]
) -> None:
    router.will(failure(code, stage="decode", cause="SOMETHING"))
    error = ask().error
    assert type(error) is kind
    assert (error.stage, error.message) == ("decode", code.name)
    assert len(router.requests) == 1


@pytest.mark.parametrize("damaged", [False, True])
def test_a_status_without_a_readable_detail_still_has_its_class(
    ask: Ask, router: ScriptedRouter, damaged: bool
) -> None:
    class Damaged:
        def SerializeToString(self) -> bytes:
            return b"\xff\xff"

    router.will(Fail(grpc.StatusCode.UNIMPLEMENTED, "Method not found!", Damaged() if damaged else None))
    error = ask().error
    assert type(error) is headrace.InternalError
    assert (error.message, error.code, error.stage) == ("Method not found!", "UNIMPLEMENTED", "client")


def test_a_failure_in_mid_answer_keeps_what_was_read_and_is_raised_again(
    ask: Ask, router: ScriptedRouter
) -> None:
    router.will(delta(0, [10], "Hel"), failure(grpc.StatusCode.ABORTED, stage="decode", cause="NAN_LOGITS"))
    read = ask()
    assert read.texts == ["Hel"]
    assert read.answer.partial_text == "Hel"
    with pytest.raises(headrace.RequestFailed) as again:
        _ = read.answer.text
    assert again.value is read.error


def test_a_broken_stream_is_attached_to_and_nothing_is_shown_twice(ask: Ask, router: ScriptedRouter) -> None:
    router.will(accepted(resume_handle=b"handle"), delta(0, [10], "Hel"), delta(1, [11], ""), LOST)
    router.will(accepted(resume_handle=b"handle"), delta(0, [10, 11, 12], "Hello wor"), LOST)
    router.will(delta(0, [10, 11, 12, 13], "Hello world"), finished(), done())
    read = ask("Hi", temperature=0.7)
    assert (read.texts, read.error) == (["Hel", "lo wor", "ld"], None)
    assert read.answer.token_ids == (10, 11, 12, 13)
    first, second, third = router.requests
    assert second == third
    assert second.resume_handle == b"handle"
    second.ClearField("resume_handle")
    assert first == second
    assert first.next_index == 0


def test_a_cut_wire_is_survived(ask: Ask, router: ScriptedRouter) -> None:
    relay = Wire(router.address)
    router.will(delta(0, [10], "Hel"), relay.cut, Hold())
    router.will(*HELLO)
    read = ask(address=relay.address)
    relay.close()
    assert (read.error, read.answer.text) == (None, "Hello")
    assert router.hung_up.wait(10)


def test_a_retryable_failure_is_sent_again_with_the_same_id_and_body(
    ask: Ask, router: ScriptedRouter
) -> None:
    router.will(
        failure(grpc.StatusCode.RESOURCE_EXHAUSTED, cause="QUEUE_FULL", retryable=True, retry_after_s=0.01)
    )
    router.will(*HELLO)
    assert ask().answer.text == "Hello"
    assert router.requests[0] == router.requests[1]


def test_the_last_failure_is_raised_when_the_attempts_are_used_up(ask: Ask, router: ScriptedRouter) -> None:
    for _ in range(QUICK.max_attempts):
        router.will(LOST)
    read = ask()
    assert type(read.error) is headrace.Unavailable
    assert read.error.retryable
    assert len(router.requests) == QUICK.max_attempts


def test_tokens_that_arrive_renew_the_attempts(ask: Ask, router: ScriptedRouter) -> None:
    tokens = [10 * index for index in range(2 * QUICK.max_attempts)]
    for count in range(1, len(tokens)):
        router.will(delta(0, tokens[:count], "x" * count), LOST)
    router.will(delta(0, tokens, "x" * len(tokens)), finished(), done())
    assert ask().answer.token_ids == tuple(tokens)


def test_a_retry_never_waits_past_the_deadline(ask: Ask, router: ScriptedRouter) -> None:
    router.will(failure(grpc.StatusCode.UNAVAILABLE, cause="DRAINING", retryable=True, retry_after_s=100.0))
    patient = RetryPolicy(base_delay_s=0.01, max_delay_s=200)
    error = ask(timeout_s=60.0, client={"retry": patient}).error
    assert type(error) is headrace.Unavailable
    assert (error.cause, error.retry_after_s) == ("DRAINING", 100.0)


def test_an_answer_that_changed_is_an_error_and_its_call_is_ended(ask: Ask, router: ScriptedRouter) -> None:
    router.will(delta(0, [10], "Hel"), LOST)
    router.will(delta(0, [99], "Bye"), Hold())
    read = ask()
    assert type(read.error) is headrace.RequestFailed
    assert (read.error.cause, read.texts) == ("ANSWER_CHANGED", ["Hel"])
    assert router.hung_up.wait(10)


def test_a_stream_that_ends_without_done_is_an_error(ask: Ask, router: ScriptedRouter) -> None:
    router.will(delta(0, [10], "Hel"))
    read = ask()
    assert type(read.error) is headrace.InternalError
    assert read.error.cause == "STREAM_INCOMPLETE"


def test_a_connection_lost_after_the_last_event_is_no_failure(ask: Ask, router: ScriptedRouter) -> None:
    router.will(*HELLO, LOST)
    read = ask()
    assert (read.error, read.answer.text, len(router.requests)) == (None, "Hello", 1)


def test_a_silent_router_ends_at_the_deadline(ask: Ask, router: ScriptedRouter) -> None:
    router.will(delta(0, [10], "Hel"), Hold())
    read = ask(timeout_s=0.2)
    assert type(read.error) is headrace.DeadlineExceeded
    assert isinstance(read.error, TimeoutError)
    assert (read.error.request_id, read.error.stage) == (read.answer.request_id, "client")
    assert router.hung_up.wait(10)
    assert len(router.requests) == 1


def test_a_router_that_is_not_there_says_so(ask: Ask) -> None:
    error = ask(address="127.0.0.1:1").error
    assert type(error) is headrace.Unavailable
    assert isinstance(error, ConnectionError)
    assert "127.0.0.1:1" in error.message
    assert error.cause == "NO_CONNECTION"


def test_a_router_that_comes_back_is_found_again(ask: Ask, router: ScriptedRouter) -> None:
    relay = Wire(router.address)
    router.will(delta(0, [10], "Hel"), lambda: relay.stay_down(0.3), Hold())
    router.will(*HELLO)
    patient = RetryPolicy(max_attempts=100, base_delay_s=0.05, max_delay_s=0.1)
    read = ask(address=relay.address, client={"retry": patient})
    relay.close()
    assert (read.error, read.answer.text) == (None, "Hello")


@pytest.mark.parametrize(
    ("client", "message"),
    [
        ({"api_key": "geheim\n"}, "api_key must be printable ASCII"),
        ({"api_key": "schlüssel"}, "api_key must be printable ASCII"),
        ({"api_key": ""}, "api_key must be printable ASCII"),
        ({"timeout_s": -1.0}, "timeout_s must be a positive number"),
    ],
)
def test_a_client_refuses_what_no_call_could_carry(ask: Ask, client: dict[str, Any], message: str) -> None:
    with pytest.raises(headrace.InvalidRequest, match=message):
        ask(client=client)


def test_an_address_needs_a_port(ask: Ask) -> None:
    with pytest.raises(headrace.InvalidRequest, match="address must be HOST:PORT"):
        ask(address="localhost")


def test_credentials_make_an_encrypted_channel(ask: Ask) -> None:
    router = ScriptedRouter()
    server = serve(router, grpc.local_server_credentials())
    router.will(*HELLO)
    read = ask(address=router.address, client={"credentials": grpc.local_channel_credentials()})
    server.stop(None).wait()
    assert (read.error, read.answer.text) == (None, "Hello")
