"""Placement: the choice of workers, and what is charged to them."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.core.fleet import Demand, Identity, Role, WorkerFacts, WorkerRef, WorkerState
from router.core.placement import MAX_PREFILL_PROMPTS, POLICIES, Placement, PlacementState, Wait, WaitCause

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


def state_of(*workers):
    placement = PlacementState(POLICIES["least-loaded"], WINDOW)
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


@pytest.mark.parametrize(
    "workers",
    [
        [],
        [facts("p", Role.PREFILL)],
        [facts("d", Role.DECODE)],
        [facts("p", Role.PREFILL), facts("d", Role.DECODE, identity=OTHER)],
    ],
    ids=["none", "prefill only", "decode only", "unequal"],
)
def test_without_a_pair_there_are_no_workers(workers):
    placement = state_of(*workers)
    assert place(placement, 1) is WaitCause.NO_WORKERS
    assert not placement.is_complete


def test_why_two_workers_are_not_paired_can_be_read():
    placement = state_of(facts("p", Role.PREFILL), facts("d", Role.DECODE, identity=OTHER))
    reason = placement.unpaired_reason(placement.worker(WorkerRef("d", 1)))
    assert "'p'" in reason and "arithmetic 'bfloat16' is not 'float32'" in reason
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


class ChargesMachine(RuleBasedStateMachine):
    """Random traffic over workers that come, go and report; ends by ending every request."""

    def __init__(self):
        super().__init__()
        self.placement = PlacementState(POLICIES["least-loaded"], WINDOW)
        self.num_keys = 0
        self.live: dict[int, Placement] = {}
        self.epochs = 0

    @rule(
        name=st.sampled_from("abcd"),
        role=st.sampled_from(Role),
        identity=st.sampled_from([IDENTITY, OTHER]),
        num_blocks=st.integers(1, 40),
    )
    def join(self, name, role, identity, num_blocks):
        self.epochs += 1
        self.placement.add(
            facts(name, role, self.epochs, identity, num_blocks=num_blocks), WorkerState.SERVING
        )

    @precondition(lambda self: list(self.placement.workers))
    @rule(data=st.data())
    def leave(self, data):
        worker = data.draw(st.sampled_from(list(self.placement.workers)))
        self.placement.remove(worker.facts.ref)

    @rule(tokens=st.integers(1, 300), choices=st.integers(1, 4), now=st.floats(0, 10))
    def arrive(self, tokens, choices, now):
        wanted = demand(tokens, choices)
        decision = self.placement.place(wanted, now)
        if isinstance(decision, Wait):
            return
        decode = self.placement.worker(decision.decode)
        prefill = self.placement.worker(decision.prefill or decision.decode)
        assert decode.facts.identity == prefill.facts.identity
        assert decode.decodes and prefill.prefills
        assert decode.credits >= wanted.num_blocks(BLOCK)
        assert decode.num_sequences + choices <= decode.facts.max_sequences
        self.placement.charge(self.num_keys, decision, wanted)
        self.live[self.num_keys] = decision
        self.num_keys += 1

    @precondition(lambda self: self.live)
    @rule(data=st.data(), step=st.sampled_from(["granted", "prefilled", "refused", "release"]))
    def go_on(self, data, step):
        key = data.draw(st.sampled_from(list(self.live)))
        if step == "refused":
            self.placement.refused(key, until_s=5.0)
        else:
            getattr(self.placement, step)(key)
        if step in ("refused", "release"):
            del self.live[key]

    @precondition(lambda self: list(self.placement.workers))
    @rule(data=st.data(), free=st.integers(0, 40), sequences=st.integers(0, 8))
    def report(self, data, free, sequences):
        worker = data.draw(st.sampled_from(list(self.placement.workers)))
        self.placement.report(
            worker.facts.ref, state=WorkerState.SERVING, free_blocks=free, num_sequences=sequences
        )

    @invariant()
    def nothing_is_negative_or_overfull(self):
        for worker in self.placement.workers:
            assert worker.charged_blocks >= 0
            assert worker.charged_sequences >= 0
            assert worker.prefill_tokens >= 0
            assert worker.prefill_prompts >= 0
            assert worker.prefill_prompts <= MAX_PREFILL_PROMPTS or worker.prefill_tokens <= WINDOW

    def teardown(self):
        for key in self.live:
            self.placement.release(key)
            self.placement.release(key)
        for worker in self.placement.workers:
            assert worker.charged_blocks == worker.charged_sequences == 0
            assert worker.prefill_tokens == worker.prefill_prompts == 0


TestCharges = ChargesMachine.TestCase
TestCharges.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
