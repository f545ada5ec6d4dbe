"""Placement against a naive recount: whatever happens in whatever order, the books and the columns agree."""

import math
from collections import Counter
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from router.core.columns import row_of
from router.core.fleet import Demand, Identity, LinkSpeed, Role, WorkerFacts, WorkerRef, WorkerState
from router.core.placement import MAX_PREFILL_PROMPTS, POLICIES, PlacementState, Wait

pytestmark = pytest.mark.unit

IDENTITIES = [
    Identity(weights_digest="w", tokenizer_digest="t", arithmetic=name, layout="gqa", handoff_major=1)
    for name in ("float32", "bfloat16")
]
WINDOW = 64
MAX_CONTEXT = 300
ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True)
SPEED = st.one_of(st.just(0.0), st.floats(1e-5, 1.0), ANY_FLOAT)


@dataclass
class Booked:
    """What one live request holds, as the rules of the machine say."""

    decode: WorkerRef
    prefill: WorkerRef
    num_blocks: int
    num_sequences: int
    num_tokens: int
    granted: bool = False
    blocks_held: bool = True
    prefill_held: bool = True


class PlacementMachine(RuleBasedStateMachine):
    """Random traffic over workers that come, go, report anything and lose their connection."""

    @initialize(policy=st.sampled_from(sorted(POLICIES)), local_prefill=st.booleans())
    def begin(self, policy, local_prefill):
        self.local_prefill = local_prefill
        self.placement = PlacementState(
            POLICIES[policy], WINDOW, local_prefill=local_prefill, generator=Random(1)
        )
        self.num_keys = 0
        self.num_epochs = 0
        self.booked: dict[int, Booked] = {}
        self.free: dict[WorkerRef, int] = {}

    def _workers(self):
        return list(self.placement.workers)

    def _draw_worker(self, data):
        return data.draw(st.sampled_from(self._workers()))

    @rule(
        name=st.sampled_from("abcde"),
        role=st.sampled_from(Role),
        identity=st.sampled_from(IDENTITIES),
        block_tokens=st.sampled_from([8, 16]),
        num_blocks=st.integers(1, 40),
        kv_bytes=st.sampled_from([0, 1000]),
    )
    def join(self, name, role, identity, block_tokens, num_blocks, kv_bytes):
        self.num_epochs += 1
        facts = WorkerFacts(
            ref=WorkerRef(name, self.num_epochs),
            role=role,
            identity=identity,
            block_tokens=block_tokens,
            num_blocks=num_blocks,
            max_sequences=6,
            max_context=MAX_CONTEXT,
            kv_address=f"{name}:1",
            kv_bytes_per_token=kv_bytes,
        )
        self.placement.add(facts, WorkerState.SERVING)
        self.free[facts.ref] = num_blocks

    @precondition(_workers)
    @rule(data=st.data())
    def leave(self, data):
        self.placement.remove(self._draw_worker(data).facts.ref)

    @precondition(_workers)
    @rule(data=st.data(), connected=st.booleans())
    def connect(self, data, connected):
        self.placement.set_connected(self._draw_worker(data).facts.ref, connected)

    @rule(
        data=st.data(),
        tokens=st.integers(1, 200),
        choices=st.integers(1, 3),
        now=st.floats(0, 10),
        held=st.lists(st.tuples(st.integers(0, 2**7), st.integers(0, 400)), max_size=3),
    )
    def arrive(self, data, tokens, choices, now, held):
        cached, seen = [], 0
        for mask, num_tokens in held:
            cached.append((mask & ~seen, num_tokens))
            seen |= mask
        refs = [worker.facts.ref for worker in self._workers()]
        avoid = data.draw(st.sets(st.sampled_from(refs), max_size=2)) if refs else set()
        prefer = data.draw(st.sampled_from([None, *refs]))
        wanted = Demand(num_prompt_tokens=tokens, max_total_tokens=tokens + 10, num_choices=choices)
        decision = self.placement.place(wanted, now, cached, avoid, prefer)
        assert self.placement.place(wanted, now, cached, avoid, prefer) == decision
        predicted = self.placement.predict_ttft_s(wanted, now, cached)
        assert predicted is None or (math.isfinite(predicted) and predicted > 0)
        if isinstance(decision, Wait):
            return
        assert (decision.idle_ttft_s is None) == (decision.predicted_ttft_s is None)
        if decision.predicted_ttft_s is not None:
            assert 0 < decision.idle_ttft_s <= decision.predicted_ttft_s
        self._check(decision, wanted, now, cached, avoid)
        self.placement.charge(self.num_keys, decision, wanted)
        decode = self.placement.worker(decision.decode)
        self.booked[self.num_keys] = Booked(
            decode=decision.decode,
            prefill=decision.prefill or decision.decode,
            num_blocks=wanted.num_blocks(decode.facts.block_tokens),
            num_sequences=choices,
            num_tokens=tokens - decision.cached_prefill_tokens,
        )
        self.num_keys += 1

    def _check(self, decision, wanted, now, cached, avoid):
        decode = self.placement.worker(decision.decode)
        prefill = self.placement.worker(decision.prefill or decision.decode)
        assert decode is not None and prefill is not None
        assert decode.is_serving and prefill.is_serving
        assert decode.facts.identity == prefill.facts.identity
        assert decode.decodes and decode.could_decode(wanted) and prefill.could_prefill(wanted)
        assert prefill.prefills or (prefill is decode and self.local_prefill)
        assert (decision.prefill is None) == (prefill is decode)
        assert decode.credits >= wanted.num_blocks(decode.facts.block_tokens)
        assert decode.num_sequences + wanted.num_choices <= decode.facts.max_sequences
        assert decode.refused_until_s <= now
        lacking = wanted.num_prompt_tokens - decision.cached_prefill_tokens
        assert prefill.prefill_prompts < MAX_PREFILL_PROMPTS or prefill.prefill_tokens + lacking <= WINDOW
        for worker, tokens in (
            (decode, decision.cached_decode_tokens),
            (prefill, decision.cached_prefill_tokens),
        ):
            held = next((tokens for mask, tokens in cached if mask >> worker.slot & 1), 0)
            assert tokens == min(held, wanted.num_prompt_tokens - 1)
        if decision.decode in avoid:
            assert not [
                w for w in self._workers()
                if w.facts.ref not in avoid and w.facts.identity == decode.facts.identity
                and w.decodes and w.state is WorkerState.SERVING and w.could_decode(wanted)
            ]  # fmt: skip
        assert [c.worker_id for c in decision.decode_candidates if c.chosen] == [decision.decode.worker_id]
        assert [c.worker_id for c in decision.prefill_candidates if c.chosen] == [prefill.facts.ref.worker_id]

    @precondition(lambda self: self.booked)
    @rule(data=st.data(), step=st.sampled_from(["granted", "prefilled", "refused", "release"]))
    def go_on(self, data, step):
        key = data.draw(st.sampled_from(list(self.booked)))
        booked = self.booked[key]
        if step == "refused":
            self.placement.refused(key, until_s=5.0)
        else:
            getattr(self.placement, step)(key)
        if step in ("refused", "release"):
            del self.booked[key]
        booked.granted |= step == "granted"
        booked.prefill_held &= step != "prefilled"

    @precondition(_workers)
    @rule(
        data=st.data(),
        state=st.sampled_from([WorkerState.SERVING, WorkerState.SERVING, WorkerState.NO_NEW]),
        free=st.integers(0, 50),
        sequences=st.integers(0, 8),
        queued=st.integers(0, 500),
        step_s=SPEED,
        s_per_token=SPEED,
        first_row_s=SPEED,
        row_s=SPEED,
        links=st.dictionaries(
            st.sampled_from(["a:1", "b:1", "z:1", ""]), st.builds(LinkSpeed, ANY_FLOAT, ANY_FLOAT), max_size=2
        ),
    )
    def report(self, data, state, free, sequences, queued, step_s, s_per_token, first_row_s, row_s, links):
        worker = self._draw_worker(data)
        self.placement.report(
            worker.facts.ref,
            state=state,
            free_blocks=free,
            num_sequences=sequences,
            queued_prefill_tokens=queued,
            step_s=step_s,
            first_row_s=first_row_s,
            row_s=row_s,
            prefill_s_per_token=s_per_token,
            links=links,
        )
        self.free[worker.facts.ref] = min(free, worker.facts.num_blocks)
        for booked in self.booked.values():
            if booked.decode == worker.facts.ref and booked.granted:
                booked.blocks_held = False
        assert worker.num_sequences >= sequences
        assert worker.tokens_ahead >= queued

    @invariant()
    def the_books_agree_with_a_recount(self):
        if not hasattr(self, "placement"):
            return
        blocks, sequences, prompts, tokens = Counter(), Counter(), Counter(), Counter()
        for booked in self.booked.values():
            sequences[booked.decode] += booked.num_sequences
            blocks[booked.decode] += booked.num_blocks * booked.blocks_held
            prompts[booked.prefill] += booked.prefill_held
            tokens[booked.prefill] += booked.num_tokens * booked.prefill_held
        for worker in self._workers():
            ref = worker.facts.ref
            assert worker.charged_blocks == blocks[ref] >= 0
            assert worker.charged_sequences == sequences[ref]
            assert (worker.prefill_prompts, worker.prefill_tokens) == (prompts[ref], tokens[ref])
            assert worker.credits == self.free[ref] - blocks[ref]

    @invariant()
    def the_columns_are_those_of_the_workers(self):
        if not hasattr(self, "placement"):
            return
        slots = [worker.slot for worker in self._workers()]
        assert len(set(slots)) == len(slots) and all(slot < 5 for slot in slots)
        for worker in self._workers():
            group = self.placement._groups[worker.facts.identity]
            for table, offers in (
                (group.decoders, worker.decodes),
                (group.prefillers, worker.prefills),
            ):
                place = table.place_of(worker.slot)
                assert (place is not None) == (offers and worker.is_serving)
                if place is not None:
                    assert table.workers[place] is worker
                    assert table.slots[place] == worker.slot
                    assert table.row(place) == row_of(worker, WINDOW)

    def teardown(self):
        if not hasattr(self, "placement"):
            return
        for key in self.booked:
            self.placement.release(key)
            self.placement.release(key)
        for worker in self._workers():
            assert worker.charged_blocks == worker.charged_sequences == 0
            assert worker.prefill_tokens == worker.prefill_prompts == 0


TestPlacement = PlacementMachine.TestCase
TestPlacement.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
