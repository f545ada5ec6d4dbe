"""Cached blocks that a worker loads from another one instead of computing them, and what may go wrong on the way."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from headrace.v1 import kvtransfer_pb2, worker_pb2
from tests.integration.test_worker_fencing import TurnedClock
from tests.scripted_router import Choice, SessionClient, generate_locally, hand_over, request_key, task
from tests.tiny_model import make_tiny_model
from tests.worker_nodes import (
    PATIENCE_S,
    GatherGate,
    ScatterGate,
    assert_nothing_held,
    expect_computing_to_win,
    expect_loading_to_win,
    random_prompt,
    session,
    start_worker,
    wait_until,
    worker,
)
from worker.config import WorkerRole
from worker.loading import STALL_S
from worker.node import WorkerNode

pytestmark = pytest.mark.integration

BLOCK = 64
LONG = 5 * BLOCK + 20
ELSEWHERE = 4 * BLOCK


class Workers(NamedTuple):
    """A prefill and a decode worker, and one that computes everything alone, for comparison and as a source."""

    prefill: WorkerNode
    decode: WorkerNode
    alone: WorkerNode


class Clients(NamedTuple):
    prefill: SessionClient
    decode: SessionClient
    alone: SessionClient


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def nodes(model_dir: Path) -> Iterator[Workers]:
    with (
        worker(model_dir, WorkerRole.PREFILL, max_prompts=8) as prefill,
        worker(model_dir, WorkerRole.DECODE) as decode,
        worker(model_dir, WorkerRole.BOTH) as alone,
    ):
        yield Workers(prefill, decode, alone)


@pytest.fixture
def clients(nodes: Workers) -> Iterator[Clients]:
    with session(nodes.prefill) as prefill, session(nodes.decode) as decode, session(nodes.alone) as alone:
        yield Clients(prefill, decode, alone)
    assert_nothing_held(*nodes)
    [service] = nodes.prefill._services
    wait_until(lambda: not any(service._channels._uses.values()), "channels to be given back")


def _source(node: WorkerNode, **fields: object) -> worker_pb2.CacheSource:
    named = {"kv_address": node.kv_address, "epoch": node.epoch, "cached_tokens": ELSEWHERE, **fields}
    return worker_pb2.CacheSource(**named)


def _cancel(client: SessionClient, key: worker_pb2.RequestKey) -> None:
    client.send(cancel=worker_pb2.CancelAttempt(key=key, cause="CLIENT_CANCELLED"))


def _only(choices: list[Choice]) -> list[int]:
    [choice] = choices
    return choice.token_ids


# --- what is loaded ----------------------------------------------------------------------------


def test_the_next_turn_of_a_chat_computes_and_moves_its_new_tokens_alone(
    nodes: Workers, clients: Clients
) -> None:
    prompt = random_prompt(1, 150)
    hand_over(clients.prefill, clients.decode, request_key("turn 1"), task(prompt, max_tokens=120))
    said = _only(clients.decode.answer(request_key("turn 1")))
    longer = [*prompt, *said, *random_prompt(2, 40)]
    in_cache = (150 + 119) // BLOCK * BLOCK  # the last token of an answer is drawn, not computed

    expect_loading_to_win(nodes.prefill, nodes.decode.kv_address)
    turn_2 = request_key("turn 2")
    lease = hand_over(clients.prefill, clients.decode, turn_2, task(longer))
    answer = _only(clients.decode.answer(turn_2))
    finished = clients.prefill.prefill_finished(turn_2)

    assert lease.cached_tokens == in_cache == 256
    assert (finished.cached_tokens, finished.computed_tokens) == (in_cache, len(longer) - in_cache)
    assert finished.fetched_tokens == in_cache - 150 // BLOCK * BLOCK
    assert finished.fetched_from == nodes.decode.kv_address
    assert finished.transferred_tokens == len(longer) - in_cache
    assert answer == _only(generate_locally(clients.alone, turn_2, task(longer)))


def test_a_worker_that_the_router_names_serves_what_the_decode_worker_lacks(
    nodes: Workers, clients: Clients
) -> None:
    prompt = random_prompt(3, LONG)
    generate_locally(clients.alone, request_key("elsewhere"), task(prompt))
    expect_loading_to_win(nodes.prefill, nodes.alone.kv_address)
    key = request_key("with a source")
    hand_over(clients.prefill, clients.decode, key, task(prompt), sources=[_source(nodes.alone)])
    answer = _only(clients.decode.answer(key))
    finished = clients.prefill.prefill_finished(key)
    assert (finished.fetched_tokens, finished.fetched_from) == (ELSEWHERE, nodes.alone.kv_address)
    assert finished.computed_tokens == LONG - ELSEWHERE
    assert answer == _only(generate_locally(clients.alone, key, task(prompt)))


def test_where_computing_is_faster_nothing_is_loaded(nodes: Workers, clients: Clients) -> None:
    prompt = random_prompt(4, LONG)
    generate_locally(clients.alone, request_key("slow to load"), task(prompt))
    expect_computing_to_win(nodes.prefill, nodes.alone.kv_address)
    key = request_key("computed")
    hand_over(clients.prefill, clients.decode, key, task(prompt), sources=[_source(nodes.alone)])
    clients.decode.answer(key)
    finished = clients.prefill.prefill_finished(key)
    assert (finished.fetched_tokens, finished.fetched_from, finished.computed_tokens) == (0, "", LONG)


def test_the_codec_and_why_reach_the_router_and_the_handoff(nodes: Workers, clients: Clients) -> None:
    taken: list[kvtransfer_pb2.Handoff] = []
    [keeper] = nodes.decode._keepers
    adopt = keeper.on_commit

    def keep_and_adopt(lease_id: bytes, handoff: kvtransfer_pb2.Handoff, fidelity: int) -> None:
        taken.append(handoff)
        adopt(lease_id, handoff, fidelity)

    keeper.on_commit = keep_and_adopt
    try:
        key = request_key("codec")
        hand_over(clients.prefill, clients.decode, key, task(random_prompt(5, LONG)))
        clients.decode.answer(key)
        finished = clients.prefill.prefill_finished(key)
    finally:
        keeper.on_commit = adopt
    assert finished.codec in ("raw", "split")
    assert finished.codec_reason.strip()
    assert [(each.codec, bool(each.codec_reason.strip())) for each in taken] == [(finished.codec, True)]


# --- sources that do not keep their word -------------------------------------------------------


@contextmanager
def _stale(nodes: Workers) -> Iterator[worker_pb2.CacheSource]:
    yield _source(nodes.alone, epoch=nodes.alone.epoch ^ 1)


@contextmanager
def _empty(nodes: Workers) -> Iterator[worker_pb2.CacheSource]:
    yield _source(nodes.alone)


@contextmanager
def _dead(nodes: Workers) -> Iterator[worker_pb2.CacheSource]:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port = listening.getsockname()[1]
    yield _source(nodes.alone, kv_address=f"127.0.0.1:{port}")


@contextmanager
def _silent(nodes: Workers) -> Iterator[worker_pb2.CacheSource]:
    """Takes connections, and never says a word."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        yield _source(nodes.alone, kv_address=f"127.0.0.1:{listening.getsockname()[1]}")


SOURCES: dict[str, Callable[[Workers], AbstractContextManager[worker_pb2.CacheSource]]] = {
    "of an old incarnation": _stale,
    "that holds nothing": _empty,
    "that is gone": _dead,
    "that is silent": _silent,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_that_does_not_serve_costs_the_prompt_nothing_but_time(
    nodes: Workers, clients: Clients, kind: str
) -> None:
    prompt, key = random_prompt(sum(map(ord, kind)), LONG), request_key(kind)
    with SOURCES[kind](nodes) as source:
        expect_loading_to_win(nodes.prefill, source.kv_address)
        hand_over(clients.prefill, clients.decode, key, task(prompt), sources=[source])
        answer = _only(clients.decode.answer(key))
    finished = clients.prefill.prefill_finished(key)
    assert (finished.fetched_tokens, finished.fetched_from, finished.computed_tokens) == (0, "", LONG)
    assert answer == _only(generate_locally(clients.alone, key, task(prompt)))
    assert_nothing_held(*nodes)
    if kind in (
        "that is gone",
        "that is silent",
    ):  # remembered, so that the next prompts do not wait for it, too
        assert nodes.prefill.kv.speeds.fixed_s(source.kv_address) >= STALL_S


def test_a_source_that_stands_still_is_given_up(
    nodes: Workers, clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.loading.STALL_S", 0.5)
    prompt, key = random_prompt(8, LONG), request_key("stands still")
    generate_locally(clients.alone, key, task(prompt))
    expected = _only(clients.alone.answer(key))
    expect_loading_to_win(nodes.prefill, nodes.alone.kv_address)
    gate = GatherGate(nodes.alone.engine)
    try:
        hand_over(clients.prefill, clients.decode, key, task(prompt), sources=[_source(nodes.alone)])
        assert _only(clients.decode.answer(key)) == expected
        assert gate.reached.is_set()
        assert clients.prefill.prefill_finished(key).computed_tokens == LONG
    finally:
        gate.open()


def test_a_source_that_dies_in_the_middle_leaves_the_prompt_to_be_computed(
    nodes: Workers, clients: Clients, model_dir: Path
) -> None:
    prompt, key = random_prompt(7, LONG), request_key("dies")
    source = start_worker(model_dir, WorkerRole.BOTH)
    gate = ScatterGate(nodes.prefill.engine)
    try:
        with session(source) as to_source:
            generate_locally(to_source, key, task(prompt))
        expect_loading_to_win(nodes.prefill, source.kv_address)
        hand_over(clients.prefill, clients.decode, key, task(prompt), sources=[_source(source)])
        assert gate.reached.wait(PATIENCE_S)
    finally:
        source.stop()
        gate.open()
    answer = _only(clients.decode.answer(key))
    assert clients.prefill.prefill_finished(key).computed_tokens == LONG
    assert answer == _only(generate_locally(clients.alone, key, task(prompt)))


# --- ends in the middle ------------------------------------------------------------------------


@contextmanager
def _held_fetch(
    nodes: Workers, clients: Clients, key: worker_pb2.RequestKey, seed: int, remaining_s: float = 60.0
) -> Iterator[ScatterGate]:
    """A prompt whose blocks have begun to come from `alone`, and stand still until the gate opens."""
    prompt = random_prompt(seed, LONG)
    generate_locally(clients.alone, key, task(prompt))
    expect_loading_to_win(nodes.prefill, nodes.alone.kv_address)
    gate = ScatterGate(nodes.prefill.engine)
    try:
        sources = [_source(nodes.alone)]
        hand_over(clients.prefill, clients.decode, key, task(prompt), remaining_s, sources)
        assert gate.reached.wait(PATIENCE_S)
        yield gate
    finally:
        gate.open()


def test_a_cancel_during_a_fetch_gives_everything_back(nodes: Workers, clients: Clients) -> None:
    key = request_key("cancelled")
    with _held_fetch(nodes, clients, key, 10):
        for client in (clients.prefill, clients.decode):
            _cancel(client, key)
        assert_nothing_held(nodes.decode)
    assert_nothing_held(*nodes)
    again = request_key("cancelled", attempt=2)
    hand_over(clients.prefill, clients.decode, again, task(random_prompt(10, LONG)))
    assert len(_only(clients.decode.answer(again))) == 16
    assert clients.prefill.num_failures(key) == 0


def test_a_cancel_ends_the_wait_for_a_source_that_stands_still(
    nodes: Workers, clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.loading.STALL_S", 1000.0)
    prompt, key = random_prompt(16, LONG), request_key("waits")
    generate_locally(clients.alone, key, task(prompt))
    expect_loading_to_win(nodes.prefill, nodes.alone.kv_address)
    gate = GatherGate(nodes.alone.engine)
    try:
        hand_over(clients.prefill, clients.decode, key, task(prompt), sources=[_source(nodes.alone)])
        assert gate.reached.wait(PATIENCE_S)
        for client in (clients.prefill, clients.decode):
            _cancel(client, key)
        [fetcher] = nodes.prefill._fetchers
        wait_until(lambda: not fetcher.num_open, "the end of the fetch")
        assert_nothing_held(nodes.prefill, nodes.decode)
    finally:
        gate.open()


def test_a_deadline_during_a_fetch_ends_the_request_with_its_cause(nodes: Workers, clients: Clients) -> None:
    key = request_key("late")
    with _held_fetch(nodes, clients, key, 11, remaining_s=1.0):
        error = clients.prefill.failed(key)
        assert (error.cause, error.retryable) == ("DEADLINE_EXCEEDED", False)
        clients.decode.failed(key)
    assert_nothing_held(*nodes)


def test_a_newer_attempt_takes_the_place_of_one_that_fetches(nodes: Workers, clients: Clients) -> None:
    key, newer = request_key("again", attempt=1), request_key("again", attempt=2)
    with _held_fetch(nodes, clients, key, 12):
        hand_over(clients.prefill, clients.decode, newer, task(random_prompt(12, LONG)))
        answer = _only(clients.decode.answer(newer))
    assert answer == _only(generate_locally(clients.alone, newer, task(random_prompt(12, LONG))))
    assert_nothing_held(*nodes)


def test_a_worker_that_stops_during_a_fetch_ends_the_request_and_the_fetch(
    nodes: Workers, clients: Clients, model_dir: Path
) -> None:
    key = request_key("stopped")
    stopping = start_worker(model_dir, WorkerRole.PREFILL)
    with session(stopping) as to_stopping:
        ours = Workers(stopping, nodes.decode, nodes.alone)
        with _held_fetch(ours, Clients(to_stopping, clients.decode, clients.alone), key, 13) as gate:
            stop = threading.Thread(target=stopping.stop)
            stop.start()
            assert to_stopping.failed(key).cause == "WORKER_STOPPED"
            gate.open()
            stop.join(PATIENCE_S)
            assert not stop.is_alive()
    _cancel(clients.decode, key)
    assert_nothing_held(stopping)


def test_a_fetch_that_ends_after_its_request_is_no_violation_and_a_leak_is(
    nodes: Workers, clients: Clients, model_dir: Path
) -> None:
    key = request_key("slow end")
    node = start_worker(model_dir, WorkerRole.PREFILL)
    try:
        with session(node) as to_node:
            ours = Workers(node, nodes.decode, nodes.alone)
            with _held_fetch(ours, Clients(to_node, clients.decode, clients.alone), key, 14):
                for client in (to_node, clients.decode):
                    _cancel(client, key)
                [service] = node._services
                wait_until(lambda: service.num_requests == 0, "the request's end")
                assert node.report().private_blocks > 0
                _check_idle(node)
                assert node.num_idle_violations == 0
            assert_nothing_held(node)
        assert node.engine.open_prefix(b"a leak", [b"k" * 16], 0) == 0
        _check_idle(node)
        assert node.num_idle_violations > 0
    finally:
        node.stop()


def _check_idle(node: WorkerNode) -> None:
    """Some rounds of the check that an idle engine asks for."""
    for _ in range(3):
        node.on_idle()
    done = threading.Event()
    node._loop.loop.call_soon_threadsafe(done.set)
    assert done.wait(PATIENCE_S)


# --- fencing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fenced", ["the asker", "the source"])
def test_a_fence_during_a_fetch_gives_everything_back(
    clients: Clients, nodes: Workers, model_dir: Path, fenced: str
) -> None:
    clock = TurnedClock()
    role = WorkerRole.PREFILL if fenced == "the asker" else WorkerRole.BOTH
    node = start_worker(model_dir, role, running_clock=clock)
    key = request_key(f"fence of {fenced}")
    prompt = random_prompt(15, LONG)
    try:
        with session(node) as to_node:
            if fenced == "the asker":
                ours = Workers(node, nodes.decode, nodes.alone)
                theirs = Clients(to_node, clients.decode, clients.alone)
            else:
                ours = Workers(nodes.prefill, nodes.decode, node)
                theirs = Clients(clients.prefill, clients.decode, to_node)
            epoch = node.epoch
            with _held_fetch(ours, theirs, key, 15):
                clock.ahead_s = 1000.0
                to_node.wait(lambda: to_node.ended is not None, "the session to end")
                assert node.epoch != epoch
            if fenced == "the asker":
                assert to_node.failed(key).cause == "FENCED"
                _cancel(clients.decode, key)
            else:
                answer = _only(clients.decode.answer(key))
                assert answer == _only(generate_locally(clients.alone, key, task(prompt)))
        assert_nothing_held(node, *nodes)
    finally:
        node.stop()
