"""What comes of placing a request: where it goes, or why it must wait."""

from dataclasses import dataclass, field
from enum import StrEnum

from router.core.candidates import MAX_CANDIDATES, Candidate, CandidateRow, Shortlist
from router.core.fleet import WorkerRef


class WaitCause(StrEnum):
    """Why a request cannot be placed now; a group of workers answers with the first that applies."""

    NO_WORKERS = "NO_WORKERS"  # no decode worker with a worker that may prefill for it
    TOO_LARGE = "TOO_LARGE"  # none of them could take it, even when idle
    OUT_OF_TOUCH = "OUT_OF_TOUCH"  # those that could have lost their connection
    NO_CREDIT = "NO_CREDIT"  # decode memory or sequences are spent
    PREFILL_BUSY = "PREFILL_BUSY"


@dataclass(frozen=True, slots=True)
class Wait:
    """Not now. What is TOO_LARGE will not fit later either, unless other workers join."""

    cause: WaitCause
    reason: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes. `prefill` None: the decode worker prefills by itself.

    `predicted_ttft_s` is None while nothing was measured that it could rest on; `idle_ttft_s` is what it would be if no
    prompt were ahead, on the prefill worker that would be best then, and is never above it. The cached tokens are those
    of the prompt that the worker which decodes, or the one which prefills, holds already.
    """

    decode: WorkerRef
    prefill: WorkerRef | None
    reason: str
    predicted_ttft_s: float | None = None
    idle_ttft_s: float | None = None
    cached_decode_tokens: int = 0
    cached_prefill_tokens: int = 0
    _decoders: Shortlist | None = field(default=None, repr=False, compare=False)
    _prefillers: Shortlist | None = field(default=None, repr=False, compare=False)
    _locals: tuple[CandidateRow, ...] = field(default=(), repr=False, compare=False)

    @property
    def workers(self) -> tuple[WorkerRef, ...]:
        return (self.decode,) if self.prefill is None else (self.decode, self.prefill)

    @property
    def decode_candidates(self) -> tuple[Candidate, ...]:
        """The best few decode workers, the chosen one first."""
        few = self._decoders.candidates() if self._decoders is not None else []
        return _ordered([option._replace(chosen=option.worker_id == self.decode.worker_id) for option in few])

    @property
    def prefill_candidates(self) -> tuple[Candidate, ...]:
        """The best few to prefill, the chosen one first; decode workers that could do it by themselves too."""
        remote = self._prefillers.candidates() if self._prefillers is not None else []
        chosen = self.decode if self.prefill is None else self.prefill
        options = [(option, self.prefill is not None) for option in remote]
        options += [(Candidate(*row), self.prefill is None) for row in self._locals]
        return _ordered([
            option._replace(chosen=is_side and option.worker_id == chosen.worker_id) for option, is_side in options
        ])  # fmt: skip

    def compact(self) -> None:
        """Keeps the best few candidates alone."""
        for shortlist in (self._decoders, self._prefillers):
            if shortlist is not None:
                shortlist.compact()


@dataclass(frozen=True, slots=True)
class Choice:
    """A placement in one group, with a rank to compare it with another group's."""

    rank: tuple[float, ...]
    placement: Placement


def _ordered(candidates: list[Candidate]) -> tuple[Candidate, ...]:
    ranked = sorted(candidates, key=lambda candidate: (not candidate.chosen, candidate.cost_s))
    return tuple(ranked[:MAX_CANDIDATES])
