"""What placement is told of a request, and what is remembered of the choice."""

from __future__ import annotations

import pytest

from headrace.v1 import worker_pb2
from kvtransfer.key_digest import key_digest
from router.core.answer import Answer
from router.core.fleet import Demand, Identity, Role, WorkerFacts, WorkerRef, WorkerState
from router.core.index_feed import IndexFeed, KeyScheme
from router.core.lifecycle import Lifecycle
from router.core.placement import POLICIES, Placement, PlacementState, Wait
from router.placer import AVOID_S, Placer
from router.prompt_keys import KeyRoots
from router.requests import Request, RequestKey

pytestmark = pytest.mark.unit

IDENTITY = Identity(weights_digest="w", tokenizer_digest="t", arithmetic="a", layout="l", handoff_major=1)
SCHEME = KeyScheme("identity", 16)
PROMPT = list(range(100))


class Fleet:
    """A placer and its workers, at time `now`, which is 0 at first."""

    def __init__(self, policy: str = "cost") -> None:
        self.now = 0.0
        self.placement: PlacementState[RequestKey] = PlacementState(POLICIES[policy], 1024)
        self.feed = IndexFeed()
        self.placer = Placer(self.placement, self.feed, KeyRoots(b"s" * 16), lambda: self.now)

    def join(self, worker_id: str, role: Role) -> WorkerRef:
        ref = WorkerRef(worker_id, 7)
        slot = self.feed.joined(ref, SCHEME, 0.0)
        facts = WorkerFacts(
            ref=ref,
            role=role,
            identity=IDENTITY,
            block_tokens=SCHEME.block_tokens,
            num_blocks=64,
            max_sequences=8,
            max_context=1000,
            kv_address=f"{worker_id}:1",
            kv_bytes_per_token=1000,
        )
        self.placement.add(facts, WorkerState.SERVING, slot)
        self.feed.take(ref, worker_pb2.BlockEvents(number=1, is_snapshot=True), 0.0)
        return ref

    def caches(self, ref: WorkerRef, request: Request, num_blocks: int) -> None:
        assert request.keys is not None
        keys = request.keys.keys(SCHEME)[:num_blocks]
        change = worker_pb2.BlockChange(added=True, keys=b"".join(keys))
        events = worker_pb2.BlockEvents(
            number=2, changes=[change], num_blocks=num_blocks, digest=key_digest(keys)
        )
        self.feed.take(ref, events, 0.0)

    def request(self, request_id: str = "r", num_choices: int = 1) -> Request:
        request = Request(
            key=RequestKey("t", request_id),
            body=b"",
            seed=0,
            attempt=1,
            deadline_s=100.0,
            resumable=False,
            resume_handle=b"",
            lifecycle=Lifecycle(0.0),
            answer=Answer(num_choices),
        )
        request.task = worker_pb2.GenerationTask(prompt_token_ids=PROMPT)
        request.demand = Demand(num_prompt_tokens=len(PROMPT), max_total_tokens=200, num_choices=num_choices)
        self.placer.tokens_changed(request)
        return request

    def dispatch(self, request: Request) -> Placement:
        placement = self.placer.place(request)
        assert isinstance(placement, Placement)
        request.placement = placement
        self.placer.dispatched(request, placement)
        return placement


def placed_beside_a_holder(fleet: Fleet, name: str, state: WorkerState) -> tuple[WorkerRef, Request]:
    """A prefill worker that has four blocks of the prompt and takes none; the request is placed on another."""
    holder, _ = fleet.join(name, Role.PREFILL), fleet.join("d", Role.DECODE)
    request = fleet.request()
    fleet.caches(holder, request, 4)
    fleet.join("p", Role.PREFILL)
    fleet.placement.set_state(holder, state)
    assert fleet.dispatch(request).prefill == WorkerRef("p", 7)
    return holder, request


def test_who_has_more_of_the_prompt_is_named_as_a_source_though_it_takes_no_requests() -> None:
    fleet = Fleet()
    leaving, request = placed_beside_a_holder(fleet, "leaving", WorkerState.KV_ONLY)
    (source,) = fleet.placer.sources(request)
    assert (source.kv_address, source.epoch, source.cached_tokens) == ("leaving:1", 7, 64)
    fleet.placement.set_connected(leaving, False)
    assert fleet.placer.sources(request) == []


@pytest.mark.parametrize(("policy", "is_named"), [(name, name != "round-robin") for name in POLICIES])
def test_a_policy_that_knows_nothing_of_caches_names_no_source(policy: str, is_named: bool) -> None:
    fleet = Fleet(policy)
    _, request = placed_beside_a_holder(fleet, "holder", WorkerState.NO_NEW)
    assert bool(fleet.placer.sources(request)) is is_named


def test_those_that_the_request_is_placed_on_are_no_sources() -> None:
    fleet = Fleet()
    prefill, decode = fleet.join("p", Role.PREFILL), fleet.join("d", Role.DECODE)
    request = fleet.request()
    fleet.caches(prefill, request, 3)
    fleet.caches(decode, request, 2)
    fleet.dispatch(request)
    assert fleet.placer.sources(request) == []


def test_a_prompt_placed_on_a_worker_counts_as_cached_there_before_it_says_so() -> None:
    fleet = Fleet()
    fleet.join("d", Role.DECODE)
    chosen = {fleet.join(f"p{number}", Role.PREFILL) for number in range(4)}
    request = fleet.request("first")
    first = fleet.dispatch(request)
    fleet.placer.prefilled(request)
    second = fleet.dispatch(fleet.request("second"))
    assert first.prefill in chosen
    assert second.prefill == first.prefill
    assert (first.cached_prefill_tokens, second.cached_prefill_tokens) == (0, 96)


def test_what_an_answer_has_by_now_is_looked_up_too_where_there_is_one_choice() -> None:
    fleet = Fleet()
    one, two = fleet.request("one"), fleet.request("two", num_choices=2)
    for request in (one, two):
        for choice in request.answer.choices:
            choice.tokens.extend(range(40))
        fleet.placer.tokens_changed(request)
    assert len(one.keys.keys(SCHEME)) == (len(PROMPT) + 40 - 1) // 16
    assert len(two.keys.keys(SCHEME)) == (len(PROMPT) - 1) // 16


def test_predictions_are_held_against_what_workers_find() -> None:
    fleet = Fleet()
    prefill = fleet.join("p", Role.PREFILL)
    fleet.join("d", Role.DECODE)
    request = fleet.request()
    fleet.caches(prefill, request, 4)
    fleet.dispatch(request)
    fleet.placer.found_cached(request, 32)
    counters = fleet.feed.counters
    assert (counters.predictions, counters.false_hits, counters.confirmed_tokens) == (1, 1, 32)
    fleet.placer.ended(request, "FINISHED")
    fleet.placer.ended(request, "again")
    assert [decision.ended for decision in request.decisions] == ["FINISHED"]
    assert all(worker.prefill_tokens == worker.charged_sequences == 0 for worker in fleet.placement.workers)


def test_where_an_attempt_failed_a_request_goes_back_in_the_end_if_the_others_have_no_room() -> None:
    fleet = Fleet()
    failed, other = fleet.join("d", Role.DECODE), fleet.join("d2", Role.DECODE)
    request = fleet.request()
    assert fleet.dispatch(request).decode == failed
    fleet.placer.ended(request, "KV_FAILED")
    request.failed_on.add(failed)
    assert fleet.dispatch(request).decode == other
    fleet.placer.ended(request, "WORKER_DRAINED")
    fleet.placement.report(other, state=WorkerState.SERVING, free_blocks=0, num_sequences=8)
    assert isinstance(fleet.placer.place(request), Wait)
    fleet.now = AVOID_S
    assert fleet.dispatch(request).decode == failed
    fleet.placer.ended(request, "KV_FAILED")
    fleet.now += AVOID_S / 2
    assert isinstance(fleet.placer.place(request), Wait)
