"""What the codecs cost: guesses, corrected by measurements; and how busy the cores are."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.busy import SAMPLE_S, BusyCores, busy_seconds
from kvtransfer.codec_speed import HALF_LIFE_S, CodecSpeed, SpeedBook, dtype_label, probe_codecs
from kvtransfer.codecs import CODECS
from kvtransfer.layouts import CacheLayout, Field, Paged, Plane

pytestmark = pytest.mark.unit

MIB = 1 << 20
RAW = CodecSpeed(0.1e-9, 0.1e-9, 1.0)
SPLIT = CodecSpeed(3e-9, 2e-9, 1.4)


class Now:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def guessed(clock: Now) -> SpeedBook:
    book = SpeedBook(clock)
    book.guess("raw", "bfloat16", RAW)
    book.guess("split", "bfloat16", SPLIT)
    return book


def test_a_guess_holds_until_something_was_measured() -> None:
    book = guessed(Now())
    assert book.speeds("bfloat16")["split"] == CodecSpeed(3e-9, 2e-9, pytest.approx(1.4))
    assert book.speeds("float32") == {}


def test_the_first_frames_outweigh_the_guess() -> None:
    book = guessed(Now())
    for _ in range(4):
        book.note_encoded("split", "bfloat16", MIB, MIB // 2, 6e-9 * MIB, 1.0)
    speed = book.speeds("bfloat16")["split"]
    assert speed.encode_s_per_byte == pytest.approx(6e-9, rel=0.1)
    assert speed.ratio == pytest.approx(2.0, rel=0.05)
    assert speed.decode_s_per_byte == 2e-9
    assert book.encode_s == pytest.approx(4 * 6e-9 * MIB)


def test_what_a_busy_core_made_slower_is_taken_out() -> None:
    book = guessed(Now())
    for _ in range(20):
        book.note_encoded("split", "bfloat16", MIB, MIB, 6e-9 * MIB, 2.0)
    assert book.speeds("bfloat16")["split"].encode_s_per_byte == pytest.approx(3e-9, rel=0.05)


def test_reading_the_cache_counts_for_codecs_that_were_not_used_yet() -> None:
    book = guessed(Now())
    for _ in range(20):
        book.note_encoded("raw", "bfloat16", MIB, MIB, 0.6e-9 * MIB, 1.0)
    assert book.speeds("bfloat16")["split"].encode_s_per_byte == pytest.approx(3.5e-9, rel=0.02)


def test_what_was_slow_once_is_forgiven_after_a_while() -> None:
    clock = Now()
    book = guessed(clock)
    book.note_encoded("split", "bfloat16", MIB, MIB, 100e-9 * MIB, 1.0)
    assert book.speeds("bfloat16")["split"].encode_s_per_byte > 50e-9
    clock.now += 10 * HALF_LIFE_S
    assert book.speeds("bfloat16")["split"].encode_s_per_byte < 5e-9


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["raw", "split", "new"]),
            st.integers(0, 1 << 24),
            st.integers(0, 1 << 24),
            st.floats(0, 10),
            st.floats(0, 100),
        ),
        max_size=40,
    )
)
def test_whatever_is_measured_speeds_and_ratios_stay_positive(
    frames: list[tuple[str, int, int, float, float]],
) -> None:
    clock = Now()
    book = guessed(clock)
    for codec, raw_bytes, payload_bytes, encode_s, passed_s in frames:
        clock.now += passed_s
        book.note_encoded(codec, "bfloat16", raw_bytes, payload_bytes, encode_s, 1.0)
    for speed in book.speeds("bfloat16").values():
        assert speed.encode_s_per_byte > 0
        assert speed.decode_s_per_byte > 0
        assert speed.ratio > 0


def test_every_codec_of_this_build_is_guessed_at_start() -> None:
    floats = Plane("k", 30, Paged(1), 3, (Field("k", 64, "bfloat16"),), scale_along="channel")
    mixed = Plane(
        "latent", 3, Paged(4), 1, (Field("nope", 448, "float8_e4m3"), Field("rope", 64, "bfloat16"))
    )
    index = Plane("index", 3, Paged(4), 1, (Field("key", 128, "uint8"),))
    layout = CacheLayout((floats, mixed, index), 64)
    ticks = iter(range(1000))
    book = SpeedBook(Now())
    probe_codecs(book, CODECS, layout, lambda: float(next(ticks)))
    assert dtype_label(layout) == "bfloat16+float8_e4m3+uint8"
    speeds = book.speeds(dtype_label(layout))
    assert set(speeds) == {codec.name for codec in CODECS}
    assert all(speed.encode_s_per_byte > 0 and speed.decode_s_per_byte > 0 for speed in speeds.values())
    assert speeds["raw"].ratio == pytest.approx(1.0)
    assert all(speed.ratio >= 0.98 for speed in speeds.values())


def test_busy_is_what_others_use_of_the_cores_and_is_sampled_rarely() -> None:
    clock, used, own = Now(), [100.0], [5.0]
    busy = BusyCores({0, 1}, lambda: own[0], clock, lambda cpus: used[0])
    assert busy() == 0.0
    clock.now += 1.0
    used[0] += 1.5  # of two cores
    own[0] += 0.5
    assert busy() == pytest.approx(0.5)
    used[0] += 10
    clock.now += SAMPLE_S / 2
    assert busy() == pytest.approx(0.5)
    clock.now += SAMPLE_S
    assert busy() == 1.0


def test_the_systems_counters_grow_with_work() -> None:
    before = busy_seconds(())
    sum(number * number for number in range(2_000_000))
    assert busy_seconds(()) >= before
    assert busy_seconds({0}) <= busy_seconds(()) + 1e-6
