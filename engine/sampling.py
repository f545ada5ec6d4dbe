"""From logits to tokens: processors, the seeded draw, finish rules, log-probabilities.

Pure numpy on float32 rows; knows no model, cache or device. Processors work in the order that inference.proto
states: logit_bias, repetition_penalty (prompt and answer), presence and frequency penalty (answer),
min_tokens, temperature, top_k, top_p, min_p, then the draw.

A result is a function of its own row and `SampleRow` alone (design.md §3.7), never of the other rows or of
their number: a row is reduced by itself, and random numbers are counter-based. The uniform number of token
`t` is word `t` of the SplitMix64 stream (Steele et al., "Fast splittable pseudorandom number generators",
OOPSLA 2014) whose start is a hash of (seed, choice, position), so that any token's number can be had without
the others'. The token is the one with the largest scaled logit plus Gumbel noise -log(-log(u)), which draws
from the softmax ("Gumbel-max trick"). Whatever two tokens tie in, the lower id comes first.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from engine.request import Drawn, FinishReason, Logprobs, SamplingParams

FloatRow: TypeAlias = npt.NDArray[np.float32]
TokenIds: TypeAlias = npt.NDArray[np.intp]
Words: TypeAlias = npt.NDArray[np.uint64]

MIN_TEMPERATURE = 1e-5
"""Lower temperatures are taken as this one: the draw is greedy there already, and float32 does not
overflow."""

_TOP_P_FIRST_GUESS = 1024
_SCREEN_FROM_TOKENS = 2048
_SCREEN_SLACK = 4.0

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What one row of logits is drawn for.

    `tokens` is the prompt (its first `num_prompt` entries) and the answer so far; the token to draw gets
    position `len(tokens)`. `max_tokens_left` is what the context still holds, the token to draw included (at
    least 1).
    """

    params: SamplingParams
    tokens: Sequence[int]
    num_prompt: int
    choice: int
    max_tokens_left: int

    @property
    def position(self) -> int:
        """Absolute position of the token to draw, from 0."""
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        """Answer tokens drawn before this one."""
        return len(self.tokens) - self.num_prompt


@dataclass(frozen=True, slots=True)
class SampleFailure:
    """A row that no token can be drawn from. `cause` is one of NAN_LOGITS, NO_TOKEN_LEFT,
    INVALID_LOGIT_BIAS."""

    cause: str
    message: str


def sample(logits: FloatRow, rows: Sequence[SampleRow]) -> list[Drawn | SampleFailure]:
    """Draw one token per row.

    Args:
        logits: [R, V] float32, not changed.
        rows: R rows, in the order of the logits.

    Returns:
        R results in the same order. A row whose logits hold NaN or +inf, or nothing above -inf, gives a
        `SampleFailure`; the other rows are drawn as if it were not there.

    Raises:
        ValueError: shapes do not agree, or the logits are not float32.
    """
    if logits.ndim != 2 or len(logits) != len(rows):
        raise ValueError(
            f"logits of shape {logits.shape} do not fit {len(rows)} rows: [{len(rows)}, V] is needed"
        )
    if logits.dtype != np.float32:
        raise ValueError(f"logits are {logits.dtype}; float32 is needed")
    return [_sample_row(np.ascontiguousarray(values), row) for values, row in zip(logits, rows, strict=True)]


def _sample_row(raw: FloatRow, row: SampleRow) -> Drawn | SampleFailure:
    params = row.params
    best = int(raw.argmax())  # the first NaN, when there is one
    peak = float(raw[best])
    if not math.isfinite(peak):
        what = "nothing above -inf" if peak == -math.inf else f"{peak} at token {best}"
        return SampleFailure("NAN_LOGITS", f"the logits for position {row.position} hold {what}")
    values = raw
    if _has_processors(row):
        invalid = [token for token, _ in params.logit_bias if not 0 <= token < len(raw)]
        if invalid:
            message = f"logit_bias names token {invalid[0]}; the vocabulary has {len(raw)}"
            return SampleFailure("INVALID_LOGIT_BIAS", message)
        values = _processed(raw, row)
        best = int(values.argmax())
        if not math.isfinite(values[best]):
            message = f"penalties, biases and min_tokens leave no token to draw at position {row.position}"
            return SampleFailure("NO_TOKEN_LEFT", message)
    token = best if params.greedy or params.top_k == 1 else _draw(values, float(values[best]), row)
    logprobs = None if params.logprobs is None else _logprobs(raw, peak, token, params.logprobs)
    return Drawn(token_id=token, logprobs=logprobs, finish=_finish(token, row))


def _finish(token: int, row: SampleRow) -> FinishReason | None:
    params = row.params
    if token in params.stopping_token_ids:  # never before min_tokens: they cannot be drawn
        return FinishReason.STOP
    if row.num_generated + 1 >= params.max_tokens or row.max_tokens_left <= 1:
        return FinishReason.LENGTH
    return None


# Processors: logits in, logits out.


def _has_processors(row: SampleRow) -> bool:
    params = row.params
    return (
        bool(params.logit_bias)
        or params.repetition_penalty != 1.0
        or ((params.presence_penalty != 0.0 or params.frequency_penalty != 0.0) and row.num_generated > 0)
        or row.num_generated < params.min_tokens
    )


def _processed(raw: FloatRow, row: SampleRow) -> FloatRow:
    params = row.params
    values = raw.copy()
    # Extreme parameters may overflow; the caller looks at the result.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        for token, bias in params.logit_bias:
            values[token] += np.float32(bias)
        if params.repetition_penalty != 1.0:
            seen = np.asarray(row.tokens, dtype=np.intp)
            penalty = np.float32(params.repetition_penalty)
            at_seen = values[seen]
            values[seen] = np.where(at_seen < 0, at_seen * penalty, at_seen / penalty)
        if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            answer = np.asarray(row.tokens[row.num_prompt :], dtype=np.intp)
            drawn, times = np.unique(answer, return_counts=True)
            penalties = params.presence_penalty + params.frequency_penalty * times
            values[drawn] -= penalties.astype(np.float32)
        if row.num_generated < params.min_tokens:
            values[[token for token in params.stopping_token_ids if token < len(values)]] = -np.inf
    return values


# Truncation. top_k, top_p and min_p each keep a head of one and the same order (logit descending, id
# ascending), so together they keep the shortest of the three heads, and only its length has to be found.


def _draw(values: FloatRow, peak: float, row: SampleRow) -> int:
    params = row.params
    inverse_temperature = np.float32(1.0 / max(params.temperature, MIN_TEMPERATURE))
    key = _draw_key(params.seed, row.choice, row.position)
    num_kept = _num_kept(values, np.float32(peak), inverse_temperature, params)
    if num_kept == 1:
        return int(values.argmax())
    if num_kept < len(values):
        ids = _head(values, num_kept)
        scaled = (values[ids] - np.float32(peak)) * inverse_temperature
        return int(ids[_gumbel_argmax(scaled, _random_words(key, _steps(ids)))])
    scaled = (values - np.float32(peak)) * inverse_temperature
    return _gumbel_argmax(scaled, _random_words(key, _steps_of_all(len(values))))


def _num_kept(
    values: FloatRow, peak: np.float32, inverse_temperature: np.float32, params: SamplingParams
) -> int:
    """How many tokens top_k, top_p and min_p leave, at least 1."""
    num_kept = min(params.top_k, len(values)) if params.top_k > 0 else len(values)
    if params.top_p >= 1.0 and params.min_p <= 0.0:
        return num_kept
    if num_kept < len(values):
        weights = np.exp((_largest(values, num_kept) - peak) * inverse_temperature)
        total = float(weights.sum(dtype=np.float64))
        return min(
            _num_in_nucleus(weights, total, params.top_p) or num_kept, _num_above(weights, params.min_p)
        )
    all_weights = np.exp((values - peak) * inverse_temperature)
    if params.min_p > 0.0:
        num_kept = _num_above(all_weights, params.min_p)
    if params.top_p < 1.0:
        total = float(all_weights.sum(dtype=np.float64))
        num_kept = min(num_kept, _nucleus_of_all(values, peak, inverse_temperature, total, params.top_p))
    return num_kept


def _nucleus_of_all(
    values: FloatRow, peak: np.float32, inverse_temperature: np.float32, total: float, top_p: float
) -> int:
    """Length of the nucleus of a whole vocabulary, sorting all of it only where its head is not enough."""
    for num_sorted in (_TOP_P_FIRST_GUESS, len(values)):
        weights = np.exp((_largest(values, num_sorted) - peak) * inverse_temperature)
        if found := _num_in_nucleus(weights, total, top_p):
            return found
    return len(values)


def _num_in_nucleus(weights: FloatRow, total: float, top_p: float) -> int | None:
    """Length of the shortest head of descending `weights` that sums to `top_p` of `total`, if one does."""
    if top_p >= 1.0:
        return None
    reached = int(np.searchsorted(np.cumsum(weights, dtype=np.float64), top_p * total)) + 1
    return reached if reached <= len(weights) else None


def _num_above(weights: FloatRow, min_p: float) -> int:
    """How many weights are at least `min_p` of the largest, which is 1."""
    return int(np.count_nonzero(weights >= np.float32(min_p)))


def _largest(values: FloatRow, count: int) -> FloatRow:
    """The `count` largest values, descending."""
    if count < len(values):
        values = np.partition(values, len(values) - count)[len(values) - count :]
    return np.sort(values)[::-1]


def _head(values: FloatRow, count: int) -> TokenIds:
    """Ids, ascending, of the `count` largest values; of equal values the lower ids."""
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    ids = np.flatnonzero(values >= threshold)
    num_over = len(ids) - count
    if num_over == 0:
        return ids
    ties = np.flatnonzero(values[ids] == threshold)
    return np.delete(ids, ties[len(ties) - num_over :])


# The draw.


def _draw_key(seed: int, choice: int, position: int) -> np.uint64:
    packed = struct.pack("<QIQ", seed, choice, position)
    return np.uint64(int.from_bytes(blake2b(packed, digest_size=8).digest(), "little"))


def _steps(ids: TokenIds) -> Words:
    """How far each token's word lies from the start of a SplitMix64 stream."""
    return (ids.astype(np.uint64) + np.uint64(1)) * _GAMMA


@lru_cache(maxsize=2)
def _steps_of_all(vocab_size: int) -> Words:
    return _steps(np.arange(vocab_size))


def _random_words(key: np.uint64, steps: Words) -> Words:
    """The words at `steps` of the SplitMix64 stream that starts at `key`."""
    words = steps + key
    # In place: fresh memory for each step would cost more than its arithmetic.
    shifted = np.empty_like(words)
    words ^= np.right_shift(words, np.uint64(30), out=shifted)
    words *= _MIX_1
    words ^= np.right_shift(words, np.uint64(27), out=shifted)
    words *= _MIX_2
    words ^= np.right_shift(words, np.uint64(31), out=shifted)
    return words


def _gumbel_scores(scaled: FloatRow, words: Words) -> npt.NDArray[np.float64]:
    """Scaled logits plus Gumbel noise -log(-log(u)), float64."""
    # 52 bits and a half: never rounded to 0 or to 1.
    uniform = (words >> np.uint64(12)).view(np.int64) + 0.5
    uniform *= 2.0**-52
    noise: npt.NDArray[np.float64] = -np.log(-np.log(uniform))
    return scaled + noise


def _gumbel_argmax(scaled: FloatRow, words: Words) -> int:
    """Index of the largest score; `scaled` logits and random `words` of the same tokens, by ascending id.

    Of many tokens only those that can reach the score log(Z) - slack, Z the sum of their weights, get one
    computed. A score of s + g reaches it only if 1 - u <= -log(u) <= exp(s + slack) / Z, which costs no
    logarithm. The largest score is Gumbel-distributed around log(Z) and stays below with a probability of
    exp(-exp(slack)); then all scores are computed. The result is the same.
    """
    if len(words) >= _SCREEN_FROM_TOKENS:
        reach = np.exp(scaled)
        floor = math.log(float(reach.sum(dtype=np.float64))) - _SCREEN_SLACK
        reach *= np.float32(math.exp(-floor) * 1.0001)  # room for rounding
        able = np.flatnonzero(_tail(words) <= reach)
        scores = _gumbel_scores(scaled[able], words[able])
        if len(able) and scores.max() >= floor:
            return int(able[scores.argmax()])
    return int(_gumbel_scores(scaled, words).argmax())


def _tail(words: Words) -> FloatRow:
    """1 - u of each word, cut to 24 bits, so never too large."""
    bits = np.invert(words)
    bits >>= np.uint64(40)
    tail = bits.view(np.int64).astype(np.float32)
    tail *= np.float32(2.0**-24)
    return tail


# Log-probabilities.


def _logprobs(raw: FloatRow, peak: float, token: int, num_top: int) -> Logprobs:
    shifted = raw - np.float32(peak)
    log_total = math.log(float(np.exp(shifted).sum(dtype=np.float64)))
    ids = _head(raw, min(num_top, len(raw))) if num_top > 0 else np.empty(0, dtype=np.intp)
    ids = ids[np.argsort(-raw[ids], kind="stable")]
    top = tuple((int(i), float(shifted[i]) - log_total) for i in ids)
    return Logprobs(logprob=float(shifted[token]) - log_total, top=top)
