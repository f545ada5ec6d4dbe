"""The pure parts of `headrace bench overload`: its load, and what it makes of outcomes."""

from __future__ import annotations

import math
import random
from collections import Counter

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import overload_figures as figures
from bench.overload import WEIGHTS, Subject, compared, profile
from bench.overload_load import (
    ERROR_DETAIL_KEY,
    LONGEST_PROMPT,
    SHORTEST_PROMPT,
    Outcome,
    cause_of,
    poisson,
    prompt_length,
)
from cluster.errors import ClusterError
from headrace.v1 import inference_pb2 as pb
from router.auth import key_digest

pytestmark = pytest.mark.unit

TENANTS = list(WEIGHTS)


def outcome(tenant: str = "small", **given_: object) -> Outcome:
    """A good one of 100 + 16 tokens, first token after 0.2 s, whole at 1 s."""
    values: dict[str, object] = {
        "prompt_tokens": 100, "due_s": 0.0, "sent_s": 0.0, "ended_s": 1.0, "ttft_s": 0.2,
        "answer_tokens": 16, "accepted": True, "cause": "",
    }  # fmt: skip
    return Outcome(tenant=tenant, **{**values, **given_})  # type: ignore[arg-type]


def refused(after_s: float = 0.01, cause: str = "PREDICTED_LATE") -> Outcome:
    return outcome(ended_s=after_s, ttft_s=None, answer_tokens=0, accepted=False, cause=cause)


# --- the load --------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.floats(0.5, 50.0), st.floats(1.0, 20.0))
def test_a_load_is_in_order_within_its_time_and_the_same_for_the_same_seed(
    seed: int, rate: float, seconds: float
) -> None:
    arrivals = poisson(seed, rate, seconds, TENANTS)
    times = [arrival.at_s for arrival in arrivals]
    assert times == sorted(times)
    assert all(0 <= at_s < seconds for at_s in times)
    assert arrivals == poisson(seed, rate, seconds, TENANTS)


def test_tenants_offer_alike_and_the_rate_together() -> None:
    arrivals = poisson(1, 300.0, 60.0, TENANTS)
    counts = Counter(arrival.tenant for arrival in arrivals)
    assert len(arrivals) == pytest.approx(300 * 60, rel=0.03)
    assert all(counts[tenant] == pytest.approx(100 * 60, rel=0.05) for tenant in TENANTS)


@given(st.integers(0, 2**32))
def test_prompts_have_lengths_within_their_bounds(seed: int) -> None:
    assert SHORTEST_PROMPT <= prompt_length(random.Random(seed)) <= LONGEST_PROMPT


@pytest.mark.parametrize(
    ("rate", "seconds", "tenants"), [(0.0, 1.0, TENANTS), (1.0, 0.0, TENANTS), (1, 1, [])]
)
def test_a_load_of_nothing_is_refused(rate: float, seconds: float, tenants: list[str]) -> None:
    with pytest.raises(ValueError, match="a load needs a rate"):
        poisson(0, rate, seconds, tenants)


def error(status: grpc.StatusCode, *metadata: tuple[str, bytes]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(status, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata))


def test_a_failure_is_called_what_the_router_calls_it() -> None:
    detail = pb.ErrorDetail(cause="QUEUE_FULL").SerializeToString()
    exhausted = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert cause_of(error(exhausted, (ERROR_DETAIL_KEY, detail))) == "QUEUE_FULL"
    assert cause_of(error(exhausted)) == "RESOURCE_EXHAUSTED"


# --- figures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        outcome(ttft_s=0.6),
        outcome(ended_s=10.1),
        outcome(cause="WORKER_LOST"),
        outcome(ttft_s=None, answer_tokens=0, cause="DEADLINE_EXCEEDED"),
        refused(),
    ],
    ids=["late", "after the load", "broken off", "without a token", "refused"],
)
def test_only_whole_answers_in_time_are_good(bad: Outcome) -> None:
    outcomes = [outcome(), bad, outcome(ended_s=10.0, ttft_s=0.5)]
    assert figures.good(outcomes, 0.5, 10.0) == [outcomes[0], outcomes[2]]
    assert figures.goodput(outcomes, 0.5, 10.0) == pytest.approx(0.2)
    assert figures.goodput_tokens(outcomes, 0.5, 10.0) == pytest.approx(2 * 116 / 10)


def test_service_counts_an_answers_token_twice_and_only_what_was_answered_by_then() -> None:
    outcomes = [outcome(), outcome("large"), outcome("large", ended_s=11.0), refused()]
    assert figures.service(outcomes, 10.0) == {"small": 132, "large": 132}


@given(st.floats(1.0, 1e6))
def test_shares_as_the_weights_are_no_error(each: float) -> None:
    errors = figures.share_errors({tenant: each * weight for tenant, weight in WEIGHTS.items()}, WEIGHTS)
    assert all(math.isclose(error, 0.0, abs_tol=1e-9) for error in errors.values())


def test_a_share_error_is_a_part_of_the_share_that_is_due() -> None:
    errors = figures.share_errors({"small": 200.0, "middle": 200.0, "large": 300.0}, WEIGHTS)
    assert errors == pytest.approx({"small": 1.0, "middle": 0.0, "large": -0.25})
    assert figures.share_errors({"large": 7.0}, WEIGHTS)["small"] == -1.0
    with pytest.raises(ValueError, match="nobody was served"):
        figures.share_errors({}, WEIGHTS)


def test_the_best_rate_is_the_lower_of_two() -> None:
    assert figures.best_rate({4.0: 3.0, 2.0: 3.0, 1.0: 1.0}) == 2.0


def test_refusals_and_failures_are_told_apart() -> None:
    outcomes = [outcome(), refused(), refused(cause="QUEUE_FULL"), outcome(cause="WORKER_LOST")]
    assert figures.causes(outcomes, "3x") == {
        "offered_3x": 4,
        "accepted_3x": 2,
        "failed_3x": 1,
        "refused_3x_predicted_late": 1,
        "refused_3x_queue_full": 1,
        "failed_3x_worker_lost": 1,
    }


def test_latencies_are_of_those_accepted_and_of_those_refused() -> None:
    found = figures.latencies([outcome(), outcome(sent_s=0.1, ended_s=3.0), refused(0.02)])
    assert found["ttft_p99_accepted_s"] == pytest.approx(0.2)
    assert found["refusal_p50_ms"] == found["refusal_p99_ms"] == pytest.approx(20.0)
    assert found["client_lag_p99_ms"] == pytest.approx(98.0)
    assert not [name for name in figures.latencies([outcome()]) if "refusal" in name]


def test_the_overload_is_held_against_the_capacity() -> None:
    at_capacity = [outcome("large")] * 8
    beyond = [outcome(tenant) for tenant, weight in WEIGHTS.items() for _ in range(int(weight))] + [
        refused()
    ] * 9
    found = compared(at_capacity, beyond, 0.5, 10.0)
    assert found["goodput_ratio"] == pytest.approx(7 / 8)
    assert found["share_error_max"] == pytest.approx(0.0)
    assert found["refused_3x_predicted_late"] == 9
    with pytest.raises(ClusterError, match="nothing was answered within the service level"):
        compared(at_capacity, [refused()], 0.5, 10.0)


# --- the cluster -----------------------------------------------------------------------------------------


def test_the_profile_has_the_tenants_and_the_service_level() -> None:
    keys = {tenant: f"key of {tenant}" for tenant in TENANTS}
    router = profile(Subject(), keys, 1.234).profile.router
    assert router.slo.ttft == pytest.approx(1.234)
    assert {name: each.weight for name, each in router.tenants.items()} == WEIGHTS
    assert router.tenants["large"].keys == [key_digest("key of large")]
    assert profile(Subject(), keys).profile.router.slo is None


@pytest.mark.parametrize(
    ("goodputs", "is_saturated"),
    [
        ([], False),
        ([0.0, 0.0], False),
        ([5.0, 5.1], False),
        ([5.0, 5.1, 5.2], True),
        ([5.0, 5.1, 6.0], False),
        ([5.0, 6.0, 5.0], False),
        ([5.0, 6.0, 5.0, 6.2], True),
    ],
)
def test_rates_rise_until_two_of_them_bring_nothing(goodputs: list[float], is_saturated: bool) -> None:
    assert figures.is_saturated(goodputs) == is_saturated


def test_prompts_of_a_subject_differ_from_the_first_tokens_on() -> None:
    subject = Subject(first_id=5, vocab_size=200)
    prompts = [tuple(subject.prompt(120, seed)) for seed in range(300)]
    assert len({prompt[:8] for prompt in prompts}) == 300
    assert all(len(prompt) == 120 and min(prompt) >= 5 and max(prompt) < 200 for prompt in prompts)
