"""The client that takes the cluster at its word: what a router says wrongly must show, whatever the SDK makes of it."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest

from bench.chaos_load import Turn
from bench.chaos_stream import StrictStream
from bench.chaos_verdict import ChoiceSeen, End, Outcome
from headrace.v1 import inference_pb2 as pb

pytestmark = pytest.mark.unit

ACCEPTED = pb.GenerateResponse(accepted=pb.Accepted(resume_handle=b"handle"))
DONE = pb.GenerateResponse(done=pb.Done())
LOST = grpc.StatusCode.UNAVAILABLE


def delta(first_index: int, *token_ids: int, choice: int = 0) -> pb.GenerateResponse:
    text = "".join(f"{token_id} " for token_id in token_ids)
    return pb.GenerateResponse(
        delta=pb.Delta(choice=choice, first_index=first_index, token_ids=token_ids, text=text)
    )


def finished(num_tokens: int, choice: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        choice_finished=pb.ChoiceFinished(
            choice=choice, reason=pb.FINISH_REASON_LENGTH, num_tokens=num_tokens
        )
    )


class Failure(grpc.aio.AioRpcError):
    def __init__(self, code: grpc.StatusCode, cause: str = "", retryable: bool = False) -> None:
        detail = pb.ErrorDetail(cause=cause, retryable=retryable).SerializeToString()
        trailing = (("headrace-error-bin", detail),) if cause else ()
        super().__init__(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details=cause)


class Call:
    def __init__(self, script: Sequence[Any]) -> None:
        self._script = script

    def cancel(self) -> bool:
        return True

    async def __aiter__(self) -> AsyncIterator[pb.GenerateResponse]:
        for event in self._script:
            if isinstance(event, Exception):
                raise event
            yield event


class Stub:
    """Gives one script after the other; `asked` are the requests."""

    def __init__(self, *scripts: Sequence[Any]) -> None:
        self._scripts = list(scripts)
        self.asked: list[pb.GenerateRequest] = []

    def Generate(self, request: pb.GenerateRequest, **_: Any) -> Call:
        self.asked.append(pb.GenerateRequest.FromString(request.SerializeToString()))
        return Call(self._scripts.pop(0))


class Always(random.Random):
    """Draws one number."""

    def __init__(self, drawn: float) -> None:
        super().__init__()
        self._drawn = drawn

    def random(self) -> float:
        return self._drawn


FROM_START, FROM_HERE = Always(0.9), Always(0.1)


async def read(
    *scripts: Sequence[Any], rng: random.Random = FROM_START, n: int = 1, left_s: float = 60.0
) -> tuple[Outcome, Stub]:
    now, stub = time.monotonic(), Stub(*scripts)
    outcome = Outcome(name="r", sent_s=now, deadline_s=now + left_s, choices=[ChoiceSeen() for _ in range(n)])
    await StrictStream([stub], (), [1, 2], Turn((1, 2), {"n": n}), outcome, rng).read()
    return outcome, stub


async def test_an_answer_in_order_is_whole() -> None:
    outcome, _ = await read([ACCEPTED, delta(0, 5, 6), delta(2, 7), finished(3), DONE])
    assert (outcome.end, outcome.cause, outcome.num_repeated, outcome.num_skipped) == (End.FINISHED, "", 0, 0)
    assert (outcome.choices[0].token_ids, outcome.choices[0].text) == ([5, 6, 7], "5 6 7 ")
    assert len(outcome.token_times) == 3


@pytest.mark.parametrize(
    ("again", "num_repeated"), [(delta(1, 6), 1), (delta(0, 5, 6), 2), (delta(1, 6, 7), 1)]
)
async def test_a_token_that_comes_twice_on_one_connection_is_counted(
    again: pb.GenerateResponse, num_repeated: int
) -> None:
    outcome, _ = await read([ACCEPTED, delta(0, 5, 6), again, Failure(LOST, "GONE")])
    assert outcome.num_repeated == num_repeated


async def test_an_index_that_is_left_out_is_counted() -> None:
    outcome, _ = await read([ACCEPTED, delta(0, 5), delta(3, 8), Failure(LOST, "GONE")])
    assert outcome.num_skipped == 2


async def test_a_second_connection_from_the_start_brings_the_same_again() -> None:
    outcome, stub = await read(
        [ACCEPTED, delta(0, 5, 6), Failure(LOST)], [ACCEPTED, delta(0, 5, 6, 7), finished(3), DONE]
    )
    assert (outcome.end, outcome.num_repeated, outcome.num_changed) == (End.FINISHED, 0, 0)
    assert (outcome.choices[0].token_ids, outcome.choices[0].text) == ([5, 6, 7], "5 6 7 ")
    assert (stub.asked[1].next_index, stub.asked[1].resume_handle) == (0, b"handle")


async def test_a_second_connection_from_where_it_stood_goes_on_there() -> None:
    outcome, stub = await read(
        [ACCEPTED, delta(0, 5, 6), Failure(LOST)],
        [ACCEPTED, delta(2, 7), finished(3), DONE],
        rng=FROM_HERE,
    )
    assert (outcome.end, outcome.num_skipped) == (End.FINISHED, 0)
    assert stub.asked[1].next_index == 2
    assert outcome.choices[0].token_ids == [5, 6, 7]
    assert outcome.choices[0].text is None


async def read_by_two(
    first: Sequence[Sequence[Any]], second: Sequence[Sequence[Any]]
) -> tuple[Outcome, Stub]:
    """By routers with these scripts; also the second one."""
    now, stubs = time.monotonic(), [Stub(*first), Stub(*second)]
    outcome = Outcome(name="r", sent_s=now, deadline_s=now + 60.0, choices=[ChoiceSeen()])
    await StrictStream(stubs, (), [1, 2], Turn((1, 2), {}), outcome, FROM_HERE).read()
    return outcome, stubs[1]


async def test_where_a_router_is_gone_the_next_one_is_asked_to_take_the_answer_over() -> None:
    outcome, second = await read_by_two(
        [[ACCEPTED, delta(0, 5, 6), Failure(LOST)]], [[ACCEPTED, delta(2, 7), finished(3), DONE]]
    )
    assert (outcome.end, outcome.choices[0].token_ids) == (End.FINISHED, [5, 6, 7])
    assert (second.asked[0].next_index, second.asked[0].resume_handle) == (2, b"handle")


async def test_a_router_that_answers_is_asked_again() -> None:
    again = Failure(LOST, "OVERLOADED", retryable=True)
    outcome, second = await read_by_two([[again], [ACCEPTED, delta(0, 5), finished(1), DONE]], [])
    assert (outcome.end, second.asked) == (End.FINISHED, [])


async def test_with_two_choices_it_stands_where_the_shorter_one_does() -> None:
    outcome, stub = await read(
        [ACCEPTED, delta(0, 5, 6), delta(0, 9, choice=1), Failure(LOST)],
        [ACCEPTED, delta(1, 6), finished(2), delta(1, 8, choice=1), finished(2, choice=1), DONE],
        rng=FROM_HERE, n=2,
    )  # fmt: skip
    assert stub.asked[1].next_index == 1
    assert (outcome.end, outcome.num_repeated) == (End.FINISHED, 0)
    assert [choice.token_ids for choice in outcome.choices] == [[5, 6], [9, 8]]


async def test_a_second_connection_that_says_otherwise_is_counted() -> None:
    outcome, _ = await read(
        [ACCEPTED, delta(0, 5, 6), Failure(LOST)], [ACCEPTED, delta(0, 5, 4), finished(2), DONE]
    )
    assert outcome.num_changed == 1


@pytest.mark.parametrize(
    "script",
    [
        [delta(0, 5)],
        [ACCEPTED, ACCEPTED],
        [ACCEPTED, delta(0, 5), finished(2)],
        [ACCEPTED, delta(0, 5), finished(1), finished(1)],
        [ACCEPTED, delta(0, 5), DONE],
        [ACCEPTED, delta(0, 5), finished(1), DONE, delta(1, 6)],
        [ACCEPTED, delta(0, 5)],
    ],
    ids=[
        "no accepted",
        "accepted twice",
        "end too early",
        "two ends",
        "done early",
        "more behind",
        "no done",
    ],
)
async def test_a_broken_contract_is_a_failure(script: list[pb.GenerateResponse]) -> None:
    outcome, _ = await read(script)
    assert outcome.end is End.FAILED
    assert "BROKEN_CONTRACT" in outcome.cause


async def test_what_may_not_be_tried_again_is_a_failure() -> None:
    outcome, stub = await read([ACCEPTED, Failure(grpc.StatusCode.INTERNAL, "NONFINITE")])
    assert (outcome.end, len(stub.asked)) == (End.FAILED, 1)
    assert "NONFINITE" in outcome.cause


async def test_a_deadline_that_passed_ends_it_and_one_that_did_not_is_a_failure() -> None:
    told = Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    on_time, _ = await read([ACCEPTED, told], left_s=0.2)
    assert on_time.end is End.DEADLINE
    too_early, _ = await read([ACCEPTED, told])
    assert too_early.end is End.FAILED
