"""Which codec lands the rest of a transfer first: one prediction for each, and the pick. Pure arithmetic, no state.

A transfer is a pipeline of three stages, encode here, the wire, decode over there, that work frame by frame at
the same time. So n bytes take about n x the slowest stage, and one frame through each of the others.

While the prompt is still being computed, more bytes will come, and no codec lands before them: a stage that
keeps up with the prompt costs nobody any time, and what is left to save is the work of the cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

TIE = 0.03
"""Predictions that differ by less are equal: the one that costs less work is taken."""
KEEPS_UP = 0.85
"""A codec keeps up when its slowest stage needs at most this share of the time; the one in use may need all of it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A codec's cost per raw byte. `encode_s`: on idle cores. `decode_s`: as landing takes over there now.
    `payload`: payload bytes."""

    name: str
    encode_s: float
    decode_s: float
    payload: float

    @property
    def work_s(self) -> float:
        """Seconds of both sides' cores."""
        return self.encode_s + self.decode_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Raw bytes and seconds. `bytes_left`: there and not sent. `bytes_to_come`: of the prompt that is being
    computed, all of them there in `computed_in_s`. `busy`: share of this side's cores that others use, 0 to 1."""

    bytes_left: int
    frame_bytes: int
    bytes_per_s: float
    round_trip_s: float = 0.0
    busy: float = 0.0
    bytes_to_come: int = 0
    computed_in_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """`landed_s`: from now until the last byte has landed. `slowest_s`: what the slowest stage needs for all of it.
    `is_hidden`: it keeps up with the prompt."""

    candidate: Candidate
    landed_s: float
    slowest_s: float
    is_hidden: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """The pick, in words too, and every forecast by the codec's name."""

    pick: Forecast
    reason: str
    forecasts: dict[str, Forecast]


def slowdown(busy: float) -> float:
    """How much longer an encoder takes on cores of which `busy` is used: one that shares its core gets half of it."""
    return 1.0 + min(1.0, max(0.0, busy))


def make_plan(candidates: Sequence[Candidate], situation: Situation, in_use: str = "") -> Plan:
    """`candidates`: at least one. `in_use`: the codec that the transfer takes now, which may keep up more narrowly."""
    forecasts = [_forecast(candidate, situation, candidate.name == in_use) for candidate in candidates]
    by_name = {forecast.candidate.name: forecast for forecast in forecasts}
    hidden = [forecast for forecast in forecasts if forecast.is_hidden]
    if hidden:
        pick = min(hidden, key=lambda forecast: forecast.candidate.work_s)
    else:
        first_s = min(forecast.landed_s for forecast in forecasts)
        equal = [forecast for forecast in forecasts if forecast.landed_s <= first_s * (1 + TIE)]
        pick = min(equal, key=lambda forecast: forecast.candidate.work_s)
    return Plan(pick, explain(pick, forecasts, situation), by_name)


def explain(pick: Forecast, forecasts: Sequence[Forecast], situation: Situation) -> str:
    """ "split: 0.41 s predicted over 12 MB/s, raw 0.58 s": the numbers, and the runner-up."""
    name = pick.candidate.name
    link = rate_text(situation.bytes_per_s)
    others = [forecast for forecast in forecasts if forecast is not pick]
    if pick.is_hidden:
        text = f"{name}: hidden behind the prompt, {seconds_text(pick.slowest_s)} of work over {link} in "
        text += seconds_text(situation.computed_in_s)
        others.sort(key=lambda forecast: (not forecast.is_hidden, forecast.candidate.work_s))
        return text + "".join(
            f", {o.candidate.name} {seconds_text(o.slowest_s)} and more of the cores"
            if o.is_hidden
            else f", {o.candidate.name} {seconds_text(o.slowest_s)}"
            for o in others[:1]
        )
    others.sort(key=lambda forecast: forecast.landed_s)
    text = f"{name}: {seconds_text(pick.landed_s)} predicted over {link}"
    return text + "".join(f", {o.candidate.name} {seconds_text(o.landed_s)}" for o in others[:1])


def rate_text(bytes_per_s: float) -> str:
    """ "12 MB/s", "1.2 GB/s"."""
    if bytes_per_s >= 1e9:
        return f"{bytes_per_s / 1e9:.2g} GB/s"
    return f"{bytes_per_s / 1e6:.3g} MB/s"


def seconds_text(seconds: float) -> str:
    """ "0.41 s", "3.2 ms"."""
    if seconds >= 0.1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2g} ms"


def _forecast(candidate: Candidate, situation: Situation, is_in_use: bool) -> Forecast:
    stages = (
        candidate.encode_s * slowdown(situation.busy),
        candidate.payload / situation.bytes_per_s,
        candidate.decode_s,
    )
    num_bytes = situation.bytes_left + situation.bytes_to_come
    slowest_s = num_bytes * max(stages)
    landed_s = _pipeline_s(stages, num_bytes, situation)
    is_hidden = False
    if situation.bytes_to_come:
        is_hidden = slowest_s <= situation.computed_in_s * (1.0 if is_in_use else KEEPS_UP)
        # Encoding takes the time of busy cores from the prompt; what came last is then still to be sent.
        delay_s = situation.busy * candidate.encode_s * num_bytes
        last_s = _pipeline_s(stages, situation.frame_bytes, situation)
        landed_s = max(landed_s, situation.computed_in_s + delay_s + last_s)
    return Forecast(candidate, landed_s, slowest_s, is_hidden)


def _pipeline_s(stages: tuple[float, float, float], num_bytes: int, situation: Situation) -> float:
    frame_bytes = min(num_bytes, situation.frame_bytes)
    return (num_bytes - frame_bytes) * max(stages) + frame_bytes * sum(stages) + situation.round_trip_s
