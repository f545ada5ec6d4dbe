"""What the blocking client alone has to show: threads, garbage, the calls without a stream."""

import threading
from collections.abc import Iterator

import grpc
import pytest

from headrace import (
    AnswerIncomplete,
    Cancelled,
    Client,
    Delta,
    FinishReason,
    Message,
    Model,
    NotFound,
    RequestFailed,
    RequestState,
    RetryPolicy,
    Unavailable,
)
from headrace.v1 import inference_pb2 as wire
from tests.integration.scripted_router import (
    HELLO,
    LOST,
    Hold,
    ScriptedRouter,
    delta,
    done,
    failure,
    finished,
    serve,
)

pytestmark = pytest.mark.integration


@pytest.fixture
def router() -> Iterator[ScriptedRouter]:
    router = ScriptedRouter()
    server = serve(router)
    yield router
    server.stop(None).wait()


@pytest.fixture
def client(router: ScriptedRouter) -> Iterator[Client]:
    with Client(
        router.address, retry=RetryPolicy(max_attempts=3, base_delay_s=0.01, max_delay_s=0.05)
    ) as client:
        yield client


def test_reading_the_text_waits_for_all_of_it(client: Client, router: ScriptedRouter) -> None:
    router.will(*HELLO)
    assert client.generate("Hi").text == "Hello"


def test_what_was_iterated_over_is_not_lost_to_the_text(client: Client, router: ScriptedRouter) -> None:
    router.will(*HELLO)
    answer = client.generate("Hi")
    assert next(answer) == "Hel"
    assert answer.text == "Hello"
    assert list(answer) == []


def test_deltas_show_every_choice_and_its_tokens(client: Client, router: ScriptedRouter) -> None:
    router.will(delta(0, [1], "a"), delta(0, [2], "b", choice=1), delta(1, [3], ""), finished(), done())
    assert list(client.generate("Hi", n=2).deltas()) == [
        Delta(choice=0, first_index=0, token_ids=(1,), text="a"),
        Delta(choice=1, first_index=0, token_ids=(2,), text="b"),
        Delta(choice=0, first_index=1, token_ids=(3,), text=""),
    ]


def test_leaving_the_context_hangs_up_and_keeps_what_was_read(client: Client, router: ScriptedRouter) -> None:
    router.will(delta(0, [10], "Hel"), Hold())
    with client.generate("Hi") as answer:
        assert next(answer) == "Hel"
    assert router.hung_up.wait(10)
    assert (answer.text, answer.finish_reason, list(answer)) == ("Hel", FinishReason.CANCELLED, [])
    with pytest.raises(AnswerIncomplete, match="closed before its usage came"):
        _ = answer.usage


def test_closing_a_complete_answer_changes_nothing(client: Client, router: ScriptedRouter) -> None:
    router.will(*HELLO)
    with client.generate("Hi") as answer:
        answer.read()
    answer.cancel()
    assert (answer.finish_reason, answer.usage.completion_tokens) == (FinishReason.STOP, 2)
    assert router.cancelled_ids == []


def test_cancel_tells_the_router_and_hangs_up(client: Client, router: ScriptedRouter) -> None:
    router.will(delta(0, [10], "Hel"), Hold())
    answer = client.generate("Hi", resumable=True)
    next(answer)
    answer.cancel()
    assert router.cancelled_ids == [answer.request_id]
    assert router.hung_up.wait(10)
    assert answer.text == "Hel"


def test_another_thread_may_close_an_answer_that_is_being_read(
    client: Client, router: ScriptedRouter
) -> None:
    router.will(delta(0, [10], "Hel"), Hold())
    answer = client.generate("Hi")
    reading, texts = threading.Event(), []

    def read() -> None:
        for text in answer:
            texts.append(text)
            reading.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert reading.wait(10)
    answer.close()
    reader.join(10)
    assert not reader.is_alive()
    assert texts == ["Hel"]


def test_closing_interrupts_the_wait_before_a_repeat(router: ScriptedRouter) -> None:
    router.will(failure(grpc.StatusCode.UNAVAILABLE, retryable=True))
    with Client(router.address, retry=RetryPolicy(base_delay_s=3600, max_delay_s=3600)) as client:
        answer = client.generate("Hi")
        reader = threading.Thread(target=answer.read)
        reader.start()
        while not router.requests:
            threading.Event().wait(0.01)
        answer.close()
        reader.join(10)
    assert not reader.is_alive()


@pytest.mark.parametrize("num_read", [0, 1])
def test_an_answer_that_is_dropped_is_hung_up_on(
    client: Client, router: ScriptedRouter, num_read: int
) -> None:
    router.will(delta(0, [10], "Hel"), Hold())
    answer = client.generate("Hi")
    while not router.requests:
        threading.Event().wait(0.01)
    for _ in range(num_read):
        next(answer)
    del answer
    assert router.hung_up.wait(10)


def test_breaking_out_of_a_loop_hangs_up(client: Client, router: ScriptedRouter) -> None:
    router.will(delta(0, [10], "Hel"), Hold())
    for _ in client.generate("Hi"):
        break
    assert router.hung_up.wait(10)


def test_closing_the_client_ends_its_answers(router: ScriptedRouter) -> None:
    router.will(delta(0, [10], "Hel"), Hold())
    client = Client(router.address)
    answer = client.generate("Hi")
    next(answer)
    client.close()
    with pytest.raises(Cancelled):
        answer.read()
    assert router.hung_up.wait(10)


def test_a_closed_client_says_so(client: Client) -> None:
    client.close()
    client.close()
    for call in (lambda: client.generate("Hi"), client.models):
        with pytest.raises(Cancelled, match="the client is closed"):
            call()


def test_cancel_by_id_says_whether_it_was_running(client: Client, router: ScriptedRouter) -> None:
    assert client.cancel("r-1") is True
    assert client.cancel("unknown") is False
    assert router.cancelled_ids == ["r-1", "unknown"]


def test_get_tells_state_and_error(client: Client, router: ScriptedRouter) -> None:
    detail = wire.ErrorDetail(
        request_id="r-1", stage="decode", cause="WORKER_LOST", message="lost", retryable=True
    )
    router.will(
        wire.GetResponse(
            request_id="r-1",
            state=wire.REQUEST_STATE_FAILED,
            prompt_tokens=5,
            completion_tokens=[3, 4],
            error=detail,
        )
    )
    info = client.get("r-1")
    assert (info.state, info.prompt_tokens, info.completion_tokens) == (RequestState.FAILED, 5, (3, 4))
    assert type(info.error) is RequestFailed
    assert (info.error.stage, info.error.retryable) == ("decode", True)


def test_get_of_an_unknown_request_is_not_found(client: Client, router: ScriptedRouter) -> None:
    router.will(failure(grpc.StatusCode.NOT_FOUND, cause="UNKNOWN_REQUEST", message="no such request"))
    with pytest.raises(NotFound, match="no such request") as missing:
        client.get("r-1")
    assert missing.value.request_id == "r-1"


def test_tokenize_gives_ids(client: Client, router: ScriptedRouter) -> None:
    router.will(wire.TokenizeResponse(token_ids=[1, 2]))
    router.will(wire.TokenizeResponse(token_ids=[3]))
    assert client.tokenize("Hi") == [1, 2]
    assert client.tokenize([Message("user", "Hi")], model="tiny") == [3]


def test_models_and_status(client: Client) -> None:
    assert client.models() == [Model(name="tiny", architecture="llama", max_context=2048, digest="abc")]
    assert client.status().running_requests == 2


def test_a_call_without_a_stream_is_repeated_too(client: Client, router: ScriptedRouter) -> None:
    router.will(LOST)
    router.will(wire.TokenizeResponse(token_ids=[1]))
    assert client.tokenize("Hi") == [1]
    for _ in range(3):
        router.will(LOST)
    with pytest.raises(Unavailable):
        client.tokenize("Hi")


def test_neither_prompt_nor_answer_shows_in_a_repr(client: Client, router: ScriptedRouter) -> None:
    router.will(*HELLO)
    answer = client.generate("secret", request_id="r-1")
    assert repr(answer) == "<Answer r-1 open>"
    answer.read()
    assert repr(answer) == "<Answer r-1 ended>"
