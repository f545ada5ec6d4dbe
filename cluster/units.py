"""Sizes and times as people write them: `2GiB`, `100ms`. Pure; knows no YAML and no profile.

A number without a unit is refused, because a reader could not tell bytes from gigabytes.
"""

from __future__ import annotations

import difflib
import math
import re
from contextlib import suppress

SIZE_UNITS: dict[str, int] = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
DURATION_UNITS: dict[str, float] = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}

SIZE_PATTERN = r"^\d+(\.\d+)? ?(B|KiB|MiB|GiB|TiB)$"
DURATION_PATTERN = r"^\d+(\.\d+)? ?(us|ms|s|m|h)$"

_QUANTITY = re.compile(r"(?P<number>\d+(?:\.\d+)?) ?(?P<unit>[A-Za-zµ]*)", re.ASCII)
# What people write for a unit that is not in the table: lower case to the unit they most likely meant.
_SIZE_HINTS = {
    "k": "KiB",
    "kb": "KiB",
    "m": "MiB",
    "mb": "MiB",
    "g": "GiB",
    "gb": "GiB",
    "t": "TiB",
    "tb": "TiB",
}
_DURATION_HINTS = {"sec": "s", "secs": "s", "min": "m", "mins": "m", "msec": "ms", "hr": "h", "hour": "h"}


class UnitError(ValueError):
    """A quantity that cannot be read.

    Attributes:
        expected: what a good value looks like.
        nearest: the same quantity in the unit that was probably meant, or None.
    """

    def __init__(self, message: str, *, expected: str, nearest: str | None = None) -> None:
        super().__init__(message)
        self.expected = expected
        self.nearest = nearest


def parse_size(text: object) -> int:
    """Bytes of `512MiB`. Raises UnitError for a missing or unknown unit or a part of a byte."""
    expected = 'a size with a unit, such as "512MiB" or "2GiB"'
    number, unit = _split(text, expected, SIZE_UNITS, _SIZE_HINTS)
    size_bytes = number * SIZE_UNITS[unit]
    if size_bytes != int(size_bytes):
        raise UnitError(f'"{text}" is not a whole number of bytes', expected=expected)
    return int(size_bytes)


def parse_duration(text: object) -> float:
    """Seconds of `100ms`. Raises UnitError for a missing or unknown unit."""
    expected = 'a time with a unit, such as "100ms" or "10m"'
    number, unit = _split(text, expected, DURATION_UNITS, _DURATION_HINTS)
    return number * DURATION_UNITS[unit]


def parse_rate(text: str) -> float:
    """Bits per second of "50Mbit", "1Gbit", "10 Gbit/s". Raises UnitError."""
    plain = text.strip().lower().removesuffix("/s").removesuffix("ps").strip()
    for unit, factor in (("gbit", 1e9), ("mbit", 1e6), ("kbit", 1e3)):
        number = plain.removesuffix(unit)
        if number != plain:
            with suppress(ValueError):
                rate = float(number) * factor
                if rate > 0:
                    return rate
    raise UnitError(f'"{text}" is not a rate', expected="a rate such as 50Mbit, 1Gbit or 400Gbit")


def parse_tokens(text: str) -> int:
    """Tokens of "8192", "128K" (times 1,024) or "1M". Raises UnitError."""
    plain = text.strip().upper()
    factor = {"K": 2**10, "M": 2**20}.get(plain[-1:], 1)
    number = plain[:-1] if factor > 1 else plain
    if not number.isdecimal() or not int(number):
        raise UnitError(f'"{text}" is not a number of tokens', expected="a number such as 8192, 128K or 1M")
    return int(number) * factor


def format_size(size_bytes: int) -> str:
    """The shortest exact text that parse_size reads back, such as `2GiB` or `1536MiB`."""
    for unit in reversed(SIZE_UNITS):
        if size_bytes and size_bytes % SIZE_UNITS[unit] == 0:
            return f"{size_bytes // SIZE_UNITS[unit]}{unit}"
    return f"{size_bytes}B"


def format_duration(duration_s: float) -> str:
    """Text that parse_duration reads back, in the largest unit that leaves a whole number."""
    for unit in reversed(DURATION_UNITS):
        number = duration_s / DURATION_UNITS[unit]
        if number >= 1 and math.isclose(number, round(number), rel_tol=1e-9):
            return f"{round(number)}{unit}"
    return f"{duration_s:g}s"


def _split(
    text: object, expected: str, units: dict[str, int] | dict[str, float], hints: dict[str, str]
) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(text.strip()) if isinstance(text, str) else None
    if isinstance(text, int | float) and not isinstance(text, bool):
        raise UnitError(f"{text} has no unit", expected=expected)
    if match is None:
        raise UnitError(f"{text!r} is not a number with a unit", expected=expected)
    number, unit = match["number"], match["unit"]
    if not unit:
        raise UnitError(f'"{text}" has no unit', expected=expected)
    if unit not in units:
        raise UnitError(
            f'unknown unit "{unit}"', expected=expected, nearest=_nearest(number, unit, units, hints)
        )
    return float(number), unit


def _nearest(
    number: str, unit: str, units: dict[str, int] | dict[str, float], hints: dict[str, str]
) -> str | None:
    lowered = {name.lower(): name for name in units} | hints
    close = difflib.get_close_matches(unit.lower(), lowered, n=1, cutoff=0.5)
    return f"{number}{lowered[close[0]]}" if close else None
