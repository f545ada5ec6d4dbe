"""The engine: sequences in, events out, one step at a time. The only loop's body.

Thread rules: `step` is called by one thread. Every other method takes `lock` and may be called by any; `step`
holds it while it plans and while it applies, not while it computes. The worker's lease table shares the lock,
so that a lease and its blocks change together (design §3.1). Blocks belong to a lease until `release`; the
engine itself only takes them away to preempt.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from engine.applying import apply_draws
from engine.drafter import Drafter, DraftState
from engine.drawing import Result, draw
from engine.events import ChunkDone, Event, SequenceFailed, StepResult, layers_per_report
from engine.pool import BlockPool
from engine.probe import is_invariant
from engine.request import Drawn, SamplingParams, SequenceStatus
from engine.request import Sequence as EngineSequence
from engine.resumption import NOTHING, SoFar
from engine.runner import EngineOptions, ModelRunner
from engine.scheduler import Scheduler, StepLimits, StepPlan, choice_owner, owner_of
from engine.set_aside import bring_back, set_aside
from engine.windows import TakenUp, WindowUse


@dataclass(slots=True)
class _Lease:
    """What the engine knows of a lease: its owners in the pool, and whether their contents can be trusted."""

    num_choices: int  # 0: it holds a prefix to be read or filled, and never computes
    root_key: bytes = b""
    taken_up: TakenUp = TakenUp(0)  # noqa: RUF009 - frozen
    bound: int = 0
    tenant: str = ""
    trusted: bool = False  # computed here or verified at commit: its private blocks hold numbers
    failed: bool = False  # it came to NaN: nor are its cached blocks to be trusted
    children: set[int] = field(default_factory=set)


class Engine:
    """One model, one cache, one scheduler. Open it with `Engine.open`."""

    def __init__(
        self, runner: ModelRunner, options: EngineOptions, invariant: bool, clock: Callable[[], float]
    ) -> None:
        self._clock = clock
        self.lock = threading.RLock()
        self.runner = runner
        self.config = runner.config
        self.layout = runner.layout
        self.cache = runner.cache
        self.pool: BlockPool = runner.pool
        self.max_context = runner.max_context
        self.max_sequences = options.max_sequences
        self.invariant = invariant
        limits = StepLimits(
            options.chunk_tokens,
            options.max_sequences,
            options.max_drafts,
            self.max_context,
            options.itl_s,
        )
        self.scheduler = Scheduler(self.pool, limits, record_policy=options.window_records)
        self._set_aside_bytes = options.set_aside_bytes
        self._leases: dict[bytes, _Lease] = {}
        self._in_flight: set[bytes] = set()
        self._deferred: set[bytes] = set()
        self._sequence_ids = count()
        self.on_progress: Callable[[StepResult], None] = lambda _result: None
        """Called on the stepping thread in mid-step with ChunkDone events of some layers; must return at once."""

    @classmethod
    def open(
        cls, model_dir: Path, options: EngineOptions, clock: Callable[[], float] = time.monotonic
    ) -> Engine:
        """Load the model, run it once (which warms it up) and probe the numeric contract (design §3.7).

        Raises EngineError, ModelConfigError or WeightsError, each naming the file and what is supported.
        """
        runner = ModelRunner(model_dir, options)
        return cls(runner, options, is_invariant(runner), clock)

    @property
    def arithmetic(self) -> str:
        """What two workers must share for equal bits: precision, kernels, instruction set."""
        return self.runner.arithmetic

    # --- leases --------------------------------------------------------------------------------

    def reserve(
        self,
        lease_id: bytes,
        prompt: Sequence[int],
        num_choices: int,
        root_key: bytes,
        *,
        bound: int = 0,
        tenant: str = "",
        is_computed_here: bool = True,
    ) -> int | None:
        """Open a lease on the cached prefix of `prompt` and on blocks for the rest of it and one token more.

        `bound`: the worst rank (engine/pool.py) that the request takes, now and after a preemption; `tenant`: who
        holds the blocks; `is_computed_here`: whether `submit` will follow, else `adopt`. Returns the prompt tokens
        found cached (whole blocks, never the last token), or None where there is no room now: running answers keep
        a block each to grow into, and the preempted go first.
        """
        with self.lock:
            if sum(lease.num_choices for lease in self._leases.values()) + num_choices > self.max_sequences:
                return None
            keys = self.prefix_keys(root_key, prompt)
            spare = self.scheduler.spare_blocks + num_choices - 1
            num_blocks = self.pool.blocks_for(len(prompt) + 1)
            use = WindowUse.COMPUTED if is_computed_here else WindowUse.LANDING
            num_hit = self.pool.open(lease_id, keys, num_blocks, spare, bound, tenant, use)
            if num_hit is None:
                return None
            taken_up = TakenUp(num_hit * self.pool.block_tokens)
            if is_computed_here:
                taken_up = self.pool.taken_up(lease_id)
            if taken_up.record is not None:
                self.cache.windows.restore(taken_up.record, self.pool.slot(lease_id), taken_up.num_tokens)
            self._leases[lease_id] = _Lease(num_choices, root_key, taken_up, bound, tenant)
            return taken_up.num_tokens

    def submit(
        self,
        lease_id: bytes,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        prefill_only: bool,
        so_far: SoFar = NOTHING,
    ) -> EngineSequence:
        """Compute the prompt of a reserved lease, and go on to the answer unless `prefill_only`. Of an answer that goes
        on, `prompt` is the head of `so_far`, here and elsewhere."""
        drafter = None if prefill_only else self._drafter(prompt)
        with self.lock:
            lease = self._leases[lease_id]
            lease.trusted = True
            sequence = self._head(lease_id, prompt, sampling, so_far)
            sequence.take_up(lease.taken_up)
            sequence.prefill_only = prefill_only
            sequence.drafter = drafter
            self.scheduler.add(sequence)
            return sequence

    def adopt(
        self,
        lease_id: bytes,
        prompt: Sequence[int],
        sampling: SamplingParams,
        first: Sequence[Drawn],
        fidelity: int = 0,
        drafting: DraftState | None = None,
        so_far: SoFar = NOTHING,
    ) -> list[EngineSequence]:
        """Go on with a prompt whose KV was written into the lease's blocks; `first[i]` is choice i's token after it.

        `fidelity`: the worst rank of what was written; the blocks are cached under it. `drafting`: what a drafter
        made of the prompt, where that is known. Raises ValueError where one of them is not of such a lease. Emits
        nothing for the first tokens. Returns the sequences that compute on (those not finished by it).
        """
        with self.lock:
            lease = self._leases[lease_id]
            if fidelity > lease.bound:
                raise ValueError(
                    f"KV of rank {fidelity} landed, but the lease was reserved for {lease.bound}"
                )
            drafter = self._drafter(prompt, drafting)
            lease.trusted = True
            self.pool.worsen(lease_id, fidelity)
            self.cache.fence()
            parent = self._head(lease_id, prompt, sampling, so_far)
            parent.drafter = drafter
            parent.num_computed = len(prompt)
            self.scheduler.seal(parent)
            return self._begin_answers(parent, first)

    def stop(self, lease_id: bytes) -> None:
        """Compute nothing more for a lease; its blocks stay until `release`."""
        with self.lock:
            for sequence in self.scheduler.find(lease_id):
                self.scheduler.remove(sequence, SequenceStatus.FINISHED)

    def finish_choice(self, lease_id: bytes, choice: int) -> None:
        """Compute nothing more for one choice (a stop string ended it)."""
        with self.lock:
            for sequence in self.scheduler.find(lease_id):
                if sequence.choice == choice:
                    self.scheduler.remove(sequence, SequenceStatus.FINISHED)

    def release(self, lease_id: bytes) -> None:
        """Give a lease's blocks back; what was keyed stays cached. Idempotent.

        Where a step computes for the lease, the blocks come back when that step is applied.
        """
        with self.lock:
            if lease_id not in self._leases:
                return
            self.stop(lease_id)
            if lease_id in self._in_flight:
                self._deferred.add(lease_id)
                return
            lease = self._leases.pop(lease_id)
            for choice in (0, *lease.children):
                self._close(lease, choice_owner(lease_id, choice))

    # --- prefixes, to be read or filled by others ----------------------------------------------

    def prefix_keys(self, root_key: bytes, tokens: Sequence[int]) -> list[bytes]:
        """Keys of the full blocks that may be taken from the cache: at least one token stays to be computed."""
        return self.scheduler.prefix_keys(root_key, tokens)

    def pin(self, owner: bytes, keys: Sequence[bytes], bound: int) -> tuple[int, int] | None:
        """Keep the leading cached blocks of `keys` with ranks up to `bound`, to be gathered under `owner` until
        `release`. Returns (how many, their worst rank).

        None where the first is not cached, or where running answers would not keep a block each to grow into.
        """
        with self.lock:
            num_blocks = self.pool.lookup(keys, bound)
            if not num_blocks:
                return None
            spare = self.scheduler.spare_blocks
            if self.pool.open(owner, keys[:num_blocks], num_blocks, spare, bound, use=WindowUse.NONE) is None:
                return None
            self._leases[owner] = _Lease(num_choices=0)
            return num_blocks, self.pool.rank(owner)

    def open_prefix(self, lease_id: bytes, keys: Sequence[bytes], bound: int, tenant: str = "") -> int | None:
        """Open a lease on the cached ones of the leading `keys` and on blocks to be filled for the others.

        Returns how many are cached; the entries of the others are written through `cache` under `lease_id`. None
        where there is no room now, as in `reserve`. Takes no place of a sequence.
        """
        with self.lock:
            spare = self.scheduler.spare_blocks
            num_hit = self.pool.open(lease_id, keys, len(keys), spare, bound, tenant, WindowUse.NONE)
            if num_hit is not None:
                self._leases[lease_id] = _Lease(num_choices=0, bound=bound, tenant=tenant)
            return num_hit

    def seal_prefix(self, lease_id: bytes, keys: Sequence[bytes], num_blocks: int, fidelity: int) -> None:
        """The first `num_blocks` blocks of an `open_prefix` lease are filled and verified: cache them under their
        keys. `fidelity`: the worst rank of what was written.

        Raises ValueError for a rank beyond the lease's bound, or for more blocks than it has.
        """
        with self.lock:
            lease, blocks = self._leases[lease_id], self.pool.blocks(lease_id)
            if fidelity > lease.bound or num_blocks > min(len(keys), len(blocks)):
                raise ValueError(
                    f"{num_blocks} blocks of rank {fidelity} to seal, but the lease was opened for {len(blocks)} "
                    f"of rank {lease.bound}, and {len(keys)} keys are given"
                )
            self.cache.fence()
            self.pool.worsen(lease_id, fidelity)
            for key in keys[len(self.pool.keys(lease_id)) : num_blocks]:
                self.pool.seal(lease_id, key)

    def sealed_keys(self, lease_id: bytes) -> list[tuple[bytes, ...]]:
        """Of each of a lease's choices, the keys of its leading blocks that are cached; none for a lease whose
        contents are not to be trusted, or that is not known."""
        with self.lock:
            lease = self._leases.get(lease_id)
            if lease is None or lease.failed:
                return []
            owners = [choice_owner(lease_id, choice) for choice in (0, *lease.children)]
            return [tuple(self.pool.keys(owner)) for owner in owners if self.pool.owns(owner)]

    def fidelity_of(self, lease_id: bytes) -> int:
        """The worst rank of a lease's blocks. Raises KeyError for a lease that holds none."""
        with self.lock:
            return self.pool.rank(lease_id)

    def has_work(self) -> bool:
        """Whether a step might compute something."""
        with self.lock:
            return bool(self.scheduler.sequences)

    @property
    def num_leases(self) -> int:
        """Leases that hold blocks, of requests and of prefixes."""
        with self.lock:
            return len(self._leases)

    # --- the step ------------------------------------------------------------------------------

    def step(self) -> StepResult:
        """Plan, compute and apply one step. Without anything to compute, returns at once with no events."""
        began = self._clock()
        with self.lock:
            plan = self._planned()
            if not plan.rows and self._take_back_ended():
                plan = self._planned()
            if not plan.rows:
                return StepResult()
            batch = self.runner.build(plan)
            self._in_flight = {row.sequence.lease_id for row in plan.rows}
        try:
            logits = self.runner.forward(batch, self._layer_reporter(plan, began))
            drawn = draw(logits, batch.drawing, self.max_context)
            with self.lock:
                events = self._apply(plan, drawn)
        finally:
            with self.lock:
                self._in_flight = set()
                deferred, self._deferred = self._deferred, set()
                for lease_id in deferred:
                    self.release(lease_id)
        step_s = self._clock() - began
        prefill_s = self.scheduler.pace.observe(plan.num_answer_tokens, plan.num_prefill_tokens, step_s)
        return StepResult(
            events=tuple(events),
            num_prefill_tokens=plan.num_prefill_tokens,
            num_decode_rows=plan.num_decode_rows,
            num_drafts=sum(len(row.drafts) for row in plan.rows),
            num_drafts_kept=sum(len(drawn[row.sequence.sequence_id]) - 1 for row in plan.rows if row.drafts),
            step_s=step_s,
            prefill_s=prefill_s,
        )

    def _planned(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self._move_kept(plan)
        return plan

    def _take_back_ended(self) -> bool:
        """Closes choices that have ended, of leases whose other choices have not: those may wait for their blocks.
        Whether there were any. Called where nothing can be computed, so no step reads them."""
        found = False
        for lease_id in {sequence.lease_id for sequence in self.scheduler.sequences}:
            going = {sequence.choice for sequence in self.scheduler.find(lease_id)}
            lease = self._leases[lease_id]
            for choice in {0, *lease.children} - going:
                found |= self._close(lease, choice_owner(lease_id, choice))
        return found

    def _close(self, lease: _Lease, owner: bytes) -> bool:
        """Whether that owner of the lease held anything."""
        if not self.pool.owns(owner):
            return False
        freed = self.pool.close(owner, forget=lease.failed)
        if lease.failed or not lease.trusted:  # what landed may be half a block, or NaN
            self.cache.scrub(freed)
        return True

    def _move_kept(self, plan: StepPlan) -> None:
        """Out of blocks that the plan gives to others, and into those that it gives to who comes back."""
        for preempted in plan.preempted:
            others = self.scheduler.sequences
            preempted.sequence.set_aside = set_aside(preempted, self.cache, others, self._set_aside_bytes)
        for each in plan.brought_back:
            bring_back(each, self.cache)
        for resumed in plan.resumed:
            self.cache.windows.restore(resumed.record, resumed.slot, resumed.num_tokens)

    def _layer_reporter(self, plan: StepPlan, began: float) -> Callable[[int], None]:
        """Says how far the chunks that go elsewhere are, a few times a step, so that they can leave in mid-step."""
        pushed = [
            (row.sequence.lease_id, row.start + row.num_tokens)
            for row in plan.rows
            if row.sequence.prefill_only
        ]
        group = layers_per_report(self.config.num_layers)

        def after_layer(num_layers: int) -> None:
            if pushed and num_layers % group == 0 and num_layers < self.config.num_layers:
                events = tuple(ChunkDone(lease_id, end, num_layers) for lease_id, end in pushed)
                self.on_progress(StepResult(events=events, step_s=self._clock() - began))

        return after_layer

    def _apply(self, plan: StepPlan, drawn: dict[int, list[Result]]) -> list[Event]:
        events = apply_draws(plan, drawn, self.scheduler, self._begin_answers)
        for event in events:
            if isinstance(event, SequenceFailed):
                self._leases[event.lease_id].failed = True
        return events

    def _drafter(self, prompt: Sequence[int], state: DraftState | None = None) -> Drafter | None:
        return Drafter(prompt, state) if self.scheduler.limits.max_drafts else None

    # --- choices -------------------------------------------------------------------------------

    def _begin_answers(self, parent: EngineSequence, first: Sequence[Drawn]) -> list[EngineSequence]:
        """Start every choice that has not ended, each on blocks of its own."""
        head, so_far = list(parent.tokens), parent.so_far
        drafter = parent.drafter.copy() if parent.drafter is not None else None
        going = []
        for choice, token in enumerate(first):
            if choice in so_far.ended or (so_far.draws(choice) and token.finish is not None):
                continue
            sequence = parent
            if choice > 0:
                sequence = self._sequence(parent.lease_id, choice, head, parent.num_prompt, parent.sampling)
                sequence.drafter = drafter.copy() if drafter is not None else None
                self._fork(parent, sequence)
            for token_id in so_far.rest(choice) or (token.token_id,):
                sequence.append(token_id)
            self.scheduler.add(sequence)
            going.append(sequence)
        return going

    def _fork(self, parent: EngineSequence, child: EngineSequence) -> None:
        source, owner = owner_of(parent), owner_of(child)
        self._leases[child.lease_id].children.add(child.choice)
        shared = self.pool.fork(source, owner, parent.num_computed)
        if shared is None:
            child.status = SequenceStatus.PREEMPTED
            return
        first, last = shared
        self.cache.copy_blocks(self.pool.blocks(source)[first:last], self.pool.blocks(owner)[first:last])
        self.cache.windows.copy(self.pool.slot(source), self.pool.slot(owner))
        child.num_computed = parent.num_computed

    def _head(
        self, lease_id: bytes, head: Sequence[int], sampling: SamplingParams, so_far: SoFar
    ) -> EngineSequence:
        sequence = self._sequence(lease_id, 0, head, len(head) - so_far.num_shared, sampling)
        sequence.so_far = so_far
        return sequence

    def _sequence(
        self, lease_id: bytes, choice: int, tokens: Sequence[int], num_prompt: int, sampling: SamplingParams
    ) -> EngineSequence:
        lease = self._leases[lease_id]
        return EngineSequence(
            sequence_id=next(self._sequence_ids),
            lease_id=lease_id,
            choice=choice,
            tokens=list(tokens),
            num_prompt=num_prompt,
            sampling=sampling,
            root_key=lease.root_key,
            bound=lease.bound,
            tenant=lease.tenant,
        )
