"""Before a worker counts as ready, a block really moves between it and those that it will work with.

A worker that says that it is well may still be out of reach for its peers: a wrong address, a firewall, a link that
loses large messages. So each newcomer is tried with workers of the other kind: a short prompt of random tokens is
computed on the one and answered on the other, by the very messages of any request. It is ready once one of these
trials has passed; what a partner refused for want of room says nothing, and if that is all there is, it is ready too.
A newcomer that has nobody to be tried with is ready at once: whoever comes next is tried with it.

    RESERVING → PREFILLING → passed
        └───────────┴──────── failed: the next partner; after the last one again, ever more rarely

Knows no connections and no clock (`now` is monotonic seconds). What is to be sent is returned, as (worker, message).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from headrace.v1 import inference_pb2, worker_pb2
from router.core.fleet import Role, WorkerFacts, WorkerRef

CANARY_TENANT = "headrace canary"
"""No caller's: the names of tenants hold no spaces."""
MAX_PARTNERS = 8
ANSWER_TOKENS = 2  # the first is the prefill worker's, the second the decode worker's own
FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 30.0
_NO_ROOM = frozenset({"NO_CAPACITY", "NOT_SERVING", "PREFILL_QUEUE_FULL"})

Outgoing = list[tuple[WorkerRef, worker_pb2.RouterMessage]]


@dataclass(slots=True)
class _Trial:
    """A prompt on its way from `prefill` to `decode`."""

    key: worker_pb2.RequestKey
    task: worker_pb2.GenerationTask
    prefill: WorkerRef
    decode: WorkerRef
    partner: WorkerRef
    deadline_s: float


@dataclass(slots=True)
class _Newcomer:
    facts: WorkerFacts
    vocab_size: int
    partners: list[WorkerFacts]
    next_partner: int = 0
    pause_s: float = FIRST_PAUSE_S
    next_at_s: float = 0.0
    trial: _Trial | None = None
    num_failed: int = 0
    problems: dict[str, str] = field(default_factory=dict)
    is_ready: bool = False


class Canaries:
    """The trials of all newcomers, one at a time each. `timeout_s`: of one trial; 0: everybody is ready at once.
    `fidelity`: what requests may get, since workers that store other dtypes may move nothing that is exact."""

    def __init__(self, timeout_s: float, random: Random, fidelity: str = "exact") -> None:
        self._timeout_s = timeout_s
        self._fidelity = fidelity
        self._random = random
        self._newcomers: dict[WorkerRef, _Newcomer] = {}
        self._trials: dict[str, _Newcomer] = {}  # by request id
        self._let_in: list[WorkerRef] = []
        self._num_trials = 0
        self._router = random.getrandbits(64)

    def joined(
        self, facts: WorkerFacts, vocab_size: int, others: Sequence[WorkerFacts], now: float
    ) -> Outgoing:
        """A worker is here: try it with some of `others` that it may be paired with."""
        partners = [other for other in others if _pairs(facts, other)] if self._timeout_s else []
        self._random.shuffle(partners)
        newcomer = _Newcomer(facts, vocab_size, partners[:MAX_PARTNERS])
        self._newcomers[facts.ref] = newcomer
        if not partners:
            self._ready(newcomer)
            return []
        return self._begin(newcomer, now)

    def left(self, ref: WorkerRef) -> None:
        """A worker is gone: it need not be tried, and nobody can be tried with it."""
        gone = self._newcomers.pop(ref, None)
        if gone is not None:
            self._end_trial(gone)
        for newcomer in self._newcomers.values():
            newcomer.partners = [partner for partner in newcomer.partners if partner.ref != ref]
            if newcomer.trial is not None and newcomer.trial.partner == ref:
                self._end_trial(newcomer)
            if not newcomer.partners:
                self._ready(newcomer)

    @property
    def is_busy(self) -> bool:
        """Whether a trial is under way: only then is there anything to `take`."""
        return bool(self._trials)

    def let_in(self) -> list[WorkerRef]:
        """Workers that have become ready since this was last asked."""
        ready, self._let_in = self._let_in, []
        return ready

    def is_ready(self, ref: WorkerRef) -> bool:
        """Whether a worker may get requests."""
        newcomer = self._newcomers.get(ref)
        return newcomer is not None and newcomer.is_ready

    def problem(self, ref: WorkerRef) -> str:
        """What failed between a worker and its partners, for people; empty where nothing did."""
        newcomer = self._newcomers.get(ref)
        if newcomer is None:
            return ""
        return "; ".join(
            f"no block could be moved with {worker_id!r}: {why}"
            for worker_id, why in newcomer.problems.items()
        )

    def due(self, now: float) -> Outgoing:
        """Trials that begin now, in place of those that took too long too. To be called some times a second."""
        outgoing: Outgoing = []
        for newcomer in self._newcomers.values():
            trial = newcomer.trial
            if trial is not None and now >= trial.deadline_s:
                outgoing += _cancel(trial)
                self._failed(newcomer, f"nothing came within {self._timeout_s:g} s", now)
            if newcomer.trial is None and not newcomer.is_ready and now >= newcomer.next_at_s:
                outgoing += self._begin(newcomer, now)
        return outgoing

    def take(self, ref: WorkerRef, message: worker_pb2.WorkerMessage, now: float) -> Outgoing:
        """Takes what a worker said of trials; messages of requests change nothing."""
        match message.WhichOneof("message"):
            case "reserved":
                return self._reserved(ref, message.reserved, now)
            case "failed":
                return self._attempt_failed(ref, message.failed, now)
            case "step":
                outputs = [o for o in message.step.outputs if o.key.tenant == CANARY_TENANT]
                return [each for output in outputs for each in self._answered(ref, output)]
        return []

    def _reserved(self, ref: WorkerRef, reserved: worker_pb2.Reserved, now: float) -> Outgoing:
        newcomer = self._of(reserved.key)
        if reserved.key.tenant != CANARY_TENANT:
            return []
        if newcomer is None or newcomer.trial is None or newcomer.trial.decode != ref:
            return [(ref, _cancel_message(reserved.key))]
        trial = newcomer.trial
        start = worker_pb2.StartPrefill(
            key=trial.key, task=trial.task, remaining_s=trial.deadline_s - now, lease=reserved
        )
        return [(trial.prefill, worker_pb2.RouterMessage(start_prefill=start))]

    def _answered(self, ref: WorkerRef, output: worker_pb2.ChoiceOutput) -> Outgoing:
        newcomer = self._of(output.key)
        if not output.HasField("finished"):
            return []
        if newcomer is not None and newcomer.trial is not None and newcomer.trial.decode == ref:
            newcomer.problems.pop(newcomer.trial.partner.worker_id, None)
            self._end_trial(newcomer)
            self._ready(newcomer)
        seen = worker_pb2.TokensSeen(key=output.key, choice=0, next_index=ANSWER_TOKENS)
        return [
            (ref, worker_pb2.RouterMessage(acknowledge=worker_pb2.AcknowledgeTokens(seen=[seen]))),
        ]

    def _attempt_failed(self, ref: WorkerRef, failed: worker_pb2.AttemptFailed, now: float) -> Outgoing:
        newcomer = self._of(failed.key)
        if newcomer is None or newcomer.trial is None:
            return []
        trial = newcomer.trial
        if ref not in (trial.prefill, trial.decode):
            return []
        if failed.error.cause in _NO_ROOM:
            self._end_trial(newcomer)
            self._move_on(newcomer, now)
        else:
            self._failed(newcomer, f"{failed.error.cause}: {failed.error.message[:200]}", now)
        return _cancel(trial)

    def _failed(self, newcomer: _Newcomer, why: str, now: float) -> None:
        assert newcomer.trial is not None
        newcomer.problems[newcomer.trial.partner.worker_id] = why
        self._end_trial(newcomer)
        newcomer.num_failed += 1
        self._move_on(newcomer, now)

    def _move_on(self, newcomer: _Newcomer, now: float) -> None:
        """The next partner at once, the first one again after a pause; ready, where none of them had room."""
        newcomer.next_partner += 1
        if newcomer.next_partner < len(newcomer.partners):
            newcomer.next_at_s = now
            return
        if not newcomer.num_failed:
            self._ready(newcomer)
        newcomer.next_partner = newcomer.num_failed = 0
        newcomer.next_at_s = now + newcomer.pause_s
        newcomer.pause_s = min(2 * newcomer.pause_s, MAX_PAUSE_S)

    def _begin(self, newcomer: _Newcomer, now: float) -> Outgoing:
        if not newcomer.partners:
            return []
        partner = newcomer.partners[newcomer.next_partner % len(newcomer.partners)]
        prefill, decode = _roles(newcomer.facts, partner)
        self._num_trials += 1
        key = worker_pb2.RequestKey(
            tenant=CANARY_TENANT, request_id=f"{self._router:x}-{self._num_trials}", attempt=1
        )
        newcomer.trial = _Trial(
            key, self._task(newcomer), prefill.ref, decode.ref, partner.ref, now + self._timeout_s
        )
        self._trials[key.request_id] = newcomer
        reserve = worker_pb2.Reserve(key=key, task=newcomer.trial.task, remaining_s=self._timeout_s)
        return [(decode.ref, worker_pb2.RouterMessage(reserve=reserve))]

    def _task(self, newcomer: _Newcomer) -> worker_pb2.GenerationTask:
        """Random tokens, which nobody has cached: a whole block, and one token that is computed in any case."""
        num_tokens = min(newcomer.facts.block_tokens + 1, newcomer.facts.max_context - ANSWER_TOKENS)
        sampling = inference_pb2.SamplingParams(
            temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True, n=1, seed=0
        )
        return worker_pb2.GenerationTask(
            prompt_token_ids=[self._random.randrange(newcomer.vocab_size) for _ in range(num_tokens)],
            sampling=sampling,
            fidelity=self._fidelity,
        )

    def _of(self, key: worker_pb2.RequestKey) -> _Newcomer | None:
        """Whose trial it is; None of one that is over, and of requests."""
        return self._trials.get(key.request_id) if key.tenant == CANARY_TENANT else None

    def _end_trial(self, newcomer: _Newcomer) -> None:
        if newcomer.trial is not None:
            self._trials.pop(newcomer.trial.key.request_id, None)
            newcomer.trial = None

    def _ready(self, newcomer: _Newcomer) -> None:
        if not newcomer.is_ready:
            newcomer.is_ready = True
            self._let_in.append(newcomer.facts.ref)


def _pairs(one: WorkerFacts, other: WorkerFacts) -> bool:
    """Whether one of them may prefill for the other."""
    return one.identity == other.identity and one.role is not other.role


def _roles(one: WorkerFacts, other: WorkerFacts) -> tuple[WorkerFacts, WorkerFacts]:
    """Who prefills, and who decodes."""
    return (one, other) if one.role is Role.PREFILL or other.role is Role.DECODE else (other, one)


def _cancel(trial: _Trial) -> Outgoing:
    return [(ref, _cancel_message(trial.key)) for ref in (trial.decode, trial.prefill)]


def _cancel_message(key: worker_pb2.RequestKey) -> worker_pb2.RouterMessage:
    return worker_pb2.RouterMessage(cancel=worker_pb2.CancelAttempt(key=key, cause="CANARY_OVER"))
