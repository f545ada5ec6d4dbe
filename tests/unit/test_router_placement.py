"""Placement: the choice of workers, and what is charged to them."""

import pytest

from router.core.fleet import Demand, Identity, Role, WorkerFacts, WorkerRef, WorkerState
from router.core.placement import POLICIES, PlacementState, Wait, WaitCause

pytestmark = pytest.mark.unit

IDENTITY = Identity(
    weights_digest="w", tokenizer_digest="t", arithmetic="float32", layout="gqa", handoff_major=1
)
OTHER = Identity(
    weights_digest="w", tokenizer_digest="t", arithmetic="bfloat16", layout="gqa", handoff_major=1
)
BLOCK = 16
WINDOW = 64


def facts(worker_id, role, epoch=1, identity=IDENTITY, **sizes):
    defaults = {"block_tokens": BLOCK, "num_blocks": 40, "max_sequences": 8, "max_context": 512}
    return WorkerFacts(ref=WorkerRef(worker_id, epoch), role=role, identity=identity, **(defaults | sizes))


def state_of(*workers, local_prefill=True):
    placement = PlacementState(POLICIES["least-loaded"], WINDOW, local_prefill=local_prefill)
    for worker in workers:
        placement.add(worker, WorkerState.SERVING)
    return placement


def demand(num_prompt_tokens=100, num_choices=1, max_new_tokens=10):
    return Demand(
        num_prompt_tokens=num_prompt_tokens,
        max_total_tokens=num_prompt_tokens + max_new_tokens,
        num_choices=num_choices,
    )


def place(placement, key, wanted=None, now=0.0):
    """Places and charges; the names of the two workers, or the cause to wait."""
    wanted = wanted or demand()
    decision = placement.place(wanted, now)
    if isinstance(decision, Wait):
        return decision.cause
    placement.charge(key, decision, wanted)
    return decision.decode.worker_id, decision.prefill.worker_id if decision.prefill else None


def report(placement, worker_id, free_blocks=40, num_sequences=0, state=WorkerState.SERVING):
    placement.report(
        WorkerRef(worker_id, 1), state=state, free_blocks=free_blocks, num_sequences=num_sequences
    )


def test_one_worker_that_does_both_prefills_for_itself():
    assert place(state_of(facts("b", Role.BOTH)), "r") == ("b", None)


def test_a_pair_splits_the_work():
    placement = state_of(facts("p", Role.PREFILL), facts("d", Role.DECODE))
    assert place(placement, "r") == ("d", "p")


def test_a_burst_spreads_without_a_report_in_between():
    placement = state_of(*(facts(name, Role.DECODE) for name in "def"), facts("p", Role.PREFILL))
    placed = []
    for key in range(6):
        placed.append(place(placement, key)[0])
        placement.prefilled(key)
    assert sorted(placed) == ["d", "d", "e", "e", "f", "f"]


def test_prompts_go_where_the_fewest_tokens_are_ahead():
    placement = state_of(facts("d", Role.DECODE), facts("p", Role.PREFILL), facts("q", Role.PREFILL))
    assert place(placement, 1, demand(300))[1] == "p"
    assert place(placement, 2, demand(100))[1] == "q"
    assert place(placement, 3, demand(100))[1] == "q"


def test_a_prefill_worker_holds_the_running_prompt_and_one_more():
    placement = state_of(facts("d", Role.DECODE), facts("p", Role.PREFILL))
    assert place(placement, 1) == ("d", "p")
    assert place(placement, 2) == ("d", "p")
    assert place(placement, 3) is WaitCause.PREFILL_BUSY
    placement.prefilled(1)
    assert place(placement, 3) == ("d", "p")


def test_short_prompts_share_a_window_of_tokens():
    placement = state_of(facts("d", Role.DECODE), facts("p", Role.PREFILL))
    placed = [place(placement, key, demand(WINDOW // 4)) for key in range(5)]
    assert placed == [("d", "p")] * 4 + [WaitCause.PREFILL_BUSY]


def test_credits_are_spent_at_dispatch_and_come_back_with_the_end():
    placement = state_of(facts("b", Role.BOTH, num_blocks=10))
    assert place(placement, 1, demand(8 * BLOCK)) == ("b", None)
    assert place(placement, 2, demand(BLOCK)) is WaitCause.NO_CREDIT
    placement.release(1)
    assert place(placement, 2, demand(BLOCK)) == ("b", None)


def test_a_report_older_than_the_grant_does_not_return_the_credit():
    placement = state_of(facts("b", Role.BOTH, num_blocks=10))
    place(placement, 1, demand(8 * BLOCK))
    report(placement, "b", free_blocks=10)
    assert place(placement, 2, demand(BLOCK)) is WaitCause.NO_CREDIT


def test_a_report_after_the_grant_counts_the_blocks_once():
    placement = state_of(facts("b", Role.BOTH, num_blocks=10))
    place(placement, 1, demand(4 * BLOCK))
    placement.granted(1)
    report(placement, "b", free_blocks=5)
    assert placement.worker(WorkerRef("b", 1)).credits == 5
    placement.release(1)
    assert placement.worker(WorkerRef("b", 1)).credits == 5
    report(placement, "b", free_blocks=10)
    assert placement.worker(WorkerRef("b", 1)).credits == 10


def test_sequences_are_bounded_and_those_of_other_routers_count():
    placement = state_of(facts("b", Role.BOTH, max_sequences=3))
    report(placement, "b", num_sequences=1)
    assert place(placement, 1, demand(num_choices=2)) == ("b", None)
    placement.prefilled(1)
    assert place(placement, 2) is WaitCause.NO_CREDIT
    report(placement, "b", num_sequences=2)
    assert place(placement, 2) == ("b", None)


def test_a_refusal_keeps_requests_away_until_a_report_or_a_while():
    placement = state_of(facts("b", Role.BOTH))
    place(placement, 1)
    placement.refused(1, until_s=5.0)
    assert place(placement, 2, now=4.9) is WaitCause.NO_CREDIT
    assert place(placement, 2, now=5.0) == ("b", None)
    placement.refused(2, until_s=9.0)
    report(placement, "b")
    assert place(placement, 3, now=5.0) == ("b", None)


@pytest.mark.parametrize(
    "wanted",
    [demand(40 * BLOCK), demand(num_choices=9), demand(500, max_new_tokens=13)],
    ids=["blocks", "choices", "context"],
)
def test_what_no_worker_could_ever_take_is_told_apart_from_what_must_wait(wanted):
    placement = state_of(facts("b", Role.BOTH))
    assert place(placement, 1, wanted) is WaitCause.TOO_LARGE
    placement.add(
        facts("c", Role.BOTH, num_blocks=80, max_sequences=16, max_context=1024), WorkerState.SERVING
    )
    assert place(placement, 1, wanted) == ("c", None)


DECODE_ALONE = [
    [facts("d", Role.DECODE)],
    [facts("p", Role.PREFILL), facts("d", Role.DECODE, identity=OTHER)],
]


@pytest.mark.parametrize("workers", [[], [facts("p", Role.PREFILL)]], ids=["none", "prefill only"])
def test_without_a_decode_worker_there_are_no_workers(workers):
    placement = state_of(*workers)
    assert place(placement, 1) is WaitCause.NO_WORKERS
    assert not placement.is_complete


@pytest.mark.parametrize("workers", DECODE_ALONE, ids=["decode only", "unequal"])
def test_a_decode_worker_without_a_pair_serves_alone_if_it_may(workers):
    placement = state_of(*workers, local_prefill=False)
    assert place(placement, 1) is WaitCause.NO_WORKERS
    assert not placement.is_complete
    placement = state_of(*workers)
    assert placement.is_complete
    assert [place(placement, key) for key in range(3)] == [("d", None), ("d", None), WaitCause.PREFILL_BUSY]


def test_a_prefill_worker_too_small_for_the_prompt_counts_as_none():
    workers = facts("d", Role.DECODE), facts("p", Role.PREFILL, max_context=50)
    assert place(state_of(*workers), 1) == ("d", None)
    assert place(state_of(*workers), 1, demand(40)) == ("d", "p")
    assert place(state_of(*workers, local_prefill=False), 1) is WaitCause.TOO_LARGE


def test_prefill_workers_out_of_touch_are_waited_for_until_they_are_lost():
    placement = state_of(facts("d", Role.DECODE), facts("p", Role.PREFILL))
    placement.set_connected(WorkerRef("p", 1), False)
    assert place(placement, 1) is WaitCause.OUT_OF_TOUCH
    placement.remove(WorkerRef("p", 1))
    assert place(placement, 1) == ("d", None)


def test_why_two_workers_are_not_paired_can_be_read():
    placement = state_of(facts("p", Role.PREFILL), facts("d", Role.DECODE, identity=OTHER))
    reason = placement.unpaired_reason(placement.worker(WorkerRef("d", 1)))
    assert "'p'" in reason and "arithmetic 'bfloat16' is not 'float32'" in reason
    assert reason.endswith("it prefills by itself")
    placement.add(facts("q", Role.PREFILL, identity=OTHER), WorkerState.SERVING)
    assert placement.unpaired_reason(placement.worker(WorkerRef("d", 1))) == ""
    assert placement.is_complete


def test_equal_workers_pair_among_themselves():
    placement = state_of(
        facts("p", Role.PREFILL),
        facts("q", Role.PREFILL, identity=OTHER),
        facts("d", Role.DECODE, identity=OTHER),
    )
    assert place(placement, 1) == ("d", "q")


@pytest.mark.parametrize("state", [WorkerState.NO_NEW, WorkerState.KV_ONLY, WorkerState.GONE])
def test_only_a_serving_worker_gets_requests(state):
    placement = state_of(facts("b", Role.BOTH))
    report(placement, "b", state=state)
    assert place(placement, 1) is WaitCause.NO_WORKERS
    report(placement, "b")
    assert place(placement, 1) == ("b", None)


def test_a_worker_out_of_touch_is_waited_for():
    placement = state_of(facts("b", Role.BOTH))
    placement.set_connected(WorkerRef("b", 1), False)
    assert place(placement, 1) is WaitCause.OUT_OF_TOUCH
    assert not placement.is_complete
    placement.set_connected(WorkerRef("b", 1), True)
    assert place(placement, 1) == ("b", None)


def test_colocated_workers_stay_colocated_and_help_pure_decode_workers():
    placement = state_of(facts("a", Role.BOTH), facts("b", Role.BOTH))
    assert {place(placement, 1), place(placement, 2)} == {("a", None), ("b", None)}
    placement = state_of(facts("a", Role.BOTH), facts("d", Role.DECODE, max_sequences=64))
    assert place(placement, 1, demand(num_choices=4)) == ("a", None)
    assert place(placement, 2) == ("d", "a")


def test_a_worker_that_does_both_prefers_a_free_prefill_worker():
    placement = state_of(facts("b", Role.BOTH), facts("p", Role.PREFILL))
    assert place(placement, 1) == ("b", "p")
    assert place(placement, 2) == ("b", None)


def test_a_new_incarnation_starts_clean_and_the_old_charges_do_not_touch_it():
    placement = state_of(facts("b", Role.BOTH))
    place(placement, 1)
    placement.add(facts("b", Role.BOTH, epoch=2), WorkerState.SERVING)
    placement.granted(1)
    placement.prefilled(1)
    placement.release(1)
    worker = placement.worker(WorkerRef("b", 2))
    assert (worker.charged_blocks, worker.charged_sequences, worker.prefill_tokens) == (0, 0, 0)
    assert placement.worker(WorkerRef("b", 1)) is None
    placement.remove(WorkerRef("b", 1))
    assert placement.worker(WorkerRef("b", 2)) is worker


def test_a_choice_can_be_explained_and_changes_nothing():
    placement = state_of(facts("p", Role.PREFILL), facts("d", Role.DECODE))
    first, second = placement.place(demand(), 0.0), placement.place(demand(), 0.0)
    assert first == second
    assert "decode on d" in first.reason and "prefill on p" in first.reason


def test_misuse_is_refused():
    placement = state_of(facts("b", Role.BOTH))
    decision = placement.place(demand(), 0.0)
    placement.charge("r", decision, demand())
    with pytest.raises(ValueError, match="charged already"):
        placement.charge("r", decision, demand())
    placement.remove(WorkerRef("b", 1))
    with pytest.raises(LookupError, match="gone"):
        placement.charge("s", decision, demand())
    with pytest.raises(ValueError, match="block_tokens is 0"):
        placement.add(facts("z", Role.BOTH, block_tokens=0), WorkerState.SERVING)
