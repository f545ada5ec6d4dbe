"""A router by hand: speaks Worker.Session to one worker at a time and writes down what comes back."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import grpc

from headrace.v1 import inference_pb2, worker_pb2, worker_pb2_grpc
from kvtransfer.cluster_token import cluster_metadata

TIMEOUT_S = 60.0


@dataclass
class Choice:
    """What came for one choice of one request."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[inference_pb2.TokenLogprobs] = field(default_factory=list)
    finished: inference_pb2.ChoiceFinished | None = None


class SessionClient:
    """One stream to one worker. Safe to use from the test's thread while its own thread reads."""

    def __init__(self, address: str, secret: bytes, router_id: str = "router", epoch: int = 1) -> None:
        self.messages: list[worker_pb2.WorkerMessage] = []
        self.ended: grpc.StatusCode | None = None
        self._outgoing: queue.SimpleQueue[worker_pb2.RouterMessage | None] = queue.SimpleQueue()
        self._news = threading.Condition()
        self.metadata = cluster_metadata(secret)
        self._channel = grpc.insecure_channel(address)
        stub = worker_pb2_grpc.WorkerStub(self._channel)
        self._call = stub.Session(iter(self._outgoing.get, None), metadata=self.metadata)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.send(hello=worker_pb2.RouterHello(router_id=router_id, router_epoch=epoch))

    def send(self, **message: object) -> None:
        """One RouterMessage, given by its oneof's field."""
        self._outgoing.put(worker_pb2.RouterMessage(**message))

    def break_off(self) -> None:
        """Cut the stream, as a network does."""
        self._call.cancel()
        self._reader.join(TIMEOUT_S)
        self._channel.close()

    def close(self) -> None:
        """End the stream in order."""
        self._outgoing.put(None)
        self.break_off()

    def _read(self) -> None:
        try:
            for message in self._call:
                with self._news:
                    self.messages.append(message)
                    self._news.notify_all()
        except grpc.RpcError as error:
            self.ended = error.code()
        finally:
            with self._news:
                self.ended = self.ended or grpc.StatusCode.OK
                self._news.notify_all()

    # --- reading -------------------------------------------------------------------------------

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Until `condition`, looked at whenever a message came."""
        with self._news:
            arrived = self._news.wait_for(lambda: condition() or self.ended is not None, TIMEOUT_S)
        assert arrived and condition(), f"waited for {what}; ended={self.ended}; have {self.messages[-5:]}"

    def hello(self) -> worker_pb2.WorkerHello:
        self.wait(lambda: bool(self._of("hello")), "a hello")
        return self._of("hello")[0].hello

    def reserved(self, key: worker_pb2.RequestKey) -> worker_pb2.Reserved:
        self.wait(lambda: bool(self._about("reserved", key)), "a lease")
        return self._about("reserved", key)[-1]

    def prefill_finished(self, key: worker_pb2.RequestKey) -> worker_pb2.PrefillFinished:
        self.wait(lambda: bool(self._about("prefill_finished", key)), "the end of prefill")
        return self._about("prefill_finished", key)[-1]

    def failed(self, key: worker_pb2.RequestKey) -> inference_pb2.ErrorDetail:
        self.wait(lambda: bool(self._about("failed", key)), "a failure")
        return self._about("failed", key)[-1].error

    def num_failures(self, key: worker_pb2.RequestKey) -> int:
        return len(self._about("failed", key))

    def reports(self) -> list[worker_pb2.WorkerReport]:
        return [message.report for message in self._of("report")]

    def answer(self, key: worker_pb2.RequestKey, num_choices: int = 1) -> list[Choice]:
        """The whole answer, once every choice has finished."""
        self.wait(
            lambda: sum(c.finished is not None for c in self.so_far(key).values()) == num_choices, "an answer"
        )
        choices = self.so_far(key)
        return [choices[index] for index in range(num_choices)]

    def so_far(self, key: worker_pb2.RequestKey) -> dict[int, Choice]:
        """What came on this stream; asserts that token numbers have no gap and no repeat."""
        choices: dict[int, Choice] = {}
        starts: dict[int, int] = {}
        for output in self._outputs(key):
            delta = output.delta
            choice = choices.setdefault(delta.choice, Choice())
            start = starts.setdefault(delta.choice, delta.first_index)
            assert delta.first_index == start + len(choice.token_ids)
            choice.token_ids.extend(delta.token_ids)
            choice.text += delta.text
            choice.logprobs.extend(delta.logprobs)
            if output.HasField("finished"):
                choice.finished = output.finished
        return choices

    def num_tokens(self, key: worker_pb2.RequestKey) -> int:
        """Tokens that came on this stream, of all choices."""
        return sum(len(choice.token_ids) for choice in self.so_far(key).values())

    def acknowledge(self, key: worker_pb2.RequestKey, choice: int, next_index: int) -> None:
        seen = worker_pb2.TokensSeen(key=key, choice=choice, next_index=next_index)
        self.send(acknowledge=worker_pb2.AcknowledgeTokens(seen=[seen]))

    def _outputs(self, key: worker_pb2.RequestKey) -> Iterator[worker_pb2.ChoiceOutput]:
        for message in self._of("step"):
            yield from (output for output in message.step.outputs if output.key == key)

    def _about(self, kind: str, key: worker_pb2.RequestKey) -> list:
        return [getattr(m, kind) for m in self._of(kind) if getattr(m, kind).key == key]

    def _of(self, kind: str) -> list[worker_pb2.WorkerMessage]:
        return [message for message in list(self.messages) if message.WhichOneof("message") == kind]


def request_key(request_id: str, attempt: int = 1, tenant: str = "default") -> worker_pb2.RequestKey:
    return worker_pb2.RequestKey(tenant=tenant, request_id=request_id, attempt=attempt)


def task(
    prompt: Sequence[int],
    *,
    eos: Sequence[int] = (),
    max_tokens: int = 16,
    seed: int = 0,
    fidelity: str = "exact",
    **sampling: object,
) -> worker_pb2.GenerationTask:
    """A task as the router sends it, defaults filled in; greedy unless a temperature is given."""
    sampling.setdefault("temperature", 0.0)
    params = inference_pb2.SamplingParams(max_tokens=max_tokens, seed=seed, **{"n": 1, **sampling})
    return worker_pb2.GenerationTask(
        prompt_token_ids=prompt, sampling=params, eos_token_ids=eos, fidelity=fidelity
    )


def hand_over(
    prefill: SessionClient,
    decode: SessionClient,
    key: worker_pb2.RequestKey,
    work: worker_pb2.GenerationTask,
    remaining_s: float = 60.0,
    sources: Sequence[worker_pb2.CacheSource] = (),
) -> worker_pb2.Reserved:
    """Reserve on one worker, then start the prefill on the other; does not wait for more. `sources`: of cached
    blocks, beside the decode worker."""
    decode.send(reserve=worker_pb2.Reserve(key=key, task=work, remaining_s=remaining_s))
    lease = decode.reserved(key)
    prefill.send(
        start_prefill=worker_pb2.StartPrefill(
            key=key, task=work, remaining_s=remaining_s, lease=lease, sources=sources
        )
    )
    return lease


def generate_locally(
    worker: SessionClient, key: worker_pb2.RequestKey, work: worker_pb2.GenerationTask
) -> list[Choice]:
    """The same request computed by one worker alone."""
    worker.send(reserve=worker_pb2.Reserve(key=key, task=work, remaining_s=60.0, local_prefill=True))
    return worker.answer(key, work.sampling.n)
