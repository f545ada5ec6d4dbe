"""Sizes and times with units."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.units import UnitError, format_duration, format_size, parse_duration, parse_size

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("1B", 1), ("64KiB", 65536), ("2GiB", 2 << 30), ("1.5 GiB", 3 << 29), ("1TiB", 1 << 40)],
)
def test_a_size_is_its_bytes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "duration_s"), [("100ms", 0.1), ("2s", 2.0), ("10m", 600.0), ("1h", 3600.0), ("5us", 5e-6)]
)
def test_a_duration_is_its_seconds(text: str, duration_s: float) -> None:
    assert parse_duration(text) == pytest.approx(duration_s)


@pytest.mark.parametrize("bad", ["2", 2, 2.5, "", "GiB", "-1GiB", "2 GiB!", "1e3MiB", None, True, [], "²GiB"])
def test_a_size_without_a_readable_unit_is_refused(bad: object) -> None:
    with pytest.raises(UnitError) as caught:
        parse_size(bad)
    assert "2GiB" in caught.value.expected


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("2GB", "2GiB"), ("2gb", "2GiB"), ("8 Gigs", "8GiB"), ("3M", "3MiB"), ("1gib", "1GiB")],
)
def test_a_wrong_size_unit_names_the_nearest(text: str, nearest: str) -> None:
    with pytest.raises(UnitError) as caught:
        parse_size(text)
    assert caught.value.nearest == nearest


@pytest.mark.parametrize(
    ("text", "nearest"), [("2sec", "2s"), ("5min", "5m"), ("3msec", "3ms"), ("7zzz", None)]
)
def test_a_wrong_time_unit_names_the_nearest_if_one_is_near(text: str, nearest: str | None) -> None:
    with pytest.raises(UnitError) as caught:
        parse_duration(text)
    assert caught.value.nearest == nearest


def test_a_part_of_a_byte_is_refused() -> None:
    with pytest.raises(UnitError, match="whole number of bytes"):
        parse_size("0.3B")


@given(st.integers(min_value=1, max_value=1 << 50))
@settings(deadline=None)
def test_every_size_reads_back_as_it_was_written(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


@given(st.integers(min_value=1, max_value=10**9).map(lambda count: count / 1e6))
@settings(deadline=None)
def test_every_duration_reads_back_as_it_was_written(duration_s: float) -> None:
    assert parse_duration(format_duration(duration_s)) == pytest.approx(duration_s)
