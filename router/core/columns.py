"""The workers' figures as columns of numbers, so that a thousand of them are weighed in a few array operations.

A table has one row for each worker that may get requests now; `write` brings a row up to the worker's own
figures, which stay the truth. Rows are in no order that means anything; a worker that leaves is replaced by the last.
"""

import math

import numpy as np
from numpy.typing import NDArray

from router.core.fleet import Role, Worker

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

MAX_PREFILL_PROMPTS = 2  # the running prompt and one more

_CHARGED = (
    "credits", "num_sequences", "refused_until_s", "turn_tokens", "tokens_ahead", "last_placed", "last_prefilled",
)  # fmt: skip
_REPORTED = (
    "num_blocks", "max_sequences", "block_tokens", "max_context", "is_both", "empty_step_s", "row_s", "s_per_token",
    "kv_bytes_per_token", "link_s_per_byte", "link_fixed_s",
)  # fmt: skip
COLUMNS = (*_CHARGED, *_REPORTED)
_NUM_CHARGED = len(_CHARGED)


def turn_tokens(worker: Worker, window_tokens: int) -> float:
    """How many tokens to prefill may be sent to a worker now. It holds the running prompt and one more, whatever their
    size, and any number of prompts that stay within the window together."""
    if worker.prefill_prompts < MAX_PREFILL_PROMPTS:
        return math.inf
    return window_tokens - worker.prefill_tokens


def charged_of(worker: Worker, window_tokens: int) -> tuple[float, ...]:
    """The first of a worker's columns: what changes with each request."""
    return (
        worker.credits,
        worker.num_sequences,
        worker.refused_until_s,
        turn_tokens(worker, window_tokens),
        worker.tokens_ahead,
        worker.last_placed,
        worker.last_prefilled,
    )


def row_of(worker: Worker, window_tokens: int) -> tuple[float, ...]:
    """A worker's figures in the order of the columns."""
    facts = worker.facts
    return (
        *charged_of(worker, window_tokens),
        facts.num_blocks,
        facts.max_sequences,
        facts.block_tokens,
        facts.max_context,
        facts.role is Role.BOTH,
        worker.empty_step_s,
        worker.row_s,
        worker.prefill_s_per_token,
        facts.kv_bytes_per_token,
        worker.link_s_per_byte,
        worker.link_fixed_s,
    )


class WorkerTable:
    """Columns over some workers; `workers[i]` has row i. The prefill window is in tokens. What is charged is brought up
    to date by `refresh`, before a choice, since it changes several times between two."""

    credits: Floats
    num_blocks: Floats
    num_sequences: Floats
    max_sequences: Floats
    block_tokens: Floats
    max_context: Floats
    refused_until_s: Floats
    turn_tokens: Floats
    tokens_ahead: Floats
    last_placed: Floats
    last_prefilled: Floats
    is_both: Floats
    empty_step_s: Floats
    row_s: Floats
    s_per_token: Floats
    kv_bytes_per_token: Floats
    link_s_per_byte: Floats
    link_fixed_s: Floats

    def __init__(self, window_tokens: int) -> None:
        self.workers: tuple[Worker, ...] = ()
        self._window_tokens = window_tokens
        self._places: dict[int, int] = {}
        self._stale: dict[int, Worker] = {}  # by slot
        self.rows: Floats = np.zeros((len(COLUMNS), 0))
        self._bind()

    def __len__(self) -> int:
        return len(self.workers)

    @property
    def load(self) -> Floats:
        """The share of a decode worker's sequences that is taken."""
        return self.num_sequences / self.max_sequences

    @property
    def used(self) -> Floats:
        """The share of a decode worker's blocks that is taken."""
        return 1.0 - self.credits / self.num_blocks

    def place_of(self, slot: int) -> int | None:
        """The row of the worker with this slot."""
        return self._places.get(slot)

    def row(self, place: int) -> tuple[float, ...]:
        """A row as it stands, for those who compare it with `row_of`."""
        self.refresh()
        return tuple(self.rows[:, place].tolist())

    def add(self, worker: Worker) -> None:
        self._places[worker.slot] = len(self.workers)
        self.workers = (*self.workers, worker)
        self.rows = np.column_stack([self.rows, row_of(worker, self._window_tokens)])
        self._bind()

    def remove(self, worker: Worker) -> None:
        """Takes a worker out; one that is not in changes nothing."""
        place = self._places.pop(worker.slot, None)
        if place is None:
            return
        self._stale.pop(worker.slot, None)
        *workers, last = self.workers
        if last is not worker:
            workers[place] = last
            self._places[last.slot] = place
            self.rows[:, place] = self.rows[:, -1]
        self.workers = tuple(workers)
        self.rows = self.rows[:, :-1].copy()
        self._bind()

    def write(self, worker: Worker) -> None:
        """Brings a worker's row up to date; one that is not in changes nothing."""
        place = self._places.get(worker.slot)
        if place is not None:
            self.rows[:, place] = row_of(worker, self._window_tokens)
            self._stale.pop(worker.slot, None)

    def charged(self, worker: Worker) -> None:
        """What is charged to a worker has changed; `refresh` brings it into the columns."""
        if worker.slot in self._places:
            self._stale[worker.slot] = worker

    def refresh(self) -> None:
        """Brings the columns up to what was charged."""
        for slot, worker in self._stale.items():
            self.rows[:_NUM_CHARGED, self._places[slot]] = charged_of(worker, self._window_tokens)
        self._stale.clear()

    def _bind(self) -> None:
        for name, column in zip(COLUMNS, self.rows, strict=True):
            setattr(self, name, column)
        self.slots = np.array([worker.slot for worker in self.workers], dtype=np.intp)
        self.num_both = sum(worker.facts.role is Role.BOTH for worker in self.workers)
