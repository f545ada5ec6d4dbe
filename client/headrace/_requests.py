"""From what a caller passes to the messages of the wire.

Ranges are the router's to judge, since it knows the model: whatever a field can carry is sent. Refused
here is only what protobuf cannot carry: a wrong type, a number outside the field's width, text that is
not Unicode.
"""

import difflib
import hashlib
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypedDict

from headrace._errors import bad_argument
from headrace._types import Message
from headrace.v1 import inference_pb2 as wire

ChatTurn = Message | Mapping[str, str]


class AnswerOptions(TypedDict, total=False):
    """The keyword arguments of `generate` and `chat`. All are optional; None is the same as leaving one out.

    Logits are processed in this order: logit_bias, repetition_penalty, presence_penalty and
    frequency_penalty, min_tokens, temperature, top_k, top_p, min_p, then the draw.
    """

    max_tokens: int | None
    """Longest answer, in tokens, at least 1. Default: what the context leaves."""
    temperature: float | None
    """0 is greedy. Default 1."""
    top_k: int | None
    """Draw from the k likeliest tokens; 0, the default, is off."""
    top_p: float | None
    """Draw from the likeliest tokens that reach this probability, in (0, 1]; 1, the default, is off."""
    min_p: float | None
    """Draw from tokens at least this share as likely as the likeliest, in [0, 1]; 0, the default, is off."""
    repetition_penalty: float | None
    """Above 0; 1, the default, is off. Prompt and answer count."""
    presence_penalty: float | None
    """In [-2, 2]; 0, the default, is off. The answer counts."""
    frequency_penalty: float | None
    """In [-2, 2]; 0, the default, is off. The answer counts."""
    logit_bias: Mapping[int, float] | None
    """Token id to what is added to its logit, in [-100, 100]."""
    min_tokens: int | None
    """Tokens before an end or stop token may be drawn. Default 0."""
    seed: int | None
    """0 to 2**64 - 1. Default: derived from the request id, so that a repeat gives the same answer."""
    stop: str | Sequence[str] | None
    """Stop strings: the answer ends before one. At most 16, of at most 256 bytes each."""
    stop_token_ids: Sequence[int] | None
    """Tokens that end the answer and are not shown in its text. At most 64."""
    ignore_eos: bool | None
    """Go on past the model's end tokens. Default False."""
    logprobs: int | None
    """Log probabilities of the drawn token and this many alternatives, 0 to 20. Default: none at all."""
    n: int | None
    """Answers to the one prompt, 1 to 16. Default 1."""
    model: str | None
    """Name of the model. Default: the only one."""
    request_id: str | None
    """Unique per tenant, at most 128 characters. Default: drawn at random."""
    priority: int | None
    """A higher class is served first; at most the one that the cluster's profile lets this tenant have. Default 0."""
    resumable: bool | None
    """Let the request go on for a grace when the connection is lost. Default False."""
    timeout_s: float | None
    """Seconds for the whole answer, repeats included. Default: the client's."""


_SCALARS = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "seed",
    "ignore_eos",
    "logprobs",
    "n",
)


def generate_request(prompt: str | Sequence[int], options: AnswerOptions) -> wire.GenerateRequest:
    """The request for a prompt of text or token ids. Its `timeout_s` is left to the connection.

    Raises:
        InvalidRequest: an argument cannot be sent.
        TypeError: an option that does not exist.
    """
    request = wire.GenerateRequest()
    _fill(request, options)
    with _sending("prompt"):
        if isinstance(prompt, str):
            request.text = prompt
        elif isinstance(prompt, bytes | bytearray):
            raise TypeError("it is bytes; decode it to text first")
        else:
            # An empty list is a prompt too, which the router refuses by name.
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(prompt)
    return request


def chat_request(messages: Iterable[ChatTurn], options: AnswerOptions) -> wire.ChatRequest:
    """The request for a conversation. Raises as `generate_request`."""
    request = wire.ChatRequest()
    _fill(request, options)
    request.messages.extend(_chat_messages(messages))
    return request


def tokenize_request(text_or_messages: str | Iterable[ChatTurn], model: str | None) -> wire.TokenizeRequest:
    """The request for the token ids of a text or a conversation. Raises as `generate_request`."""
    request = wire.TokenizeRequest()
    with _sending("model"):
        request.model = model or ""
    if isinstance(text_or_messages, str):
        with _sending("text"):
            request.text = text_or_messages
    else:
        request.chat.SetInParent()
        request.chat.messages.extend(_chat_messages(text_or_messages))
    return request


def cancel_request(request_id: str) -> wire.CancelRequest:
    with _sending("request_id"):
        return wire.CancelRequest(request_id=request_id)


def get_request(request_id: str) -> wire.GetRequest:
    with _sending("request_id"):
        return wire.GetRequest(request_id=request_id)


def _fill(request: wire.GenerateRequest | wire.ChatRequest, options: AnswerOptions) -> None:
    _require_known(options)
    with _sending("request_id"):
        # With an id of its own every request can be sent again without being answered twice.
        request.request_id = options.get("request_id") or uuid.uuid4().hex
    with _sending("model"):
        request.model = options.get("model") or ""
    with _sending("priority"):
        request.priority = options.get("priority") or 0
    with _sending("resumable"):
        request.resumable = options.get("resumable") or False
    _fill_sampling(request.sampling, options)
    if not request.sampling.HasField("seed"):
        request.sampling.seed = _seed_of(request.request_id)


def _fill_sampling(sampling: wire.SamplingParams, options: AnswerOptions) -> None:
    values: Mapping[str, object] = options
    for name in _SCALARS:
        if (value := values.get(name)) is not None:
            with _sending(f"{name}={value!r}"):
                setattr(sampling, name, value)
    if (stop := options.get("stop")) is not None:
        with _sending("stop"):
            sampling.stop.extend((stop,) if isinstance(stop, str) else stop)
    if (stop_token_ids := options.get("stop_token_ids")) is not None:
        with _sending("stop_token_ids"):
            sampling.stop_token_ids.extend(stop_token_ids)
    if (logit_bias := options.get("logit_bias")) is not None:
        with _sending("logit_bias"):
            sampling.logit_bias.update(logit_bias)


def _seed_of(request_id: str) -> int:
    """A seed that a repeat of the request finds again, at another router or in another process too."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "little")


def _require_known(options: AnswerOptions) -> None:
    known = AnswerOptions.__annotations__
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"unexpected keyword argument {name!r}{hint}")


def _chat_messages(turns: Iterable[ChatTurn]) -> list[wire.ChatMessage]:
    if isinstance(turns, str | bytes | Mapping | Message):
        raise bad_argument(f"messages must be a list of messages, got one {type(turns).__name__}")
    return [_chat_message(turn, f"messages[{index}]") for index, turn in enumerate(turns)]


def _chat_message(turn: ChatTurn, place: str) -> wire.ChatMessage:
    if isinstance(turn, Message):
        turn = {"role": turn.role, "content": turn.content}
    if not isinstance(turn, Mapping) or set(turn) != {"role", "content"}:
        found = ", ".join(map(repr, turn)) if isinstance(turn, Mapping) else f"a {type(turn).__name__}"
        raise bad_argument(f"{place} must have the keys 'role' and 'content' and no other, got {found}")
    with _sending(f"{place}['role']"):
        message = wire.ChatMessage(role=turn["role"])
    with _sending(f"{place}['content']"):
        message.content = turn["content"]
    return message


@contextmanager
def _sending(name: str) -> Iterator[None]:
    """Turns protobuf's refusal of a value into an error that names the argument."""
    try:
        yield
    except UnicodeEncodeError as wrong:
        surrogate = ord(wrong.object[wrong.start])
        raise bad_argument(
            f"{name} is not valid Unicode text: lone surrogate U+{surrogate:04X} at character {wrong.start}"
        ) from None
    except (TypeError, ValueError) as wrong:
        raise bad_argument(f"{name} cannot be sent: {wrong}") from None
