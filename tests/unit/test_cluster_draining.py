"""What an operator's drain orders as a worker goes its way, and when it is done or given up."""

from __future__ import annotations

import pytest

from cluster.draining import PATIENCE_S, Drain
from cluster.errors import ClusterError
from headrace.v1 import cluster_pb2, worker_pb2

pytestmark = pytest.mark.unit

SERVING = worker_pb2.WORKER_STATE_SERVING
NO_NEW = worker_pb2.WORKER_STATE_NO_NEW
KV_ONLY = worker_pb2.WORKER_STATE_KV_ONLY
GONE = worker_pb2.WORKER_STATE_GONE
EPOCH = 7


def status(
    state: worker_pb2.WorkerState, *, connected: bool = True, epoch: int = EPOCH
) -> cluster_pb2.WorkerStatus:
    return cluster_pb2.WorkerStatus(
        connected=connected,
        hello=worker_pb2.WorkerHello(worker_id="w", epoch=epoch),
        report=worker_pb2.WorkerReport(state=state),
        last_error="" if connected else "the network is down",
    )


def look(
    drain: Drain, seen: cluster_pb2.WorkerStatus, now: float
) -> tuple[tuple[worker_pb2.WorkerState, ...], bool]:
    return drain.orders(seen, now), drain.is_done(seen, now)


@pytest.mark.parametrize(("goal", "order"), [(KV_ONLY, NO_NEW), (GONE, GONE)])
def test_a_worker_is_first_asked_to_finish(
    goal: worker_pb2.WorkerState, order: worker_pb2.WorkerState
) -> None:
    drain = Drain(EPOCH, goal, began=0.0)
    assert drain.first_order() == order
    for now in range(10_000):
        assert look(drain, status(NO_NEW), now) == ((), False)


def test_an_order_is_repeated_until_it_is_heard() -> None:
    drain = Drain(EPOCH, KV_ONLY, began=0.0)
    assert look(drain, status(SERVING), 0.1) == ((NO_NEW,), False)
    assert look(drain, status(worker_pb2.WORKER_STATE_UNSPECIFIED), 0.2) == ((NO_NEW,), False)
    assert look(drain, status(NO_NEW), 0.3) == ((), False)
    assert look(drain, status(KV_ONLY), 0.4) == ((), True)


def test_what_still_runs_is_handed_back_once_its_time_is_over() -> None:
    drain = Drain(EPOCH, KV_ONLY, began=100.0, timeout_s=5.0)
    assert look(drain, status(NO_NEW), 104.9) == ((), False)
    assert look(drain, status(NO_NEW), 105.0) == ((KV_ONLY,), False)
    assert look(drain, status(NO_NEW), 105.2) == ((), False)


def test_one_that_is_to_go_still_goes_after_handing_back() -> None:
    drain = Drain(EPOCH, GONE, began=100.0, timeout_s=0.0)
    assert look(drain, status(NO_NEW), 100.0) == ((KV_ONLY, GONE), False)
    assert look(drain, status(KV_ONLY), 101.0) == ((), False)
    assert look(drain, status(GONE), 102.0) == ((), False)
    assert look(drain, status(GONE, connected=False), 103.0) == ((), True)


def test_a_drain_that_somebody_undid_fails() -> None:
    drain = Drain(EPOCH, KV_ONLY, began=0.0)
    look(drain, status(NO_NEW), 1.0)
    with pytest.raises(ClusterError, match="w serves again"):
        look(drain, status(SERVING), 2.0)


@pytest.mark.parametrize("goal", [KV_ONLY, GONE])
def test_a_worker_that_ended_meanwhile_is_not_taken_for_its_successor(goal: worker_pb2.WorkerState) -> None:
    drain = Drain(EPOCH, goal, began=0.0)
    look(drain, status(NO_NEW), 1.0)
    with pytest.raises(ClusterError, match="another process took its place"):
        look(drain, status(KV_ONLY, epoch=EPOCH + 1), 2.0)


def test_a_worker_may_be_out_of_touch_for_a_while() -> None:
    drain = Drain(EPOCH, KV_ONLY, began=0.0, timeout_s=1.0)
    look(drain, status(NO_NEW), 0.5)
    away = status(NO_NEW, connected=False)
    assert look(drain, away, PATIENCE_S) == ((), False)
    assert look(drain, status(NO_NEW), PATIENCE_S + 1) == ((KV_ONLY,), False)
    assert look(drain, away, 2 * PATIENCE_S) == ((), False)
    with pytest.raises(ClusterError, match="was lost while it drained: the network is down"):
        look(drain, away, 2 * PATIENCE_S + 2)


def test_one_whose_engine_failed_has_nothing_left_to_finish() -> None:
    assert look(Drain(EPOCH, KV_ONLY, began=0.0), status(GONE), 0.1) == ((), True)
