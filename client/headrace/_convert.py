"""From messages of the wire to the values of `_types`."""

from collections.abc import Iterable

from headrace._errors import Cancelled, HeadraceError, RequestFailed
from headrace._types import (
    FinishReason,
    Model,
    RequestInfo,
    RequestState,
    Timing,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from headrace.v1 import inference_pb2 as wire


def finish_reason(value: wire.FinishReason) -> FinishReason:
    try:
        return FinishReason(wire.FinishReason.Name(value).removeprefix("FINISH_REASON_").lower())
    except ValueError:
        return FinishReason.UNKNOWN


def request_state(value: wire.RequestState) -> RequestState:
    try:
        return RequestState(wire.RequestState.Name(value).removeprefix("REQUEST_STATE_").lower())
    except ValueError:
        return RequestState.UNKNOWN


def logprobs(messages: Iterable[wire.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(message.logprob, tuple(TokenLogprob(top.token_id, top.logprob) for top in message.top))
        for message in messages
    )


def usage(message: wire.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_tokens=message.cached_tokens,
        computed_tokens=message.computed_tokens,
        transferred_tokens=message.transferred_tokens,
        kv_bytes=message.kv_bytes,
        wire_bytes=message.wire_bytes,
        fetched_tokens=message.fetched_tokens,
        codec=message.codec,
        codec_reason=message.codec_reason,
    )


def timing(message: wire.Timing) -> Timing:
    return Timing(
        queue_s=message.queue_s,
        reserve_s=message.reserve_s,
        prefill_s=message.prefill_s,
        transfer_s=message.transfer_s,
        frame_s=message.frame_s,
        fetch_s=message.fetch_s,
        handoff_s=message.handoff_s,
        first_step_s=message.first_step_s,
        decode_s=message.decode_s,
        ttft_s=message.ttft_s,
        total_s=message.total_s,
        prefill_worker=message.prefill_worker,
        decode_worker=message.decode_worker,
        fetched_from=message.fetched_from,
        attempts=message.attempts,
        predicted_ttft_s=message.predicted_ttft_s,
    )


def model(message: wire.Model) -> Model:
    return Model(
        name=message.name,
        architecture=message.architecture,
        max_context=message.max_context,
        digest=message.digest,
    )


def request_info(message: wire.GetResponse) -> RequestInfo:
    state = request_state(message.state)
    return RequestInfo(
        request_id=message.request_id,
        state=state,
        prompt_tokens=message.prompt_tokens,
        completion_tokens=tuple(message.completion_tokens),
        error=_recorded_error(message.error, state) if message.HasField("error") else None,
    )


def error_from_detail(
    detail: wire.ErrorDetail, kind: type[HeadraceError], *, code: str = "", message: str = ""
) -> HeadraceError:
    """The error that `detail` describes; `message` is what to say where the detail says nothing."""
    return kind(
        detail.message or message,
        request_id=detail.request_id,
        stage=detail.stage,
        cause=detail.cause,
        code=code,
        retryable=detail.retryable,
        retry_after_s=detail.retry_after_s,
        attempt=detail.attempt,
    )


def _recorded_error(detail: wire.ErrorDetail, state: RequestState) -> HeadraceError:
    # A record carries no gRPC status, so the state alone tells the two kinds apart.
    return error_from_detail(detail, Cancelled if state is RequestState.CANCELLED else RequestFailed)
