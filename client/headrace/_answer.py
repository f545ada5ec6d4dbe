"""What an answer is made of: a pure fold of the stream's events, and the view of it that users read.

Knows no connection: the two clients feed it, events in, deltas out. A stream that broke is read again
from its first token, and what was given out before is dropped here. Asking for the tokens that are
missing would be shorter, but not right: text lags its tokens (a split character, a possible stop string),
so that no token index says how much text was seen. Characters are therefore counted, choice by choice;
and as the tokens come again too, an answer that changed in between is noticed instead of spliced.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from headrace import _convert
from headrace._errors import CLIENT_STAGE, AnswerIncomplete, HeadraceError, InternalError, RequestFailed
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
    stop: str = ""
    stop_token_id: int | None = None

    def new_text(self, text: str) -> str:
        """Takes text of this connection; what of it was not there yet."""
        known_chars = min(len(text), self.num_chars - self.replayed_chars)
        self.replayed_chars += len(text)
        new_text = text[known_chars:]
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

    def __init__(self, request_id: str, seed: int) -> None:
        self.request_id = request_id
        self.seed = seed
        self.resume_handle = b""
        self.prompt_tokens: int | None = None
        self.usage: Usage | None = None
        self.timing: Timing | None = None
        self.done = False
        self.ended = False
        self._folds: dict[int, _ChoiceFold] = {0: _ChoiceFold()}

    def fold(self, event: wire.GenerateResponse | None) -> Delta | None:
        """Takes one event, or None for the end of the stream; what it adds to a choice, if anything.

        Raises:
            RequestFailed: tokens differ from those read before the stream broke.
            InternalError: tokens are missing, or the stream ended before the answer did.
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
        text = fold.new_text(delta.text)
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
        if self._state.done:
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
