"""The dispatcher against workers that answer late, refuse, fail, vanish and come back, in any order.

Messages are in flight both ways, and lost when a stream breaks. However they interleave with cancels, clients
that leave and deadlines that pass: every request ends, its listeners get each token once, and at last no worker
holds anything. What is still under way when the trouble is over is finished, not left to its deadline.
"""

import heapq
import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.v1 import inference_pb2 as pb
from headrace.v1 import worker_pb2
from router.attempts import Attempts
from router.book import RequestBook
from router.config import RouterConfig
from router.core.answer import Answer
from router.core.failures import Rejection
from router.core.fleet import Identity, Role, WorkerFacts, WorkerRef, WorkerState
from router.core.index_feed import IndexFeed
from router.core.lifecycle import Lifecycle
from router.core.placement import POLICIES, PlacementState
from router.core.queue import TokenQueue
from router.core.retries import MAX_FAILED_ATTEMPTS, MAX_WORKERS_LOST
from router.core.shedding import Shedder
from router.core.tenants import TenantLimits
from router.dispatcher import MAX_STALE, Dispatcher
from router.gate import Gate
from router.placer import Placer
from router.prompt_keys import KeyRoots
from router.requests import Attachment, Request, RequestKey
from router.resume import ResumeHandles

pytestmark = pytest.mark.unit

NUM_TOKENS = 3
ANSWER = "abc"
# The client's own doing, the deadline, and what no other attempt would mend. Lost workers are not among them.
ALLOWED_ENDS = {
    "CLIENT_CANCELLED", "CLIENT_DISCONNECTED", "DEADLINE_EXCEEDED", "NAN_LOGITS", "QUEUE_FULL", "NO_WORKERS",
    "PREDICTED_LATE", "DEADLINE_TOO_SHORT",
}  # fmt: skip
IDENTITY = Identity(weights_digest="", tokenizer_digest="", arithmetic="", layout="", handoff_major=1)
CONFIG = RouterConfig(
    router_id="r", model_name="m", model_dir=Path("unused"), cluster_secret=b"s" * 16, resume_grace_s=5.0
)


class Timers:
    """A clock that is set forward by hand."""

    def __init__(self):
        self.now = 0.0
        self._due = []
        self._count = 0

    def clock(self):
        return self.now

    def call_later(self, delay_s, callback):
        self._count += 1
        timer = Timer(callback)
        heapq.heappush(self._due, (self.now + delay_s, self._count, timer))
        return timer

    def advance(self, seconds):
        until = self.now + seconds
        while self._due and self._due[0][0] <= until:
            self.now, _, timer = heapq.heappop(self._due)
            if timer.callback is not None:
                timer.callback()
        self.now = until


class Timer:
    def __init__(self, callback):
        self.callback = callback

    def cancel(self):
        self.callback = None


@dataclass
class Lease:
    committed: bool
    next_index: int = 0
    heard: bool = True


@dataclass
class FakeWorker:
    """Holds leases and prefill jobs by (request id, attempt), as the contract has it."""

    ref: WorkerRef
    role: Role
    refuses: bool = False
    connected: bool = True
    inbox: deque = field(default_factory=deque)
    outbox: deque = field(default_factory=deque)
    leases: dict[tuple[str, int], Lease] = field(default_factory=dict)
    jobs: dict[tuple[str, int], bool] = field(default_factory=dict)  # whether heard of since a break
    jobs_done: set[tuple[str, int]] = field(default_factory=set)
    cancelled: dict[str, int] = field(default_factory=dict)

    def handle(self, message):
        kind = message.WhichOneof("message")
        getattr(self, f"_on_{kind}")(getattr(message, kind))

    def _on_reserve(self, message):
        name = (message.key.request_id, message.key.attempt)
        if self._is_cancelled(name):
            self._fail(message.key, "CANCELLED")
        elif name not in self.leases and self.refuses:
            self._fail(message.key, "NO_CAPACITY")
        else:
            so_far = [token for known in message.task.so_far for token in known.token_ids]
            assert so_far == list(range(len(so_far)))
            lease = Lease(committed=message.local_prefill, next_index=len(so_far))
            self.leases.setdefault(name, lease).heard = True
            self._send(reserved=worker_pb2.Reserved(key=message.key))

    def _on_start_prefill(self, message):
        name = (message.key.request_id, message.key.attempt)
        if self._is_cancelled(name):
            self._fail(message.key, "CANCELLED")
        elif name in self.jobs_done:
            self._send(prefill_finished=worker_pb2.PrefillFinished(key=message.key))
        else:
            self.jobs[name] = True

    def _on_cancel(self, message):
        request_id, attempt = message.key.request_id, message.key.attempt
        self.cancelled[request_id] = max(attempt, self.cancelled.get(request_id, 0))
        self.jobs = {name: heard for name, heard in self.jobs.items() if not self._is_cancelled(name)}
        self.leases = {name: lease for name, lease in self.leases.items() if not self._is_cancelled(name)}

    def _on_acknowledge(self, message):
        (seen,) = message.seen
        if seen.next_index == NUM_TOKENS:
            self.leases.pop((seen.key.request_id, seen.key.attempt), None)

    def _on_resume(self, message):
        lease = self.leases.get((message.key.request_id, message.key.attempt))
        if lease is None:
            self._fail(message.key, "UNKNOWN_REQUEST", retryable=True)
        else:
            lease.heard = True
            lease.next_index = message.next_index[0]

    def speakable(self):
        return [n for n, lease in self.leases.items() if lease.committed and lease.next_index < NUM_TOKENS]

    def say(self, name, num_tokens):
        lease = self.leases[name]
        first, end = lease.next_index, min(NUM_TOKENS, lease.next_index + num_tokens)
        delta = pb.Delta(first_index=first, token_ids=range(first, end), text=ANSWER[first:end])
        output = worker_pb2.ChoiceOutput(key=self.key(name), delta=delta)
        lease.next_index = end
        if end == NUM_TOKENS:
            output.finished.CopyFrom(pb.ChoiceFinished(num_tokens=NUM_TOKENS))
        self._send(step=worker_pb2.StepOutput(outputs=[output]))

    def fail(self, name, cause):
        self.leases.pop(name, None)
        self.jobs.pop(name, None)
        self._fail(self.key(name), cause, retryable=cause != "NAN_LOGITS")

    def finish_job(self, name, decode):
        del self.jobs[name]
        lease = decode.leases.get(name) if decode is not None else None
        if lease is None:
            self._fail(self.key(name), "LEASE_GONE", retryable=True)
        else:
            lease.committed = True
            self.jobs_done.add(name)
            self._send(prefill_finished=worker_pb2.PrefillFinished(key=self.key(name)))

    def break_stream(self):
        self.connected = False
        self.inbox.clear()
        self.outbox.clear()
        self.jobs = dict.fromkeys(self.jobs, False)
        for lease in self.leases.values():
            lease.heard = False

    def _is_cancelled(self, name):
        return name[1] <= self.cancelled.get(name[0], 0)

    @staticmethod
    def key(name):
        return worker_pb2.RequestKey(tenant="t", request_id=name[0], attempt=name[1])

    def _fail(self, key, cause, retryable=False):
        error = pb.ErrorDetail(cause=cause, retryable=retryable)
        self._send(failed=worker_pb2.AttemptFailed(key=key, error=error))

    def _send(self, **message):
        self.outbox.append(worker_pb2.WorkerMessage(**message))


class Cluster:
    """One decode, one prefill and one worker of both roles, and what may happen to them by chance."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.timers = Timers()
        self.book = RequestBook(CONFIG, self.timers.clock, self.timers.call_later)
        self.placement = PlacementState(POLICIES["least-loaded"], prefill_window_tokens=64)
        self.queue = TokenQueue(200)
        clock = self.timers.clock
        placer = Placer(self.placement, IndexFeed(), KeyRoots(CONFIG.cluster_secret), clock)
        self.limits = TenantLimits({})
        gate = Gate(self.queue, self.limits, Shedder(), placer, clock)
        attempts = Attempts(self.book, self.queue, placer, self, clock)
        handles = ResumeHandles(CONFIG.cluster_secret)
        self.dispatcher = Dispatcher(
            self.book, self.queue, gate, placer, attempts, self, handles, clock, self.timers.call_later
        )
        self.workers: dict[WorkerRef, FakeWorker] = {}
        self.attachments: list[Attachment] = []
        self.num_requests = 0
        for worker_id, role in (("d", Role.DECODE), ("p", Role.PREFILL), ("b", Role.BOTH)):
            self._join(worker_id, role, epoch=1)

    def run(self, num_events):
        """Lets that many things happen, the usual ones more often than trouble."""
        events = {
            self.submit: 6,
            self.router_message_arrives: 20,
            self.worker_message_arrives: 20,
            self.worker_speaks: 12,
            self.prefill_ends: 8,
            self.worker_reports: 6,
            self.time_passes: 3,
            self.client_acts: 3,
            self.attempt_fails: 1,
            self.stream_breaks: 1,
            self.stream_is_back: 3,
            self.worker_is_replaced: 0.5,
        }
        for event in self.random.choices(list(events), list(events.values()), k=num_events):
            event()

    # Links

    def send(self, ref, message):
        worker = self.workers.get(ref)
        if worker is not None and (worker.connected or message.HasField("cancel")):
            worker.inbox.append(message)

    def acknowledge(self, ref, key, choice, next_index):
        seen = worker_pb2.TokensSeen(key=key, choice=choice, next_index=next_index)
        self.send(ref, worker_pb2.RouterMessage(acknowledge=worker_pb2.AcknowledgeTokens(seen=[seen])))

    def _join(self, worker_id, role, epoch):
        ref = WorkerRef(worker_id, epoch)
        self.workers[ref] = FakeWorker(ref, role)
        facts = WorkerFacts(
            ref=ref,
            role=role,
            identity=IDENTITY,
            block_tokens=16,
            num_blocks=8,
            max_sequences=3,
            max_context=100,
        )
        self.placement.add(facts, WorkerState.SERVING)
        self.dispatcher.on_joined()

    def _deliver_up(self, worker):
        message = worker.outbox.popleft()
        kind = message.WhichOneof("message")
        handlers = {
            "reserved": self.dispatcher.on_reserved,
            "prefill_finished": self.dispatcher.on_prefill_finished,
            "step": self.dispatcher.on_step,
            "failed": self.dispatcher.on_failed,
        }
        handlers[kind](worker.ref, getattr(message, kind))

    def _one_of(self, choices):
        choices = list(choices)
        return self.random.choice(choices) if choices else None

    # Clients

    def submit(self):
        self.num_requests += 1
        if self.random.random() < 0.1:
            # A worker knows the id from before this router did.
            self._one_of(self.workers.values()).cancelled[f"r{self.num_requests}"] = self.random.randint(1, 5)
        request = Request(
            key=RequestKey("t", f"r{self.num_requests}"),
            body=b"",
            seed=0,
            attempt=0,
            deadline_s=self.timers.now + self.random.uniform(1, 20),
            resumable=self.random.random() < 0.5,
            resume_handle=b"",
            lifecycle=Lifecycle(self.timers.now),
            answer=Answer(1),
        )
        self.book.begin(request)
        self.attachments.append(self.book.attach(request, 0))
        sampling = pb.SamplingParams(max_tokens=NUM_TOKENS, n=1)
        prompt = [1] * self.random.randint(1, 60)
        self.dispatcher.submit(request, worker_pb2.GenerationTask(prompt_token_ids=prompt, sampling=sampling))

    def client_acts(self):
        attachment = self._one_of(self.attachments)
        match attachment and self.random.choice(["cancel", "leave", "attach"]):
            case "cancel":
                self.book.cancel(attachment.request)
            case "leave":
                self.book.detach(attachment)
            case "attach":
                self.attachments.append(self.book.attach(attachment.request, 0))

    def time_passes(self):
        self.timers.advance(self.random.uniform(0, 2))
        self.dispatcher.pump()

    # Workers

    def router_message_arrives(self):
        worker = self._one_of(w for w in self.workers.values() if w.inbox and w.connected)
        if worker is not None:
            worker.handle(worker.inbox.popleft())

    def worker_message_arrives(self):
        worker = self._one_of(w for w in self.workers.values() if w.outbox and w.connected)
        if worker is not None:
            self._deliver_up(worker)

    def worker_speaks(self):
        found = self._one_of((w, name) for w in self.workers.values() for name in w.speakable())
        if found is not None:
            found[0].say(found[1], self.random.randint(1, NUM_TOKENS))

    def prefill_ends(self):
        found = self._one_of((w, name) for w in self.workers.values() for name in w.jobs)
        if found is not None:
            found[0].finish_job(found[1], self._decode_worker_of(found[1]))

    def attempt_fails(self):
        found = self._one_of((w, name) for w in self.workers.values() for name in (*w.leases, *w.jobs))
        if found is not None:
            found[0].fail(found[1], self.random.choice(["NAN_LOGITS", "ENGINE_FAILED", "LEASE_EXPIRED"]))

    def worker_reports(self):
        worker = self._one_of(self.workers.values())
        worker.refuses = self.random.random() < 0.3
        self._report(worker, free_blocks=self.random.randint(0, 8))

    def stream_breaks(self):
        worker = self._one_of(w for w in self.workers.values() if w.connected)
        if worker is not None:
            worker.break_stream()
            self.placement.set_connected(worker.ref, False)

    def stream_is_back(self):
        worker = self._one_of(w for w in self.workers.values() if not w.connected)
        if worker is not None:
            worker.connected = True
            self.placement.set_connected(worker.ref, True)
            self.dispatcher.on_back(worker.ref)

    def worker_is_replaced(self):
        worker = self._one_of(self.workers.values())
        del self.workers[worker.ref]
        self.placement.remove(worker.ref)
        self.dispatcher.on_lost(worker.ref, "replaced")
        self._join(worker.ref.worker_id, worker.role, worker.ref.epoch + 1)

    # The end

    def check_that_all_is_well_in_the_end(self):
        self._end_all_trouble()
        assert not self.book.live and len(self.queue) == 0
        assert self.limits.num_running("t") == 0
        for worker in self.placement.workers:
            assert worker.charged_blocks == worker.charged_sequences == worker.prefill_tokens == 0
        for worker in self.workers.values():
            assert not worker.jobs
            assert not [name for name, lease in worker.leases.items() if lease.heard]
        for attachment in self.attachments:
            self._check_listener(attachment)

    def _end_all_trouble(self):
        for worker in self.workers.values():
            worker.refuses = False
        while not all(worker.connected for worker in self.workers.values()):
            self.stream_is_back()
        moved = True
        while moved:
            self._quiesce()
            self._check_that_nothing_stale_is_held()
            for worker in self.workers.values():  # their grace is over
                worker.leases = {name: lease for name, lease in worker.leases.items() if lease.heard}
            moved = False
            for worker in self.workers.values():
                for name in list(worker.jobs):
                    worker.finish_job(name, self._decode_worker_of(name))
                    moved = True
                for name in worker.speakable():
                    worker.say(name, NUM_TOKENS)
                    moved = True
                self._report(worker, free_blocks=8)
            moved = moved or any(worker.inbox for worker in self.workers.values())

    def _check_that_nothing_stale_is_held(self):
        """What a worker holds belongs to a running attempt, or was not heard of: the worker's grace ends it."""
        running = {(request.key.request_id, request.attempt) for request in self.book.live}
        for worker in self.workers.values():
            assert {name for name, heard in worker.jobs.items() if heard} <= running
            assert {name for name, lease in worker.leases.items() if lease.heard} <= running

    def _decode_worker_of(self, name):
        return next((worker for worker in self.workers.values() if name in worker.leases), None)

    def _report(self, worker, free_blocks):
        self.placement.report(
            worker.ref, state=WorkerState.SERVING, free_blocks=free_blocks, num_sequences=len(worker.leases)
        )
        self.dispatcher.pump()

    def _quiesce(self):
        while any(worker.inbox or worker.outbox for worker in self.workers.values()):
            for worker in self.workers.values():
                while worker.inbox:
                    worker.handle(worker.inbox.popleft())
                while worker.outbox:
                    self._deliver_up(worker)

    @staticmethod
    def _has_no_budget_left(request):
        setbacks = request.setbacks
        return (
            setbacks.workers_lost > MAX_WORKERS_LOST
            or setbacks.failed_attempts > MAX_FAILED_ATTEMPTS
            or request.num_stale >= MAX_STALE
        )

    def _check_listener(self, attachment):
        text, finished, done = "", False, False
        try:
            while messages := attachment.take():
                for message in map(pb.GenerateResponse.FromString, messages):
                    assert not done
                    text += message.delta.text
                    finished |= message.HasField("choice_finished")
                    done = message.HasField("done")
        except Rejection as rejection:
            assert rejection.failure.cause in ALLOWED_ENDS or self._has_no_budget_left(attachment.request), (
                rejection.failure
            )
            assert ANSWER.startswith(text)
        else:
            assert (text, finished, done) == (ANSWER, True, True)


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 2**32 - 1))
def test_whatever_happens_every_request_ends_and_nothing_is_held(seed):
    cluster = Cluster(seed)
    cluster.run(num_events=250)
    cluster.check_that_all_is_well_in_the_end()
