"""Cancel, deadline and expiry, in every state: both workers end up with nothing held."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headrace.v1 import worker_pb2
from tests.scripted_router import SessionClient, generate_locally, hand_over, request_key, task
from tests.tiny_model import make_tiny_model
from tests.worker_nodes import (
    ScatterGate,
    StepGate,
    assert_nothing_held,
    random_prompt,
    session,
    worker,
)
from worker.config import WorkerRole
from worker.node import WorkerNode

pytestmark = pytest.mark.integration

KEY = request_key("the request")
Pair = tuple[WorkerNode, WorkerNode]
Clients = tuple[SessionClient, SessionClient]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def nodes(model_dir: Path) -> Iterator[Pair]:
    with (
        worker(model_dir, WorkerRole.PREFILL, chunk_tokens=32) as prefill,
        worker(model_dir, WorkerRole.DECODE, lease_ttl_s=1.0) as decode,
    ):
        yield prefill, decode


@pytest.fixture
def clients(nodes: Pair) -> Iterator[Clients]:
    with session(nodes[0]) as to_prefill, session(nodes[1]) as to_decode:
        yield to_prefill, to_decode


def _cancel(client: SessionClient, key: worker_pb2.RequestKey = KEY) -> None:
    client.send(cancel=worker_pb2.CancelAttempt(key=key, cause="CLIENT_CANCELLED"))


def _reserve(client: SessionClient, key: worker_pb2.RequestKey, **fields: object) -> None:
    work = task(random_prompt(0, 200), max_tokens=100)
    client.send(reserve=worker_pb2.Reserve(**{"key": key, "task": work, "remaining_s": 60.0, **fields}))


def _reserved(nodes: Pair, clients: Clients) -> Callable[[], None]:
    _reserve(clients[1], KEY)
    clients[1].reserved(KEY)
    return lambda: None


def _prefilling(nodes: Pair, clients: Clients) -> Callable[[], None]:
    gate = StepGate(nodes[0].engine)
    hand_over(*clients, KEY, task(random_prompt(0, 200), max_tokens=100))
    gate.allow(2)
    gate.wait_until_held()
    return gate.open


def _landing(nodes: Pair, clients: Clients) -> Callable[[], None]:
    gate = ScatterGate(nodes[1].engine)
    hand_over(*clients, KEY, task(random_prompt(0, 200), max_tokens=100))
    assert gate.reached.wait(30)
    return gate.open


def _decoding(nodes: Pair, clients: Clients) -> Callable[[], None]:
    gate = StepGate(nodes[1].engine)
    hand_over(*clients, KEY, task(random_prompt(0, 200), max_tokens=100))
    gate.allow(3)
    clients[1].wait(lambda: clients[1].num_tokens(KEY) == 4, "four tokens")
    gate.wait_until_held()
    return gate.open


def _wait_until_heard(decode: SessionClient) -> None:
    """All that was sent to the decode worker before."""
    marker = request_key("marker")
    decode.send(cancel=worker_pb2.CancelAttempt(key=marker, cause="MARKER"))
    _reserve(decode, marker)
    decode.failed(marker)


STATES = {"reserved": _reserved, "prefilling": _prefilling, "landing": _landing, "decoding": _decoding}


@pytest.mark.parametrize("state", STATES)
def test_a_cancel_to_both_workers_frees_everything(nodes: Pair, clients: Clients, state: str) -> None:
    let_go = STATES[state](nodes, clients)
    # The decode worker first, as the router does it, and until it has heard of it: else the other's abort may overtake
    # its cancel.
    for client in reversed(clients):
        _cancel(client)
        _cancel(client)
        if client is clients[1]:
            _wait_until_heard(client)
    let_go()
    assert_nothing_held(*nodes)
    again = request_key("the request", attempt=2)
    hand_over(*clients, again, task(random_prompt(0, 200)))
    assert len(clients[1].answer(again)[0].token_ids) == 16
    assert clients[1].num_failures(KEY) == 0


@pytest.mark.parametrize("state", ["prefilling", "landing"])
def test_a_cancel_at_decode_alone_ends_the_prefill_too(nodes: Pair, clients: Clients, state: str) -> None:
    let_go = STATES[state](nodes, clients)
    _cancel(clients[1])
    _wait_until_heard(clients[1])
    let_go()
    assert clients[0].failed(KEY).stage in ("transfer", "handoff")
    assert_nothing_held(*nodes)


@pytest.mark.parametrize("state", ["prefilling", "landing"])
def test_a_cancel_at_prefill_alone_gives_the_lease_back(nodes: Pair, clients: Clients, state: str) -> None:
    let_go = STATES[state](nodes, clients)
    _cancel(clients[0])
    let_go()
    error = clients[1].failed(KEY)
    assert (error.stage, error.cause) == ("transfer", "CLIENT_CANCELLED")
    assert_nothing_held(*nodes)


def test_a_cancel_that_comes_first_refuses_the_reserve_and_not_the_next_attempt(
    nodes: Pair, clients: Clients
) -> None:
    _cancel(clients[1])
    _reserve(clients[1], KEY)
    assert clients[1].failed(KEY).cause == "CANCELLED"
    [choice] = generate_locally(clients[1], request_key("the request", attempt=2), task(random_prompt(0, 20)))
    assert len(choice.token_ids) == 16
    assert_nothing_held(*nodes)


def test_a_cancel_that_comes_first_refuses_the_prefill(nodes: Pair, clients: Clients) -> None:
    _cancel(clients[0])
    hand_over(*clients, KEY, task(random_prompt(0, 200)))
    assert clients[0].failed(KEY).cause == "CANCELLED"
    _cancel(clients[1])
    assert_nothing_held(*nodes)


def test_a_cancel_after_the_end_changes_nothing(nodes: Pair, clients: Clients) -> None:
    hand_over(*clients, KEY, task(random_prompt(0, 70)))
    clients[1].answer(KEY)
    for client in clients:
        _cancel(client)
    assert_nothing_held(*nodes)
    assert [client.num_failures(KEY) for client in clients] == [0, 0]


def test_a_newer_attempt_replaces_the_older_one(nodes: Pair, clients: Clients) -> None:
    let_go = _prefilling(nodes, clients)
    newer = request_key("the request", attempt=2)
    hand_over(*clients, newer, task(random_prompt(0, 90)))
    let_go()
    assert len(clients[1].answer(newer)[0].token_ids) == 16
    _reserve(clients[1], KEY)
    assert clients[1].failed(KEY).cause == "STALE_ATTEMPT"
    assert_nothing_held(*nodes)
    assert nodes[1].report().refused_stale >= 1


def test_a_lease_that_nobody_fills_expires(nodes: Pair, clients: Clients) -> None:
    _reserve(clients[1], KEY)
    error = clients[1].failed(KEY)
    assert (error.stage, error.cause, error.retryable) == ("transfer", "LEASE_EXPIRED", True)
    assert_nothing_held(*nodes)


def test_a_long_prefill_keeps_its_lease(nodes: Pair, clients: Clients) -> None:
    gate = StepGate(nodes[0].engine)
    hand_over(*clients, KEY, task(random_prompt(0, 200)))
    sweeps = nodes[1].config.lease_ttl_s * 2.5 / nodes[1].config.report_interval_s
    before = len(clients[1].reports())
    clients[1].wait(lambda: len(clients[1].reports()) > before + sweeps, "time to pass")
    gate.open()
    assert len(clients[1].answer(KEY)[0].token_ids) == 16
    assert_nothing_held(*nodes)


@pytest.mark.parametrize("state", ["prefilling", "decoding"])
def test_a_deadline_ends_the_request_where_it_is(nodes: Pair, clients: Clients, state: str) -> None:
    index = 0 if state == "prefilling" else 1
    gate = StepGate(nodes[index].engine)
    hand_over(*clients, KEY, task(random_prompt(0, 200), max_tokens=100), remaining_s=2.0)
    gate.allow(2)
    error = clients[index].failed(KEY)
    gate.open()
    stage = "prefill" if state == "prefilling" else "decode"
    assert (error.cause, error.stage, error.retryable) == ("DEADLINE_EXCEEDED", stage, False)
    assert_nothing_held(*nodes)


def test_a_deadline_that_has_passed_is_refused_at_once(nodes: Pair, clients: Clients) -> None:
    _reserve(clients[1], KEY, remaining_s=0.0)
    assert clients[1].failed(KEY).cause == "DEADLINE_EXCEEDED"
    assert_nothing_held(*nodes)


class Interleaving:
    """Requests that come, go on and are cancelled in an order that a seed decides."""

    def __init__(self, clients: Clients, seed: int) -> None:
        self._clients = clients
        self._rng = random.Random(seed)
        self._running: dict[str, worker_pb2.Reserve] = {}
        self._prefilling: set[str] = set()
        self._looks_left: dict[str, int] = {}
        self.outcomes = {"finished": 0, "failed": 0, "cancelled": 0}

    def run(self, num_requests: int) -> None:
        for number in range(num_requests):
            self._begin(number)
            while len(self._running) == 6:
                self._look()
        while self._running:
            self._look()

    def _begin(self, number: int) -> None:
        rng = self._rng
        work = task(random_prompt(number % 5, rng.randrange(1, 300)), max_tokens=rng.randrange(1, 30))
        request = worker_pb2.Reserve(
            key=request_key(f"random-{number}"),
            task=work,
            remaining_s=rng.choice((0.3, 60.0, 60.0)),
            local_prefill=rng.random() < 0.2,
        )
        self._running[request.key.request_id] = request
        self._looks_left[request.key.request_id] = rng.choice((0, 1, 2, 4, 8, 16, 1000, 1000, 1000, 1000))
        self._clients[1].send(reserve=request)

    def _look(self) -> None:
        seen = len(self._clients[1].messages)
        for name, request in list(self._running.items()):
            if any(client.num_failures(request.key) for client in self._clients):
                self._end(request, "failed")
            elif _finished(self._clients[1], request.key):
                self._end(request, "finished")
            elif self._looks_left[name] == 0:
                self._end(request, "cancelled")
            elif name not in self._prefilling and not request.local_prefill:
                self._prefill(request)
            self._looks_left[name] -= 1
        self._clients[1].wait(lambda: len(self._clients[1].messages) > seen, "news")

    def _prefill(self, request: worker_pb2.Reserve) -> None:
        if not _granted(self._clients[1], request.key):
            return
        self._prefilling.add(request.key.request_id)
        lease = self._clients[1].reserved(request.key)
        start = worker_pb2.StartPrefill(
            key=request.key, task=request.task, remaining_s=request.remaining_s, lease=lease
        )
        self._clients[0].send(start_prefill=start)

    def _end(self, request: worker_pb2.Reserve, outcome: str) -> None:
        for client in self._rng.sample(self._clients, 2):
            _cancel(client, request.key)
        del self._running[request.key.request_id]
        self.outcomes[outcome] += 1


def _granted(client: SessionClient, key: worker_pb2.RequestKey) -> bool:
    return any(message.reserved.key == key for message in client.messages if message.HasField("reserved"))


def _finished(client: SessionClient, key: worker_pb2.RequestKey) -> bool:
    choices = client.so_far(key)
    return bool(choices) and all(choice.finished for choice in choices.values())


@pytest.mark.parametrize("seed", [1, 2])
def test_requests_that_end_in_any_order_leave_nothing(model_dir: Path, seed: int) -> None:
    with (
        worker(model_dir, WorkerRole.PREFILL, chunk_tokens=32) as prefill,
        worker(model_dir, WorkerRole.DECODE, kv_bytes=500 << 10, lease_ttl_s=1.0) as decode,
        session(prefill) as to_prefill,
        session(decode) as to_decode,
    ):
        interleaving = Interleaving((to_prefill, to_decode), seed)
        interleaving.run(num_requests=40)
        assert_nothing_held(prefill, decode)
        assert interleaving.outcomes["finished"] > 0
        assert sum(interleaving.outcomes.values()) == 40
