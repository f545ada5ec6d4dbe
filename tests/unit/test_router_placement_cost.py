"""Placement by predicted cost: what is weighed against what."""

import math
from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.candidates import MAX_CANDIDATES
from router.core.costs import CostModel
from router.core.fleet import Demand, Identity, LinkSpeed, Role, WorkerFacts, WorkerRef, WorkerState
from router.core.placement import POLICIES, PlacementState, Wait, WaitCause
from router.core.weighing import tokens_by_slot

pytestmark = pytest.mark.unit

IDENTITY = Identity(
    weights_digest="w", tokenizer_digest="t", arithmetic="float32", layout="gqa", handoff_major=1
)
S_PER_TOKEN = 0.0002
STEP_S = 0.02
GOOD = LinkSpeed(1e9, 0.005)
SLOW = LinkSpeed(1e6, 0.005)
NO_WINDOW = 0
WIDE_WINDOW = 1 << 20


def ref(name):
    return WorkerRef(name, 1)


class Fleet:
    """Prefill workers named p…, decode workers d…, workers that do both b…; all measured alike unless told."""

    def __init__(self, names, policy="cost", window=WIDE_WINDOW, measured=True, **options):
        self.state = PlacementState(POLICIES[policy], window, **options)
        self.num_keys = 0
        for name in names.split():
            self.join(name)
        for name in names.split() if measured else ():
            self.report(name)

    def join(self, name):
        role = {"p": Role.PREFILL, "d": Role.DECODE, "b": Role.BOTH}[name[0]]
        facts = WorkerFacts(
            ref=ref(name),
            role=role,
            identity=IDENTITY,
            block_tokens=16,
            num_blocks=10_000,
            max_sequences=64,
            max_context=32_768,
            kv_address=f"{name}:1",
            kv_bytes_per_token=20_000,
        )
        self.state.add(facts, WorkerState.SERVING)

    def report(
        self,
        name,
        sequences=0,
        queued=0,
        step_s=None,
        s_per_token=S_PER_TOKEN,
        free=10_000,
        links=None,
        line=(0.0, 0.0),
    ):
        self.state.report(
            ref(name),
            state=WorkerState.SERVING,
            free_blocks=free,
            num_sequences=sequences,
            queued_prefill_tokens=queued,
            step_s=STEP_S * (1 + sequences / 64) if step_s is None else step_s,
            first_row_s=line[0],
            row_s=line[1],
            prefill_s_per_token=s_per_token,
            links={f"{other}:1": link for other, link in (links or {}).items()},
        )

    def mask(self, *names):
        return sum(1 << self.state.worker(ref(name)).slot for name in names)

    def decide(self, tokens, **options):
        return self.state.place(demand(tokens), 0.0, **options)

    def place(self, tokens, **options):
        """Names of the decode and the prefill worker, or the cause to wait."""
        decision = self.decide(tokens, **options)
        if isinstance(decision, Wait):
            return decision.cause
        return decision.decode.worker_id, decision.prefill.worker_id if decision.prefill else None

    def dispatch(self, tokens, **options):
        decision = self.decide(tokens, **options)
        self.state.charge(self.num_keys, decision, demand(tokens))
        self.num_keys += 1
        return decision


def demand(tokens):
    return Demand(num_prompt_tokens=tokens, max_total_tokens=tokens + 100)


# --- cached prefixes -------------------------------------------------------------------------------------


def test_a_cached_prefix_wins_over_an_idle_worker_until_its_queue_is_longer_than_what_it_saves():
    fleet = Fleet("p p2 d")
    fleet.report("d", sequences=8)
    cached = [(fleet.mask("p2"), 1792)]
    fleet.report("p2", queued=1700)
    assert fleet.place(2048, cached=cached) == ("d", "p2")
    fleet.report("p2", queued=1900)
    assert fleet.place(2048, cached=cached) == ("d", "p")


def test_a_decode_worker_that_holds_the_prefix_wins_until_it_is_much_fuller():
    fleet = Fleet("p d d2", local_prefill=False)
    cached = [(fleet.mask("d2"), 2000)]
    fleet.report("d2", sequences=3)
    decision = fleet.decide(2048, cached=cached)
    assert (decision.decode, decision.cached_decode_tokens) == (ref("d2"), 2000)
    assert decision.cached_prefill_tokens == 0
    fleet.report("d2", sequences=20)
    assert fleet.place(2048, cached=cached) == ("d", "p")


def test_one_token_is_always_computed():
    fleet = Fleet("p d")
    decision = fleet.decide(100, cached=[(fleet.mask("p", "d"), 5000)])
    assert decision.cached_prefill_tokens == decision.cached_decode_tokens == 99


def test_only_tokens_that_are_not_cached_are_charged():
    fleet = Fleet("p d", local_prefill=False)
    fleet.dispatch(2048, cached=[(fleet.mask("p"), 2000)])
    assert fleet.state.worker(ref("p")).prefill_tokens == 48
    fleet.state.release(0)
    assert fleet.state.worker(ref("p")).prefill_tokens == 0


# --- prefill on the decode worker ------------------------------------------------------------------------


def test_a_short_prompt_stays_on_an_idle_decode_worker_and_a_long_one_does_not():
    fleet = Fleet("p d")
    assert fleet.place(32) == ("d", None)
    assert fleet.place(2048) == ("d", "p")


def test_a_mostly_cached_prompt_stays_where_its_cache_is():
    fleet = Fleet("p d d2")
    assert fleet.place(2048, cached=[(fleet.mask("d2"), 2040)]) == ("d2", None)
    assert fleet.place(2048, cached=[(fleet.mask("d2"), 100)])[1] == "p"


def test_the_longest_prefix_is_tried_even_where_another_worker_is_better_to_decode():
    fleet = Fleet("p d d2")
    fleet.report("d2", sequences=4)
    for name in ("p", "d"):
        fleet.report(name, links={"d": LinkSpeed(1e12, 0.005)})
    fleet.report("p", queued=1000, links={"d": LinkSpeed(1e12, 0.005), "d2": LinkSpeed(1e12, 0.005)})
    assert fleet.place(2048)[0] == "d"
    assert fleet.place(2048, cached=[(fleet.mask("d2"), 2040)]) == ("d2", None)


def test_a_busy_decode_worker_gives_its_prompts_away():
    fleet = Fleet("p d")
    assert fleet.place(48) == ("d", None)
    fleet.report("d", sequences=40)
    assert fleet.place(48) == ("d", "p")


def test_a_long_queue_at_the_prefill_worker_keeps_prompts_on_an_idle_decode_worker():
    fleet = Fleet("p d")
    assert fleet.place(512) == ("d", "p")
    fleet.report("p", queued=20_000)
    assert fleet.place(512) == ("d", None)
    fleet.report("d", queued=30_000)
    assert fleet.place(512) == ("d", "p")


def test_the_objective_for_latencies_between_tokens_says_how_much_harm_a_prompt_does():
    assert Fleet("p d", slo_itl_s=0.02, slo_ttft_s=0.4).place(256) == ("d", "p")
    assert Fleet("p d", slo_itl_s=0.5, slo_ttft_s=10.0).place(256) == ("d", None)


def test_a_handover_is_to_save_more_than_predictions_are_off_by():
    fleet = Fleet("b d")
    fleet.report("b", sequences=7, step_s=0.024)
    fleet.report("d", sequences=8, step_s=0.022)
    decision = fleet.decide(256)
    least = min(decision.prefill_candidates, key=lambda each: each.cost_s)
    assert (decision.prefill, least.note) == (None, "")  # a handover was predicted to cost a little less
    fleet.report("d", sequences=40)
    assert fleet.place(256)[0] == "b"


def test_a_worker_that_decodes_too_is_no_place_to_spare_a_decode_worker():
    """Its answers suffer as much from a prompt as those of the worker that would be spared."""
    fleet = Fleet("b d")
    for sequences in (0, 1, 8, 40):
        for name in ("b", "d"):
            fleet.report(name, sequences=sequences)
        fleet.report("b", sequences=sequences, free=0)  # so that the other one decodes
        for tokens in (32, 512, 4096):
            assert fleet.place(tokens) == ("d", None)
    fleet.report("b", free=0)
    assert fleet.place(512) == ("d", "b")  # nobody to harm there


def test_the_best_to_prefill_decodes_too_where_that_saves_the_way():
    fleet = Fleet("b d")
    fleet.report("b", sequences=2, queued=500)
    fleet.report("d", sequences=6)
    decision = fleet.decide(1000)
    assert min(decision.decode_candidates, key=lambda each: each.cost_s).worker_id == "d"
    assert (decision.decode, decision.prefill) == (ref("b"), None)


def test_work_spreads_evenly_over_a_worker_that_does_both_and_one_that_decodes():
    fleet = Fleet("b d")
    for tokens in (48, 2048):
        placed = [fleet.dispatch(tokens) for _ in range(6)]
        assert Counter(decision.decode for decision in placed) == {ref("b"): 3, ref("d"): 3}
        assert [decision.prefill for decision in placed] == [None] * 6


def test_the_harm_done_is_no_part_of_the_time_to_first_token():
    fleet = Fleet("b d")
    fleet.report("b", sequences=2, free=0)
    fleet.report("d", sequences=40)
    decision = fleet.decide(512)
    assert decision.prefill == ref("b")
    assert decision.predicted_ttft_s == pytest.approx(512 * S_PER_TOKEN + GOOD.fixed_s + 2 * STEP_S, rel=0.5)
    (chosen,) = [each for each in decision.prefill_candidates if each.chosen]
    assert chosen.cost_s > 2 * decision.predicted_ttft_s


def test_without_local_prefill_everything_goes_to_prefill_workers():
    fleet = Fleet("p d", local_prefill=False)
    assert fleet.place(1) == ("d", "p")
    fleet.state.remove(ref("p"))
    assert fleet.place(1) is WaitCause.NO_WORKERS
    assert not fleet.state.is_complete


def test_a_taken_prefill_worker_is_waited_for_if_that_costs_less():
    fleet = Fleet("p d", window=NO_WINDOW)
    fleet.report("d", sequences=8)
    assert [fleet.dispatch(2048).prefill for _ in range(2)] == [ref("p")] * 2
    assert fleet.place(2048) is WaitCause.PREFILL_BUSY
    assert fleet.place(32) == ("d", None)


def test_a_decode_worker_has_few_prompts_of_its_own_at_a_time():
    fleet = Fleet("d", window=NO_WINDOW)
    assert [fleet.dispatch(2048).prefill for _ in range(2)] == [None, None]
    assert fleet.place(2048) is WaitCause.PREFILL_BUSY
    fleet.state.prefilled(0)
    assert fleet.place(2048) == ("d", None)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_when_all_prefill_workers_are_lost_decode_workers_serve_alone(policy):
    fleet = Fleet("p d", policy=policy, measured=False)
    assert fleet.place(2048) == ("d", "p")
    fleet.state.remove(ref("p"))
    assert fleet.state.is_complete
    assert fleet.place(2048) == ("d", None)


def test_prefill_workers_out_of_touch_are_not_waited_for_where_costs_count():
    fleet = Fleet("p d")
    fleet.state.set_connected(ref("p"), False)
    assert fleet.place(2048) == ("d", None)


def test_prompts_without_prefill_workers_go_where_they_do_least_harm():
    fleet = Fleet("d d2 d3")
    fleet.report("d", sequences=8)
    fleet.report("d2", queued=5000)
    assert fleet.place(1024) == ("d3", None)


def place_and_finish(fleet, tokens):
    """Who prefilled it; reports follow, as they do."""
    decision = fleet.dispatch(tokens)
    fleet.state.release(fleet.num_keys - 1)
    name = (decision.prefill or decision.decode).worker_id
    worker = fleet.state.worker(ref(name))
    fleet.report(name, s_per_token=worker.prefill_s_per_token)
    return name


def test_a_worker_that_was_slow_once_is_tried_again_after_a_while():
    fleet = Fleet("p p2 p3 d", local_prefill=False)
    fleet.report("p", s_per_token=5 * S_PER_TOKEN)
    names = [place_and_finish(fleet, 2048) for _ in range(400)]
    assert "p" not in names[:10]
    assert 2 < names.count("p") < 40  # it is as slow each time


def test_a_worker_that_is_quick_again_is_used_as_the_others_once_it_was_tried():
    fleet = Fleet("p p2 d", local_prefill=False)
    fleet.report("p", s_per_token=5 * S_PER_TOKEN)
    while place_and_finish(fleet, 2048) != "p":
        assert fleet.num_keys < 200
    fleet.report("p")
    names = [place_and_finish(fleet, 2048) for _ in range(20)]
    assert names.count("p") == 10


# --- decode steps ----------------------------------------------------------------------------------------


def predicted_step_s(fleet, name):
    return next(each.step_s for each in fleet.decide(16).decode_candidates if each.worker_id == name)


def test_a_step_is_as_long_as_the_line_of_the_worker_says():
    fleet = Fleet("p d")
    fleet.report("d", sequences=7, line=(0.015, 0.005))
    assert predicted_step_s(fleet, "d") == pytest.approx(0.015 + 7 * 0.005)


def test_without_a_line_a_full_batch_takes_twice_as_long_as_an_empty_one():
    fleet = Fleet("p d")
    fleet.report("d", sequences=63, step_s=0.03)
    assert predicted_step_s(fleet, "d") == pytest.approx(0.03 * 2 / (1 + 63 / 64))


@pytest.mark.parametrize("line", [(-1.0, 0.0), (math.nan, 0.0), (0.01, -1.0), (0.01, 0.02), (100.0, 0.0)])
def test_a_line_that_cannot_be_is_not_taken(line):
    fleet = Fleet("p d")
    fleet.report("d", line=line)
    assert predicted_step_s(fleet, "d") == pytest.approx(STEP_S * 65 / 64)


def test_one_that_has_decoded_nothing_yet_is_taken_for_as_quick_as_the_others():
    fleet = Fleet("p d d2 d3", measured=False)
    for name, line in (("d", (0.02, 0.01)), ("d2", (0.02, 0.02))):
        fleet.report(name, step_s=0.0, line=line)
    assert predicted_step_s(fleet, "d3") == pytest.approx(0.005 + 0.015, rel=0.01)


def test_where_answers_take_each_other_much_time_they_spread_though_one_worker_has_the_prompt():
    """The prompt is handed over to an idle worker, or decoded where it is, by what its step gains."""
    cached = 1350
    for row_s, expected in ((0.0001, "b"), (0.01, "d")):
        fleet = Fleet("b d")
        fleet.report("b", sequences=7, line=(0.02, row_s))
        fleet.report("d", line=(0.02, row_s))
        assert fleet.place(1500, cached=[(fleet.mask("b"), cached)]) == (
            expected,
            None if expected == "b" else "b",
        )


# --- links and speeds ------------------------------------------------------------------------------------


def test_a_slow_link_pushes_prompts_to_another_prefill_worker():
    fleet = Fleet("p p2 d")
    fleet.report("p", links={"d": SLOW})
    fleet.report("p2", links={"d": GOOD}, queued=1000)
    assert fleet.place(2048) == ("d", "p2")


def test_slow_links_keep_prompts_local():
    fleet = Fleet("p d")
    fleet.report("p", links={"d": GOOD})
    assert fleet.place(512) == ("d", "p")
    fleet.report("p", links={"d": SLOW})
    assert fleet.place(512) == ("d", None)


def test_a_link_is_remembered_until_its_worker_is_gone():
    fleet = Fleet("p p2 d")
    fleet.report("p", links={"d": SLOW})
    fleet.report("p2", links={"d": GOOD}, queued=100)
    fleet.report("p")
    assert fleet.place(2048) == ("d", "p2")
    fleet.state.remove(ref("p"))
    fleet.join("p")
    fleet.report("p")
    assert fleet.place(2048) == ("d", "p")


def test_the_transfer_hides_behind_the_computation():
    fleet = Fleet("p d", local_prefill=False)
    fleet.report("p", links={"d": LinkSpeed(1e9, 0.0)})
    fast = fleet.decide(2048).predicted_ttft_s
    fleet.report("p", links={"d": LinkSpeed(1e8, 0.0)})
    assert fleet.decide(2048).predicted_ttft_s == pytest.approx(fast)  # 0.41 s of each
    fleet.report("p", links={"d": LinkSpeed(5e7, 0.0)})
    assert fleet.decide(2048).predicted_ttft_s == pytest.approx(fast + 0.4096)


def test_a_burst_spreads_over_prefill_workers_in_proportion_to_their_speed():
    fleet = Fleet("p p2 d")
    fleet.report("d", sequences=10)
    fleet.report("p2", s_per_token=S_PER_TOKEN / 3)
    placed = Counter(fleet.dispatch(1000).prefill.worker_id for _ in range(20))
    assert placed == {"p": 5, "p2": 15}


def test_a_burst_spreads_evenly_over_equal_decode_workers():
    fleet = Fleet("p d d2 d3 d4", local_prefill=False)
    placed = Counter(fleet.dispatch(1000).decode.worker_id for _ in range(20))
    assert placed == {"d": 5, "d2": 5, "d3": 5, "d4": 5}


def test_faster_and_emptier_decode_workers_are_preferred():
    fleet = Fleet("p d d2")
    fleet.report("d2", step_s=STEP_S / 2)
    assert fleet.place(2048)[0] == "d2"
    fleet = Fleet("p d d2")
    fleet.report("d", free=2000)
    assert fleet.place(2048)[0] == "d2"


def test_a_step_measured_in_a_full_batch_is_not_taken_for_a_slow_worker():
    fleet = Fleet("p d d2")
    fleet.report("d", sequences=32, step_s=0.03)
    fleet.report("d", sequences=0, step_s=0.0)
    fleet.report("d2", sequences=0, step_s=0.025)
    assert fleet.place(2048)[0] == "d"


def test_what_was_not_measured_is_taken_for_the_mean():
    fleet = Fleet("p p2 p3 d", measured=False)
    fleet.report("p", s_per_token=0.0001, links={"d": LinkSpeed(1e9, 0.01)})
    fleet.report("p2", s_per_token=0.0003, links={"d": LinkSpeed(0.5e9, 0.03)})
    fleet.report("d", s_per_token=0.0, sequences=20)
    decision = fleet.decide(1000)
    assert decision.prefill == ref("p")
    computing = {c.worker_id: c.compute_s for c in decision.prefill_candidates}
    assert computing == pytest.approx({"p": 0.1, "p2": 0.3, "p3": 0.2, "d": 0.2})
    carrying = {c.worker_id: c.transfer_s for c in decision.prefill_candidates}
    assert carrying == pytest.approx({"p": 0.02, "p2": 0.04, "p3": 0.03, "d": 0.0})


def test_unmeasured_workers_share_by_load_and_nothing_is_predicted():
    fleet = Fleet("p p2 d d2", measured=False)
    decisions = [fleet.dispatch(tokens) for tokens in (300, 100, 100, 8)]
    assert [decision.prefill.worker_id for decision in decisions] == ["p", "p2", "p2", "p2"]
    assert [decision.decode.worker_id for decision in decisions] == ["d", "d2", "d2", "d"]
    assert all(decision.predicted_ttft_s is None for decision in decisions)
    assert fleet.state.predict_ttft_s(demand(100), 0.0) is None


@pytest.mark.parametrize("lie", [math.nan, math.inf, -1.0, 0.0, 1e300])
def test_a_speed_that_cannot_be_changes_nothing(lie):
    fleet = Fleet("p d")
    fleet.report("p", links={"d": GOOD})
    before = fleet.decide(2048)
    fleet.report("p", s_per_token=lie, step_s=lie, links={"d": LinkSpeed(lie, 0.005)})
    fleet.report("p", links={"d": LinkSpeed(1e9, lie)} if lie else None)
    fleet.report("d", step_s=lie, s_per_token=lie)
    after = fleet.decide(2048)
    assert after == before and math.isfinite(after.predicted_ttft_s)


def test_tokens_that_a_report_names_are_not_counted_twice():
    fleet = Fleet("p d", local_prefill=False)
    fleet.dispatch(1000)
    fleet.report("p", queued=1000)
    assert fleet.state.worker(ref("p")).tokens_ahead == 1000
    fleet.report("p", queued=1600)
    assert fleet.state.worker(ref("p")).tokens_ahead == 1600
    fleet.state.prefilled(0)
    assert fleet.state.worker(ref("p")).tokens_ahead == 600


# --- avoid, prefer ---------------------------------------------------------------------------------------


def test_where_an_attempt_failed_is_avoided_while_others_could_serve():
    fleet = Fleet("p p2 d d2", local_prefill=False)
    assert fleet.place(2048, avoid={ref("p"), ref("d")}) == ("d2", "p2")
    fleet.state.set_connected(ref("p2"), False)
    assert fleet.place(2048, avoid={ref("p"), ref("d")}) is WaitCause.OUT_OF_TOUCH
    fleet.state.remove(ref("p2"))
    assert fleet.place(2048, avoid={ref("p"), ref("d")}) == ("d2", "p")
    fleet.state.remove(ref("d2"))
    assert fleet.place(2048, avoid={ref("p"), ref("d")}) == ("d", "p")


def test_who_is_to_be_spared_serves_where_the_others_have_no_room():
    fleet = Fleet("p d d2", local_prefill=False)
    assert fleet.place(2048, spare={ref("d")}) == ("d2", "p")
    fleet.report("d2", sequences=64)
    assert fleet.place(2048, avoid={ref("d")}) is WaitCause.NO_CREDIT
    assert fleet.place(2048, spare={ref("d")}) == ("d", "p")
    assert fleet.place(2048, spare={ref("d")}, avoid={ref("d")}) is WaitCause.NO_CREDIT
    fleet.report("d", sequences=64)
    assert fleet.place(2048, spare={ref("d")}) is WaitCause.NO_CREDIT


def test_another_incarnation_is_not_avoided():
    assert Fleet("p d").place(2048, avoid={WorkerRef("d", 7)}) == ("d", "p")


def test_prefill_goes_local_rather_than_to_a_worker_to_be_avoided():
    assert Fleet("p d").place(2048, avoid={ref("p")}) == ("d", None)


def test_a_decode_worker_that_has_the_blocks_is_kept_while_it_is_not_much_fuller():
    fleet = Fleet("p d d2")
    fleet.report("d2", sequences=3)
    assert fleet.place(2048) == ("d", "p")
    assert fleet.place(2048, prefer=ref("d2")) == ("d2", "p")
    assert fleet.place(2048, prefer=ref("d2"), avoid={ref("d2")}) == ("d", "p")
    fleet.report("d2", sequences=20)
    assert fleet.place(2048, prefer=ref("d2")) == ("d", "p")
    fleet.report("d2", sequences=64)
    assert fleet.place(2048, prefer=ref("d2")) == ("d", "p")


# --- predictions and explanations ------------------------------------------------------------------------


def test_the_time_to_first_token_is_predicted_from_its_parts():
    fleet = Fleet("p d", local_prefill=False)
    fleet.report("p", queued=500, links={"d": GOOD})
    expected = (500 + 2048) * S_PER_TOKEN + GOOD.fixed_s + STEP_S * (1 + 1 / 64)
    assert fleet.decide(2048).predicted_ttft_s == pytest.approx(expected)
    assert fleet.state.predict_ttft_s(demand(2048), 0.0) == pytest.approx(expected)
    cached = [(fleet.mask("p"), 1024)]
    assert fleet.state.predict_ttft_s(demand(2048), 0.0, cached) == pytest.approx(
        expected - 1024 * S_PER_TOKEN
    )


def test_what_is_ahead_is_not_in_the_prediction_for_idle_workers():
    fleet = Fleet("p p2 d", local_prefill=False)
    step_s = STEP_S * (1 + 1 / 64)
    fleet.report("p", queued=5000, links={"d": GOOD})
    fleet.report("p2", s_per_token=4 * S_PER_TOKEN, links={"d": GOOD})
    decision = fleet.decide(1000)
    assert decision.prefill == ref("p2")
    assert decision.predicted_ttft_s == pytest.approx(4000 * S_PER_TOKEN + GOOD.fixed_s + step_s)
    assert decision.idle_ttft_s == pytest.approx(1000 * S_PER_TOKEN + GOOD.fixed_s + step_s)
    assert fleet.state.predict_ttft_s(demand(1000), 0.0, idle=True) == decision.idle_ttft_s


def test_what_the_decode_worker_has_ahead_is_not_in_it_either():
    fleet = Fleet("d")
    fleet.report("d", queued=300)
    decision = fleet.decide(100)
    assert decision.predicted_ttft_s - decision.idle_ttft_s == pytest.approx(300 * S_PER_TOKEN)


def test_an_idle_worker_is_as_quick_as_it_was_when_others_left_it_its_cores():
    fleet = Fleet("d")
    fleet.report("d")
    fleet.report("d", s_per_token=3 * S_PER_TOKEN)
    decision = fleet.decide(1000)
    assert decision.predicted_ttft_s - decision.idle_ttft_s == pytest.approx(2000 * S_PER_TOKEN, rel=0.01)
    for _ in range(2000):  # it is so slow for good
        fleet.report("d", s_per_token=3 * S_PER_TOKEN)
    decision = fleet.decide(1000)
    assert decision.predicted_ttft_s == pytest.approx(decision.idle_ttft_s)


def test_a_prediction_looks_behind_workers_that_are_taken():
    fleet = Fleet("p d", window=NO_WINDOW, local_prefill=False)
    predicted = [fleet.state.predict_ttft_s(demand(1000), 0.0)]
    for _ in range(2):
        fleet.dispatch(1000)
        predicted.append(fleet.state.predict_ttft_s(demand(1000), 0.0))
    assert fleet.place(1000) is WaitCause.PREFILL_BUSY
    steps = np.diff(predicted)
    assert steps == pytest.approx([1000 * S_PER_TOKEN + STEP_S / 64] * 2)


def test_nothing_is_predicted_without_workers():
    fleet = Fleet("p d", local_prefill=False)
    fleet.state.set_connected(ref("p"), False)
    assert fleet.state.predict_ttft_s(demand(1000), 0.0) is None


def test_a_choice_names_its_candidates_the_chosen_first():
    fleet = Fleet(" ".join(f"p{n} d{n}" for n in range(12)))
    fleet.report("d3", step_s=STEP_S / 2)
    fleet.report("p5", s_per_token=S_PER_TOKEN / 2, queued=10)
    decision = fleet.decide(2048, cached=[(fleet.mask("p5"), 48)])
    decode, prefill = decision.decode_candidates, decision.prefill_candidates
    assert len(decode) == len(prefill) == MAX_CANDIDATES
    assert [c.chosen for c in decode] == [c.chosen for c in prefill] == [True] + [False] * 7
    assert decode[0].worker_id == "d3" and prefill[0].worker_id == "p5"
    assert [c.cost_s for c in prefill] == sorted(c.cost_s for c in prefill)
    best = prefill[0]
    assert (best.cached_tokens, best.tokens_ahead) == (48, 10)
    assert best.queue_s == pytest.approx(10 * S_PER_TOKEN / 2)
    assert best.compute_s == pytest.approx(2000 * S_PER_TOKEN / 2)
    assert best.transfer_s == pytest.approx(2048 * 20_000 / 1e9)
    assert decode[0].step_s == pytest.approx(STEP_S / 2 * (1 + 1 / 64))
    assert decode[0].free_blocks == 10_000


def test_candidates_stay_as_they_were_when_the_choice_was_made():
    fleet = Fleet("p d", local_prefill=False)
    decision = fleet.decide(2048)
    before = Fleet("p d", local_prefill=False).decide(2048)
    expected = (before.decode_candidates, before.prefill_candidates)
    fleet.dispatch(1000)
    fleet.report("d", free=10)
    fleet.state.remove(ref("p"))
    assert (decision.decode_candidates, decision.prefill_candidates) == expected


def test_who_was_ruled_out_is_told_with_the_reason():
    fleet = Fleet("p p2 d d2 d3", local_prefill=False)
    fleet.report("d2", free=3)
    fleet.report("d3", sequences=64)
    decision = fleet.decide(2048, avoid={ref("p2")})
    notes = {c.worker_id: (c.note, c.cost_s) for c in decision.decode_candidates}
    assert notes["d"][0] == "" and math.isfinite(notes["d"][1])
    assert notes["d2"] == ("too few free blocks", math.inf)
    assert notes["d3"] == ("too many sequences", math.inf)
    assert decision.prefill_candidates[1].note == "an attempt failed there"


def test_local_prefill_is_explained_beside_the_prefill_worker_it_beat():
    decision = Fleet("p d").decide(32)
    assert "prefill there too" in decision.reason and "with prefill on p" in decision.reason
    chosen, other = decision.prefill_candidates
    assert (chosen.worker_id, chosen.chosen) == ("d", True)
    assert (other.worker_id, other.chosen) == ("p", False)
    assert chosen.cost_s < other.cost_s


# --- slots, policies, columns ----------------------------------------------------------------------------


def test_slots_are_the_lowest_that_are_free_or_those_that_were_asked_for():
    fleet = Fleet("p d")
    facts = fleet.state.worker(ref("p")).facts
    fleet.state.remove(ref("p"))
    fleet.join("p2")
    assert [fleet.state.worker(ref(name)).slot for name in ("p2", "d")] == [0, 1]
    fleet.state.add(facts, WorkerState.SERVING, slot=9)
    assert fleet.decide(2048, cached=[(1 << 9, 2000)]).prefill == ref("p")
    fleet.state.add(facts, WorkerState.SERVING, slot=9)
    with pytest.raises(ValueError, match="slot 1 is 'd''s"):
        fleet.state.add(facts, WorkerState.SERVING, slot=1)
    with pytest.raises(ValueError, match="slot -1"):
        fleet.state.add(facts, WorkerState.SERVING, slot=-1)
    assert fleet.state.worker(ref("p")).slot == 9


def test_round_robin_takes_turns():
    fleet = Fleet("p p2 p3 d d2", policy="round-robin")
    placed = [fleet.dispatch(1000) for _ in range(6)]
    assert [decision.prefill.worker_id for decision in placed] == ["p", "p2", "p3"] * 2
    assert [decision.decode.worker_id for decision in placed] == ["d", "d2"] * 3


def test_power_of_two_takes_the_less_loaded_of_two_and_draws_from_what_it_is_given():
    names = " ".join(f"p{n} d{n}" for n in range(8))
    fleets = [Fleet(names, policy="power-of-two", generator=Random(seed)) for seed in (1, 1, 2)]
    runs = [
        [(d.decode.worker_id, d.prefill.worker_id) for d in (fleet.dispatch(100) for _ in range(64))]
        for fleet in fleets
    ]
    assert runs[0] == runs[1] != runs[2]
    loads = Counter(decode for decode, _ in runs[0])
    assert len(loads) == 8 and max(loads.values()) <= 8 + 3
    pair = Fleet("p d d2", policy="power-of-two")
    pair.report("d", sequences=1)
    assert {pair.place(100)[0] for _ in range(8)} == {"d2"}


@pytest.mark.parametrize("objective", [{"slo_ttft_s": 0.0}, {"slo_itl_s": math.nan}, {"slo_itl_s": -1.0}])
def test_objectives_are_positive(objective):
    with pytest.raises(ValueError, match=next(iter(objective))):
        CostModel(**({"slo_ttft_s": 1.0, "slo_itl_s": 1.0} | objective))


@settings(deadline=None)  # the first call compiles
@given(
    holders=st.lists(st.integers(0, 5), max_size=70),
    tokens=st.lists(st.integers(0, 5000), min_size=4, max_size=4),
    num_slots=st.integers(0, 70),
)
def test_tokens_by_slot_are_those_of_the_mask_that_names_the_slot(holders, tokens, num_slots):
    masks = [sum(1 << slot for slot, holder in enumerate(holders) if holder == each) for each in range(4)]
    found = tokens_by_slot(list(zip(masks, tokens, strict=True)), num_slots, 4000)
    held = dict(enumerate([*tokens, 0, 0]))  # the last two kinds of slots hold nothing
    expected = [min(held[holders[slot]], 4000) if slot < len(holders) else 0 for slot in range(num_slots)]
    assert found.tolist() == expected
