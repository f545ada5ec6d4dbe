"""Answers through a real router and scripted workers: the ways on which all goes well."""

from collections.abc import AsyncIterator

import pytest

from headrace.v1 import inference_pb2 as pb
from headrace.v1 import worker_pb2
from tests.integration.router_harness import STOP, Harness, running_router

pytestmark = pytest.mark.integration


@pytest.fixture
async def router() -> AsyncIterator[Harness]:
    async with running_router() as harness:
        yield harness


async def test_a_disaggregated_request_goes_through_both_workers(router: Harness):
    prefill, decode = await router.pair()
    stream = router.generate("hello", request_id="one", sampling=pb.SamplingParams(seed=7, max_tokens=9))

    reserve = await decode.expect("reserve")
    assert (reserve.key.tenant, reserve.key.request_id, reserve.key.attempt) == ("default", "one", 1)
    assert not reserve.local_prefill and 0 < reserve.remaining_s <= 600
    assert list(reserve.task.prompt_token_ids) == list(b"hello")
    assert list(reserve.task.eos_token_ids) == [0] and reserve.task.fidelity == "exact"
    sampling = reserve.task.sampling
    assert (sampling.seed, sampling.max_tokens, sampling.n, sampling.temperature) == (7, 9, 1, 1.0)
    assert prefill.pending() == []

    decode.grant(reserve, cached_tokens=2)
    start = await prefill.expect("start_prefill")
    assert start.key == reserve.key and start.task == reserve.task
    assert start.lease.lease_id == b"l" * 16 and start.lease.kv_address == "d:1"
    await router.until_state("one", pb.REQUEST_STATE_PREFILLING)

    prefill.finish_prefill(
        start.key, prefill_s=0.5, transfer_s=0.25, handoff_s=0.125, computed_tokens=3,
        transferred_tokens=4, kv_bytes=1000, wire_bytes=1100,
    )  # fmt: skip
    await router.until_state("one", pb.REQUEST_STATE_DECODING)
    decode.say(start.key, 0, "w")
    decode.say(start.key, 1, "or")
    decode.say(start.key, 3, "ld", finish=STOP)

    answer = await stream.end()
    assert answer.accepted == pb.Accepted(
        request_id="one", prompt_tokens=5, seed=7, resume_handle=answer.accepted.resume_handle
    )
    assert answer.accepted.resume_handle
    assert answer.text == {0: "world"} and answer.token_ids == {0: list(b"world")}
    assert (answer.finished[0].reason, answer.finished[0].num_tokens) == (STOP, 5)
    assert answer.done.usage == pb.Usage(
        prompt_tokens=5, completion_tokens=5, cached_tokens=2, computed_tokens=3, transferred_tokens=4,
        kv_bytes=1000, wire_bytes=1100,
    )  # fmt: skip
    timing = answer.done.timing
    assert (timing.prefill_s, timing.transfer_s, timing.handoff_s) == (0.5, 0.25, 0.125)
    assert (timing.prefill_worker, timing.decode_worker) == ("p", "d")
    assert timing.total_s >= timing.ttft_s > 0
    seen = (await decode.expect("acknowledge")).seen
    assert (seen[-1].key.request_id, seen[-1].next_index) == ("one", 5)
    assert decode.pending() == prefill.pending() == []


async def test_one_worker_of_both_roles_prefills_for_itself(router: Harness):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    stream = router.generate(request_id="one")
    reserve = await worker.expect("reserve")
    assert reserve.local_prefill
    worker.grant(reserve, cached_tokens=4)
    worker.say(reserve.key, 0, "hi", finish=STOP)
    answer = await stream.end()
    assert answer.text == {0: "hi"}
    usage = answer.done.usage
    assert (usage.cached_tokens, usage.computed_tokens, usage.transferred_tokens) == (4, 1, 0)
    assert answer.done.timing.prefill_worker == answer.done.timing.decode_worker == "b"
    assert answer.done.timing.prefill_s > 0


async def test_figures_of_a_prefill_worker_that_come_last_are_waited_for(router: Harness):
    prefill, decode = await router.pair()
    stream = router.generate(request_id="one")
    reserve = await decode.expect("reserve")
    decode.grant(reserve)
    start = await prefill.expect("start_prefill")
    decode.say(reserve.key, 0, "x", finish=STOP)
    await stream.until("x")
    assert (await router.get("one")).state == pb.REQUEST_STATE_DECODING
    prefill.finish_prefill(start.key, kv_bytes=77, computed_tokens=5)
    assert (await stream.end()).done.usage.kv_bytes == 77


async def test_figures_that_never_come_do_not_hold_the_answer_back(router: Harness):
    prefill, decode = await router.pair()
    stream = router.generate(request_id="one")
    reserve = await decode.expect("reserve")
    decode.grant(reserve)
    await prefill.expect("start_prefill")
    decode.say(reserve.key, 0, "x", finish=STOP)
    assert (await stream.end()).done.usage.completion_tokens == 1


async def test_several_choices_come_side_by_side_and_end_each(router: Harness):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    stream = router.generate(request_id="one", sampling=pb.SamplingParams(n=2))
    reserve = await worker.expect("reserve")
    assert reserve.task.sampling.n == 2
    worker.grant(reserve)
    worker.say(reserve.key, 0, "a", choice=0)
    worker.say(reserve.key, 0, "bb", choice=1, finish=STOP)
    worker.say(reserve.key, 1, "aa", choice=0, finish=pb.FINISH_REASON_LENGTH)
    answer = await stream.end()
    assert answer.text == {0: "aaa", 1: "bb"}
    assert answer.finished[0].reason == pb.FINISH_REASON_LENGTH
    assert answer.done.usage.completion_tokens == 5


async def test_a_chat_is_rendered_through_the_template(router: Harness):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    stream = router.chat(("system", "be"), ("user", "hi"), request_id="one")
    reserve = await worker.expect("reserve")
    assert bytes(reserve.task.prompt_token_ids) == b"<system>be<user>hi"
    worker.grant(reserve)
    worker.say(reserve.key, 0, "ok", finish=STOP)
    assert (await stream.end()).text == {0: "ok"}


async def test_token_ids_are_taken_as_they_are(router: Harness):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    router.generate(request_id="one", text=None, token_ids=pb.TokenIds(ids=[5, 0, 299]))
    reserve = await worker.expect("reserve")
    assert list(reserve.task.prompt_token_ids) == [5, 0, 299]


async def test_what_the_caller_leaves_open_is_filled_in(router: Harness):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    first, second = router.generate(), router.generate()
    one, two = await worker.expect("reserve"), await worker.expect("reserve")
    assert one.task.sampling.max_tokens == 256 - 5
    assert one.task.sampling.seed != two.task.sampling.seed
    assert one.key.request_id != two.key.request_id
    accepted = {(await s.until("accepted")).accepted.request_id for s in (first, second)}
    assert accepted == {one.key.request_id, two.key.request_id}


async def test_a_long_prompt_is_tokenized_aside():
    async with running_router(max_context=40_000) as large:
        worker = await large.worker("b", worker_pb2.ROLE_BOTH, max_context=40_000, num_blocks=4000)
        stream = large.generate("x" * 20_000, request_id="long")
        reserve = await worker.expect("reserve")
        assert len(reserve.task.prompt_token_ids) == 20_000
        worker.grant(reserve)
        worker.say(reserve.key, 0, "y", finish=STOP)
        assert (await stream.end()).text == {0: "y"}


async def test_requests_wait_while_credits_are_out_and_go_on_in_order(router: Harness):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH, max_sequences=1)
    first = router.generate(request_id="first")
    reserve = await worker.expect("reserve")
    second = router.generate(request_id="second")
    await second.until("accepted")
    third = router.generate(request_id="third")
    await third.until("accepted")
    assert (await router.get("second")).state == pb.REQUEST_STATE_QUEUED
    assert worker.pending() == []
    for stream, name in ((first, "first"), (second, "second"), (third, "third")):
        assert reserve.key.request_id == name
        worker.grant(reserve)
        worker.say(reserve.key, 0, "x", finish=STOP)
        answer = await stream.end()
        assert answer.text == {0: "x"}
        if name != "third":
            reserve = await worker.expect("reserve")
    assert answer.done.timing.queue_s > 0


async def test_tokens_of_many_requests_in_one_step_reach_each(router: Harness):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    streams = {name: router.generate(request_id=name) for name in "abcd"}
    step = worker_pb2.StepOutput()
    for _ in streams:
        reserve = await worker.expect("reserve")
        worker.grant(reserve)
        name = reserve.key.request_id
        step.outputs.add(
            key=reserve.key,
            delta=pb.Delta(token_ids=[1], text=name),
            finished=pb.ChoiceFinished(reason=STOP, num_tokens=1),
        )
    worker.send(step=step)
    for name, stream in streams.items():
        assert (await stream.end()).text == {0: name}


async def test_models_and_tokenize_answer_without_workers(router: Harness):
    (model,) = (await router.inference.Models(pb.ModelsRequest())).models
    assert model == pb.Model(name="tiny", architecture="Tiny", max_context=256, digest="weights")
    tokens = await router.inference.Tokenize(pb.TokenizeRequest(text="né"))
    assert list(tokens.token_ids) == list("né".encode())
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="x")])
    tokens = await router.inference.Tokenize(pb.TokenizeRequest(chat=chat))
    assert bytes(tokens.token_ids) == b"<user>x"
