"""Clients that note everything: one that reads the contract's messages itself, and the SDK's.

The SDK drops what it has seen already, which is right for its users and would hide a token that came twice. So most
requests are asked by a client that takes a message at its word: on one connection every choice's tokens must follow one
another without a gap or a repeat. It asks again under the same id, from the beginning or from where it stood.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

import grpc

from bench.chaos_load import Turn
from bench.chaos_verdict import DEADLINE_MARGIN_S, ChoiceSeen, End, Outcome
from headrace import AsyncClient, DeadlineExceeded, FinishReason, HeadraceError, RetryPolicy
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import inference_pb2_grpc

RETRY_S = 0.25
CALL_GRACE_S = 0.5
EARLY_S = 0.3
"""A deadline that is told with more than this left of it was not the request's."""
SDK_RETRIES = RetryPolicy(max_attempts=200, base_delay_s=0.2, max_delay_s=1.0)
GET_TIMEOUT_S = 5.0
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)
_OVER = (pb.REQUEST_STATE_FINISHED, pb.REQUEST_STATE_CANCELLED, pb.REQUEST_STATE_FAILED)
_REASONS: dict[FinishReason | None, int] = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.FAILED: pb.FINISH_REASON_FAILED,
}
_ERROR_KEY = "headrace-error-bin"


class Clients:
    """Asks as one tenant, by both clients. Belongs to an event loop; `close` at the end."""

    def __init__(
        self, addresses: Sequence[str], api_key: str, rng: random.Random, reading: list[StrictStream]
    ) -> None:
        """`addresses`: of the routers that they know. `reading`: where each strict stream stands while it is read."""
        self._reading = reading
        self._rng = rng
        self._metadata = (("authorization", f"Bearer {api_key}"),)
        self._channels = [
            grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            for address in rng.sample(addresses, len(addresses))
        ]
        self._stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in self._channels]
        self._sdk = AsyncClient(addresses, api_key=api_key, retry=SDK_RETRIES)

    async def ask(self, name: str, prompt: Sequence[int], turn: Turn, timeout_s: float) -> Outcome:
        """One request to its end, whatever that is. `timeout_s`: where the turn has no deadline of its own."""
        now = time.monotonic()
        outcome = Outcome(
            name=name,
            sent_s=now,
            deadline_s=now + (turn.deadline_s or timeout_s),
            choices=[ChoiceSeen() for _ in range(turn.sampling.get("n", 1))],
            expects_deadline=turn.deadline_s is not None,
        )
        if turn.by_sdk:
            await _ask_by_sdk(self._sdk, prompt, turn, outcome)
        else:
            stream = StrictStream(self._stubs, self._metadata, prompt, turn, outcome, self._rng)
            self._reading.append(stream)
            try:
                await stream.read()
            finally:
                self._reading.remove(stream)
        outcome.ended_s = time.monotonic()
        if outcome.end is End.DEADLINE:
            await asyncio.sleep(DEADLINE_MARGIN_S)
            outcome.ran_on = any([await self._runs_on(stub, name) for stub in self._stubs])
        return outcome

    async def close(self) -> None:
        """Hang up."""
        await self._sdk.close()
        for channel in self._channels:
            await channel.close()

    async def _runs_on(self, stub: Any, name: str) -> bool:
        """Whether a router has a request running, once it can be asked. One that is not there has not."""
        while True:
            try:
                known = await stub.Get(
                    pb.GetRequest(request_id=name), metadata=self._metadata, timeout=GET_TIMEOUT_S
                )
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    return False
                await asyncio.sleep(RETRY_S)
            else:
                return known.state not in _OVER


class StrictStream:
    """One request, over as many connections as it takes. Fills its outcome.

    Where a router cannot be reached, the next of `stubs` has its turn: it must take the answer over.
    """

    def __init__(
        self,
        stubs: Sequence[Any],
        metadata: tuple[tuple[str, str], ...],
        prompt: Sequence[int],
        turn: Turn,
        outcome: Outcome,
        rng: random.Random,
    ) -> None:
        self.outcome = outcome
        self._stubs = stubs
        self._metadata = metadata
        self._rng = rng
        self._request = pb.GenerateRequest(
            request_id=outcome.name,
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingParams(**turn.sampling),
            resumable=True,
        )
        self._current = 0
        self._call: Any = None
        self._leaves_for_good = False
        self._cursors: list[int] = []
        self._is_first_event = True
        self._is_done = False
        self._deadline_told = False

    @property
    def num_tokens(self) -> int:
        """So far."""
        return sum(len(choice.token_ids) for choice in self.outcome.choices)

    def leave(self, *, for_good: bool) -> None:
        """Hang up in mid-answer; the reader comes back unless it is `for_good`."""
        self._leaves_for_good = self._leaves_for_good or for_good
        if self._call is not None:
            self._call.cancel()

    async def read(self) -> None:
        """Until the answer is complete, the deadline passes, the client leaves, or nothing can help."""
        while not await self._is_over():
            next_index = min(len(choice.token_ids) for choice in self.outcome.choices)
            await self._connect(next_index if self._rng.random() < 0.5 else 0)

    async def _is_over(self) -> bool:
        outcome = self.outcome
        if outcome.cause:
            outcome.end = End.FAILED
        elif self._is_done:
            outcome.end = End.FINISHED
        elif self._leaves_for_good:
            outcome.end = End.LEFT
        elif self._deadline_told or time.monotonic() >= outcome.deadline_s:
            outcome.end, outcome.cause = End.DEADLINE, "DEADLINE_EXCEEDED"
        else:
            if outcome.num_connections:
                await asyncio.sleep(min(RETRY_S, max(0.0, outcome.deadline_s - time.monotonic())))
            return False
        return True

    async def _connect(self, next_index: int) -> None:
        outcome, request = self.outcome, self._request
        outcome.num_connections += 1
        request.next_index = next_index
        request.timeout_s = max(0.01, outcome.deadline_s - time.monotonic())
        self._cursors = [next_index] * len(outcome.choices)
        self._is_first_event = True
        for choice in outcome.choices:
            choice.text, choice.finish = (None if next_index else ""), None
        self._call = self._stubs[self._current].Generate(
            request, timeout=request.timeout_s + CALL_GRACE_S, metadata=self._metadata
        )
        try:
            async for event in self._call:
                self._take(event)
            if not self._is_done:
                outcome.cause = "BROKEN_CONTRACT: the stream ended before the answer did"
        except grpc.aio.AioRpcError as error:
            self._note(error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
        finally:
            self._call.cancel()

    def _note(self, error: grpc.aio.AioRpcError) -> None:
        """Why a connection ended; a cause where asking again would not help."""
        detail = _detail(error)
        left_s = self.outcome.deadline_s - time.monotonic()
        # A short deadline may also be refused at the door, where the cluster could not have kept it.
        is_refused = (
            detail is not None and detail.cause == "DEADLINE_TOO_SHORT" and self.outcome.expects_deadline
        )
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and (left_s < EARLY_S or is_refused):
            self._deadline_told = True
        elif detail is None:
            self._current = (self._current + 1) % len(self._stubs)
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                self.outcome.cause = f"{error.code().name}: {error.details()}"
        elif not detail.retryable:
            self.outcome.cause = f"{detail.cause} in {detail.stage}: {detail.message}"

    def _take(self, event: pb.GenerateResponse) -> None:
        kind = event.WhichOneof("event")
        if self._is_done or (kind == "accepted") != self._is_first_event:
            self.outcome.cause = f"BROKEN_CONTRACT: {kind} in the wrong place"
        self._is_first_event = False
        match kind:
            case "accepted":
                self._request.resume_handle = event.accepted.resume_handle
            case "delta":
                self._take_delta(event.delta)
            case "choice_finished":
                finished = event.choice_finished
                choice = self.outcome.choices[finished.choice]
                if choice.finish is not None or finished.num_tokens != len(choice.token_ids):
                    self.outcome.cause = f"BROKEN_CONTRACT: choice {finished.choice} finished twice or early"
                stop_token_id = finished.stop_token_id if finished.HasField("stop_token_id") else None
                choice.finish = (finished.reason, finished.stop, stop_token_id)
            case "done":
                self._is_done = all(choice.finish is not None for choice in self.outcome.choices)
                if not self._is_done:
                    self.outcome.cause = "BROKEN_CONTRACT: done with a choice that has not finished"

    def _take_delta(self, delta: pb.Delta) -> None:
        outcome, choice = self.outcome, self.outcome.choices[delta.choice]
        cursor = self._cursors[delta.choice]
        if delta.token_ids and delta.first_index != cursor:
            outcome.num_repeated += max(
                0, min(cursor, delta.first_index + len(delta.token_ids)) - delta.first_index
            )
            outcome.num_skipped += max(0, delta.first_index - cursor)
        now = time.monotonic()
        for offset, token_id in enumerate(delta.token_ids):
            index = delta.first_index + offset
            if index < len(choice.token_ids):
                outcome.num_changed += choice.token_ids[index] != token_id
            else:
                choice.token_ids.append(token_id)
                outcome.token_times.append(now)
                if delta.logprobs:
                    choice.logprobs.append(_plain(delta.logprobs[offset]))
        self._cursors[delta.choice] = max(cursor, delta.first_index + len(delta.token_ids))
        if choice.text is not None:
            choice.text += delta.text


async def _ask_by_sdk(client: AsyncClient, prompt: Sequence[int], turn: Turn, outcome: Outcome) -> None:
    answer = client.generate(
        list(prompt),
        request_id=outcome.name,
        resumable=True,
        timeout_s=outcome.deadline_s - time.monotonic(),
        **turn.sampling,
    )
    try:
        async for delta in answer.deltas():
            choice = outcome.choices[delta.choice]
            if delta.token_ids and delta.first_index != len(choice.token_ids):
                outcome.num_repeated += max(0, len(choice.token_ids) - delta.first_index)
                outcome.num_skipped += max(0, delta.first_index - len(choice.token_ids))
            choice.token_ids.extend(delta.token_ids)
            outcome.token_times.extend([time.monotonic()] * len(delta.token_ids))
            choice.text = (choice.text or "") + delta.text
            choice.logprobs.extend(
                (each.logprob, tuple((top.token_id, top.logprob) for top in each.top))
                for each in delta.logprobs
            )
    except DeadlineExceeded:
        outcome.end, outcome.cause = End.DEADLINE, "DEADLINE_EXCEEDED"
        return
    except HeadraceError as error:
        left_s = outcome.deadline_s - time.monotonic()
        is_refused = error.cause == "PREDICTED_LATE" and outcome.expects_deadline  # at the door
        is_out_of_time = error.retryable and (left_s < 2 * SDK_RETRIES.max_delay_s or is_refused)
        outcome.end = End.DEADLINE if is_out_of_time else End.FAILED
        outcome.cause = f"{error.cause}: {error.message}"
        return
    for seen, told in zip(outcome.choices, answer.choices, strict=True):
        reason = _REASONS.get(told.finish_reason, pb.FINISH_REASON_UNSPECIFIED)
        seen.finish = (reason, told.stop, told.stop_token_id)
    outcome.end = End.FINISHED


def _plain(logprobs: pb.TokenLogprobs) -> tuple[float, tuple[tuple[int, float], ...]]:
    return logprobs.logprob, tuple((top.token_id, top.logprob) for top in logprobs.top)


def _detail(error: grpc.aio.AioRpcError) -> pb.ErrorDetail | None:
    for key, value in error.trailing_metadata() or ():
        if key == _ERROR_KEY and isinstance(value, bytes):
            return pb.ErrorDetail.FromString(value)
    return None
