"""Which cores each engine of one machine gets, and which are left to everything else. Pure.

Decode writes a token for everybody at each step, so it is what a stolen millisecond hurts most: its cores
are taken from the end of the list, prefill's come below, and the router, Ray's daemons, clients and the
workers' own service threads stay off the decode cores wherever there is another core.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from worker.config import WorkerRole

_WEIGHT = {WorkerRole.PREFILL: 2, WorkerRole.DECODE: 1, WorkerRole.BOTH: 3}
"""Cores that a worker without a number of its own gets, relative to others: prefill is bound by compute,
decode by memory, which a few cores saturate."""
_FROM_THE_TOP = (WorkerRole.DECODE, WorkerRole.BOTH, WorkerRole.PREFILL)
_CORES_TO_KEEP_ONE_FREE = 4
"""From this many cores on, one in sixteen (at least one) is left to everything that is not an engine."""


@dataclass(frozen=True, slots=True)
class CoreDemand:
    """One engine on the machine. `num_cpus` None takes a share of what is left."""

    worker_id: str
    role: WorkerRole
    num_cpus: int | None = None


@dataclass(frozen=True, slots=True)
class CoreDivision:
    """Who runs where.

    Attributes:
        engines: each worker's engine cores.
        shared: the workers whose cores another engine uses too, because there are too few.
        service: the cores of everything that is not an engine.
    """

    engines: Mapping[str, tuple[int, ...]]
    shared: frozenset[str]
    service: tuple[int, ...]


def divide(cores: Sequence[int], demands: Sequence[CoreDemand]) -> CoreDivision:
    """Divide `cores`, listed so that neighbours share hardware.

    Raises ValueError where the demands with a number exceed the cores.
    """
    wanted = sum(demand.num_cpus or 0 for demand in demands)
    if not cores or wanted > len(cores):
        raise ValueError(f"{wanted} cores wanted of {len(cores)}")
    ordered = sorted(demands, key=lambda demand: _FROM_THE_TOP.index(demand.role))
    num_open = sum(demand.num_cpus is None for demand in demands)
    if num_open <= len(cores) - wanted:
        engines = _exclusive(cores, ordered)
    else:
        engines = _crowded(cores, ordered)
    return CoreDivision(engines, _shared(engines), _service(cores, demands, engines))


def _exclusive(cores: Sequence[int], demands: Sequence[CoreDemand]) -> dict[str, tuple[int, ...]]:
    """No core has two engines."""
    shares = _open_shares(len(cores), demands)
    engines, end = {}, len(cores)
    for demand in demands:
        start = end - (demand.num_cpus or shares[demand.role])
        engines[demand.worker_id] = tuple(cores[start:end])
        end = start
    return engines


def _open_shares(num_cores: int, demands: Sequence[CoreDemand]) -> dict[WorkerRole, int]:
    """Cores of each worker without a number of its own: equal within a role, so that replicas are."""
    num_open = Counter(demand.role for demand in demands if demand.num_cpus is None)
    shares = dict.fromkeys(num_open, 1)
    keep = max(1, num_cores // 16) if num_cores >= _CORES_TO_KEEP_ONE_FREE else 0
    left = num_cores - keep - sum(demand.num_cpus or 1 for demand in demands)
    while fitting := [role for role in num_open if num_open[role] <= left]:
        # The role with the least for its weight is next; of equals the weightier, which is prefill.
        neediest = min(fitting, key=lambda role: (shares[role] / _WEIGHT[role], -_WEIGHT[role]))
        shares[neediest] += 1
        left -= num_open[neediest]
    return shares


def _crowded(cores: Sequence[int], demands: Sequence[CoreDemand]) -> dict[str, tuple[int, ...]]:
    """More engines than cores: those without a number get one core each, decode apart from prefill."""
    engines, end = {}, len(cores)
    for demand in demands:
        if demand.num_cpus is not None:
            engines[demand.worker_id] = tuple(cores[end - demand.num_cpus : end])
            end -= demand.num_cpus
    pool = cores[:end] or cores
    decoding = [demand for demand in demands if demand.num_cpus is None and demand.role.decodes]
    prefilling = [demand for demand in demands if demand.num_cpus is None and not demand.role.decodes]
    split = len(pool)
    if decoding and prefilling and len(pool) > 1:
        split = round(len(pool) * len(decoding) / (len(decoding) + len(prefilling)))
        split = min(max(split, 1), len(pool) - 1)
    upper, lower = pool[-split:], pool[:-split] or pool
    engines |= {demand.worker_id: (upper[-1 - index % len(upper)],) for index, demand in enumerate(decoding)}
    engines |= {
        demand.worker_id: (lower[-1 - index % len(lower)],) for index, demand in enumerate(prefilling)
    }
    return engines


def _shared(engines: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    users: dict[int, list[str]] = {}
    for worker_id, cpus in engines.items():
        for cpu in cpus:
            users.setdefault(cpu, []).append(worker_id)
    return frozenset(worker_id for sharers in users.values() if len(sharers) > 1 for worker_id in sharers)


def _service(
    cores: Sequence[int], demands: Sequence[CoreDemand], engines: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    busy = {cpu for cpus in engines.values() for cpu in cpus}
    decoding = {cpu for demand in demands if demand.role.decodes for cpu in engines[demand.worker_id]}
    for taken in (busy, decoding):
        left = tuple(cpu for cpu in cores if cpu not in taken)
        if left:
            return left
    return tuple(cores)
