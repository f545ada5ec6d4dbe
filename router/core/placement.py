"""Where a request runs: which worker decodes it, and which one prefills it.

Placement spends *credits* (blocks of decode memory) and charges load when it dispatches, not when a
report comes back, so that a burst between two reports spreads. A charge has parts with lives of their own:

- *prefill*: from dispatch until the prompt is prefilled. A worker holds the running prompt and one more;
  short prompts that together stay within a window of tokens may be more than two.
- *sequences*: from dispatch until the request ends.
- *blocks*: from dispatch until the first report that came after the worker granted them. From then on the
  report's own number of free blocks has them in it.

Decode and prefill workers are ranked apart, never in pairs, and only among workers of one identity: those
that may hand a sequence over to one another. Knows no clock (`now` is monotonic seconds), no connections,
no tokens.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

from router.core.fleet import Demand, Identity, Role, Worker, WorkerFacts, WorkerRef, WorkerState

K = TypeVar("K", bound=Hashable)

MAX_PREFILL_PROMPTS = 2  # the running prompt and one more


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes. `prefill` None: the decode worker prefills by itself."""

    decode: WorkerRef
    prefill: WorkerRef | None
    reason: str

    @property
    def workers(self) -> tuple[WorkerRef, ...]:
        return (self.decode,) if self.prefill is None else (self.decode, self.prefill)


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


class Policy(Protocol):
    """Ranks the workers that can take a request; the lowest rank wins."""

    def decode_rank(self, worker: Worker) -> tuple[float, ...]: ...

    def prefill_rank(self, worker: Worker) -> tuple[float, ...]: ...


class LeastLoaded:
    """The decode worker with the fewest sequences for its size, then with the most free blocks; the prefill
    worker with the fewest prompt tokens ahead, then one that does nothing else. Ties go to the one chosen
    longest ago."""

    def decode_rank(self, worker: Worker) -> tuple[float, ...]:
        facts = worker.facts
        return (
            worker.num_sequences / facts.max_sequences,
            -worker.credits / facts.num_blocks,
            worker.last_placed,
        )

    def prefill_rank(self, worker: Worker) -> tuple[float, ...]:
        return (worker.prefill_tokens, worker.facts.role is Role.BOTH, worker.last_placed)


POLICIES: dict[str, Policy] = {"least-loaded": LeastLoaded()}


@dataclass(slots=True)
class _Charge:
    decode: Worker
    prefill: Worker
    num_blocks: int
    num_sequences: int
    prompt_tokens: int
    blocks_held: bool = True
    prefill_held: bool = True


_Pair = tuple[tuple[float, ...], Worker, Worker]


class PlacementState(Generic[K]):
    """The workers, what this router has charged to them, and the choice among them."""

    def __init__(self, policy: Policy, prefill_window_tokens: int) -> None:
        self._policy = policy
        self._prefill_window_tokens = prefill_window_tokens
        self._workers: dict[str, Worker] = {}
        self._charges: dict[K, _Charge] = {}
        self._unreported: dict[WorkerRef, set[K]] = {}
        self._num_placed = 0

    @property
    def workers(self) -> Iterable[Worker]:
        return self._workers.values()

    def worker(self, ref: WorkerRef) -> Worker | None:
        """The worker of this very incarnation."""
        worker = self._workers.get(ref.worker_id)
        return worker if worker is not None and worker.facts.ref == ref else None

    def add(self, facts: WorkerFacts, state: WorkerState) -> None:
        """A worker joined; an older incarnation of it is forgotten, with what was charged to it.

        Raises:
            ValueError: a size that must be positive is not.
        """
        sizes = {"block_tokens": facts.block_tokens, "max_context": facts.max_context}
        if facts.role is not Role.PREFILL:
            sizes |= {"num_blocks": facts.num_blocks, "max_sequences": facts.max_sequences}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(
                    f"worker {facts.ref.worker_id!r} says {name} is {value}; it must be positive"
                )
        older = self._workers.get(facts.ref.worker_id)
        if older is not None:
            self.remove(older.facts.ref)
        self._workers[facts.ref.worker_id] = Worker(facts, state, free_blocks=facts.num_blocks)

    def remove(self, ref: WorkerRef) -> None:
        """A worker is gone. A ref of an older incarnation changes nothing."""
        if self.worker(ref) is not None:
            del self._workers[ref.worker_id]
            self._unreported.pop(ref, None)

    def set_connected(self, ref: WorkerRef, connected: bool) -> None:
        """A worker out of touch keeps its charges but gets nothing new."""
        worker = self.worker(ref)
        if worker is not None:
            worker.connected = connected

    def report(self, ref: WorkerRef, *, state: WorkerState, free_blocks: int, num_sequences: int) -> None:
        """Takes a worker's own figures; they include every lease that it granted before."""
        worker = self.worker(ref)
        if worker is None:
            return
        worker.state = state
        worker.free_blocks = free_blocks
        worker.foreign_sequences = max(0, num_sequences - worker.charged_sequences)
        worker.refused_until_s = 0.0
        for key in self._unreported.pop(ref, ()):
            charge = self._charges.get(key)
            if charge is not None and charge.decode is worker:
                self._return_blocks(charge)

    @property
    def is_complete(self) -> bool:
        """Whether some serving decode worker has a serving worker to prefill for it."""
        serving = [w for w in self._workers.values() if w.is_serving]
        prefilling = {w.facts.identity for w in serving if w.prefills}
        return any(w.decodes and w.facts.identity in prefilling for w in serving)

    def unpaired_reason(self, worker: Worker) -> str:
        """Why no other worker may be paired with this one; empty if one may, or none is needed."""
        if worker.facts.role is Role.BOTH:
            return ""
        wanted = Role.PREFILL if worker.decodes else Role.DECODE
        partners = [w for w in self._workers.values() if w.facts.role in (wanted, Role.BOTH)]
        if not partners:
            return f"no {wanted} worker to pair with"
        differences = [worker.facts.identity.difference(w.facts.identity) for w in partners]
        if not all(differences):
            return ""
        return f"cannot pair with {partners[0].facts.ref.worker_id!r}: {differences[0]}"

    def place(self, demand: Demand, now: float) -> Placement | Wait:
        """Chooses workers without charging them: the same state gives the same choice."""
        pairs: list[_Pair] = []
        causes: set[WaitCause] = set()
        groups: dict[Identity, list[Worker]] = {}
        for worker in self._workers.values():
            if worker.state is WorkerState.SERVING:
                groups.setdefault(worker.facts.identity, []).append(worker)
        for group in groups.values():
            found = self._best_pair(group, demand, now)
            causes.add(found) if isinstance(found, WaitCause) else pairs.append(found)
        if not pairs:
            return self._wait(demand, causes)
        _, decode, prefill = min(pairs, key=lambda pair: pair[0])
        return Placement(
            decode=decode.facts.ref,
            prefill=None if prefill is decode else prefill.facts.ref,
            reason=(
                f"decode on {decode.facts.ref.worker_id} ({decode.num_sequences} sequences, "
                f"{decode.credits} free blocks), prefill on {prefill.facts.ref.worker_id} "
                f"({prefill.prefill_tokens} tokens ahead)"
            ),
        )

    def charge(self, key: K, placement: Placement, demand: Demand) -> None:
        """Books a request on the workers it is dispatched to, until `release`.

        Raises:
            ValueError: the key has a charge already.
            LookupError: a worker of the placement is gone.
        """
        if key in self._charges:
            raise ValueError(f"{key!r} is charged already")
        decode = self.worker(placement.decode)
        prefill = self.worker(placement.prefill or placement.decode)
        if decode is None or prefill is None:
            raise LookupError(f"a worker of {placement.workers} is gone")
        charge = _Charge(
            decode=decode,
            prefill=prefill,
            num_blocks=demand.num_blocks(decode.facts.block_tokens),
            num_sequences=demand.num_choices,
            prompt_tokens=demand.num_prompt_tokens,
        )
        self._charges[key] = charge
        decode.charged_blocks += charge.num_blocks
        decode.charged_sequences += charge.num_sequences
        prefill.prefill_prompts += 1
        prefill.prefill_tokens += charge.prompt_tokens
        self._num_placed += 1
        decode.last_placed = prefill.last_placed = self._num_placed

    def granted(self, key: K) -> None:
        """The decode worker granted the lease: its next report has the blocks in it."""
        self._unreported.setdefault(self._charges[key].decode.facts.ref, set()).add(key)

    def refused(self, key: K, until_s: float) -> None:
        """The decode worker had no room: the charge is returned, and nothing more is sent there before its
        next report or `until_s`, whichever comes first."""
        self._charges[key].decode.refused_until_s = until_s
        self.release(key)

    def prefilled(self, key: K) -> None:
        """The prompt is prefilled: its place on the prefill worker is free. Repeats change nothing."""
        charge = self._charges.get(key)
        if charge is not None:
            self._return_prefill(charge)

    def release(self, key: K) -> None:
        """The request ended: all that it still holds is returned. Repeats change nothing."""
        charge = self._charges.pop(key, None)
        if charge is None:
            return
        self._return_blocks(charge)
        self._return_prefill(charge)
        charge.decode.charged_sequences -= charge.num_sequences

    def _best_pair(self, group: list[Worker], demand: Demand, now: float) -> _Pair | WaitCause:
        decoding = [w for w in group if w.decodes]
        prefilling = [w for w in group if w.prefills]
        if not decoding or not prefilling:
            return WaitCause.NO_WORKERS
        decoding = [w for w in decoding if _could_decode(w, demand)]
        prefilling = [w for w in prefilling if demand.num_prompt_tokens < w.facts.max_context]
        if not decoding or not prefilling:
            return WaitCause.TOO_LARGE
        decoding = [w for w in decoding if w.connected]
        prefilling = [w for w in prefilling if w.connected]
        if not decoding or not prefilling:
            return WaitCause.OUT_OF_TOUCH
        decoding = [w for w in decoding if _can_decode(w, demand, now)]
        if not decoding:
            return WaitCause.NO_CREDIT
        ready = [w for w in prefilling if self._can_prefill(w, demand)]
        return self._match(decoding, ready) or WaitCause.PREFILL_BUSY

    def _match(self, decoding: list[Worker], ready: list[Worker]) -> _Pair | None:
        # A worker that does both prefills for itself and for pure decode workers, not for its own kind:
        # colocated workers side by side stay colocated.
        ranked = sorted(ready, key=self._policy.prefill_rank)
        first_any = ranked[0] if ranked else None
        first_pure = next((w for w in ranked if w.facts.role is Role.PREFILL), None)
        for decode in sorted(decoding, key=self._policy.decode_rank):
            if decode.facts.role is Role.DECODE:
                prefill = first_any
            else:
                options = [w for w in (first_pure, decode if decode in ready else None) if w is not None]
                prefill = min(options, key=self._policy.prefill_rank, default=None)
            if prefill is not None:
                return self._policy.decode_rank(decode), decode, prefill
        return None

    def _can_prefill(self, worker: Worker, demand: Demand) -> bool:
        return (
            worker.prefill_prompts < MAX_PREFILL_PROMPTS
            or worker.prefill_tokens + demand.num_prompt_tokens <= self._prefill_window_tokens
        )

    def _wait(self, demand: Demand, causes: set[WaitCause]) -> Wait:
        for cause in (WaitCause.PREFILL_BUSY, WaitCause.NO_CREDIT, WaitCause.OUT_OF_TOUCH):
            if cause in causes:
                return Wait(cause, f"all workers that could take it are taken: {cause}")
        if WaitCause.TOO_LARGE not in causes:
            return Wait(
                WaitCause.NO_WORKERS, "no decode worker is connected with one that may prefill for it"
            )
        return Wait(
            WaitCause.TOO_LARGE,
            f"{demand.num_prompt_tokens} prompt tokens, {demand.max_total_tokens} with the answer, and "
            f"{demand.num_choices} choices need more memory or context than any worker has",
        )

    def _return_blocks(self, charge: _Charge) -> None:
        if charge.blocks_held:
            charge.blocks_held = False
            charge.decode.charged_blocks -= charge.num_blocks

    def _return_prefill(self, charge: _Charge) -> None:
        if charge.prefill_held:
            charge.prefill_held = False
            charge.prefill.prefill_prompts -= 1
            charge.prefill.prefill_tokens -= charge.prompt_tokens


def _could_decode(worker: Worker, demand: Demand) -> bool:
    facts = worker.facts
    return (
        demand.num_blocks(facts.block_tokens) <= facts.num_blocks
        and demand.num_choices <= facts.max_sequences
        and demand.max_total_tokens <= facts.max_context
    )


def _can_decode(worker: Worker, demand: Demand, now: float) -> bool:
    facts = worker.facts
    return (
        now >= worker.refused_until_s
        and demand.num_blocks(facts.block_tokens) <= worker.credits
        and worker.num_sequences + demand.num_choices <= facts.max_sequences
    )
