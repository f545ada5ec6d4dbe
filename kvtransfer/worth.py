"""Whether to load a cached prefix from a tier or another worker, or to compute it again. Pure.

Loading is worth it when it is predicted to be done sooner, by a margin: computing is known to work, and a load
that disappoints has cost its time on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtransfer.codec_plan import rate_text, seconds_text

if TYPE_CHECKING:
    from collections.abc import Sequence

MARGIN = 0.2
"""Loading must be done sooner than computing by this share."""
LONG_PREFIX_TOKENS = 256
"""Where a speed is not known, a prefix of so many tokens is worth the try that makes it known."""


@dataclass(frozen=True, slots=True)
class PrefixPart:
    """The part of a found prefix that one source has, up to token `end_token` of the sequence.

    `num_bytes`: to be moved. `bytes_per_s`: as measured from this source, None before the first time. `fixed_s`: what a
    load from it takes whatever its size: looking up, opening, a round trip.
    """

    source: str
    end_token: int
    num_bytes: int
    bytes_per_s: float | None
    fixed_s: float = 0.0

    @property
    def load_s(self) -> float | None:
        """None where it cannot be said."""
        return None if not self.bytes_per_s else self.fixed_s + self.num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class LoadDecision:
    """`num_tokens`: tokens of the sequence that will be here without computing; where nothing is loaded, those that
    are. The predictions are for the tokens between those here and `num_tokens` (where nothing is loaded, for
    all that was found); None where a speed is not known."""

    load: bool
    num_tokens: int
    predicted_load_s: float | None
    predicted_compute_s: float | None
    reason: str


def decide_parts(
    cached_tokens_here: int, parts: Sequence[PrefixPart], prefill_s_per_token: float | None
) -> LoadDecision:
    """How many leading parts of a found prefix to load: a later one is of use only with all before it.

    `parts`: in the order of the sequence. `prefill_s_per_token`: what computing a token takes here, None before the
    first prompt. Loads as many parts as make loading plus computing the others shortest; a part is added only where
    it pays with its margin, alone or together with parts behind it.
    """
    useful = [part for part in parts if part.end_token > cached_tokens_here]
    if not useful:
        return LoadDecision(False, cached_tokens_here, 0.0, 0.0, "all that was found is here")
    best, best_gain_s = 0, 0.0
    gain_s, at = 0.0, cached_tokens_here
    for count, part in enumerate(useful, 1):
        load_s, num_tokens = part.load_s, part.end_token - at
        if load_s is None or prefill_s_per_token is None:
            # What cannot be predicted is tried only where all before it is loaded, and then ends the search.
            if best == count - 1 and num_tokens >= LONG_PREFIX_TOKENS:
                best = count
            break
        gain_s += num_tokens * prefill_s_per_token * (1 - MARGIN) - load_s
        at = part.end_token
        if gain_s > best_gain_s:
            best, best_gain_s = count, gain_s
    return _decision(cached_tokens_here, useful, best, prefill_s_per_token)


def _decision(
    here: int, parts: Sequence[PrefixPart], num_loaded: int, prefill_s_per_token: float | None
) -> LoadDecision:
    judged = parts[:num_loaded] or parts
    num_tokens = judged[-1].end_token - here
    load_s = _sum([part.load_s for part in judged])
    compute_s = None if prefill_s_per_token is None else num_tokens * prefill_s_per_token
    sources = " and ".join(dict.fromkeys(part.source for part in judged))
    reason = f"{num_tokens} tokens from {sources}: {_load_text(judged, load_s)}, {_compute_text(compute_s)}"
    left_out = parts[num_loaded:] if num_loaded else ()
    if left_out:
        worse = _load_text(left_out, _sum([part.load_s for part in left_out]))
        reason += f"; not those from {left_out[0].source}: {worse}"
    end = judged[-1].end_token if num_loaded else here
    return LoadDecision(num_loaded > 0, end, load_s, compute_s, reason)


def _sum(seconds: Sequence[float | None]) -> float | None:
    known = [s for s in seconds if s is not None]
    return sum(known) if len(known) == len(seconds) else None


def _load_text(parts: Sequence[PrefixPart], load_s: float | None) -> str:
    if load_s is None:
        return "loading was never measured"
    num_bytes = sum(part.num_bytes for part in parts)
    return f"{seconds_text(load_s)} to load {num_bytes / 1e6:.3g} MB at {rate_text(num_bytes / max(load_s, 1e-9))}"


def _compute_text(compute_s: float | None) -> str:
    return "computing was never measured" if compute_s is None else f"{seconds_text(compute_s)} to compute"
