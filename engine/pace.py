"""What a step takes, learned from the steps that were. Pure: times are given to it."""

from __future__ import annotations

from dataclasses import dataclass

_FORGETS_STEPS = 0.98
_FORGETS_CHUNKS = 0.8
_ROW_GUESS = 0.05  # of a step, where nothing is known of what a row more takes
_GUESS_WEIGHT = 0.05  # as a variance of the number of rows


@dataclass(slots=True)
class _Sums:
    """Decayed, over steps without prompts."""

    weight: float = 0.0
    rows: float = 0.0
    seconds: float = 0.0
    rows_squared: float = 0.0
    rows_seconds: float = 0.0

    def add(self, num_rows: int, seconds: float) -> None:
        keep = _FORGETS_STEPS
        self.weight = keep * self.weight + 1
        self.rows = keep * self.rows + num_rows
        self.seconds = keep * self.seconds + seconds
        self.rows_squared = keep * self.rows_squared + num_rows * num_rows
        self.rows_seconds = keep * self.rows_seconds + num_rows * seconds


class StepPace:
    """Seconds of steps: a line over their rows of answers, and a rate for tokens of prompts."""

    def __init__(self) -> None:
        self._answers = _Sums()
        self._chunk_tokens = 0.0
        self._chunk_s = 0.0

    def observe(self, num_rows: int, num_prompt_tokens: int, step_s: float) -> float:
        """A step of so many rows of answers, guesses included, and so many tokens of prompts took so long. Gives what
        the prompts took beside the answers; 0 where that is not known."""
        if not num_prompt_tokens:
            if num_rows:
                self._answers.add(num_rows, step_s)
            return 0.0
        of_prompts = max(step_s - self.answers_s(num_rows), 0.0)
        self._chunk_tokens = _FORGETS_CHUNKS * self._chunk_tokens + num_prompt_tokens
        self._chunk_s = _FORGETS_CHUNKS * self._chunk_s + of_prompts
        return of_prompts if self._answers.weight or not num_rows else 0.0

    @property
    def row_s(self) -> float:
        """What one row more takes."""
        sums = self._answers
        if not sums.weight:
            return 0.0
        rows, seconds = sums.rows / sums.weight, sums.seconds / sums.weight
        spread = max(sums.rows_squared / sums.weight - rows * rows, 0.0)
        together = sums.rows_seconds / sums.weight - rows * seconds
        slope = (together + _GUESS_WEIGHT * _ROW_GUESS * seconds) / (spread + _GUESS_WEIGHT)
        return min(max(slope, 0.0), seconds / rows)

    def answers_s(self, num_rows: int) -> float:
        """What a step of so many rows of answers takes; 0 where none was measured."""
        sums = self._answers
        if not sums.weight or not num_rows:
            return 0.0
        return sums.seconds / sums.weight + self.row_s * (num_rows - sums.rows / sums.weight)

    def prompt_tokens_within(self, seconds: float) -> int:
        """How many tokens of prompts take so long; 0 where none was measured."""
        if seconds <= 0 or not self._chunk_tokens:
            return 0
        return int(min(seconds * self._chunk_tokens / max(self._chunk_s, 1e-9), 1 << 30))
