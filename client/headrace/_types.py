"""The values that the SDK takes and gives. Knows no wire format."""

from dataclasses import dataclass
from enum import StrEnum

from headrace._errors import HeadraceError


class FinishReason(StrEnum):
    """Why a choice ended."""

    STOP = "stop"  # an end token, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the end of the context
    CANCELLED = "cancelled"
    FAILED = "failed"
    UNKNOWN = "unknown"  # a reason that is newer than this SDK


class RequestState(StrEnum):
    """Where a request is in its life."""

    QUEUED = "queued"
    PLACED = "placed"
    RESERVED = "reserved"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    PREEMPTED = "preempted"
    RESUMING = "resuming"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"
    UNKNOWN = "unknown"  # a state that is newer than this SDK


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `role` is one that the model's template knows, such as `user`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability, from raw logits."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of the token drawn, and of the likeliest ones: highest first, ties by lower token id."""

    logprob: float
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New tokens of one choice. The text may lag the tokens, so either may be empty.

    Attributes:
        choice: which of the `n` answers, from 0.
        first_index: index of `token_ids[0]` in that answer, from 0.
        token_ids: the new tokens.
        text: the new text; never part of a character, never past a stop string.
        logprobs: one per token where asked for, else empty.
    """

    choice: int
    first_index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of the `n` answers to a prompt.

    Attributes:
        index: which, from 0.
        text: the text read so far.
        token_ids: the tokens read so far.
        finish_reason: why it ended; None while it goes on.
        stop: the stop string that ended it; empty if none did.
        stop_token_id: the stop token that ended it; None if none did.
        logprobs: one per token where asked for, else empty.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop: str
    stop_token_id: int | None
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a request cost.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens of all choices.
        cached_tokens: prompt tokens that no worker had to compute.
        computed_tokens: prompt tokens computed by prefill.
        transferred_tokens: prompt tokens whose KV cache crossed the wire.
        kv_bytes: bytes of KV cache handed over, before compression.
        wire_bytes: bytes of KV cache sent, headers included.
        fetched_tokens: of the cached ones, those loaded from another worker or a cache tier for this request.
        codec: that most of the KV cache travelled in; empty where none did.
        codec_reason: why that one, in words and numbers.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    computed_tokens: int
    transferred_tokens: int
    kv_bytes: int
    wire_bytes: int
    fetched_tokens: int
    codec: str
    codec_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Where a request's time went, in seconds, and which workers had it.

    Attributes:
        queue_s: accepted to placed.
        reserve_s: placed to memory reserved on the decode worker.
        prefill_s: first chunk started to first token drawn.
        transfer_s: first KV byte sent to the last frame landed; overlaps prefill.
        frame_s: sum over KV frames of the time each was in flight.
        fetch_s: loading cached blocks before the first chunk.
        handoff_s: first token drawn to the decode worker's acknowledgement.
        first_step_s: that acknowledgement to the decode worker's first own token.
        decode_s: first token at the router to the last.
        ttft_s: time to first token: accepted to first token at the router.
        total_s: accepted to finished.
        prefill_worker: id of the worker that read the prompt.
        decode_worker: id of the worker that wrote the answer.
        fetched_from: where cached blocks were loaded from: a worker's address, "store", or empty.
        attempts: placements it took; more than 1 after the loss of a worker.
        predicted_ttft_s: what `ttft_s` was predicted to be when it was placed; 0 where nothing was known.
    """

    queue_s: float
    reserve_s: float
    prefill_s: float
    transfer_s: float
    frame_s: float
    fetch_s: float
    handoff_s: float
    first_step_s: float
    decode_s: float
    ttft_s: float
    total_s: float
    prefill_worker: str
    decode_worker: str
    fetched_from: str
    attempts: int
    predicted_ttft_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that the cluster serves. `max_context` is in tokens."""

    name: str
    architecture: str
    max_context: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestInfo:
    """The state of a request that is running or has finished lately.

    Attributes:
        request_id: its id.
        state: where it is in its life.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens drawn so far, one number per choice.
        error: why, where it failed or was cancelled; it is not raised.
    """

    request_id: str
    state: RequestState
    prompt_tokens: int
    completion_tokens: tuple[int, ...]
    error: HeadraceError | None
