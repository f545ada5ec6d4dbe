"""Guesses at what an answer says next: what followed when its last tokens were there before.

Prompt lookup (Saxena, "Prompt lookup decoding", 2023) as a pure fold over a sequence's tokens. A drafter follows an
earlier place for as long as that place foretells the tokens, and keeps count whether or not its guesses were
computed, so that it knows without trying when guessing pays again. Guesses cost rows, never tokens: a token that is
drawn is drawn with its own key, and a guess is kept only where it is that token (engine/drawing.py).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MATCHED_TOKENS = 3
JUDGED_TOKENS = 64  # of a prompt's end: how well it foretells itself
WINDOW_TOKENS = 1 << 16  # how far back it looks
_FORGETS = 0.9  # of what it counted, with each token
_BYTES = 4


@dataclass(frozen=True, slots=True)
class DraftState:
    """What a drafter knows beside the tokens. follows: the position whose token it expects next, None where nothing
    is known; hits, misses: decayed counts of what it expected, above 0."""

    follows: int | None = None
    hits: float = 1.0
    misses: float = 1.0

    def check(self, num_tokens: int) -> None:
        """Raise ValueError where this is not of so many tokens."""
        if self.follows is not None and not 0 <= self.follows < num_tokens:
            raise ValueError(f"a drafter of {num_tokens} tokens cannot follow position {self.follows}")
        if not (0 < self.hits < math.inf and 0 < self.misses < math.inf):
            raise ValueError(
                f"a drafter's counts are finite and above 0, not {self.hits:g} and {self.misses:g}"
            )


class Drafter:
    """Of one sequence. `tokens`: those so far; `state`: what another drafter made of them; without it this one reads
    their end itself.

    Raises ValueError for a state that is not of so many tokens.
    """

    def __init__(self, tokens: Sequence[int], state: DraftState | None = None) -> None:
        num_read = len(tokens) if state is not None else max(0, len(tokens) - JUDGED_TOKENS)
        self._tokens = bytearray(np.asarray(tokens[:num_read], "<u4").tobytes())
        self.state = state or DraftState()
        self.state.check(num_read)
        for token in tokens[num_read:]:
            self.observe(token)

    def copy(self) -> Drafter:
        """Another one, of the same tokens."""
        twin = Drafter((), DraftState())
        twin._tokens, twin.state = self._tokens[:], self.state
        return twin

    @property
    def hit_rate(self) -> float:
        """How likely the next guess is right."""
        return self.state.hits / (self.state.hits + self.state.misses)

    def observe(self, token: int) -> None:
        """The sequence's next token."""
        follows, hits, misses = self.state.follows, self.state.hits, self.state.misses
        expected = None if follows is None else self._token(follows)
        self._tokens += token.to_bytes(_BYTES, "little")
        if follows is not None:
            hits, misses = _FORGETS * hits + (expected == token), _FORGETS * misses + (expected != token)
        follows = follows + 1 if follows is not None and expected == token else self._find()
        self.state = DraftState(follows, hits, max(misses, 1e-3))

    def draft(self, count: int) -> list[int]:
        """Up to `count` guesses at the tokens to come; what it guesses may go on with its own guesses."""
        follows = self.state.follows
        if follows is None:
            return []
        num_tokens = len(self._tokens) // _BYTES
        drafts: list[int] = []
        for position in range(follows, follows + count):
            known = position < num_tokens
            drafts.append(self._token(position) if known else drafts[position - num_tokens])
        return drafts

    def _token(self, position: int) -> int:
        return int.from_bytes(self._tokens[position * _BYTES : (position + 1) * _BYTES], "little")

    def _find(self) -> int | None:
        """The position after the last place where the newest tokens were before."""
        length = MATCHED_TOKENS * _BYTES
        newest = self._tokens[-length:]
        first = max(0, len(self._tokens) - WINDOW_TOKENS * _BYTES)
        end = len(self._tokens) - _BYTES
        while len(newest) == length:
            at = self._tokens.rfind(newest, first, end)
            if at < 0:
                return None
            if at % _BYTES == 0:
                return at // _BYTES + MATCHED_TOKENS
            end = at + length - 1
        return None


def worthwhile(
    hit_rates: Sequence[float], limits: Sequence[int], step_s: float, row_s: float, budget: int
) -> list[int]:
    """How many guesses of each sequence to compute, at most `limits` each and `budget` together.

    A step that draws one token for each sequence takes `step_s`, every row more `row_s`; the i-th guess is right, and
    all before it, with a probability of hit_rate^i. A row is worth it while it brings more tokens for its time than
    the step does without it.
    """
    counts = [0] * len(hit_rates)
    num_tokens = float(len(hit_rates))
    best = [(-rate, index) for index, rate in enumerate(hit_rates) if limits[index] > 0]
    heapq.heapify(best)
    while best and budget > 0:
        gain, index = heapq.heappop(best)
        if -gain * step_s <= row_s * num_tokens:
            break
        counts[index] += 1
        num_tokens, step_s, budget = num_tokens - gain, step_s + row_s, budget - 1
        if counts[index] < limits[index]:
            heapq.heappush(best, (gain * hit_rates[index], index))
    return counts
