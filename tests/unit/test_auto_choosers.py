"""Which chooser a transfer gets, what it says, and what it does before it knows anything."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.auto import MAX_FRAMES, MIN_FRAMES, PROBE_FRAMES, AutoCodec, Production, Steadiness
from kvtransfer.choice import CodecChooser, FixedCodec
from kvtransfer.choosers import CodecChoosers, strictest
from kvtransfer.codec_plan import Candidate, Forecast, Plan
from kvtransfer.codec_speed import SpeedBook
from kvtransfer.codecs import CODECS, Fidelity, UnknownCodec
from kvtransfer.layouts import CacheLayout, Field, Paged, Plane
from kvtransfer.link_estimate import FRESH_S, LinkEstimate
from tests.simulated_transfer import EVERY, MIB, RAW, SPLIT, Clock, SimCodec, Simulation, book_of

pytestmark = pytest.mark.unit

LAYOUT = CacheLayout((Plane("k", 2, Paged(1), 2, (Field("k", 64, "bfloat16"),)),), 64)
PEER = ("10.0.0.2:8470", 7)


def choosers(clock: Clock | None = None, max_links: int = 256) -> CodecChoosers:
    clock = clock or Clock()
    return CodecChoosers(book_of(EVERY, clock), lambda: 0.0, clock, EVERY, max_links)  # type: ignore[arg-type]


def first_choice(chooser: CodecChooser) -> tuple[str, str]:
    choice = chooser.choose(100 * MIB)
    return choice.codec.name, choice.reason


def test_a_named_codec_is_taken_within_the_bounds() -> None:
    chooser = choosers().chooser_for("int8", ["near", ""], peer=PEER, layout=LAYOUT)
    assert isinstance(chooser, FixedCodec)
    assert first_choice(chooser) == ("int8", "int8: named by the profile")


def test_through_shared_memory_auto_takes_what_costs_least_and_a_named_codec_stays() -> None:
    makers = choosers()
    chooser = makers.chooser_for("auto", ["compact"], peer=PEER, layout=LAYOUT, shares_memory=True)
    assert first_choice(chooser) == ("raw", "raw: through shared memory, faster than any codec")
    chooser = makers.chooser_for("int8", ["near"], peer=PEER, layout=LAYOUT, shares_memory=True)
    assert first_choice(chooser)[0] == "int8"


def test_a_named_codec_beyond_the_strictest_bound_gives_way_to_the_best_exact_one() -> None:
    makers, clock = choosers(clock := Clock()), clock
    chooser = makers.chooser_for("packed", ["compact", "near"], peer=PEER, layout=LAYOUT)
    simulation = Simulation(clock, 20 * MIB, lambda passed: 5e6)
    simulation.run(chooser)
    assert set(simulation.codecs) == {"raw", "split"}
    assert simulation.codecs[-1] == "split"
    assert simulation.reasons[-1].startswith(
        "packed may not be taken, it is compact, the bound is near; split: "
    )


def test_a_named_codec_that_the_receiver_does_not_speak_gives_way_too() -> None:
    chooser = choosers().chooser_for("split", [], peer=PEER, layout=LAYOUT, spoken=[("raw", 1)])
    assert first_choice(chooser) == (
        "raw",
        "split may not be taken, the receiver does not speak it; raw: the only codec that may be taken",
    )


def test_the_newest_version_that_both_speak_is_taken() -> None:
    newer = SPLIT._replace(version=2)
    clock = Clock()
    codecs = (RAW, SPLIT, newer)
    makers = CodecChoosers(book_of(codecs, clock), lambda: 0.0, clock, codecs)  # type: ignore[arg-type]
    assert makers.chooser_for("split", [], peer=PEER, layout=LAYOUT).choose(1).codec.version == 2
    old = makers.chooser_for("split", [], peer=PEER, layout=LAYOUT, spoken={("raw", 1), ("split", 1)})
    assert old.choose(1).codec.version == 1


def test_no_codec_in_common_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"no codec within fidelity exact is spoken by both .* 10\.0\.0\.2:8470"
    ):
        choosers().chooser_for("auto", ["near", "exact"], peer=PEER, layout=LAYOUT, spoken=[("int8", 1)])


def test_wrong_names_are_refused_at_start() -> None:
    makers = choosers()
    makers.check("auto", ["exact"])
    makers.check("split", ["compact"])
    with pytest.raises(UnknownCodec, match="zip"):
        makers.check("zip", ["exact"])
    with pytest.raises(ValueError, match="lossy"):
        makers.check("auto", ["lossy"])


def test_the_strictest_bound_counts_and_none_means_exact() -> None:
    assert strictest(["compact", "near", ""]) is Fidelity.NEAR
    assert strictest([""]) is Fidelity.EXACT


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["auto", *(codec.name for codec in EVERY)]),
    bounds=st.lists(st.sampled_from(["", *Fidelity]), max_size=3),
    mbit=st.floats(5, 50_000),
)
def test_no_frame_ever_takes_a_codec_beyond_the_bound(name: str, bounds: list[str], mbit: float) -> None:
    clock = Clock()
    chooser = choosers(clock).chooser_for(name, bounds, peer=PEER, layout=LAYOUT)
    simulation = Simulation(clock, 24 * MIB, lambda passed: mbit * 1e6 / 8)
    simulation.run(chooser)
    beyond = {codec.name for codec in EVERY if not strictest(bounds).allows(codec.fidelity)}
    assert not beyond & set(simulation.codecs)
    assert all(simulation.reasons)


def test_all_transfers_to_one_incarnation_of_a_worker_share_what_is_known_of_the_way() -> None:
    makers = choosers()
    assert makers.link(PEER) is makers.link(PEER)
    assert makers.link(PEER) is not makers.link((PEER[0], PEER[1] + 1))


def test_links_are_bounded_in_number_and_the_ones_used_longest_ago_go_first() -> None:
    makers = choosers(max_links=2)
    first, second = makers.link(("a", 1)), makers.link(("b", 1))
    assert makers.link(("a", 1)) is first
    makers.link(("c", 1))
    assert makers.link(("a", 1)) is first
    assert makers.link(("b", 1)) is not second


def test_the_codecs_of_this_build_are_measured_and_then_chosen_from() -> None:
    clock = Clock()
    ticks = iter(range(10_000))
    makers = CodecChoosers(SpeedBook(clock), lambda: 0.0, lambda: float(next(ticks)), CODECS)
    makers.probe(LAYOUT)
    chooser = makers.chooser_for("auto", [], peer=PEER, layout=LAYOUT)
    assert chooser.choose(MIB).codec.fidelity is Fidelity.EXACT


# ---- before anything is known


def auto(clock: Clock, link: LinkEstimate, codecs: tuple[SimCodec, ...] = (RAW, SPLIT)) -> AutoCodec:
    book = book_of(codecs, clock)
    return AutoCodec(codecs, dtype="bfloat16", book=book, link=link, busy=lambda: 0.0, clock=clock)


def take(chooser: AutoCodec, count: int) -> list[str]:
    """Frames that are sent and not answered."""
    taken = []
    for _ in range(count):
        choice = chooser.choose(50 * MIB)
        codec = next(codec for codec in EVERY if codec.name == choice.codec.name)
        taken.append(codec.name)
        chooser.note_encoded(codec.name, MIB, int(MIB / codec.ratio), MIB / codec.encode)
    return taken


def test_an_unknown_link_is_probed_with_few_cheap_frames_and_then_assumed_ever_slower() -> None:
    clock = Clock()
    chooser = auto(clock, LinkEstimate(clock))
    assert chooser.choose(50 * MIB).reason == "raw: frame 1 of 3 to probe a link that nothing is known of"
    assert take(chooser, PROBE_FRAMES) == ["raw"] * PROBE_FRAMES
    assert "nothing has landed yet" in chooser.choose(50 * MIB).reason
    assert take(chooser, 6)[-1] == "split"


def test_an_old_estimate_is_probed_again_and_then_assumed() -> None:
    clock = Clock()
    link = LinkEstimate(clock)
    Simulation(clock, 30 * MIB, lambda passed: 5e6).run(auto(clock, link))
    assert take(auto(clock, link), 1) == ["split"]
    clock.now += FRESH_S + 40
    chooser = auto(clock, link)
    assert "was measured 100 s ago (5 MB/s)" in chooser.choose(50 * MIB).reason
    assert take(chooser, PROBE_FRAMES + 1) == ["raw"] * PROBE_FRAMES + ["split"]


def test_without_any_speed_the_first_codec_is_taken() -> None:
    clock = Clock()
    book, link = SpeedBook(clock), LinkEstimate(clock)
    codecs = (RAW, SPLIT)
    chooser = AutoCodec(codecs, dtype="float32", book=book, link=link, busy=lambda: 0.0, clock=clock)
    assert first_choice(chooser) == ("raw", "raw: no codec has been measured yet")


def test_a_stream_that_broke_does_not_confuse_what_is_seen_of_the_next() -> None:
    clock = Clock()
    link = LinkEstimate(clock)
    chooser = auto(clock, link, (RAW,))
    take(chooser, 5)  # lost with their stream
    for _ in range(20):
        clock.now += 0.5
        take(chooser, 1)
        clock.now += 0.25
        chooser.note_landed("raw", MIB, MIB, 0.25, 0.05)
    view = link.view()
    assert view is not None
    assert view.bytes_per_s == pytest.approx(MIB / 0.2, rel=0.01)


# ---- how fast the prompt comes, and how long a choice holds


def test_production_is_seen_from_what_became_ready() -> None:
    clock = Clock()
    production = Production(100, clock)
    production.note(20)  # cached: it was not computed
    assert production.outlook() == (0, 0.0)
    clock.now += 2.0
    production.note(40)
    assert production.outlook() == (60, pytest.approx(6.0))
    clock.now += 1.0
    assert production.outlook() == (60, pytest.approx(5.0))
    clock.now += 1.0
    production.note(100)
    assert production.outlook() == (0, 0.0)


def test_without_a_total_nothing_is_to_come() -> None:
    clock = Clock()
    production = Production(0, clock)
    production.note(10)
    clock.now += 1
    production.note(20)
    assert production.outlook() == (0, 0.0)


def plan(**landed_s: float) -> Plan:
    forecasts = {n: Forecast(Candidate(n, 1e-9, 1e-9, 1.0), s, s, False) for n, s in landed_s.items()}
    return Plan(min(forecasts.values(), key=lambda forecast: forecast.landed_s), "", forecasts)


def test_a_codec_in_use_is_kept_unless_another_is_sooner_by_a_margin() -> None:
    steady = Steadiness()
    assert steady.settle(plan(a=1.0, b=1.1)) == "a"
    assert {steady.settle(plan(a=1.0, b=0.95)) for _ in range(20)} == {"a"}
    assert steady.settle(plan(a=1.0, b=0.90)) == "b"


def test_what_keeps_changing_is_changed_ever_more_rarely() -> None:
    steady, taken = Steadiness(), []
    for number in range(1000):
        best = "a" if number % 2 else "b"
        taken.append(steady.settle(plan(**{"a": 1.0, "b": 1.0, best: 0.5})))
    changes = [n for n in range(1, 1000) if taken[n] != taken[n - 1]]
    assert changes[0] <= MIN_FRAMES + 2
    assert len(changes) <= 1000 / MAX_FRAMES + 8


def test_a_codec_that_is_not_to_be_had_any_more_is_left_at_once() -> None:
    steady = Steadiness()
    assert steady.settle(plan(a=1.0, b=2.0)) == "a"
    assert steady.settle(plan(b=2.0)) == "b"
