"""Which faults a campaign injects, and when: pure functions of seeds, so that it can be run again.

A campaign's kinds are dealt from shuffled decks, so that one of any length has some of everything, and never more kills
than their share. Lengths are drawn from bands around the limits that the cluster is given (`Limits`): what is shorter
than a link's grace must cost nothing but time, what is longer costs attempts, and a worker that was away for longer
than its dead-after time wakes fenced.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

KILL_CHANCE = 0.7
"""That the second of a pair of faults is a kill; the first never is."""
PREFILL = ("prefill-0", "prefill-1")
DECODE = ("decode-0", "decode-1")
WORKERS = (*PREFILL, *DECODE)
ROUTERS = ("router-0", "router-1")
STORE = "store"


class Kind(StrEnum):
    """What is done to the cluster."""

    KILL_PREFILL = "kill_prefill"
    KILL_DECODE = "kill_decode"
    KILL_STORE = "kill_store"
    KILL_ROUTER = "kill_router"
    FREEZE_WORKER = "freeze_worker"  # SIGSTOP, and woken later
    FREEZE_STORE = "freeze_store"
    FREEZE_ROUTER = "freeze_router"
    CUT_WORKER = "cut_worker"  # between the routers and one worker, both ways
    CUT_KV = "cut_kv"  # the way of KV into, and out of, one worker
    CUT_CLIENTS = "cut_clients"  # between all clients and one router
    SLOW_WORKER = "slow_worker"
    SLOW_KV = "slow_kv"
    CORRUPT_KV = "corrupt_kv"  # bytes of frames are flipped on their way
    FILL_DISK = "fill_disk"  # of the store
    JUMP_CLOCK = "jump_clock"  # of one worker, forwards or backwards
    REPEAT_MESSAGES = "repeat_messages"  # between the routers and one worker, some of them late
    CLIENT_RETURNS = "client_returns"  # breaks its stream in mid-answer and asks again
    CLIENT_VANISHES = "client_vanishes"


KILLS = frozenset({Kind.KILL_PREFILL, Kind.KILL_DECODE, Kind.KILL_STORE, Kind.KILL_ROUTER})
KILL_DECK = (
    *(Kind.KILL_DECODE, Kind.KILL_DECODE, Kind.KILL_PREFILL, Kind.KILL_DECODE),
    *(Kind.KILL_PREFILL, Kind.KILL_ROUTER, Kind.KILL_STORE),
)
OTHER_DECK = (
    *(kind for kind in Kind if kind not in KILLS),
    *(Kind.FREEZE_WORKER, Kind.CUT_WORKER, Kind.CUT_KV, Kind.CORRUPT_KV),
)
_TARGETS = {
    Kind.KILL_PREFILL: PREFILL,
    Kind.KILL_DECODE: DECODE,
    **dict.fromkeys((Kind.KILL_STORE, Kind.FREEZE_STORE, Kind.FILL_DISK), (STORE,)),
    **dict.fromkeys((Kind.KILL_ROUTER, Kind.FREEZE_ROUTER, Kind.CUT_CLIENTS), ROUTERS),
    **dict.fromkeys((Kind.CLIENT_RETURNS, Kind.CLIENT_VANISHES), ("",)),
}
CARRIERS = ("tcp", "inline")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Times that the cluster is run with, in seconds; see WorkerConfig and RouterConfig."""

    link_grace_s: float = 3.0
    resume_grace_s: float = 5.0
    dead_after_s: float = 8.0
    lease_ttl_s: float = 4.0
    client_grace_s: float = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds between one fault and the next, and the longest that one lasts."""

    shortest_gap_s: float = 1.5
    longest_gap_s: float = 5.0
    longest_fault_s: float = 16.0


@dataclass(frozen=True, slots=True)
class Fault:
    """`at_s`: after the round's load began. `lasts_s`: until it is mended; 0 for what happens at once. `target`: a
    process; empty where a client is one, which is chosen among those that read just then."""

    at_s: float
    kind: Kind
    target: str
    lasts_s: float = 0.0
    parameters: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """In a few words."""
        words = [
            self.kind.value,
            self.target,
            *(f"{name}={value}" for name, value in self.parameters.items()),
        ]
        return " ".join(word for word in words if word) + (
            f" for {self.lasts_s:.1f} s" if self.lasts_s else ""
        )


def round_seed(seed: int, number: int) -> int:
    """The seed of a campaign's round: 32 bits, different for each."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=4).digest(), "little")


def kinds_of(seed: int, num_faults: int) -> list[Kind]:
    """A campaign's, in order. Raises ValueError for less than one."""
    if num_faults < 1:
        raise ValueError(f"a campaign has at least one fault, not {num_faults}")
    rng = random.Random(seed)
    kills, others = _dealt(KILL_DECK, rng), _dealt(OTHER_DECK, rng)
    # In pairs, one of which is another kind for sure: no stretch of a campaign is all kills.
    pairs = [(next(others), next(kills if rng.random() < KILL_CHANCE else others)) for _ in range(num_faults)]
    return [kind for pair in pairs for kind in rng.sample(pair, 2)][:num_faults]


def plan(seed: int, kinds: Sequence[Kind], limits: Limits = Limits(), pace: Pace = Pace()) -> list[Fault]:
    """A round's faults in the order of their times."""
    rng = random.Random(seed)
    at_s, faults = 0.0, []
    for kind in kinds:
        at_s += rng.uniform(pace.shortest_gap_s, pace.longest_gap_s)
        faults.append(_fault(rng, at_s, kind, limits, pace))
    return faults


def share_of_kills(kinds: Sequence[Kind]) -> float:
    """Of a campaign's faults."""
    return sum(kind in KILLS for kind in kinds) / len(kinds) if kinds else 0.0


def _dealt(deck: Sequence[Kind], rng: random.Random) -> Iterator[Kind]:
    """Without end: all of a shuffled deck, then all of it again."""
    while True:
        yield from rng.sample(deck, len(deck))


def _fault(rng: random.Random, at_s: float, kind: Kind, limits: Limits, pace: Pace) -> Fault:
    target = rng.choice(_TARGETS.get(kind, WORKERS))
    parameters = _parameters(rng, kind, limits)
    lasts_s = min(_lasts_s(rng, kind, limits), pace.longest_fault_s)
    return Fault(round(at_s, 3), kind, target, round(lasts_s, 3), parameters)


def _lasts_s(rng: random.Random, kind: Kind, limits: Limits) -> float:
    match kind:
        case Kind.FREEZE_WORKER | Kind.CUT_WORKER | Kind.CUT_KV:
            return _away_s(rng, limits)
        case Kind.FREEZE_ROUTER:
            return rng.uniform(0.3, 0.9 * limits.link_grace_s)
        case Kind.CUT_CLIENTS:
            return rng.uniform(0.2, 2.0)
        case Kind.SLOW_WORKER | Kind.SLOW_KV:
            return rng.uniform(2.0, 8.0)
        case Kind.CORRUPT_KV | Kind.FREEZE_STORE | Kind.FILL_DISK | Kind.REPEAT_MESSAGES:
            return rng.uniform(1.0, 6.0)
        case _:
            return 0.0


def _parameters(rng: random.Random, kind: Kind, limits: Limits) -> dict[str, Any]:
    """`silent`: nothing passes; else connections are reset and new ones refused. `flip_share`: of frames."""
    parameters: dict[str, Any] = {}
    match kind:
        case Kind.CUT_WORKER | Kind.CUT_KV | Kind.CUT_CLIENTS:
            parameters["silent"] = rng.random() < 0.5
        case Kind.SLOW_WORKER | Kind.SLOW_KV:
            parameters["bytes_per_s"] = int(10 ** rng.uniform(5.0, 6.7))
            parameters["delay_s"] = round(rng.uniform(0.0, 0.2), 3)
        case Kind.CORRUPT_KV:
            parameters["flip_share"] = round(rng.uniform(0.05, 0.5), 3)
        case Kind.JUMP_CLOCK:
            furthest_s = rng.choice((limits.lease_ttl_s, 2 * limits.dead_after_s))
            parameters["jump_s"] = round(rng.choice((1, 1, -1)) * rng.uniform(0.5, furthest_s), 3)
    if kind in (Kind.CUT_KV, Kind.SLOW_KV, Kind.CORRUPT_KV):
        parameters["carrier"] = rng.choice(CARRIERS)
    return parameters


def _away_s(rng: random.Random, limits: Limits) -> float:
    """Within the grace, beyond it, or beyond the time after which a worker fences itself."""
    band = rng.choice(
        (
            (0.2, 0.8 * limits.link_grace_s),
            (1.2 * limits.link_grace_s, 0.9 * limits.dead_after_s),
            (1.1 * limits.dead_after_s, 2.0 * limits.dead_after_s),
        )
    )
    return rng.uniform(*band)
