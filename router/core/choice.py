"""The choice among the workers of one identity.

Decode and prefill workers are ranked apart, never in pairs: the best decode worker, then the best prefill worker
for it, then prefill on that decode worker itself, on the one that holds most of the prompt, or on the best prefill
worker if that decodes, where that is allowed and predicted to cost less (`costs`). Where every prefill worker is taken,
a decode worker prefills by itself only if that costs less than the wait.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass

import numpy as np

from router.core.candidates import CandidateRow, Shortlist
from router.core.columns import Floats, Mask, WorkerTable, turn_tokens
from router.core.costs import CostModel, Figures
from router.core.fleet import Demand, Role, Worker
from router.core.groups import NOBODY, Group
from router.core.links import LinkTable
from router.core.outcomes import Choice, Placement, WaitCause
from router.core.policies import Ballot, Policy, Winner, best_of
from router.core.weighing import (
    DECODE_S_PER_TOKEN,
    KV_BYTES,
    NO_WAY,
    NUM_DECODE_FINDINGS,
    NUM_PREFILL_FINDINGS,
    weigh_decoders,
    weigh_prefillers,
    who_may_prefill,
)

ABSENT = (WaitCause.NO_WORKERS, WaitCause.TOO_LARGE)
_ORDER = list(WaitCause)


@dataclass(slots=True)
class Query:
    """What is to be placed. `cached` is by slot, as are `prefer` and the workers to avoid. `regardless`: as though
    every worker had room now, for a prediction."""

    demand: Demand
    now: float
    cached: Floats
    has_cached: bool
    prefer: int | None
    tickets: tuple[float, float, float, float]
    avoid_decode: Set[int] = NOBODY
    avoid_prefill: Set[int] = NOBODY
    regardless: bool = False


@dataclass(frozen=True, slots=True)
class Rules:
    """How to choose."""

    policy: Policy
    model: CostModel
    prefill_window_tokens: int
    local_prefill: bool


@dataclass(slots=True)
class _Option:
    """One way to prefill for a decode worker: its row, and who prefills (None: itself). `idle_ttft_s`: if no prompt
    were ahead, on whichever worker is best then."""

    decoder: int
    prefill: Worker | None
    cost_s: float
    ttft_s: float
    idle_ttft_s: float
    cached_tokens: int
    row: CandidateRow | None = None
    prefillers: Shortlist | None = None

    @property
    def idle_cost_s(self) -> float:
        return self.cost_s - self.ttft_s + self.idle_ttft_s


def choose(
    group: Group, figures: Figures, links: LinkTable, rules: Rules, query: Query
) -> Choice | WaitCause:
    """The best placement in a group, or why there is none now."""
    return _Decision(group, figures, links, rules, query).outcome()


class _Decision:
    """One choice; columns by row of the group's tables."""

    def __init__(self, group: Group, figures: Figures, links: LinkTable, rules: Rules, query: Query) -> None:
        self.group = group
        self.figures = figures
        self.links = links
        self.rules = rules
        self.query = query
        self.decoders = group.decoders
        self.prefillers = group.prefillers
        self.num_tokens = query.demand.num_prompt_tokens

    def outcome(self) -> Choice | WaitCause:
        may_decode, num_decode = self._weigh_decoders()
        may_prefill, num_prefill = self._who_may_prefill(self.query.regardless)
        decode_cause = None if num_decode else self._why_none_decodes()
        prefill_cause = None if num_prefill else self._why_none_prefills()
        self.weighs_local = self.rules.policy.heeds_costs and self.figures.is_measured
        self.alone = self.rules.local_prefill and (self.weighs_local or prefill_cause in ABSENT)
        if decode_cause is not None:
            causes = [decode_cause]
            if prefill_cause is not None and not self.alone:
                causes.append(prefill_cause)
            return min(causes, key=_ORDER.index)
        if prefill_cause is None:
            return self._beside_prefill_workers(may_decode, may_prefill)
        return self._by_themselves(may_decode, prefill_cause)

    # --- who may -----------------------------------------------------------------------------------------

    def _weigh_decoders(self) -> tuple[Mask, int]:
        """Who may decode, how many they are, and what it would cost there."""
        table, query, demand = self.decoders, self.query, self.query.demand
        landed = None if query.prefer is None else table.place_of(query.prefer)
        # What landed there need not travel again, but how much of it is of use to compute on is not known.
        self.landed_row = -1 if landed is None else landed
        may = np.empty(len(table), np.bool_)
        found = np.empty((NUM_DECODE_FINDINGS, len(table)))
        num_may = weigh_decoders(
            table.rows,
            self.figures.decode,
            table.slots,
            query.cached,
            self.num_tokens,
            demand.num_choices,
            demand.max_total_tokens,
            query.now,
            self.landed_row,
            self.rules.model.ttft_per_itl,
            query.regardless,
            may,
            found,
        )
        (
            self.decode_cost_s,
            self.step_s,
            self.itl_s,
            self.own_s,
            self.carried_s,
            self.decode_lacking,
            self.decode_cached,
        ) = found
        return _without(may, num_may, table, query.avoid_decode)

    def _who_may_prefill(self, regardless: bool) -> tuple[Mask, int]:
        """And how many they are; `regardless`: as though they had nothing else to prefill."""
        table = self.prefillers
        may = np.empty(len(table), np.bool_)
        num_may = who_may_prefill(
            table.rows, table.slots, self.query.cached, self.num_tokens, regardless, may
        )
        return _without(may, num_may, table, self.query.avoid_prefill)

    def _why_none_decodes(self) -> WaitCause:
        demand, avoid = self.query.demand, self.query.avoid_decode
        if any(w.could_decode(demand) for w in self.decoders.workers if w.slot not in avoid):
            return WaitCause.NO_CREDIT
        return self._absence(lambda w: w.decodes, Worker.could_decode, avoid)

    def _why_none_prefills(self) -> WaitCause:
        if self._who_may_prefill(regardless=True)[1]:
            return WaitCause.PREFILL_BUSY
        return self._absence(lambda w: w.prefills, Worker.could_prefill, self.query.avoid_prefill)

    def _absence(
        self, does: Callable[[Worker], bool], could: Callable[[Worker, Demand], bool], avoid: Set[int]
    ) -> WaitCause:
        """Why none of the workers that do this could; those in touch were looked at."""
        serving = [w for w in self.group.serving() if does(w) and w.slot not in avoid]
        if not serving:
            return WaitCause.NO_WORKERS
        if not any(could(worker, self.query.demand) for worker in serving):
            return WaitCause.TOO_LARGE
        return WaitCause.OUT_OF_TOUCH

    # --- what it costs -----------------------------------------------------------------------------------

    def _remote(self, decoder: int, may_prefill: Mask) -> _Option | None:
        """The best prefill worker for a decode worker. One that does both prefills for itself and for pure decode
        workers, not for its own kind: colocated workers side by side stay colocated."""
        table, address = self.prefillers, self.decoders.workers[decoder].facts.kv_address
        if self.decoders.workers[decoder].facts.role is Role.BOTH and table.num_both:
            may_prefill = may_prefill & (table.is_both == 0)
        to_travel = 0.0 if decoder == self.landed_row else self.decode_lacking.item(decoder)
        way = self.links.into(address, len(self.query.cached))
        found = np.empty((NUM_PREFILL_FINDINGS, len(table)))
        idle_row = weigh_prefillers(
            table.rows,
            self.figures.prefill,
            table.slots,
            self.query.cached,
            NO_WAY if way is None else way,
            self.num_tokens,
            to_travel * self.figures.decode.item(KV_BYTES, decoder),
            self.step_s.item(decoder),
            self.itl_s.item(decoder),
            self.rules.model.slo_itl_s,
            found,
        )
        cost_s, ttft_s, queue_s, alone_s, compute_s, transfer_s, cached = found
        ballot = Ballot(table, may_prefill, cost_s, self.query.tickets[2:])
        won = best_of(ballot, self.rules.policy.prefill_keys)
        if won is None:
            return None
        idle_s = alone_s.item(idle_row) * table.workers[idle_row].idle_part + self.step_s.item(decoder)
        return _Option(
            decoder=decoder,
            prefill=table.workers[won.row],
            cost_s=cost_s.item(won.row),
            ttft_s=ttft_s.item(won.row),
            idle_ttft_s=idle_s,
            cached_tokens=int(cached.item(won.row)),
            prefillers=Shortlist(
                table,
                won.key,
                won.row,
                (cost_s, queue_s, compute_s, transfer_s, None, cached),
                self._why_not_prefill,
            ),
        )

    def _may_prefill_itself(self, decoder: int) -> bool:
        worker = self.decoders.workers[decoder]
        if worker.facts.role is not Role.BOTH and not self.alone:
            return False
        lacking: float = self.decode_lacking.item(decoder)
        return self.query.regardless or lacking <= self.decoders.turn_tokens.item(decoder)

    def _local(self, decoder: int) -> _Option:
        """Prefill on the decode worker itself."""
        worker = self.decoders.workers[decoder]
        lacking = self.decode_lacking.item(decoder)
        step_s, own_s = self.step_s.item(decoder), self.own_s.item(decoder)
        compute_s = lacking * self.figures.decode.item(DECODE_S_PER_TOKEN, decoder)
        ttft_s = own_s + compute_s + step_s
        harm_s = self.rules.model.harm_s(compute_s, step_s, float(worker.num_sequences))
        cost_s = ttft_s + self.itl_s.item(decoder) + harm_s
        cached_tokens = int(self.num_tokens - lacking)
        row = (
            worker.facts.ref.worker_id, False, cost_s, own_s, compute_s, 0.0, step_s, cached_tokens,
            worker.tokens_ahead, worker.credits, "prefill on the decode worker itself",
        )  # fmt: skip
        idle_ttft_s = compute_s * worker.idle_part + step_s
        return _Option(decoder, None, cost_s, ttft_s, idle_ttft_s, cached_tokens, row)

    # --- the choice --------------------------------------------------------------------------------------

    def _beside_prefill_workers(self, may_decode: Mask, may_prefill: Mask) -> Choice | WaitCause:
        """Some prefill worker may take the prompt now."""
        table, policy = self.decoders, self.rules.policy
        may = may_decode
        if table.num_both and not np.count_nonzero(may_prefill & (self.prefillers.is_both == 0)):
            # Those that do both have only themselves to prefill for them.
            may = may & ((table.is_both == 0) | self._have_turn_themselves())
        won = best_of(Ballot(table, may, self.decode_cost_s, self.query.tickets[:2]), policy.decode_keys)
        if won is None:
            return WaitCause.PREFILL_BUSY
        remote = self._remote(won.row, may_prefill)
        itself = {won.row}
        if policy.heeds_costs:
            itself |= self._others_to_do_both(remote, may)
        local = [self._local(decoder) for decoder in sorted(itself) if self._may_prefill_itself(decoder)]
        return self._choice(won, self.decode_cost_s, remote, local)

    def _others_to_do_both(self, remote: _Option | None, may: Mask) -> set[int]:
        """Decode workers, beside the best to decode, that may be the best to prefill and decode: the one that holds
        most of the prompt, and the best prefill worker, if it decodes."""
        found: set[int] = set()
        if self.query.has_cached:
            found.add(int((self.decode_cached * may).argmax()))
        if remote is not None and remote.prefill is not None and remote.prefill.decodes:
            place = self.decoders.place_of(remote.prefill.slot)
            if place is not None:
                found.add(place)
        return {row for row in found if may.item(row)}

    def _by_themselves(self, may_decode: Mask, prefill_cause: WaitCause) -> Choice | WaitCause:
        """No prefill worker may take the prompt now."""
        table, figures, policy = self.decoders, self.figures, self.rules.policy
        may = may_decode & self._have_turn_themselves()
        if not self.alone:
            may &= table.is_both > 0
        compute_s = self.decode_lacking * figures.decode[DECODE_S_PER_TOKEN]
        cost_s = self.itl_s + self.own_s + compute_s + self.step_s
        cost_s += self.rules.model.harm_s(compute_s, self.step_s, table.num_sequences)
        won = best_of(Ballot(table, may, cost_s, self.query.tickets[:2]), policy.decode_keys)
        if won is None:
            return WaitCause.PREFILL_BUSY if self.alone else prefill_cause
        local, remote = self._local(won.row), None
        if self.weighs_local and prefill_cause is WaitCause.PREFILL_BUSY:
            remote = self._remote(won.row, self._who_may_prefill(regardless=True)[0])
            if remote is not None and remote.cost_s <= local.cost_s:
                return WaitCause.PREFILL_BUSY
        return self._choice(won, cost_s, remote, [local], must_be_local=True)

    def _choice(
        self,
        won: Winner,
        cost_s: Floats,
        remote: _Option | None,
        local: list[_Option],
        must_be_local: bool = False,
    ) -> Choice | WaitCause:
        """The best of the ways to prefill, explained."""
        option = min(local, key=lambda option: option.cost_s, default=None)
        if option is None or (remote is not None and not must_be_local and not self._prefers(option, remote)):
            option = remote
        if option is None:
            return WaitCause.PREFILL_BUSY
        worker = self.decoders.workers[option.decoder]
        idle = option
        if self.rules.policy.heeds_costs:
            ways = local if remote is None else [*local, remote]
            idle = min(ways, key=lambda way: way.idle_cost_s)
        is_measured = self.figures.is_measured
        placement = Placement(
            decode=worker.facts.ref,
            prefill=None if option.prefill is None else option.prefill.facts.ref,
            reason=self._reason(worker, option, remote),
            predicted_ttft_s=option.ttft_s if is_measured else None,
            idle_ttft_s=min(idle.idle_ttft_s, option.ttft_s) if is_measured else None,
            cached_decode_tokens=int(self.decode_cached.item(option.decoder)),
            cached_prefill_tokens=option.cached_tokens,
            _decoders=self._decoders_shortlist(won, cost_s, option.decoder),
            _prefillers=None if remote is None else remote.prefillers,
            _locals=tuple([option.row for option in local if option.row is not None]),
        )
        return Choice((option.cost_s,) if self.rules.policy.heeds_costs else won.rank, placement)

    def _prefers(self, local: _Option, remote: _Option) -> bool:
        if remote.prefill is None:
            return False
        decoder = self.decoders.workers[local.decoder]
        local_cost_s = local.cost_s - self.rules.model.least_gain_s(local.cost_s)
        return self.rules.policy.prefers_local(decoder, local_cost_s, remote.prefill, remote.cost_s)

    def _have_turn_themselves(self) -> Mask:
        if self.query.regardless:
            return np.ones(len(self.decoders), np.bool_)
        have_turn: Mask = self.decode_lacking <= self.decoders.turn_tokens
        return have_turn

    # --- why ---------------------------------------------------------------------------------------------

    def _decoders_shortlist(self, won: Winner, cost_s: Floats, chosen: int) -> Shortlist:
        columns = (cost_s, self.own_s, None, self.carried_s, self.step_s, self.decode_cached)
        return Shortlist(self.decoders, won.key, chosen, columns, self._why_not_decode)

    def _reason(self, worker: Worker, option: _Option, remote: _Option | None) -> str:
        name = worker.facts.ref.worker_id
        decode = f"decode on {name} ({worker.num_sequences} sequences, {worker.credits} free blocks)"
        cached = f"{option.cached_tokens} of {self.num_tokens} tokens cached"
        if option.prefill is not None:
            prefill = option.prefill
            return f"{decode}, prefill on {prefill.facts.ref.worker_id} ({prefill.tokens_ahead} tokens ahead, {cached})"
        why = "no other may take it"
        if remote is not None and remote.prefill is not None:
            other = remote.prefill.facts.ref.worker_id
            why = f"{other} has more ahead"
            if self.rules.policy.heeds_costs:
                why = f"predicted cost {option.cost_s:.3f} s, {remote.cost_s:.3f} s with prefill on {other}"
        return f"{decode}, prefill there too ({worker.tokens_ahead} tokens ahead, {cached}): {why}"

    def _why_not_decode(self, worker: Worker) -> str:
        demand = self.query.demand
        if worker.slot in self.query.avoid_decode:
            return "an attempt failed there"
        if not worker.could_decode(demand):
            return "too small for this request"
        if worker.refused_until_s > self.query.now:
            return "had no room lately"
        if worker.credits < demand.num_blocks(worker.facts.block_tokens):
            return "too few free blocks"
        if worker.num_sequences + demand.num_choices > worker.facts.max_sequences:
            return "too many sequences"
        return "nobody may prefill for it now"

    def _why_not_prefill(self, worker: Worker) -> str:
        if worker.slot in self.query.avoid_prefill:
            return "an attempt failed there"
        if not worker.could_prefill(self.query.demand):
            return "too small for this prompt"
        lacking = self.num_tokens - self.query.cached.item(worker.slot)
        if lacking > turn_tokens(worker, self.rules.prefill_window_tokens):
            return "as many prompts as it may have"
        return "prefills for itself and for workers that only decode"


def _without(may: Mask, num_may: int, table: WorkerTable, slots: Set[int]) -> tuple[Mask, int]:
    for slot in slots:
        place = table.place_of(slot)
        if place is not None:
            num_may -= int(may[place])
            may[place] = False
    return may, num_may
