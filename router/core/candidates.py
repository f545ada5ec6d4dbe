"""The best few workers of a choice, kept so that it can be explained later.

At most eight a side are kept once the request is dispatched; of a choice that comes to nothing they are not even
picked out.
"""

import math
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import NamedTuple

from router.core.columns import Floats, WorkerTable
from router.core.fleet import Worker

MAX_CANDIDATES = 8


class Candidate(NamedTuple):
    """One worker as placement saw it. Times are predictions; `cost_s` is infinite for one that was ruled out, and
    `note` says why."""

    worker_id: str
    chosen: bool
    cost_s: float
    queue_s: float
    compute_s: float
    transfer_s: float
    step_s: float
    cached_tokens: int
    tokens_ahead: int
    free_blocks: int
    note: str = ""


_Rows = tuple[Sequence[Worker], Floats, int, Sequence[Floats | None], Callable[[Worker], str]]


CandidateRow = tuple[str, bool, float, float, float, float, float, int, int, int, str]
"""The fields of a `Candidate`, in order."""


class Shortlist:
    """One side of a choice: the row `best` of a table, and those with the lowest keys.

    `columns` are cost_s, queue_s, compute_s, transfer_s, step_s and cached tokens by row; a missing one is zeros.
    Workers with an infinite key were ruled out; `why_not` says why. `compact` lets go of all rows but the few.
    """

    def __init__(
        self,
        table: WorkerTable,
        key: Floats,
        best: int,
        columns: Sequence[Floats | None],
        why_not: Callable[[Worker], str],
    ) -> None:
        # These two are the table's own, and change under our hands.
        columns = (*columns, table.tokens_ahead.copy(), table.credits.copy())
        self._whole: _Rows | None = (table.workers, key, best, columns, why_not)
        self._few: list[_Few] = []

    def compact(self) -> None:
        """Keeps the few alone, as they stood when the choice was made."""
        if self._whole is not None:
            self._few = _the_few(*self._whole)
            self._whole = None

    def candidates(self) -> list[Candidate]:
        """The few, none of them marked as chosen."""
        self.compact()
        return [_candidate(*few) for few in self._few]


_Few = tuple[str, str | None, tuple[float, ...]]
"""A worker, why it was ruled out, where it was, and its row of the columns."""


def _the_few(
    workers: Sequence[Worker],
    key: Floats,
    best: int,
    columns: Sequence[Floats | None],
    why_not: Callable[[Worker], str],
) -> list[_Few]:
    if len(key) > MAX_CANDIDATES:
        few = key.argpartition(MAX_CANDIDATES - 1)[:MAX_CANDIDATES]
        if best not in few.tolist():
            few[key.take(few).argmax()] = best
        workers, key = [workers[place] for place in few.tolist()], key.take(few)
        columns = [None if column is None else column.take(few) for column in columns]
    rows = zip(*(repeat(0.0) if column is None else column.tolist() for column in columns), strict=False)
    return [
        (worker.facts.ref.worker_id, why_not(worker) if rank == math.inf else None, row)
        for worker, rank, row in zip(workers, key.tolist(), rows, strict=True)
    ]


def _candidate(worker_id: str, why_not: str | None, row: tuple[float, ...]) -> Candidate:
    cost_s, queue_s, compute_s, transfer_s, step_s, *counts = row
    cached_tokens, tokens_ahead, free_blocks = map(int, counts)
    return Candidate(
        worker_id=worker_id,
        chosen=False,
        cost_s=cost_s if why_not is None else math.inf,
        queue_s=queue_s,
        compute_s=compute_s,
        transfer_s=transfer_s,
        step_s=step_s,
        cached_tokens=cached_tokens,
        tokens_ahead=tokens_ahead,
        free_blocks=free_blocks,
        note=why_not or "",
    )
