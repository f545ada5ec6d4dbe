"""The way in: a call is checked, found to be new or known, and tokenized once.

What costs nothing is checked first. A call that names a known request attaches to it; one whose request
failed in a way that may not happen again begins it anew, with the seed it had. Prompts too long to tokenize
between two other events are tokenized on a thread; the request waits for that, not the call, so that a
client that goes away leaves a well-ordered request behind.
"""

import asyncio
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from headrace.v1 import inference_pb2 as pb
from headrace.v1 import worker_pb2
from router.book import RequestBook
from router.config import RouterConfig, Tokenizer
from router.core import admission
from router.core.admission import Limits
from router.core.answer import Answer
from router.core.failures import Code, Failure, Rejection, Stage, invalid
from router.core.fleet import WorkerRef
from router.core.lifecycle import Lifecycle, RequestState
from router.dispatcher import Dispatcher
from router.errors import defect
from router.prompts import Prompt, body_digest
from router.requests import Attachment, Request, RequestKey
from router.resume import ResumeHandles

INLINE_BYTES = 16 << 10
TOKENIZER_THREADS = 2
MAX_REASON_CHARS = 500  # errors travel in headers
SEED_BITS = 63


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A Generate or Chat call as the front door read it. `remaining_s`: until the gRPC deadline, if any."""

    tenant: str
    request_id: str
    model: str
    prompt: Prompt
    sampling: pb.SamplingParams
    timeout_s: float
    remaining_s: float | None
    resumable: bool
    next_index: int
    resume_handle: bytes
    priority: int
    wants_direct: bool = False


@dataclass(frozen=True, slots=True)
class _Origin:
    """What a new request goes on from: nothing, an earlier run here, or one at another router, whose decode worker
    may be writing the answer still."""

    seed: int
    attempt: int
    written_on: WorkerRef | None = None


class Intake:
    """Lives on the router's event loop."""

    def __init__(
        self,
        config: RouterConfig,
        limits: Limits,
        tokenizer: Tokenizer,
        book: RequestBook,
        dispatcher: Dispatcher,
        handles: ResumeHandles,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._handles = handles
        self._limits = limits
        self._tokenizer = tokenizer
        self._eos_token_ids = sorted(tokenizer.eos_token_ids)
        self._book = book
        self._dispatcher = dispatcher
        self._clock = clock
        self._is_open = True
        self._threads = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenize")
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self, call: Call) -> Attachment:
        """The call's place at its request, new or known.

        Raises:
            Rejection: the call asks for something that cannot be, or its id is taken.
        """
        self._check(call)
        key = RequestKey(call.tenant, call.request_id or secrets.token_hex(16))
        body = body_digest(self._limits.model, call.prompt, call.sampling)
        known = self._book.get(key)
        if known is not None and known.body != body:
            raise _failed(Code.ALREADY_EXISTS, "REQUEST_EXISTS", "this request_id was used with another body")
        if known is not None and not known.may_restart:
            known.resumable = known.resumable or call.resumable
            return self._book.attach(known, call.next_index, call.wants_direct)
        if not self._is_open:
            raise _failed(Code.UNAVAILABLE, "SHUTTING_DOWN", "the router is stopping", retryable=True)
        origin = self._origin(call, body, known)
        request = self._new_request(call, key, body, origin)
        self._book.begin(request)
        attachment = self._book.attach(request, call.next_index, call.wants_direct)
        self._admit(request, call, origin)
        return attachment

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt that was checked.

        Raises:
            Rejection: the tokenizer has none for it.
        """
        if prompt.num_bytes <= INLINE_BYTES:
            return self._encode(prompt)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._encode, prompt)

    async def close(self) -> None:
        """Takes nothing new and waits for what is being tokenized."""
        self._is_open = False
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._threads.shutdown(cancel_futures=True)

    def _check(self, call: Call) -> None:
        admission.check_request_id(call.request_id)
        admission.check_model(call.model, self._limits)
        admission.check_timeout(call.timeout_s)
        admission.check_sampling(call.sampling, self._limits)
        call.prompt.check(self._limits)

    def _origin(self, call: Call, body: bytes, known: Request | None) -> _Origin:
        seed = call.sampling.seed if call.sampling.HasField("seed") else secrets.randbits(SEED_BITS)
        if known is not None:
            return _Origin(known.seed, known.attempt)
        if call.resume_handle:
            handle = self._handles.read(call.resume_handle, RequestKey(call.tenant, call.request_id), body)
            written_on = WorkerRef(handle.worker_id, handle.epoch) if handle.worker_id else None
            return _Origin(handle.seed, handle.attempt, written_on)
        if call.next_index > 0 and not admission.is_repeatable(call.sampling):
            raise _failed(
                Code.NOT_FOUND,
                "REQUEST_UNKNOWN",
                f"there is no request {call.request_id!r} to attach to at index {call.next_index}; its seed "
                "is lost without a resume_handle",
            )
        return _Origin(seed, 0)

    def _new_request(self, call: Call, key: RequestKey, body: bytes, origin: _Origin) -> Request:
        now = self._clock()
        request = Request(
            key=key,
            body=body,
            seed=origin.seed,
            attempt=origin.attempt,
            deadline_s=now + self._time_allowed_s(call),
            resumable=call.resumable,
            resume_handle=b"",
            lifecycle=Lifecycle(now),
            answer=Answer(call.sampling.n or 1),
            priority=call.priority,
            arrived_s=now,
        )
        request.resume_handle = self._handles.make(request, origin.attempt + 1)
        return request

    def _time_allowed_s(self, call: Call) -> float:
        asked_s = call.timeout_s or self._config.default_timeout_s
        remaining_s = asked_s if call.remaining_s is None else call.remaining_s
        return min(asked_s, remaining_s, self._config.max_timeout_s)

    def _admit(self, request: Request, call: Call, origin: _Origin) -> None:
        if call.prompt.num_bytes <= INLINE_BYTES:
            with self._ending(request):
                self._submit(request, call, origin, self._encode(call.prompt))
            return
        task = asyncio.create_task(self._admit_long(request, call, origin))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _admit_long(self, request: Request, call: Call, origin: _Origin) -> None:
        with self._ending(request):
            self._submit(request, call, origin, await self.tokenize(call.prompt))

    def _submit(self, request: Request, call: Call, origin: _Origin, token_ids: list[int]) -> None:
        if not request.is_over:
            self._dispatcher.submit(request, self._task(request, call, token_ids), origin.written_on)

    def _encode(self, prompt: Prompt) -> list[int]:
        try:
            return prompt.encode(self._tokenizer)
        except ValueError as error:
            reason = str(error)[:MAX_REASON_CHARS]
            raise invalid("PROMPT_NOT_ENCODABLE", f"the prompt cannot be tokenized: {reason}") from None

    @contextmanager
    def _ending(self, request: Request) -> Iterator[None]:
        """Whatever goes wrong inside ends the request: its listeners wait for it, no caller does."""
        try:
            yield
        except Rejection as rejection:
            self._book.end(request, RequestState.FAILED, rejection.failure)
        except Exception as error:  # noqa: BLE001 - as above
            self._book.end(request, RequestState.FAILED, defect(error).failure)

    def _task(self, request: Request, call: Call, token_ids: list[int]) -> worker_pb2.GenerationTask:
        admission.check_prompt_length(len(token_ids), self._limits)
        return worker_pb2.GenerationTask(
            prompt_token_ids=token_ids,
            sampling=admission.complete_sampling(call.sampling, len(token_ids), self._limits, request.seed),
            eos_token_ids=self._eos_token_ids,
            fidelity=self._config.fidelity,
            resumable=request.resumable,
        )


def _failed(code: Code, cause: str, message: str, retryable: bool = False) -> Rejection:
    return Rejection(
        Failure(code=code, stage=Stage.ADMISSION, cause=cause, message=message, retryable=retryable)
    )
