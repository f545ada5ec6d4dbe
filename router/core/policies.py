"""By what workers are ranked, among those that can take a request.

A policy gives keys: columns of numbers of which the lower wins, the next key deciding among equals. Costs are those of
`costs`; every policy is shown them, one heeds them.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from router.core.columns import Floats, Mask, WorkerTable
from router.core.fleet import Role, Worker
from router.core.weighing import lowest

MAX_KEYS = 3
Keys = tuple[Floats, ...]
"""At least one, at most `MAX_KEYS`."""
Tickets = tuple[float, float]


class Ballot(NamedTuple):
    """Who may be chosen: `may` marks rows of `table`, `cost_s` is what each is predicted to cost. `tickets` are two
    random numbers in [0, 1), the same until a request is charged."""

    table: WorkerTable
    may: Mask
    cost_s: Floats
    tickets: Tickets


class Policy(Protocol):
    """Ranks decode and prefill workers; stateless."""

    @property
    def heeds_costs(self) -> bool:
        """Whether costs decide. If not, pure decode workers prefill for want of prefill workers only."""

    @property
    def names_sources(self) -> bool:
        """Whether who prefills is told which other workers have more of the prompt cached, to fetch it from them."""

    def decode_keys(self, ballot: Ballot) -> Keys: ...

    def prefill_keys(self, ballot: Ballot) -> Keys: ...

    def prefers_local(self, local: Worker, local_cost_s: float, remote: Worker, remote_cost_s: float) -> bool:
        """Whether `local`, which decodes, should prefill too, rather than `remote`."""


class Cost:
    """The least predicted cost. Ties go to the one chosen longest ago, under the other policies too."""

    heeds_costs = True
    names_sources = True

    def decode_keys(self, ballot: Ballot) -> Keys:
        return ballot.cost_s, ballot.table.last_placed

    def prefill_keys(self, ballot: Ballot) -> Keys:
        return ballot.cost_s, ballot.table.last_placed

    def prefers_local(self, local: Worker, local_cost_s: float, remote: Worker, remote_cost_s: float) -> bool:
        return local_cost_s < remote_cost_s


class LeastLoaded:
    """The decode worker with the fewest sequences for its size, then with the most free blocks; the prefill
    worker with the fewest prompt tokens ahead, then one that does nothing else."""

    heeds_costs = False
    names_sources = True

    def decode_keys(self, ballot: Ballot) -> Keys:
        table = ballot.table
        return (
            table.load,
            table.used,
            table.last_placed,
        )

    def prefill_keys(self, ballot: Ballot) -> Keys:
        table = ballot.table
        return table.tokens_ahead, table.is_both, table.last_placed

    def prefers_local(self, local: Worker, local_cost_s: float, remote: Worker, remote_cost_s: float) -> bool:
        return _prompt_load(local) < _prompt_load(remote)


class RoundRobin:
    """One after the other, as long as they can take requests, and nothing known of their caches: what a router does
    that looks at nothing, to compare with."""

    heeds_costs = False
    names_sources = False

    def decode_keys(self, ballot: Ballot) -> Keys:
        return (ballot.table.last_placed,)

    def prefill_keys(self, ballot: Ballot) -> Keys:
        return (ballot.table.last_placed,)

    def prefers_local(self, local: Worker, local_cost_s: float, remote: Worker, remote_cost_s: float) -> bool:
        return local.last_placed < remote.last_placed


class PowerOfTwo:
    """The less loaded of two that are drawn at random (Mitzenmacher, The power of two choices in randomized load
    balancing, 2001): nearly as even as looking at all, and routers that do not know of each other do not all run
    to the same worker."""

    heeds_costs = False
    names_sources = True

    def decode_keys(self, ballot: Ballot) -> Keys:
        table = ballot.table
        return _drawn_first(ballot), table.load, table.last_placed

    def prefill_keys(self, ballot: Ballot) -> Keys:
        return _drawn_first(ballot), ballot.table.tokens_ahead, ballot.table.last_placed

    def prefers_local(self, local: Worker, local_cost_s: float, remote: Worker, remote_cost_s: float) -> bool:
        return _prompt_load(local) < _prompt_load(remote)


POLICIES: dict[str, Policy] = {
    "cost": Cost(),
    "least-loaded": LeastLoaded(),
    "round-robin": RoundRobin(),
    "power-of-two": PowerOfTwo(),
}


class Winner(NamedTuple):
    """The row that won, the first key of all rows (infinite for those that may not be chosen), and all keys."""

    row: int
    key: Floats
    keys: Keys

    @property
    def rank(self) -> tuple[float, ...]:
        """To compare it with another group's winner."""
        return tuple(key.item(self.row) for key in self.keys)


def best_of(ballot: Ballot, rank: Callable[[Ballot], Keys]) -> Winner | None:
    """The row with the lowest keys; None if no row may be chosen."""
    keys = rank(ballot)
    first, second, third = (*keys, *[keys[-1]] * (MAX_KEYS - len(keys)))
    ruled_out = np.empty(len(first))
    row = lowest(ballot.may, first, second, third, ruled_out)
    return None if row < 0 else Winner(row, ruled_out, keys)


def _drawn_first(ballot: Ballot) -> Floats:
    rows = ballot.may.nonzero()[0]
    key = np.ones(len(ballot.table))
    if len(rows):
        first = int(ballot.tickets[0] * len(rows))
        second = int(ballot.tickets[1] * (len(rows) - 1))
        key[rows[first]] = 0.0
        key[rows[second + (second >= first) if len(rows) > 1 else 0]] = 0.0
    return key


def _prompt_load(worker: Worker) -> tuple[float, ...]:
    return worker.tokens_ahead, worker.facts.role is Role.BOTH, worker.last_placed
