"""Bandwidth and round trip of a pair of workers, from when frames are acknowledged."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.codec_speed import CodecSpeed
from kvtransfer.link_estimate import (
    FIRST_PATIENCE,
    FRESH_S,
    MAX_GUESS,
    WINDOW_FRAMES,
    FrameTiming,
    LinkEstimate,
    LinkView,
)

pytestmark = pytest.mark.unit

MIB = 1 << 20


class Wire:
    """Frames over a wire of `bytes_per_s`; tells the estimate what a sender sees of each."""

    def __init__(self, bytes_per_s: float, round_trip_s: float = 0.0, landing_s: float = 0.0) -> None:
        self.now = 100.0
        self.bytes_per_s = bytes_per_s
        self.round_trip_s = round_trip_s
        self.landing_s = landing_s
        self.estimate = LinkEstimate(lambda: self.now)
        self._through = self._landed = 0.0
        self._acknowledged: float | None = None
        self._landing_before = 0.0

    def send(
        self, num_bytes: int = MIB, *, handed: float | None = None, late_s: float = 0.0, encode_s: float = 0.0
    ) -> None:
        """One frame, handed over now or at `handed`; afterwards it is the moment of its acknowledgement."""
        handed = self.now if handed is None else handed
        self._through = max(handed, self._through) + num_bytes / self.bytes_per_s
        self._landed = max(self._landed, self._through + self.round_trip_s / 2) + self.landing_s
        acknowledged = max(self.now, self._landed + self.round_trip_s / 2 + late_s)
        since_s = float("inf") if self._acknowledged is None else acknowledged - self._acknowledged
        timing = FrameTiming(
            num_bytes, acknowledged - handed, self.landing_s, since_s, self._landing_before, encode_s
        )
        self.now = self._acknowledged = acknowledged
        self._landing_before = self.landing_s
        self.estimate.note_landed(timing)

    def send_many(self, count: int, num_bytes: int = MIB) -> None:
        """Frames that are all handed over at once."""
        handed = self.now
        for _ in range(count):
            self.send(num_bytes, handed=handed)

    def view(self) -> LinkView:
        view = self.estimate.view()
        assert view is not None
        return view


def test_nothing_is_known_before_the_first_acknowledgement() -> None:
    assert LinkEstimate(lambda: 0.0).view() is None


@settings(max_examples=50, deadline=None)
@given(
    bytes_per_s=st.floats(1e6, 1e10),
    round_trip_s=st.floats(0, 0.15),
    landing_share=st.floats(0, 0.7),
    payload=st.integers(100_000, 4 * MIB),
)
def test_frames_that_wait_for_each_other_show_the_bandwidth_whatever_the_round_trip(
    bytes_per_s: float, round_trip_s: float, landing_share: float, payload: int
) -> None:
    wire = Wire(bytes_per_s, round_trip_s, landing_share * payload / bytes_per_s)
    wire.send_many(3 * WINDOW_FRAMES, payload)
    view = wire.view()
    assert view.is_sure
    assert view.bytes_per_s == pytest.approx(bytes_per_s, rel=0.01)
    assert view.round_trip_s == pytest.approx(round_trip_s, abs=0.02 * payload / bytes_per_s + 1e-9)


def test_one_frame_alone_shows_bandwidth_and_round_trip_together() -> None:
    wire = Wire(1e9, round_trip_s=0.01, landing_s=0.002)
    wire.send()
    assert wire.view().bytes_per_s == pytest.approx(MIB / (0.01 + MIB / 1e9))
    assert not wire.view().is_sure


def test_a_lone_frame_that_took_longer_than_any_round_trip_is_enough() -> None:
    wire = Wire(1e6, round_trip_s=0.01)
    wire.send()
    assert wire.view().is_sure
    assert wire.view().bytes_per_s == pytest.approx(1e6, rel=0.02)


def test_a_small_frame_alone_shows_the_round_trip_and_leaves_the_bandwidth() -> None:
    wire = Wire(1e8, round_trip_s=0.02)
    wire.send_many(10)
    known = wire.view().bytes_per_s
    wire.round_trip_s = 0.01
    wire.now += 1.0
    wire.send(1000)
    assert wire.view().round_trip_s == pytest.approx(0.01, rel=0.01)
    assert wire.view().bytes_per_s == known


def test_lone_frames_show_the_bandwidth_once_the_round_trip_is_known() -> None:
    wire = Wire(1e9, round_trip_s=0.01, landing_s=0.001)
    wire.send_many(10)
    wire.bytes_per_s = 5e8
    for _ in range(WINDOW_FRAMES):
        wire.now += 0.1  # the prompt is being computed
        wire.send()
    assert wire.view().bytes_per_s == pytest.approx(5e8, rel=0.05)


def test_acknowledgements_that_come_in_bursts_show_the_same_bandwidth() -> None:
    wire = Wire(1e8)
    handed = wire.now
    for number in range(24):
        wire.send(handed=handed, late_s=0.03 if number % 3 == 0 else 0.0)
    assert wire.view().bytes_per_s == pytest.approx(1e8, rel=0.35)


def test_a_link_that_slows_down_shows_within_two_frames_and_one_that_recovers_within_a_window() -> None:
    wire = Wire(1e9, round_trip_s=200e-6)
    wire.send_many(20)
    wire.bytes_per_s = 5e7
    wire.send_many(2)
    assert wire.view().bytes_per_s < 2e8
    wire.send_many(WINDOW_FRAMES)
    assert wire.view().bytes_per_s == pytest.approx(5e7, rel=0.05)
    wire.bytes_per_s = 1e9
    wire.send_many(WINDOW_FRAMES + 1)
    assert wire.view().bytes_per_s == pytest.approx(1e9, rel=0.1)


def test_a_receiver_that_lands_slowly_does_not_make_the_link_look_slow() -> None:
    wire = Wire(1e9)
    wire.send_many(10)
    wire.landing_s = 0.05  # 50 times the wire's
    wire.send_many(20)
    assert wire.view().bytes_per_s == pytest.approx(1e9, rel=0.1)


def test_where_landing_hides_the_link_for_long_the_estimate_creeps_up() -> None:
    wire = Wire(2e7)
    wire.send_many(10)
    wire.bytes_per_s, wire.landing_s = 1e10, 0.02  # fast now, but landing allows 50 MB/s
    rates = []
    for _ in range(200):
        wire.send(handed=wire.now - 0.03)
        rates.append(wire.view().bytes_per_s)
    assert rates[FIRST_PATIENCE] == pytest.approx(MIB / 0.02, rel=0.1)
    assert rates[-1] > 10 * rates[FIRST_PATIENCE]
    assert rates[-1] <= 1.01 * MAX_GUESS * MIB / 0.02


def test_an_encoder_that_sets_the_pace_does_not_make_the_link_look_slow() -> None:
    wire = Wire(1e9, round_trip_s=0.005)
    wire.send_many(10)
    for _ in range(FIRST_PATIENCE):  # 20 ms each, and late by as much as others use the cores
        wire.send(handed=wire.now - 0.001, late_s=0.012, encode_s=0.02)
    assert wire.view().bytes_per_s >= 5 * MIB / 0.02


def test_an_estimate_that_crept_too_far_waits_longer_before_it_does_so_again() -> None:
    wire = Wire(6e7, landing_s=0.02)  # landing allows 52 MB/s
    wire.send_many(2)

    def frames_until_it_creeps() -> int:
        for count in range(1000):
            wire.send(handed=wire.now - 0.03)
            if wire.view().bytes_per_s > 1e8:
                return count
        raise AssertionError("it never crept")

    first = frames_until_it_creeps()
    wire.landing_s = 0.0
    wire.send_many(2 * WINDOW_FRAMES)  # now the wire shows
    assert wire.view().bytes_per_s == pytest.approx(6e7, rel=0.1)
    wire.landing_s = 0.02
    assert frames_until_it_creeps() > 1.8 * first


def test_an_estimate_grows_old() -> None:
    wire = Wire(1e8)
    wire.send_many(5)
    assert wire.view().is_fresh
    wire.now += FRESH_S + 1
    assert not wire.view().is_fresh
    assert wire.view().age_s == pytest.approx(FRESH_S + 1)


def test_old_frames_do_not_count_once_new_ones_are_there() -> None:
    wire = Wire(1e7)
    wire.send_many(10)
    wire.now += 30
    wire.bytes_per_s = 1e9
    wire.send_many(4)
    assert wire.view().bytes_per_s > 2e8


def test_landing_is_learned_by_codec_and_what_all_codecs_share_counts_for_those_not_tried() -> None:
    link = LinkEstimate(lambda: 0.0)
    guesses = {"raw": CodecSpeed(0, 0.1e-9, 1.0), "split": CodecSpeed(2e-9, 2e-9, 1.4)}
    assert link.landing_s_per_byte("bfloat16", guesses) == {"raw": 0.1e-9, "split": 2e-9}
    for _ in range(50):
        link.note_landing("raw", "bfloat16", MIB, MIB * 0.6e-9)
    learned = link.landing_s_per_byte("bfloat16", guesses)
    assert learned["raw"] == pytest.approx(0.6e-9, rel=0.05)
    assert learned["split"] == pytest.approx(2.5e-9, rel=0.05)
    assert link.landing_s_per_byte("float32", guesses)["raw"] == 0.1e-9


times = st.one_of(st.just(0.0), st.floats(1e-6, 10.0))  # from bursts to stalls


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(times, times, times, st.integers(0, 4 * MIB)), min_size=1, max_size=60))
def test_whatever_is_measured_the_estimate_stays_a_positive_number(
    events: list[tuple[float, float, float, int]],
) -> None:
    now = [0.0]
    link = LinkEstimate(lambda: now[0])
    landing_before = 0.0
    for since_s, sojourn_s, landing_s, num_bytes in events:
        now[0] += since_s
        link.note_landed(FrameTiming(num_bytes, sojourn_s, landing_s, since_s, landing_before))
        landing_before = landing_s
        view = link.view()
        if view is not None:
            assert 0 < view.bytes_per_s <= 1e12
            assert view.round_trip_s >= 0
            assert view.age_s >= 0
