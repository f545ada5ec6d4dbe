"""`auto` against the best fixed codec, known in hindsight, on a simulated pipeline."""

import random
from collections.abc import Callable
from itertools import permutations

import pytest

from kvtransfer.auto import AutoCodec
from kvtransfer.codecs.base import Fidelity
from kvtransfer.link_estimate import LinkEstimate
from tests.simulated_transfer import MIB, Clock, Fixed, SimCodec, Simulation, allowed, book_of

pytestmark = pytest.mark.unit

PROMPT = 94 * MIB  # 4,096 tokens of a small model in bfloat16
LAN_S = 200e-6
GRID_MBIT = (10, 20, 50, 100, 250, 500, 1000, 1500, 2000, 3000, 5000, 7000, 10_000, 25_000, 50_000)

Rate = Callable[[float], float]


def constant(mbit: float) -> Rate:
    return lambda passed: mbit * 1e6 / 8


def auto(codecs: tuple[SimCodec, ...], clock: Clock, link: LinkEstimate | None = None) -> AutoCodec:
    return AutoCodec(
        codecs,
        dtype="bfloat16",
        book=book_of(codecs, clock),
        link=link or LinkEstimate(clock),
        busy=lambda: 0.0,
        clock=clock,
    )


def best_fixed_s(codecs: tuple[SimCodec, ...], num_bytes: int, rate: Rate, round_trip_s: float) -> float:
    return min(Simulation(Clock(), num_bytes, rate, round_trip_s).run(Fixed(codec)) for codec in codecs)


def run_auto(
    codecs: tuple[SimCodec, ...], num_bytes: int, rate: Rate, round_trip_s: float
) -> tuple[float, Simulation]:
    clock = Clock()
    simulation = Simulation(clock, num_bytes, rate, round_trip_s)
    return simulation.run(auto(codecs, clock)), simulation


@pytest.mark.parametrize("bound", list(Fidelity))
@pytest.mark.parametrize("mbit", GRID_MBIT)
def test_on_a_constant_link_auto_lands_within_15_percent_of_the_best_fixed_codec(
    mbit: float, bound: Fidelity
) -> None:
    codecs = allowed(bound)
    took_s, simulation = run_auto(codecs, PROMPT, constant(mbit), LAN_S)
    assert took_s <= 1.15 * best_fixed_s(codecs, PROMPT, constant(mbit), LAN_S)
    assert set(simulation.codecs) <= {codec.name for codec in codecs}
    assert simulation.num_changes <= 6
    assert all(simulation.reasons)


@pytest.mark.parametrize("bound", list(Fidelity))
@pytest.mark.parametrize("mbit", [mbit for mbit in GRID_MBIT if mbit <= 10_000])
def test_with_a_round_trip_of_5_ms_it_is_within_20_percent(mbit: float, bound: Fidelity) -> None:
    codecs = allowed(bound)
    took_s, _ = run_auto(codecs, PROMPT, constant(mbit), 5e-3)
    assert took_s <= 1.2 * best_fixed_s(codecs, PROMPT, constant(mbit), 5e-3)


@pytest.mark.parametrize("bound", [Fidelity.EXACT, Fidelity.COMPACT])
@pytest.mark.parametrize(("before", "after"), list(permutations((10, 100, 1000, 10_000, 50_000), 2)))
def test_where_the_link_changes_in_mid_transfer_auto_lands_within_25_percent(
    before: float, after: float, bound: Fidelity
) -> None:
    codecs, num_bytes = allowed(bound), 4 * PROMPT
    changes_at = best_fixed_s(codecs, num_bytes // 2, constant(before), LAN_S)

    def rate(passed: float) -> float:
        return (before if passed < changes_at else after) * 1e6 / 8

    took_s, simulation = run_auto(codecs, num_bytes, rate, LAN_S)
    assert took_s <= 1.25 * best_fixed_s(codecs, num_bytes, rate, LAN_S)
    assert simulation.num_changes <= 8


def test_a_link_that_slows_down_20_times_changes_the_codec_within_a_few_frames_of_showing_it() -> None:
    codecs = allowed(Fidelity.EXACT)
    clock = Clock()
    slow_at = 0.04

    def rate(passed: float) -> float:
        return 1.25e9 if passed < slow_at else 1.25e9 / 20

    simulation = Simulation(clock, PROMPT, rate, LAN_S, window_bytes=4 * MIB)
    simulation.run(auto(codecs, clock))
    first = simulation.codecs.index("split")
    # 4 frames were in flight already, of those that had passed by then and those that followed.
    fast_frames = int(slow_at * 1.25e9 / MIB)
    assert fast_frames <= first <= fast_frames + 4 + 3
    assert set(simulation.codecs[first:]) == {"split"}


def test_a_link_that_recovers_gets_its_codec_back() -> None:
    codecs = allowed(Fidelity.EXACT)
    clock = Clock()

    def rate(passed: float) -> float:
        return 1.25e9 / 20 if passed < 0.7 else 1.25e9

    simulation = Simulation(clock, PROMPT, rate, LAN_S, window_bytes=4 * MIB)
    simulation.run(auto(codecs, clock))
    assert "split" in simulation.codecs[:40]
    assert set(simulation.codecs[-20:]) == {"raw"}


def test_the_second_transfer_to_a_worker_begins_with_what_the_first_has_learned() -> None:
    codecs = allowed(Fidelity.COMPACT)
    clock = Clock()
    link = LinkEstimate(clock)
    Simulation(clock, PROMPT, constant(100)).run(auto(codecs, clock, link))
    second = Simulation(clock, PROMPT, constant(100))
    second.run(auto(codecs, clock, link))
    assert set(second.codecs) == {"packed"}


def test_a_prompt_that_is_computed_more_slowly_than_it_travels_is_sent_at_the_least_cost() -> None:
    codecs = allowed(Fidelity.EXACT)
    clock = Clock()

    def ready(passed: float) -> int:
        return int((passed // 0.1) * 4 * MIB)  # 42 MB/s in groups of layers

    simulation = Simulation(clock, PROMPT, constant(1000), ready=ready)
    chooser = AutoCodec(
        codecs,
        dtype="bfloat16",
        book=book_of(codecs, clock),
        link=LinkEstimate(clock),
        busy=lambda: 1.0,
        clock=clock,
        total_bytes=PROMPT,
    )
    simulation.run(chooser)
    in_the_middle = slice(4, -8)  # the first group shows the link, the last two are short of time
    assert set(simulation.codecs[in_the_middle]) == {"raw"}
    assert all("hidden behind the prompt" in reason for reason in simulation.reasons[in_the_middle])


@pytest.mark.parametrize("seed", range(4))
def test_noise_makes_it_change_rarely(seed: int) -> None:
    codecs = allowed(Fidelity.COMPACT)
    clock = Clock()
    noise = random.Random(seed)

    def late_s() -> float:
        return noise.expovariate(5_000) + (5e-3 if noise.random() < 0.02 else 0.0)

    def rate(passed: float) -> float:
        return 4e8 * (0.7 + 0.6 * noise.random())

    simulation = Simulation(clock, 4 * PROMPT, rate, LAN_S, late_s=late_s)
    simulation.run(auto(codecs, clock))
    assert simulation.num_changes <= 12
