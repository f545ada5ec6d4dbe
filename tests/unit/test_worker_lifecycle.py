"""A worker's way out: what is finished, handed back and waited for, under every order of orders."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace.v1 import worker_pb2
from worker.lifecycle import Held, Lifecycle
from worker.termination import EXIT_CODE, drain_on_sigterm

pytestmark = pytest.mark.unit

SERVING = worker_pb2.WORKER_STATE_SERVING
NO_NEW = worker_pb2.WORKER_STATE_NO_NEW
KV_ONLY = worker_pb2.WORKER_STATE_KV_ONLY
GONE = worker_pb2.WORKER_STATE_GONE
QUIET_S, MAX_KV_ONLY_S = 1.0, 8.0
NOTHING = Held(0, False)
BUSY = Held(2, False)
MOVING = Held(0, True)


class Bench:
    """A serving worker's lifecycle on a clock that a test turns."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.lifecycle = Lifecycle(lambda: self.now, QUIET_S, MAX_KV_ONLY_S)
        self.lifecycle.serve()

    def ask(self, wanted: worker_pb2.WorkerState, held: Held = NOTHING) -> bool:
        """The order, and the look that follows it at once."""
        self.lifecycle.ask(wanted)
        return self.lifecycle.look(held)

    def wait(self, seconds: float, held: Held = NOTHING) -> bool:
        """Looks ten times a second; whether anything was to be handed back."""
        hands_back = False
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            hands_back |= self.lifecycle.look(held)
        return hands_back

    @property
    def state(self) -> worker_pb2.WorkerState:
        return self.lifecycle.state


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_worker_serves_for_ever_unless_it_is_told_otherwise(bench: Bench) -> None:
    assert not bench.wait(1000, BUSY)
    assert not bench.wait(1000)
    assert bench.state == SERVING


def test_a_worker_that_starts_takes_nothing_and_does_not_leave() -> None:
    lifecycle = Lifecycle(lambda: 0.0)
    assert not lifecycle.look(NOTHING)
    assert lifecycle.state == NO_NEW


def test_a_draining_worker_finishes_however_long_that_takes_and_then_keeps_its_cache(bench: Bench) -> None:
    assert not bench.ask(NO_NEW, BUSY)
    assert not bench.wait(10_000, BUSY)
    assert bench.state == NO_NEW
    bench.wait(0.1)
    assert bench.state == KV_ONLY
    bench.wait(10_000)
    assert (bench.state, bench.lifecycle.is_over) == (KV_ONLY, False)


def test_asked_for_its_cache_only_it_hands_back_what_runs_until_nothing_does(bench: Bench) -> None:
    assert bench.ask(KV_ONLY, BUSY)
    assert bench.state == NO_NEW
    assert bench.lifecycle.look(Held(1, False))
    assert not bench.lifecycle.look(NOTHING)
    assert bench.state == KV_ONLY


def test_one_that_goes_waits_until_nobody_has_fetched_for_a_moment(bench: Bench) -> None:
    assert not bench.ask(GONE, BUSY)
    bench.wait(3, BUSY)
    bench.wait(3, MOVING)
    bench.wait(0.8)
    assert bench.state == KV_ONLY
    bench.wait(0.3)
    assert (bench.state, bench.lifecycle.is_over, bench.lifecycle.is_retired) == (GONE, True, True)


def test_one_that_goes_does_not_serve_its_cache_for_ever(bench: Bench) -> None:
    bench.ask(GONE)
    bench.wait(7.8, MOVING)
    assert bench.state == KV_ONLY
    bench.wait(0.3, MOVING)
    assert bench.state == GONE


def test_a_worker_that_only_kept_its_cache_for_long_waits_again_once_it_is_to_go(bench: Bench) -> None:
    bench.ask(NO_NEW)
    bench.wait(100)
    bench.ask(GONE)
    bench.wait(0.8)
    assert bench.state == KV_ONLY
    bench.wait(0.3)
    assert bench.state == GONE


@pytest.mark.parametrize("wanted", [NO_NEW, KV_ONLY, GONE])
def test_what_was_asked_for_can_be_undone(bench: Bench, wanted: worker_pb2.WorkerState) -> None:
    bench.ask(wanted, BUSY)
    assert not bench.ask(SERVING, BUSY)
    assert not bench.wait(100, BUSY)
    assert not bench.wait(100)
    assert (bench.state, bench.lifecycle.is_retired) == (SERVING, False)


def test_a_worker_that_went_does_not_come_back(bench: Bench) -> None:
    bench.ask(GONE)
    bench.wait(2)
    bench.ask(SERVING)
    assert bench.state == GONE


def test_the_last_word_counts_one_that_should_go_may_be_asked_to_stay(bench: Bench) -> None:
    bench.ask(GONE, BUSY)
    bench.ask(NO_NEW, BUSY)
    bench.wait(100)
    assert (bench.state, bench.lifecycle.is_retired) == (KV_ONLY, False)


def test_a_terminated_process_hands_back_after_its_grace_and_ends(bench: Bench) -> None:
    bench.lifecycle.terminate(20.0)
    assert not bench.wait(19.8, BUSY)
    assert bench.wait(0.3, BUSY)
    bench.wait(1.3)
    assert (bench.state, bench.lifecycle.is_over, bench.lifecycle.is_retired) == (GONE, True, False)


@pytest.mark.parametrize("wanted", [SERVING, NO_NEW, GONE])
def test_nothing_prolongs_the_life_of_a_terminated_process(
    bench: Bench, wanted: worker_pb2.WorkerState
) -> None:
    bench.lifecycle.terminate(20.0)
    bench.wait(10, BUSY)
    bench.ask(wanted, BUSY)
    assert bench.wait(10.1, BUSY)
    bench.wait(1.3)
    assert bench.lifecycle.is_over


def test_a_worker_whose_engine_failed_is_gone_and_ends_once_it_is_asked(bench: Bench) -> None:
    bench.lifecycle.close()
    bench.wait(100)
    assert (bench.state, bench.lifecycle.is_over) == (GONE, False)
    bench.ask(SERVING)
    assert bench.state == GONE
    bench.ask(GONE)
    assert bench.lifecycle.is_over


def test_an_unknown_state_is_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="cannot be asked to be in state 0"):
        bench.lifecycle.ask(worker_pb2.WORKER_STATE_UNSPECIFIED)


# --- any order of orders -----------------------------------------------------------------------


@dataclass
class Said:
    """One order, as the model remembers it. `wanted` None: the process is to end."""

    at: float
    wanted: worker_pb2.WorkerState | None
    grace_s: float = 0.0


@dataclass
class Model:
    """What the worker was told and saw, from which each answer is worked out anew."""

    said: list[Said] = field(default_factory=list)
    looks: list[tuple[float, Held, worker_pb2.WorkerState]] = field(default_factory=list)

    @property
    def terminated(self) -> list[Said]:
        return [said for said in self.said if said.wanted is None]

    @property
    def last_word(self) -> worker_pb2.WorkerState | None:
        words = [said.wanted for said in self.said if said.wanted is not None]
        return words[-1] if words else None

    @property
    def is_to_go(self) -> bool:
        return bool(self.terminated) or self.last_word == GONE

    def hand_back_at(self) -> float:
        """The earliest of what was said, since the last word that took it back; a process's end is not taken back."""
        void_before = 0
        for index, said in enumerate(self.said):
            if said.wanted is None:
                break
            if said.wanted in (SERVING, NO_NEW):
                void_before = index
        hurrying = [said for said in self.said[void_before:] if said.wanted in (KV_ONLY, None)]
        return min((said.at + said.grace_s for said in hurrying), default=float("inf"))


class AnyOrder(RuleBasedStateMachine):
    """Orders, work, fetches and time in any order, beside a model that keeps the history and decides from it."""

    @initialize()
    def begin(self) -> None:
        self.bench = Bench()
        self.model = Model()
        self.held = BUSY
        self.to_go_since: float | None = None
        self.last_moved = -1e9

    @rule(wanted=st.sampled_from([SERVING, NO_NEW, KV_ONLY, GONE]))
    def ask(self, wanted: worker_pb2.WorkerState) -> None:
        before = self.bench.state
        self.bench.lifecycle.ask(wanted)
        self.model.said.append(Said(self.bench.now, wanted))
        if wanted == SERVING:
            may_serve = before != GONE and not self.model.terminated
            assert (self.bench.state == SERVING) == may_serve
        elif before == SERVING:
            assert self.bench.state == NO_NEW
        else:
            assert self.bench.state == before
        if before == GONE:
            self.model.said.pop()

    @precondition(lambda self: len(self.model.said) >= 4)
    @rule(grace_s=st.floats(0, 5))
    def terminate(self, grace_s: float) -> None:
        before = self.bench.state
        self.bench.lifecycle.terminate(grace_s)
        self.model.said.append(Said(self.bench.now, None, grace_s))
        assert self.bench.state == (NO_NEW if before == SERVING else before)

    @rule(num_requests=st.sampled_from([2, 2, 2, 2, 1, 0]), is_moving=st.booleans())
    def work(self, num_requests: int, is_moving: bool) -> None:
        """New requests come only to one that serves; others may only end."""
        if self.bench.state != SERVING:
            num_requests = min(num_requests, self.held.num_requests)
        self.held = Held(num_requests, is_moving)

    @rule(seconds=st.sampled_from([0.0, 0.3, 1.0, 4.0]))
    def look(self, seconds: float) -> None:
        self.bench.now += seconds
        now, before = self.bench.now, self.bench.state
        if self.held.is_moving:
            self.last_moved = now
        hands_back = self.bench.lifecycle.look(self.held)
        after = self.bench.state
        assert hands_back == (after == NO_NEW and now >= self.model.hand_back_at())
        self.check_step(before, after, now)

    def check_step(self, before: int, after: int, now: float) -> None:
        is_idle = self.held.num_requests == 0
        if before in (SERVING, GONE):
            assert after == before
            return
        if before == NO_NEW and not is_idle:
            assert after == NO_NEW
            return
        if not self.model.is_to_go:
            assert after == KV_ONLY
            return
        if self.to_go_since is None:
            self.to_go_since = now
        may_go = now - self.to_go_since >= MAX_KV_ONLY_S
        may_go |= now - max(self.to_go_since, self.last_moved) >= QUIET_S
        assert after == (GONE if may_go else KV_ONLY)

    @invariant()
    def going_is_counted_from_when_it_began(self) -> None:
        if self.bench.state not in (KV_ONLY, GONE) or not self.model.is_to_go:
            self.to_go_since = None

    @invariant()
    def it_is_retired_only_where_that_was_the_last_word(self) -> None:
        if self.bench.state != GONE:
            undone_is_void = self.model.terminated and self.model.last_word == SERVING
            if not undone_is_void:
                assert self.bench.lifecycle.is_retired == (self.model.last_word == GONE)

    @invariant()
    def over_means_gone(self) -> None:
        assert not self.bench.lifecycle.is_over or self.bench.state == GONE


AnyOrder.TestCase.settings = settings(max_examples=250, stateful_step_count=25, deadline=None)
test_any_order = AnyOrder.TestCase


# --- signals -----------------------------------------------------------------------------------


class Drained:
    """A worker that notes how it was asked to leave."""

    def __init__(self) -> None:
        self.graces_s: list[float] = []

    def terminate(self, hand_back_after_s: float) -> None:
        self.graces_s.append(hand_back_after_s)


@pytest.fixture
def sigterm_restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("sigterm_restored")
def test_the_first_sigterm_drains_and_the_second_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    drained = Drained()
    drain_on_sigterm(drained, 7.0)
    signal.raise_signal(signal.SIGTERM)
    assert (drained.graces_s, codes) == ([7.0], [])
    signal.raise_signal(signal.SIGTERM)
    assert codes == [EXIT_CODE]


@pytest.mark.usefixtures("sigterm_restored")
def test_only_the_main_thread_can_see_to_signals() -> None:
    errors: list[RuntimeError] = []

    def attempt() -> None:
        try:
            drain_on_sigterm(Drained(), 7.0)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])
