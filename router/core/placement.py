"""Where a request runs: which worker decodes it, and which one prefills it.

Placement spends *credits* (blocks of decode memory) and charges load when it dispatches, not when a
report comes back, so that a burst between two reports spreads. A charge has parts with lives of their own:

- *prefill*: from dispatch until the prompt is prefilled, in tokens that are not cached where it is. A worker holds
  the running prompt and one more; short prompts that together stay within a window of tokens may be more than two.
- *sequences*: from dispatch until the request ends.
- *blocks*: from dispatch until the first report that came after the worker granted them. From then on the
  report's own number of free blocks has them in it.

The choice itself is in `choice`, what it weighs in `costs`, by what it ranks in `policies`. Only workers of one
identity may hand a sequence over to one another. A decode worker can prefill by itself: beside prefill workers where
the policy heeds costs and that is cheaper, and under every policy where no prefill worker could take the prompt.

Knows no clock (`now` is monotonic seconds), no connections, no tokens.
"""

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Generic, TypeVar

from router.core.choice import ABSENT, Query, Rules, choose
from router.core.columns import MAX_PREFILL_PROMPTS
from router.core.costs import CostModel
from router.core.fleet import (
    MAX_QUEUED_TOKENS,
    Demand,
    Identity,
    LinkSpeed,
    Role,
    Worker,
    WorkerFacts,
    WorkerRef,
    WorkerState,
)
from router.core.groups import NOBODY, Group
from router.core.links import LinkTable
from router.core.outcomes import Choice, Placement, Wait, WaitCause
from router.core.policies import POLICIES, Policy
from router.core.weighing import tokens_by_slot

__all__ = ["MAX_PREFILL_PROMPTS", "POLICIES", "Placement", "PlacementState", "Policy", "Wait", "WaitCause"]

K = TypeVar("K", bound=Hashable)

MAX_SLOTS = 1 << 16


@dataclass(slots=True)
class _Charge:
    decode: Worker
    prefill: Worker
    num_blocks: int
    num_sequences: int
    prompt_tokens: int
    blocks_held: bool = True
    prefill_held: bool = True


class PlacementState(Generic[K]):
    """The workers, what this router has charged to them, and the choice among them.

    `local_prefill`: whether workers that only decode may prefill by themselves. `generator` feeds the policies that
    draw; nothing is drawn between two charges, so that the same state gives the same choice.

    Raises:
        ValueError: an objective is not positive.
    """

    def __init__(
        self,
        policy: Policy,
        prefill_window_tokens: int,
        *,
        local_prefill: bool = True,
        slo_ttft_s: float = 2.0,
        slo_itl_s: float = 0.1,
        generator: Random | None = None,
    ) -> None:
        model = CostModel(slo_ttft_s, slo_itl_s)
        self._rules = Rules(policy, model, prefill_window_tokens, local_prefill)
        self._generator = generator or Random(0)
        self._tickets = self._draw()
        self._workers: dict[str, Worker] = {}
        self._by_slot: dict[int, Worker] = {}
        self._num_slots = 0
        self._groups: dict[Identity, Group] = {}
        self._links = LinkTable()
        self._charges: dict[K, _Charge] = {}
        self._unreported: dict[WorkerRef, set[K]] = {}
        self._num_placed = 0

    # --- workers -----------------------------------------------------------------------------------------

    @property
    def workers(self) -> Iterable[Worker]:
        return self._workers.values()

    @property
    def names_sources(self) -> bool:
        """Whether the policy has workers told where else a prompt's beginning is cached."""
        return self._rules.policy.names_sources

    def worker(self, ref: WorkerRef) -> Worker | None:
        """The worker of this very incarnation."""
        worker = self._workers.get(ref.worker_id)
        return worker if worker is not None and worker.facts.ref == ref else None

    def workers_in(self, mask: int, limit: int) -> list[Worker]:
        """At most so many of the workers whose slots are bits of `mask`."""
        found: list[Worker] = []
        while mask and len(found) < limit:
            lowest = mask & -mask
            worker = self._by_slot.get(lowest.bit_length() - 1)
            if worker is not None:
                found.append(worker)
            mask ^= lowest
        return found

    def add(self, facts: WorkerFacts, state: WorkerState, slot: int | None = None) -> None:
        """A worker joined; an older incarnation of it is forgotten, with what was charged to it.

        `slot` is its bit in masks of workers; None: the lowest that is free.

        Raises:
            ValueError: a size that must be positive is not, or another worker has the slot.
        """
        _check_sizes(facts)
        older = self._workers.get(facts.ref.worker_id)
        if slot is not None and not 0 <= slot < MAX_SLOTS:
            raise ValueError(f"slot {slot} of worker {facts.ref.worker_id!r} must be in [0, {MAX_SLOTS})")
        if slot is not None and self._by_slot.get(slot, older) is not older:
            holder = self._by_slot[slot].facts.ref.worker_id
            raise ValueError(f"slot {slot} is {holder!r}'s; {facts.ref.worker_id!r} needs another")
        if older is not None:
            self.remove(older.facts.ref)
        if slot is None:
            slot = next(free for free in count() if free not in self._by_slot)
        worker = Worker(facts, state, slot, free_blocks=facts.num_blocks)
        self._workers[facts.ref.worker_id] = self._by_slot[slot] = worker
        self._num_slots = max(self._num_slots, slot + 1)
        self._links.open(facts.kv_address)
        self._groups.setdefault(facts.identity, Group(self._rules.prefill_window_tokens)).add(worker)

    def remove(self, ref: WorkerRef) -> None:
        """A worker is gone. A ref of an older incarnation changes nothing."""
        worker = self.worker(ref)
        if worker is None:
            return
        del self._workers[ref.worker_id]
        del self._by_slot[worker.slot]
        self._unreported.pop(ref, None)
        self._links.forget(worker.slot)
        self._links.close(worker.facts.kv_address)
        group = self._groups[worker.facts.identity]
        group.remove(worker)
        if not len(group):
            del self._groups[worker.facts.identity]

    def set_connected(self, ref: WorkerRef, connected: bool) -> None:
        """A worker out of touch keeps its charges but gets nothing new."""
        worker = self.worker(ref)
        if worker is not None:
            worker.connected = connected
            self._groups[worker.facts.identity].settle(worker)

    def set_state(self, ref: WorkerRef, state: WorkerState) -> None:
        """A worker's state as the router sees it, until its next report."""
        worker = self.worker(ref)
        if worker is not None:
            worker.state = state
            self._groups[worker.facts.identity].settle(worker)

    def report(
        self,
        ref: WorkerRef,
        *,
        state: WorkerState,
        free_blocks: int,
        num_sequences: int,
        queued_prefill_tokens: int = 0,
        step_s: float = 0.0,
        first_row_s: float = 0.0,
        row_s: float = 0.0,
        prefill_s_per_token: float = 0.0,
        links: Mapping[str, LinkSpeed] | None = None,
    ) -> None:
        """Takes a worker's own figures; they include every lease that it granted before.

        `step_s` is a decode step of late, `first_row_s` one with a single answer, and `row_s` what each answer more
        adds; `links` are how fast it pushed to workers, by their kv_address. A speed that is 0, or that cannot be,
        leaves what was known before.
        """
        worker = self.worker(ref)
        if worker is None:
            return
        worker.state = state
        worker.free_blocks = min(max(free_blocks, 0), worker.facts.num_blocks)
        worker.foreign_sequences = max(0, num_sequences - worker.charged_sequences)
        queued_tokens = min(queued_prefill_tokens, MAX_QUEUED_TOKENS)
        worker.foreign_prefill_tokens = max(0, queued_tokens - worker.prefill_tokens)
        worker.refused_until_s = 0.0
        worker.prefill_measured(prefill_s_per_token)
        if not worker.line_measured(first_row_s, row_s):
            worker.step_measured(step_s, num_sequences)
        if links:
            worker.links_measured(links)
            self._links.measured(worker.slot, links)
        for key in self._unreported.pop(ref, ()):
            charge = self._charges.get(key)
            if charge is not None and charge.decode is worker:
                self._return_blocks(charge)
        self._groups[worker.facts.identity].settle(worker)

    @property
    def is_complete(self) -> bool:
        """Whether some serving worker can decode and have its prompts prefilled: by a serving prefill worker, or by
        itself."""
        for group in self._groups.values():
            decoders, prefillers = group.decoders, group.prefillers
            if len(decoders) and (self._rules.local_prefill or len(prefillers)):
                return True
        return False

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """What the workers that may prefill now compute together, as they report; None while nobody has."""
        rate = 0.0
        for group in self._groups.values():
            figures = group.figures(self._num_placed)
            rate += figures.prefill_tokens_per_s
            if self._rules.local_prefill:
                rate += figures.decode_tokens_per_s
        return rate or None

    def unpaired_reason(self, worker: Worker) -> str:
        """Why no other worker may be paired with this one; empty if one may, or it does both by role.

        A worker that only decodes may serve by itself all the same; the reason says so.
        """
        if worker.facts.role is Role.BOTH:
            return ""
        wanted = Role.PREFILL if worker.decodes else Role.DECODE
        partners = [w for w in self._workers.values() if w.facts.role in (wanted, Role.BOTH)]
        alone = "; it prefills by itself" if worker.decodes and self._rules.local_prefill else ""
        if not partners:
            return f"no {wanted} worker to pair with{alone}"
        differences = [worker.facts.identity.difference(w.facts.identity) for w in partners]
        if not all(differences):
            return ""
        return f"cannot pair with {partners[0].facts.ref.worker_id!r}: {differences[0]}{alone}"

    # --- the choice --------------------------------------------------------------------------------------

    def place(
        self,
        demand: Demand,
        now: float,
        cached: Sequence[tuple[int, int]] = (),
        avoid: Collection[WorkerRef] = frozenset(),
        prefer: WorkerRef | None = None,
        spare: Collection[WorkerRef] = frozenset(),
    ) -> Placement | Wait:
        """Chooses workers without charging them: the same state gives the same choice.

        `cached`: (mask of slots, tokens) of workers that hold that much of the prompt's beginning; masks are
        disjoint. `avoid`: where an attempt failed, to be used only if nothing else could ever serve the request.
        `spare`: where one failed some time ago, to be used only if no other can take it now.
        `prefer`: a decode worker to which the prompt was transferred before, so that it need not travel again.
        """
        query = self._query(demand, now, cached, prefer)
        if spare:
            query.avoid_decode = query.avoid_prefill = self._slots({*avoid, *spare})
            decision = self._decide(query)
            if isinstance(decision, Placement):
                return decision
        if not avoid:
            query.avoid_decode = query.avoid_prefill = NOBODY
            return self._decide(query)
        avoided = self._slots(avoid)
        query.avoid_decode = query.avoid_prefill = avoided
        decision = self._decide(query)
        if isinstance(decision, Wait) and decision.cause in ABSENT and avoided:
            return self._decide(query, avoid_if_possible=True)
        return decision

    def predict_ttft_s(
        self, demand: Demand, now: float, cached: Sequence[tuple[int, int]] = (), idle: bool = False
    ) -> float | None:
        """Seconds to the first token on the best workers, behind what is charged to them and nothing else; with `idle`,
        as if no prompt were ahead. A `Placement` has both figures already.

        None if no worker in touch could take the request, or nothing was measured yet.
        """
        query = self._query(demand, now, cached, None)
        query.regardless = True
        decision = self._decide(query)
        if not isinstance(decision, Placement):
            return None
        return decision.idle_ttft_s if idle else decision.predicted_ttft_s

    def _slots(self, refs: Collection[WorkerRef]) -> Set[int]:
        return {worker.slot for ref in refs if (worker := self.worker(ref)) is not None}

    def _query(
        self, demand: Demand, now: float, cached: Sequence[tuple[int, int]], prefer: WorkerRef | None
    ) -> Query:
        preferred = None if prefer is None else self.worker(prefer)
        return Query(
            demand=demand,
            now=now,
            cached=tokens_by_slot(cached, self._num_slots, max(0, demand.num_prompt_tokens - 1)),
            has_cached=bool(cached),
            prefer=None if preferred is None else preferred.slot,
            tickets=self._tickets,
        )

    def _decide(self, query: Query, avoid_if_possible: bool = False) -> Placement | Wait:
        choices: list[Choice] = []
        causes: set[WaitCause] = set()
        avoided = query.avoid_decode
        for group in self._groups.values():
            group.refresh()
            if avoid_if_possible:
                query.avoid_decode, query.avoid_prefill = group.avoidable(avoided, query.demand)
            found = choose(group, group.figures(self._num_placed), self._links, self._rules, query)
            choices.append(found) if isinstance(found, Choice) else causes.add(found)
        if not choices:
            return self._wait(query.demand, causes)
        return min(choices, key=lambda choice: choice.rank).placement

    # --- charges -----------------------------------------------------------------------------------------

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
        placement.compact()
        charge = _Charge(
            decode=decode,
            prefill=prefill,
            num_blocks=demand.num_blocks(decode.facts.block_tokens),
            num_sequences=demand.num_choices,
            prompt_tokens=max(0, demand.num_prompt_tokens - placement.cached_prefill_tokens),
        )
        self._charges[key] = charge
        decode.charged_blocks += charge.num_blocks
        decode.charged_sequences += charge.num_sequences
        prefill.prefill_prompts += 1
        prefill.prefill_tokens += charge.prompt_tokens
        self._num_placed += 1
        decode.last_placed = prefill.last_placed = prefill.last_prefilled = self._num_placed
        self._tickets = self._draw()
        self._charged(charge)

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
        if charge is not None and charge.prefill_held:
            self._return_prefill(charge)
            self._charged(charge)

    def release(self, key: K) -> None:
        """The request ended: all that it still holds is returned. Repeats change nothing."""
        charge = self._charges.pop(key, None)
        if charge is None:
            return
        self._return_blocks(charge)
        self._return_prefill(charge)
        charge.decode.charged_sequences -= charge.num_sequences
        self._charged(charge)

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

    def _charged(self, charge: _Charge) -> None:
        workers = (charge.decode,) if charge.decode is charge.prefill else (charge.decode, charge.prefill)
        for worker in workers:
            if self._by_slot.get(worker.slot) is worker:
                self._groups[worker.facts.identity].charged(worker)

    def _draw(self) -> tuple[float, float, float, float]:
        draw = self._generator.random
        return draw(), draw(), draw(), draw()


def _check_sizes(facts: WorkerFacts) -> None:
    sizes = {"block_tokens": facts.block_tokens, "max_context": facts.max_context}
    if facts.role is not Role.PREFILL:
        sizes |= {"num_blocks": facts.num_blocks, "max_sequences": facts.max_sequences}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"worker {facts.ref.worker_id!r} says {name} is {value}; it must be positive")
    if facts.kv_bytes_per_token < 0:
        raise ValueError(
            f"worker {facts.ref.worker_id!r} says kv_bytes_per_token is {facts.kv_bytes_per_token}; "
            "it must not be negative"
        )
