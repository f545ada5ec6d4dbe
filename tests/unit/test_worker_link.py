"""What a worker says to a router, in which order, and what survives a broken stream."""

from __future__ import annotations

import asyncio

import pytest

from headrace.v1 import inference_pb2, worker_pb2
from worker.block_journal import BlockJournal
from worker.link import MAX_CONTROL_MESSAGES, RouterLink

pytestmark = pytest.mark.unit


class Source:
    """Tokens by number."""

    def __init__(self, request_id: str) -> None:
        self.key = worker_pb2.RequestKey(request_id=request_id)
        self.unsent: list[int] = []

    def take(self) -> list[worker_pb2.ChoiceOutput]:
        tokens, self.unsent = self.unsent, []
        delta = inference_pb2.Delta(token_ids=tokens)
        return [worker_pb2.ChoiceOutput(key=self.key, delta=delta)] if tokens else []


def _link(leases: list[int] | None = None, journal: BlockJournal | None = None) -> RouterLink:
    return RouterLink(
        "router",
        1,
        lambda: worker_pb2.WorkerReport(leases=(leases or [0])[0]),
        journal or BlockJournal(),
    )


def _journal(num_blocks: int) -> BlockJournal:
    journal = BlockJournal(max_keys_per_message=1)
    for number in range(num_blocks):
        journal.named(bytes([number]) * 16, 0)
    return journal


def _control(request_id: str) -> worker_pb2.WorkerMessage:
    return worker_pb2.WorkerMessage(reserved=worker_pb2.Reserved(key={"request_id": request_id}))


async def _written(link: RouterLink, stream: object, num_messages: int) -> list[worker_pb2.WorkerMessage]:
    messages = link.messages(stream)
    return [await asyncio.wait_for(anext(messages), 5) for _ in range(num_messages)]


def _kinds(messages: list[worker_pb2.WorkerMessage]) -> list[str | None]:
    return [message.WhichOneof("message") for message in messages]


async def test_control_goes_before_reports_and_reports_before_blocks_and_tokens() -> None:
    link, source = _link(), Source("a")
    source.unsent = [1]
    link.mark(source)
    link.report_soon()
    link.send(_control("a"))
    assert _kinds(await _written(link, link.attach(), 4)) == ["reserved", "report", "blocks", "step"]


async def test_a_report_counts_what_was_granted_before_it_is_written() -> None:
    leases = [0]
    link = _link(leases)
    link.report_soon()
    link.send(_control("a"))
    leases[0] = 1
    _, report = await _written(link, link.attach(), 2)
    assert report.report.leases == 1


async def test_steps_that_nobody_could_write_become_one_message() -> None:
    link, one, two = _link(), Source("a"), Source("b")
    for token in range(3):
        for source in (one, two):
            source.unsent.append(token)
            link.mark(source, step_s=0.01)
    _, message = await _written(link, link.attach(), 2)
    assert [list(output.delta.token_ids) for output in message.step.outputs] == [[0, 1, 2], [0, 1, 2]]
    assert message.step.step_s == 0.01


async def test_a_source_that_was_unmarked_is_not_asked() -> None:
    link, source = _link(), Source("a")
    source.unsent = [1]
    link.mark(source)
    link.unmark(source)
    link.send(_control("end"))
    assert _kinds(await _written(link, link.attach(), 1)) == ["reserved"]
    assert source.unsent == [1]


async def test_what_was_not_written_waits_for_the_next_stream() -> None:
    link, source = _link(), Source("a")
    first = link.attach()
    link.send(_control("a"))
    source.unsent = [7]
    link.mark(source)
    assert link.detach(first)
    assert not link.connected
    assert link.generation == 1
    assert _kinds(await _written(link, link.attach(), 3)) == ["reserved", "blocks", "step"]


async def test_a_newer_stream_ends_the_older_one() -> None:
    link = _link()
    old = link.attach()
    reading = asyncio.create_task(_written(link, old, 2))
    await asyncio.sleep(0)
    link.attach()
    with pytest.raises(StopAsyncIteration):
        await reading
    assert not link.detach(old)
    assert link.connected


async def test_a_closed_link_writes_what_waits_and_ends() -> None:
    link = _link()
    stream = link.attach()
    link.send(_control("last word"))
    link.close()
    assert [message async for message in link.messages(stream)] == [_control("last word")]
    assert not link.connected


async def test_a_reader_waits_while_too_many_answers_are_not_written() -> None:
    link = _link()
    stream = link.attach()
    await asyncio.wait_for(link.room(), 5)
    for number in range(MAX_CONTROL_MESSAGES):
        link.send(_control(str(number)))
    waiting = asyncio.create_task(link.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    await _written(link, stream, MAX_CONTROL_MESSAGES // 2 + 1)
    await asyncio.wait_for(waiting, 5)


async def test_the_pages_of_a_snapshot_and_the_tokens_take_turns() -> None:
    link, source = _link(journal=_journal(3)), Source("a")
    messages = link.messages(link.attach())
    kinds = []
    for token in range(6):
        source.unsent.append(token)
        link.mark(source)
        kinds.append((await asyncio.wait_for(anext(messages), 5)).WhichOneof("message"))
    assert kinds == ["blocks", "step", "blocks", "step", "blocks", "step"]


async def test_each_stream_begins_with_a_snapshot_and_each_report_brings_news() -> None:
    journal = _journal(1)
    link = _link(journal=journal)
    for _ in range(2):
        stream = link.attach()
        [first] = await _written(link, stream, 1)
        assert first.blocks.number == 1
        assert first.blocks.is_snapshot
        journal.named(bytes([journal.num_blocks]) * 16, 0)
        link.report_soon()
        _, second = await _written(link, stream, 2)
        assert (second.blocks.number, len(second.blocks.changes[0].keys)) == (2, 16)
        link.detach(stream)
    assert not journal._streams


async def test_a_router_that_lost_track_is_told_all_again() -> None:
    link = _link(journal=_journal(1))
    link.snapshot_blocks()  # before there is a stream
    stream = link.attach()
    await _written(link, stream, 1)
    link.snapshot_blocks()
    link.snapshot_blocks()
    link.send(_control("a"))
    messages = await _written(link, stream, 2)
    assert _kinds(messages) == ["reserved", "blocks"]
    assert messages[1].blocks.is_snapshot


async def test_a_closed_link_is_not_collected_for() -> None:
    journal = _journal(1)
    link = _link(journal=journal)
    link.attach()
    link.close()
    assert not journal._streams
