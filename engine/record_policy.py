"""At which boundaries between blocks the live rows of windows are kept, so that a prefix can be taken up there.

`ends` is what DeepSeek runs: where a prompt ends and where an answer does. Added to it is where a prompt parts from
what is cached, since the next one may part there as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class RecordPolicy:
    """`ends`: the last boundary that a prompt can be taken up at again, and the last of an answer; `full`: every one;
    `periodic`: every `period_tokens`, a multiple of the block; `zero`: none."""

    kind: Literal["ends", "full", "periodic", "zero"] = "ends"
    period_tokens: int = 0

    def wanted(self, start: int, end: int, block_tokens: int, num_prompt: int, junction: int) -> list[int]:
        """Boundaries in (start, end] to be kept of a sequence with that prompt, ascending. `junction`: tokens of its
        prefix that were cached without a record at their end; 0 for none."""
        step = self.period_tokens if self.kind == "periodic" else block_tokens
        boundaries = range((start // step + 1) * step, end + 1, step)
        if self.kind == "zero":
            return []
        if self.kind != "ends":
            return list(boundaries)
        replayable = (num_prompt - 1) // block_tokens * block_tokens
        last = (max(end, num_prompt) // block_tokens) * block_tokens
        return [b for b in boundaries if b in (replayable, junction, last) or b > num_prompt]

    def supersedes(self, boundary: int, num_prompt: int) -> bool:
        """Whether a boundary is kept only until the next one of its answer is."""
        return self.kind == "ends" and boundary > num_prompt
