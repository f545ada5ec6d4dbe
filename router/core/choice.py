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
from router.core.costs import CostModel, Figures, step_on
from router.core.fleet import Demand, Role, Worker
from router.core.groups import NOBODY, Group
from router.core.links import LinkTable
from router.core.outcomes import Choice, Placement, WaitCause
from router.core.policies import Ballot, Policy, Winner, best_of

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
        self.prefill_cached = query.cached.take(self.prefillers.slots)
        self.decode_cached = query.cached.take(self.decoders.slots)

    def outcome(self) -> Choice | WaitCause:
        may_decode = self._who_may_decode()
        may_prefill = self._who_may_prefill()
        decode_cause = None if np.count_nonzero(may_decode) else self._why_none_decodes()
        prefill_cause = None if np.count_nonzero(may_prefill) else self._why_none_prefills()
        self.weighs_local = self.rules.policy.heeds_costs and self.figures.is_measured
        self.alone = self.rules.local_prefill and (self.weighs_local or prefill_cause in ABSENT)
        if decode_cause is not None:
            causes = [decode_cause]
            if prefill_cause is not None and not self.alone:
                causes.append(prefill_cause)
            return min(causes, key=_ORDER.index)
        self._weigh_decoders()
        if prefill_cause is None:
            return self._beside_prefill_workers(may_decode, may_prefill)
        return self._by_themselves(may_decode, prefill_cause)

    # --- who may -----------------------------------------------------------------------------------------

    def _who_may_decode(self) -> Mask:
        table, demand = self.decoders, self.query.demand
        self.num_blocks = table.blocks_of(demand)
        if self.query.regardless:
            return self._who_could_decode()
        may: Mask = table.credits >= self.num_blocks
        may &= table.room >= demand.num_choices
        if self.query.now < table.latest_refusal_s:
            may &= table.refused_until_s <= self.query.now
        if demand.max_total_tokens > table.min_context:
            may &= table.max_context >= demand.max_total_tokens
        return _without(may, table, self.query.avoid_decode)

    def _who_could_decode(self) -> Mask:
        table, demand = self.decoders, self.query.demand
        could: Mask = table.num_blocks >= self.num_blocks
        could &= table.max_sequences >= demand.num_choices
        could &= table.max_context >= demand.max_total_tokens
        return _without(could, table, self.query.avoid_decode)

    def _who_may_prefill(self) -> Mask:
        table = self.prefillers
        self.prefill_lacking = self.num_tokens - self.prefill_cached
        if self.query.regardless:
            return self._who_could_prefill()
        may: Mask = self.prefill_lacking <= table.turn_tokens
        if self.num_tokens >= table.min_context:
            may &= table.max_context > self.num_tokens
        return _without(may, table, self.query.avoid_prefill)

    def _who_could_prefill(self) -> Mask:
        could: Mask = self.prefillers.max_context > self.num_tokens
        return _without(could, self.prefillers, self.query.avoid_prefill)

    def _why_none_decodes(self) -> WaitCause:
        if np.count_nonzero(self._who_could_decode()):
            return WaitCause.NO_CREDIT
        return self._absence(lambda w: w.decodes, Worker.could_decode, self.query.avoid_decode)

    def _why_none_prefills(self) -> WaitCause:
        if np.count_nonzero(self._who_could_prefill()):
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

    def _weigh_decoders(self) -> None:
        table, figures, model = self.decoders, self.figures, self.rules.model
        num_choices = self.query.demand.num_choices
        self.step_s, self.itl_s = model.step_and_itl_s(figures, table, num_choices, self.num_blocks)
        self.own_s: Floats = table.tokens_ahead * figures.decode_s_per_token
        self.decode_lacking = self.num_tokens - self.decode_cached
        self.untransferred = self.decode_lacking
        prefer = self.query.prefer
        place = None if prefer is None else table.place_of(prefer)
        if place is not None:
            # What landed there need not travel again, but how much of it is of use to compute on is not known.
            self.untransferred = self.decode_lacking.copy()
            self.untransferred[place] = 0.0
        self.carried_s = self.untransferred * figures.decode_carried_s

    def _remote(self, decoder: int, may_prefill: Mask) -> _Option | None:
        """The best prefill worker for a decode worker. One that does both prefills for itself and for pure decode
        workers, not for its own kind: colocated workers side by side stay colocated."""
        table, figures = self.prefillers, self.figures
        if self.decoders.workers[decoder].facts.role is Role.BOTH and table.num_both:
            may_prefill = may_prefill & (table.is_both == 0)
        queue_s: Floats = table.tokens_ahead * figures.prefill_s_per_token
        compute_s = self.prefill_lacking * figures.prefill_s_per_token
        s_per_byte, fixed_s = self._links_into(decoder)
        num_bytes = self.untransferred.item(decoder) * figures.decode_kv_bytes.item(decoder)
        transfer_s = s_per_byte * num_bytes
        ttft_s = np.maximum(compute_s, transfer_s)  # the transfer runs beside the computation
        ttft_s += fixed_s
        step_s = self.step_s.item(decoder)
        idle_row = int(ttft_s.argmin())
        idle_ttft_s = ttft_s.item(idle_row) * table.workers[idle_row].idle_part + step_s
        ttft_s += queue_s
        ttft_s += step_s
        cost_s = ttft_s + self.itl_s.item(decoder)
        if table.num_both:
            cost_s += self._harm_of_prefill_s(compute_s)
        ballot = Ballot(table, may_prefill, cost_s, self.query.tickets[2:])
        won = best_of(ballot, self.rules.policy.prefill_keys)
        if won is None:
            return None
        cached = self.prefill_cached
        return _Option(
            decoder=decoder,
            prefill=table.workers[won.row],
            cost_s=cost_s.item(won.row),
            ttft_s=ttft_s.item(won.row),
            idle_ttft_s=idle_ttft_s,
            cached_tokens=int(cached.item(won.row)),
            prefillers=Shortlist(
                table,
                won.key,
                won.row,
                (cost_s, queue_s, compute_s, transfer_s, None, cached),
                self._why_not_prefill,
            ),
        )

    def _harm_of_prefill_s(self, compute_s: Floats) -> Floats:
        """To the answers of prefill workers that decode too."""
        table = self.prefillers
        step_s = step_on(table, table.empty_step_s, table.row_s, 1)
        harm_s = self.rules.model.harm_s(compute_s, step_s, table.num_sequences)
        harm_s *= table.is_both
        return harm_s

    def _links_into(self, decoder: int) -> tuple[Floats, Floats]:
        table, figures = self.prefillers, self.figures
        address = self.decoders.workers[decoder].facts.kv_address
        way = self.links.into(address, len(self.query.cached))
        if way is None:
            return figures.link_s_per_byte, figures.link_fixed_s
        speeds = way.take(table.slots, axis=1)
        np.copyto(speeds, figures.links, where=speeds < 0)
        return speeds[0], speeds[1]

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
        compute_s = lacking * self.figures.decode_s_per_token.item(decoder)
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
        cost_s = self.itl_s + self.own_s
        cost_s += self.carried_s
        won = best_of(Ballot(table, may, cost_s, self.query.tickets[:2]), policy.decode_keys)
        if won is None:
            return WaitCause.PREFILL_BUSY
        remote = self._remote(won.row, may_prefill)
        itself = {won.row}
        if policy.heeds_costs:
            itself |= self._others_to_do_both(remote, may)
        local = [self._local(decoder) for decoder in sorted(itself) if self._may_prefill_itself(decoder)]
        return self._choice(won, cost_s, remote, local)

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
        compute_s = self.decode_lacking * figures.decode_s_per_token
        cost_s = self.itl_s + self.own_s + compute_s + self.step_s
        cost_s += self.rules.model.harm_s(compute_s, self.step_s, table.num_sequences)
        won = best_of(Ballot(table, may, cost_s, self.query.tickets[:2]), policy.decode_keys)
        if won is None:
            return WaitCause.PREFILL_BUSY if self.alone else prefill_cause
        local, remote = self._local(won.row), None
        if self.weighs_local and prefill_cause is WaitCause.PREFILL_BUSY:
            remote = self._remote(won.row, self._who_could_prefill())
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


def _without(mask: Mask, table: WorkerTable, slots: Set[int]) -> Mask:
    for slot in slots:
        place = table.place_of(slot)
        if place is not None:
            mask[place] = False
    return mask
