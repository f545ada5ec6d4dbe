"""What the asyncio client alone has to show: tasks, garbage, the calls without a stream."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest

from headrace import (
    AnswerIncomplete,
    AsyncClient,
    Cancelled,
    Delta,
    FinishReason,
    Message,
    Model,
    NotFound,
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
async def client(router: ScriptedRouter) -> AsyncIterator[AsyncClient]:
    retry = RetryPolicy(max_attempts=3, base_delay_s=0.01, max_delay_s=0.05)
    async with AsyncClient(router.address, retry=retry) as client:
        yield client


async def hung_up(router: ScriptedRouter) -> bool:
    return await asyncio.to_thread(router.hung_up.wait, 10)


async def test_an_answer_can_be_read_in_one_go(client: AsyncClient, router: ScriptedRouter) -> None:
    router.will(*HELLO)
    answer = await client.generate("Hi").read()
    assert (answer.text, answer.usage.prompt_tokens) == ("Hello", 3)


async def test_what_has_not_been_read_is_not_guessed(client: AsyncClient, router: ScriptedRouter) -> None:
    router.will(*HELLO)
    answer = client.generate("Hi")
    assert await anext(answer) == "Hel"
    assert answer.partial_text == "Hel"
    with pytest.raises(AnswerIncomplete, match=r"await answer.read\(\)"):
        _ = answer.text
    assert (await answer.read()).text == "Hello"


async def test_deltas_show_every_choice_and_its_tokens(client: AsyncClient, router: ScriptedRouter) -> None:
    router.will(delta(0, [1], "a"), delta(0, [2], "b", choice=1), finished(), done())
    assert [part async for part in client.generate("Hi", n=2).deltas()] == [
        Delta(choice=0, first_index=0, token_ids=(1,), text="a"),
        Delta(choice=1, first_index=0, token_ids=(2,), text="b"),
    ]


async def test_leaving_the_context_hangs_up_and_keeps_what_was_read(
    client: AsyncClient, router: ScriptedRouter
) -> None:
    router.will(delta(0, [10], "Hel"), Hold())
    async with client.generate("Hi") as answer:
        assert await anext(answer) == "Hel"
    assert await hung_up(router)
    assert (answer.text, answer.finish_reason) == ("Hel", FinishReason.CANCELLED)
    assert [text async for text in answer] == []
    with pytest.raises(AnswerIncomplete, match="closed before its timing came"):
        _ = answer.timing


async def test_closing_a_complete_answer_changes_nothing(client: AsyncClient, router: ScriptedRouter) -> None:
    router.will(*HELLO)
    answer = await client.generate("Hi").read()
    await answer.close()
    await answer.cancel()
    assert (answer.finish_reason, router.cancelled_ids) == (FinishReason.STOP, [])


async def test_cancel_tells_the_router_and_hangs_up(client: AsyncClient, router: ScriptedRouter) -> None:
    router.will(delta(0, [10], "Hel"), Hold())
    answer = client.generate("Hi", resumable=True)
    await anext(answer)
    await answer.cancel()
    assert router.cancelled_ids == [answer.request_id]
    assert await hung_up(router)
    assert answer.text == "Hel"


async def test_cancelling_the_reading_task_cancels_the_request(
    client: AsyncClient, router: ScriptedRouter
) -> None:
    router.will(delta(0, [10], "Hel"), Hold())
    answer = client.generate("Hi")
    await anext(answer)
    reader = asyncio.create_task(answer.read())
    await asyncio.sleep(0.01)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert await hung_up(router)
    assert (answer.text, answer.finish_reason) == ("Hel", FinishReason.CANCELLED)


async def test_a_timeout_around_reading_stays_a_timeout(client: AsyncClient, router: ScriptedRouter) -> None:
    router.will(Hold())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await client.generate("Hi").read()
    assert await hung_up(router)


async def test_another_task_may_close_an_answer_that_is_being_read(
    client: AsyncClient, router: ScriptedRouter
) -> None:
    router.will(delta(0, [10], "Hel"), Hold())
    answer = client.generate("Hi")
    await anext(answer)
    reader = asyncio.create_task(answer.read())
    await asyncio.sleep(0.01)
    await answer.close()
    assert (await reader).text == "Hel"


async def test_closing_interrupts_the_wait_before_a_repeat(
    client: AsyncClient, router: ScriptedRouter
) -> None:
    router.will(failure(grpc.StatusCode.UNAVAILABLE, retryable=True))
    answer = client.generate("Hi")
    reader = asyncio.create_task(answer.read())
    while not router.requests:
        await asyncio.sleep(0.01)
    await answer.close()
    assert (await asyncio.wait_for(reader, 10)).finish_reason is FinishReason.CANCELLED


@pytest.mark.parametrize("num_read", [0, 1])
async def test_an_answer_that_is_dropped_is_hung_up_on(
    client: AsyncClient, router: ScriptedRouter, num_read: int
) -> None:
    router.will(delta(0, [10], "Hel"), Hold())
    answer = client.generate("Hi")
    while not router.requests:
        await asyncio.sleep(0.01)
    for _ in range(num_read):
        await anext(answer)
    del answer
    assert await hung_up(router)


async def test_breaking_out_of_a_loop_hangs_up(client: AsyncClient, router: ScriptedRouter) -> None:
    router.will(delta(0, [10], "Hel"), Hold())
    async for _ in client.generate("Hi"):
        break
    assert await hung_up(router)


async def test_closing_the_client_ends_its_answers_and_calls(router: ScriptedRouter) -> None:
    router.will(delta(0, [10], "Hel"), Hold())
    client = AsyncClient(router.address)
    answer = client.generate("Hi")
    await anext(answer)
    reader = asyncio.create_task(answer.read())
    router.will(Hold())
    call = asyncio.create_task(client.get("r-1"))
    while len(router.requests) < 2:
        await asyncio.sleep(0.01)
    await client.close()
    for waiting in (reader, call):
        with pytest.raises(Cancelled):
            await asyncio.wait_for(waiting, 10)


async def test_cancelling_a_call_without_a_stream_stays_a_cancellation(
    client: AsyncClient, router: ScriptedRouter
) -> None:
    router.will(Hold())
    call = asyncio.create_task(client.get("r-1"))
    while not router.requests:
        await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await hung_up(router)


async def test_a_closed_client_says_so(client: AsyncClient) -> None:
    await client.close()
    with pytest.raises(Cancelled, match="the client is closed"):
        client.generate("Hi")
    with pytest.raises(Cancelled, match="the client is closed"):
        await client.models()


def test_a_client_outside_of_a_loop_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncClient()


async def test_answers_are_read_side_by_side(client: AsyncClient, router: ScriptedRouter) -> None:
    for _ in range(6):
        router.will(*HELLO)
    answers = await asyncio.gather(*(client.generate("Hi").read() for _ in range(6)))
    assert [answer.text for answer in answers] == ["Hello"] * 6
    assert len({answer.request_id for answer in answers}) == 6


async def test_the_calls_without_a_stream(client: AsyncClient, router: ScriptedRouter) -> None:
    router.will(wire.GetResponse(request_id="r-1", state=wire.REQUEST_STATE_DECODING, completion_tokens=[3]))
    router.will(LOST)
    router.will(wire.TokenizeResponse(token_ids=[1, 2]))
    info = await client.get("r-1")
    assert (info.state, info.completion_tokens, info.error) == (RequestState.DECODING, (3,), None)
    assert await client.tokenize([Message("user", "Hi")]) == [1, 2]
    assert await client.models() == [Model(name="tiny", architecture="llama", max_context=2048, digest="abc")]
    assert (await client.status()).running_requests == 2
    assert await client.cancel("r-1") is True


async def test_failures_of_calls_without_a_stream(client: AsyncClient, router: ScriptedRouter) -> None:
    router.will(failure(grpc.StatusCode.NOT_FOUND, message="no such request"))
    with pytest.raises(NotFound, match="no such request"):
        await client.get("r-1")
    for _ in range(3):
        router.will(LOST)
    with pytest.raises(Unavailable):
        await client.tokenize("Hi")
