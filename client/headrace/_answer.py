"""What an answer is made of: a pure fold of the stream's events, and the view of it that users read.

Knows no connection: the two clients feed it, events in, deltas out. A stream that broke is read again
from its first token, and what was given out before is dropped here. Asking for the tokens that are
missing would be shorter, but not right: text lags its tokens (a split character, a possible stop string),
so that no token index says how much text was seen. Characters are therefore counted, choice by choice;
and as the tokens come again too, an answer that changed in between is noticed instead of spliced.

Tokens may also come from the worker that writes the answer, beside the router's stream, which stands still meanwhile
and goes on where it stood if the worker's breaks. Who brings a token first is believed, and checked by the other.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from headrace import _convert
from headrace._errors import (
    CLIENT_STAGE,
    AnswerIncomplete,
    HeadraceError,
    InternalError,
    RequestFailed,
    Unavailable,
)
from headrace._retry import Attempts
from headrace._types import Choice, Delta, FinishReason, Timing, TokenLogprobs, Usage
from headrace.v1 import inference_pb2 as wire

_T = TypeVar("_T")


@dataclass(slots=True)
class _ChoiceFold:
    """One choice so far. `replayed_chars` is how much text this connection has brought again."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_chars: int = 0
    replayed_chars: int = 0
    finish_reason: FinishReason | None = None
    num_tokens: int = 0
    stop: str = ""
    stop_token_id: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the choice has ended and all of its tokens are here."""
        return self.finish_reason is not None and len(self.token_ids) >= self.num_tokens

    def new_text(self, delta: wire.Delta) -> str:
        """Takes text; what of it was not there yet. A worker says where in the answer it begins, a router's follows
        what came before on this connection."""
        text = delta.text
        if delta.HasField("text_offset"):
            known_chars = self.num_chars - delta.text_offset
        else:
            known_chars = self.num_chars - self.replayed_chars
            self.replayed_chars += len(text)
        new_text = text[max(0, known_chars) :]
        if new_text:
            self.texts.append(new_text)
            self.num_chars += len(new_text)
        return new_text

    def num_known(self, first_index: int, token_ids: Sequence[int]) -> int | None:
        """How many of these tokens are there already; None if those that are there differ."""
        known = self.token_ids[first_index : first_index + len(token_ids)]
        return len(known) if known == list(token_ids[: len(known)]) else None


class AnswerState:
    """Folds GenerateResponse events into an answer.

    Attributes:
        request_id, seed: what the request carries.
        resume_handle: opaque; goes with the request when it is sent again.
        prompt_tokens: None until the request was accepted.
        usage, timing: None until the answer was complete.
        done: Done has come: nothing is missing.
        ended: there is nothing more to read.
    """

    def __init__(self, request_id: str, seed: int, num_choices: int = 1) -> None:
        self.request_id = request_id
        self._num_choices = num_choices
        self._is_split = False
        self.seed = seed
        self.resume_handle = b""
        self.prompt_tokens: int | None = None
        self.usage: Usage | None = None
        self.timing: Timing | None = None
        self.done = False
        self.ended = False
        self._folds: dict[int, _ChoiceFold] = {0: _ChoiceFold()}

    @property
    def next_index(self) -> list[int]:
        """First token that is not here, per choice."""
        folds = (self._folds.get(index) for index in range(self._num_choices))
        return [len(fold.token_ids) if fold is not None else 0 for fold in folds]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing. With one stream that is so at its `done`; with two, the other may be behind."""
        if not self.done or not self._is_split:
            return self.done
        folds = [self._folds.get(index) for index in range(self._num_choices)]
        return all(fold is not None and fold.is_whole for fold in folds)

    def split(self) -> None:
        """From now on, tokens may come from a worker beside the router, or instead of it."""
        self._is_split = True

    def fold(self, event: wire.GenerateResponse | None) -> Delta | None:
        """Takes one event, or None for the end of the stream; what it adds to a choice, if anything.

        Raises:
            RequestFailed: tokens differ from those read before the stream broke.
            InternalError: tokens are missing, or the stream ended before the answer did.
        Unavailable: the streams have ended, and a worker did not send all of its part: ask again.
        """
        if event is None:
            self._end()
            return None
        match event.WhichOneof("event"):
            case "accepted":
                self.seed = event.accepted.seed
                self.prompt_tokens = event.accepted.prompt_tokens
                self.resume_handle = event.accepted.resume_handle
            case "resume_handle":
                self.resume_handle = event.resume_handle
            case "delta":
                return self._fold_delta(event.delta)
            case "choice_finished":
                self._fold_finish(event.choice_finished)
            case "done":
                self.usage = _convert.usage(event.done.usage)
                self.timing = _convert.timing(event.done.timing)
                self.done = True
        return None

    def reconnect(self) -> None:
        """The stream broke and starts again from the first token."""
        self.done = self._is_split = False
        for fold in self._folds.values():
            fold.replayed_chars = 0

    def hang_up(self) -> None:
        """Nobody reads any more: choices that have not finished count as cancelled."""
        self.ended = True
        for fold in self._folds.values():
            fold.finish_reason = fold.finish_reason or FinishReason.CANCELLED

    def choice(self, index: int) -> Choice:
        fold = self._folds[index]
        return Choice(
            index=index,
            text="".join(fold.texts),
            token_ids=tuple(fold.token_ids),
            finish_reason=fold.finish_reason,
            stop=fold.stop,
            stop_token_id=fold.stop_token_id,
            logprobs=tuple(fold.logprobs),
        )

    def choices(self) -> tuple[Choice, ...]:
        """Every choice that has begun, in order; the first always counts as begun."""
        return tuple(self.choice(index) for index in sorted(self._folds))

    def _end(self) -> None:
        if not self.done:
            raise self._defect("STREAM_INCOMPLETE", "the stream ended before the answer did")
        if not self.is_whole:
            raise Unavailable(
                "the direct stream broke behind the router's last word",
                request_id=self.request_id,
                stage=CLIENT_STAGE,
                cause="DIRECT_BROKEN",
                retryable=True,
            )
        self.ended = True

    def _fold_delta(self, delta: wire.Delta) -> Delta | None:
        fold = self._folds.setdefault(delta.choice, _ChoiceFold())
        if delta.token_ids and delta.first_index > len(fold.token_ids):
            raise self._defect(
                "TOKENS_MISSING", f"no token {len(fold.token_ids)} came for choice {delta.choice}"
            )
        num_known = fold.num_known(delta.first_index, delta.token_ids)
        if num_known is None:
            raise self._answer_changed(delta)
        fold.token_ids.extend(delta.token_ids[num_known:])
        text = fold.new_text(delta)
        token_ids = tuple(delta.token_ids[num_known:])
        logprobs = _convert.logprobs(delta.logprobs[num_known:])
        fold.logprobs.extend(logprobs)
        if not text and not token_ids:
            return None
        return Delta(
            choice=delta.choice,
            first_index=delta.first_index + num_known,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
        )

    def _fold_finish(self, finished: wire.ChoiceFinished) -> None:
        fold = self._folds.setdefault(finished.choice, _ChoiceFold())
        fold.num_tokens = finished.num_tokens
        fold.finish_reason = _convert.finish_reason(finished.reason)
        fold.stop = finished.stop
        fold.stop_token_id = finished.stop_token_id if finished.HasField("stop_token_id") else None

    def _answer_changed(self, delta: wire.Delta) -> RequestFailed:
        return RequestFailed(
            f"choice {delta.choice} was generated anew after a lost connection, and differs at token "
            f"{delta.first_index} or later from what was read before",
            request_id=self.request_id,
            stage=CLIENT_STAGE,
            cause="ANSWER_CHANGED",
        )

    def _defect(self, cause: str, message: str) -> InternalError:
        return InternalError(message, request_id=self.request_id, stage=CLIENT_STAGE, cause=cause)


class AnswerView(ABC):
    """What can be read from an answer; the two clients add how it is received."""

    def __init__(self, state: AnswerState, attempts: Attempts) -> None:
        self._state = state
        self._attempts = attempts
        self._error: HeadraceError | None = None

    def __repr__(self) -> str:
        # Neither prompt nor answer: a repr ends up in logs.
        progress = "failed" if self._error else "ended" if self._state.ended else "open"
        return f"<{type(self).__name__} {self._state.request_id} {progress}>"

    @abstractmethod
    def _complete(self) -> None:
        """Returns once everything has been read, or raises the error that prevents it."""

    @property
    def request_id(self) -> str:
        """The request's id, with which `Client.cancel` and `Client.get` find it."""
        return self._state.request_id

    @property
    def seed(self) -> int:
        """The seed in force: the same request with it gives the same answer."""
        return self._state.seed

    @property
    def partial_text(self) -> str:
        """The text of the first choice read so far. Neither waits nor raises."""
        return self._state.choice(0).text

    @property
    def text(self) -> str:
        """The text of the first choice."""
        self._complete()
        return self._state.choice(0).text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens of the first choice."""
        self._complete()
        return self._state.choice(0).token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first choice ended."""
        self._complete()
        return self._state.choice(0).finish_reason or FinishReason.UNKNOWN

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All `n` answers to the prompt, in order."""
        self._complete()
        return self._state.choices()

    @property
    def usage(self) -> Usage:
        """Tokens and bytes that the request cost."""
        self._complete()
        return self._present(self._state.usage, "usage")

    @property
    def timing(self) -> Timing:
        """Where the request's time went, in seconds."""
        self._complete()
        return self._present(self._state.timing, "timing")

    def _raise_failure(self) -> None:
        """Raises the error that ended the answer, if one did: a part must not pass for the whole."""
        if self._error is not None:
            raise self._error

    def _delay_s(self, error: HeadraceError) -> float | None:
        """Seconds until the request is sent again; None if nothing is left to read.

        Raises:
            HeadraceError: `error`, where sending again cannot help or is not allowed.
        """
        if self._state.is_whole:
            self._state.ended = True
        if self._state.ended:
            return None
        delay_s = self._attempts.delay_s(error)
        if delay_s is None:
            self._error = error
            raise error from None
        return delay_s

    def _present(self, value: _T | None, name: str) -> _T:
        if value is None:
            raise self._incomplete(f"the answer was closed before its {name} came")
        return value

    def _incomplete(self, message: str) -> AnswerIncomplete:
        return AnswerIncomplete(message, request_id=self.request_id, stage=CLIENT_STAGE, cause="NOT_READ")
