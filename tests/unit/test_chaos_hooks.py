"""What is done to a process from within: messages twice and late, a disk that is full, a clock that jumps."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path
from typing import Any

import pytest

from bench.chaos_hooks import FREE_BYTES, DisturbedService, FullDisk, Jump, Mischief, RepeatedTokens
from headrace.v1 import worker_pb2
from worker.block_journal import BlockJournal
from worker.link import RouterLink

pytestmark = pytest.mark.unit

RESERVE = worker_pb2.RouterMessage(reserve=worker_pb2.Reserve())
RESUME = worker_pb2.RouterMessage(resume=worker_pb2.ResumeStream())


class Always(random.Random):
    def __init__(self, drawn: float) -> None:
        super().__init__()
        self._drawn = drawn

    def random(self) -> float:
        return self._drawn

    def uniform(self, low: float, high: float) -> float:
        return low


ALL, NONE = Always(0.0), Always(0.99)


class Service:
    """Notes what it is told."""

    num_requests = 3

    def __init__(self) -> None:
        self.told: list[worker_pb2.RouterMessage] = []
        self.links: list[Any] = []
        self.disowned: list[Any] = []

    def handle(self, link: Any, message: worker_pb2.RouterMessage) -> bool:
        self.told.append(message)
        self.links.append(link)
        return False

    def disown(self, link: Any, _cause: str, _before: int) -> None:
        self.disowned.append(link)


class Tokens:
    def take(self) -> list[worker_pb2.ChoiceOutput]:
        return [worker_pb2.ChoiceOutput()]


def link() -> RouterLink:
    return RouterLink("r", 1, worker_pb2.WorkerReport, BlockJournal())


def disturbed(rng: random.Random, *, is_on: bool = True) -> tuple[Service, DisturbedService]:
    service = Service()
    return service, DisturbedService(service, asyncio.get_running_loop(), Mischief(rng, is_on))  # type: ignore[arg-type]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_in_peace_every_message_comes_once_and_at_once() -> None:
    service, service_disturbed = disturbed(ALL, is_on=False)
    assert not service_disturbed.handle(link(), RESERVE)
    await settle()
    assert service.told == [RESERVE]
    assert service_disturbed.num_requests == 3


async def test_a_reserve_may_come_late_and_a_resume_twice_but_never_late() -> None:
    service, service_disturbed = disturbed(ALL)
    router = link()
    assert service_disturbed.handle(router, RESERVE)
    assert service.told == []
    await settle()
    assert service.told == [RESERVE]
    assert not service_disturbed.handle(router, RESUME)
    assert service.told == [RESERVE, RESUME]
    await settle()
    assert service.told == [RESERVE, RESUME, RESUME]


async def test_nothing_late_reaches_a_link_that_is_closed() -> None:
    service, service_disturbed = disturbed(ALL)
    router = link()
    service_disturbed.handle(router, RESERVE)
    router.close()
    await settle()
    assert service.told == []


async def test_a_link_is_the_same_to_the_service_each_time() -> None:
    service, service_disturbed = disturbed(NONE)
    router = link()
    service_disturbed.handle(router, RESERVE)
    service_disturbed.handle(router, RESUME)
    service_disturbed.disown(router, "LOST", 1)
    assert service.links[0] is service.links[1] is service.disowned[0]
    assert service.links[0].router_id == "r"


async def test_what_the_service_says_is_said_again() -> None:
    service, service_disturbed = disturbed(ALL)
    router = link()
    stream = router.attach()
    service_disturbed.handle(router, RESUME)
    service.links[0].send(worker_pb2.WorkerMessage(reserved=worker_pb2.Reserved()))
    await settle()
    router.close()
    said = [message.WhichOneof("message") async for message in router.messages(stream)]
    assert said.count("reserved") == 2


def test_tokens_may_come_twice_and_their_source_is_known_again() -> None:
    source, on = Tokens(), Mischief(ALL, is_on=True)
    assert len(RepeatedTokens(source, on).take()) == 2
    assert len(RepeatedTokens(source, Mischief(NONE, is_on=True)).take()) == 1
    assert {RepeatedTokens(source, on): None}.keys() == {RepeatedTokens(source, on)}
    assert RepeatedTokens(source, on) != RepeatedTokens(Tokens(), on)


def test_a_full_disk_tears_a_file_and_has_room_again(tmp_path: Path) -> None:
    disk = FullDisk()
    disk.is_full = True
    with pytest.raises(OSError) as raised:
        disk.write_new(tmp_path / "a", [b"x" * 3000, b"y" * 3000, b"z" * 3000])
    assert raised.value.errno == errno.ENOSPC
    assert (tmp_path / "a").read_bytes() == b"x" * 3000 + b"y" * (FREE_BYTES - 3000)
    disk.is_full = False
    assert disk.write_new(tmp_path / "b", [b"x" * 9000]).size == 9000


def test_all_clocks_of_a_worker_jump_together_and_go_on() -> None:
    jump, told = Jump(), iter(range(100, 200, 10))
    one, other = jump.over(lambda: next(told)), jump.over(lambda: 5.0)
    assert (one(), other()) == (100.0, 5.0)
    jump.ahead_s += 1000.0
    assert (one(), other()) == (1110.0, 1005.0)
    jump.ahead_s -= 2000.0
    assert (one(), other()) == (-880.0, -995.0)
