"""What a request may ask for: every field of GenerateRequest, ChatRequest and SamplingParams is checked here.

A request that can never be served is refused before it costs anything: sizes and ranges before
tokenization, the context length after it. Knows the contract's messages and the model's limits; nothing of
queues, workers or transport. Each refusal is a `Rejection` that names the field, what was wrong and what is
allowed.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headrace.v1 import inference_pb2 as pb
from router.core.failures import Code, Failure, Rejection, Stage, invalid

MAX_REQUEST_ID_CHARS = 128
MAX_CHOICES = 16
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
CHAT_ROLES = ("system", "user", "assistant", "tool")

# No vocabulary packs text tighter than this on average, so more bytes than this can't fit, whatever they say.
MAX_BYTES_PER_TOKEN = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the served model allows. `max_context` counts prompt and answer, in tokens."""

    model: str
    max_context: int
    vocab_size: int

    @property
    def max_prompt_bytes(self) -> int:
        """The longest prompt text worth tokenizing."""
        return self.max_context * MAX_BYTES_PER_TOKEN


def check_request_id(request_id: str) -> None:
    """Refuses ids that are too long or would garble a log line."""
    if len(request_id) > MAX_REQUEST_ID_CHARS:
        raise invalid(
            "REQUEST_ID_TOO_LONG",
            f"request_id has {len(request_id)} characters; at most {MAX_REQUEST_ID_CHARS} are allowed",
        )
    if not request_id.isprintable():
        raise invalid("BAD_REQUEST_ID", "request_id holds characters that cannot be printed")


def check_model(model: str, limits: Limits) -> None:
    """Refuses any model but the one served; empty means that one."""
    if model and model != limits.model:
        raise Rejection(
            Failure(
                code=Code.NOT_FOUND,
                stage=Stage.ADMISSION,
                cause="UNKNOWN_MODEL",
                message=f"model {model[:128]!r} is not served here; {limits.model!r} is",
            )
        )


def check_timeout(timeout_s: float) -> None:
    """Refuses timeouts that are no length of time; 0 means the profile's default."""
    if not math.isfinite(timeout_s) or timeout_s < 0:
        raise invalid("BAD_TIMEOUT", f"timeout_s is {timeout_s}; it must be finite and not negative")


def check_text(text: str, limits: Limits) -> None:
    """Refuses an empty prompt and one that no tokenizer could fit into the context."""
    if not text:
        raise invalid("EMPTY_PROMPT", "prompt.text is empty; it must hold at least one character")
    _check_prompt_bytes(len(text.encode()), limits)


def check_token_ids(token_ids: Sequence[int], limits: Limits) -> None:
    """Refuses an empty, too long or out-of-vocabulary list of token ids."""
    if not token_ids:
        raise invalid("EMPTY_PROMPT", "prompt.token_ids is empty; it must hold at least one token id")
    check_prompt_length(len(token_ids), limits)
    _check_vocabulary("prompt.token_ids", token_ids, limits)


def check_messages(messages: Sequence[pb.ChatMessage], limits: Limits) -> None:
    """Refuses a conversation without messages, with unknown roles or too large for the context."""
    if not messages:
        raise invalid("EMPTY_PROMPT", "messages is empty; it must hold at least one message")
    if len(messages) > limits.max_context:
        raise invalid(
            "PROMPT_TOO_LONG",
            f"{len(messages)} messages cannot fit a context of {limits.max_context} tokens",
        )
    for index, message in enumerate(messages):
        if message.role not in CHAT_ROLES:
            raise invalid(
                "BAD_ROLE",
                f"messages[{index}].role is {message.role[:32]!r}; it must be one of {', '.join(CHAT_ROLES)}",
            )
    _check_prompt_bytes(sum(len(message.content.encode()) for message in messages), limits)


def check_prompt_length(num_tokens: int, limits: Limits) -> None:
    """Refuses a tokenized prompt that is empty or leaves no token of the context for an answer."""
    if num_tokens == 0:
        raise invalid("EMPTY_PROMPT", "the prompt has no tokens")
    if num_tokens >= limits.max_context:
        raise invalid(
            "PROMPT_TOO_LONG",
            f"the prompt has {num_tokens} tokens; at most {limits.max_context - 1} fit a context of "
            f"{limits.max_context} tokens with one token of answer",
        )


def check_sampling(sampling: pb.SamplingParams, limits: Limits) -> None:
    """Refuses sampling parameters outside the ranges that the contract documents."""
    _check_ranges(sampling)
    _check_counts(sampling)
    _check_stops(sampling, limits)
    _check_logit_bias(sampling, limits)


def complete_sampling(
    sampling: pb.SamplingParams, num_prompt_tokens: int, limits: Limits, seed: int
) -> pb.SamplingParams:
    """A copy with every default filled in, as workers expect it.

    `max_tokens` is what the context leaves, or less if asked; `seed` is used where the caller set none.

    Raises:
        Rejection: `min_tokens` is more than the answer can have.
    """
    left = limits.max_context - num_prompt_tokens
    max_tokens = min(sampling.max_tokens, left) if sampling.HasField("max_tokens") else left
    if sampling.min_tokens > max_tokens:
        raise invalid(
            "BAD_MIN_TOKENS",
            f"sampling.min_tokens is {sampling.min_tokens}; the answer can have at most {max_tokens} tokens",
        )
    complete = pb.SamplingParams(
        temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
        frequency_penalty=0.0, seed=seed,
    )  # fmt: skip
    complete.MergeFrom(sampling)
    complete.max_tokens = max_tokens
    complete.n = sampling.n or 1
    return complete


def is_repeatable(sampling: pb.SamplingParams) -> bool:
    """Whether the same request gives the same answer without knowing an earlier run's seed."""
    return sampling.HasField("seed") or (sampling.HasField("temperature") and sampling.temperature == 0)


def _check_prompt_bytes(num_bytes: int, limits: Limits) -> None:
    if num_bytes > limits.max_prompt_bytes:
        raise invalid(
            "PROMPT_TOO_LONG",
            f"the prompt has {num_bytes} bytes; at most {limits.max_prompt_bytes} can fit a context of "
            f"{limits.max_context} tokens",
        )


def _check_vocabulary(field: str, token_ids: Iterable[int], limits: Limits) -> None:
    largest = max(token_ids, default=0)
    if largest >= limits.vocab_size:
        raise invalid(
            "BAD_TOKEN_ID",
            f"{field} holds token id {largest}; ids must be below the vocabulary's size, {limits.vocab_size}",
        )


def _check_ranges(sampling: pb.SamplingParams) -> None:
    # `not (low <= x <= high)` also refuses NaN, which compares false with everything.
    if sampling.HasField("temperature") and not (0 <= sampling.temperature < math.inf):
        raise _out_of_range("temperature", sampling.temperature, "finite and at least 0")
    if sampling.HasField("top_p") and not (0 < sampling.top_p <= 1):
        raise _out_of_range("top_p", sampling.top_p, "above 0 and at most 1")
    if sampling.HasField("min_p") and not (0 <= sampling.min_p <= 1):
        raise _out_of_range("min_p", sampling.min_p, "between 0 and 1")
    if sampling.HasField("repetition_penalty") and not (0 < sampling.repetition_penalty < math.inf):
        raise _out_of_range("repetition_penalty", sampling.repetition_penalty, "finite and above 0")
    if not (-2 <= sampling.presence_penalty <= 2):
        raise _out_of_range("presence_penalty", sampling.presence_penalty, "between -2 and 2")
    if not (-2 <= sampling.frequency_penalty <= 2):
        raise _out_of_range("frequency_penalty", sampling.frequency_penalty, "between -2 and 2")


def _check_counts(sampling: pb.SamplingParams) -> None:
    if sampling.HasField("max_tokens"):
        if sampling.max_tokens < 1:
            raise _out_of_range("max_tokens", sampling.max_tokens, "at least 1")
        if sampling.min_tokens > sampling.max_tokens:
            raise _out_of_range(
                "min_tokens", sampling.min_tokens, f"at most max_tokens, {sampling.max_tokens}"
            )
    if sampling.n > MAX_CHOICES:
        raise _out_of_range("n", sampling.n, f"at most {MAX_CHOICES}")
    if sampling.HasField("logprobs") and sampling.logprobs > MAX_LOGPROBS:
        raise _out_of_range("logprobs", sampling.logprobs, f"at most {MAX_LOGPROBS}")


def _check_stops(sampling: pb.SamplingParams, limits: Limits) -> None:
    if len(sampling.stop) > MAX_STOP_STRINGS:
        raise invalid(
            "TOO_MANY_STOPS",
            f"sampling.stop holds {len(sampling.stop)} strings; at most {MAX_STOP_STRINGS} are allowed",
        )
    for index, stop in enumerate(sampling.stop):
        if not stop:
            raise invalid("BAD_STOP", f"sampling.stop[{index}] is empty; it would end every answer")
        if len(stop.encode()) > MAX_STOP_STRING_BYTES:
            raise invalid(
                "BAD_STOP",
                f"sampling.stop[{index}] has {len(stop.encode())} bytes; at most {MAX_STOP_STRING_BYTES} "
                "are allowed",
            )
    if len(sampling.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise invalid(
            "TOO_MANY_STOPS",
            f"sampling.stop_token_ids holds {len(sampling.stop_token_ids)} ids; at most {MAX_STOP_TOKEN_IDS} "
            "are allowed",
        )
    _check_vocabulary("sampling.stop_token_ids", sampling.stop_token_ids, limits)


def _check_logit_bias(sampling: pb.SamplingParams, limits: Limits) -> None:
    _check_vocabulary("sampling.logit_bias", sampling.logit_bias, limits)
    for token_id, bias in sampling.logit_bias.items():
        if not (-100 <= bias <= 100):
            raise invalid(
                "BAD_SAMPLING", f"sampling.logit_bias[{token_id}] is {bias}; it must be between -100 and 100"
            )


def _out_of_range(field: str, value: float, allowed: str) -> Rejection:
    return invalid("BAD_SAMPLING", f"sampling.{field} is {value}; it must be {allowed}")
