"""From drawn tokens to what a router is sent: text, stop strings, numbering and replay.

An answer keeps every token, with the text that came out with it, until the router has acknowledged it, and
can be told to send again from an index. It is made on the service loop, off the engine's thread, and knows
no engine, no lease and no stream.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine.request import Drawn, FinishReason
from headrace.v1 import inference_pb2, worker_pb2
from text.detokenizer import IncrementalDetokenizer
from text.stops import StopScanner
from text.tokenizer import Tokenizer
from worker.wire import finish_to_wire, logprobs_to_wire


@dataclass(frozen=True, slots=True)
class _Token:
    token_id: int
    text: str
    logprobs: inference_pb2.TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens of one choice that follow one another, with their text, `text_offset` code points into the choice's."""

    first_index: int
    token_ids: tuple[int, ...]
    text: str
    text_offset: int
    logprobs: tuple[inference_pb2.TokenLogprobs, ...]


class ChoiceAnswer:
    """One choice: tokens from index 0, the text shown, and how it ended."""

    def __init__(
        self,
        choice: int,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        hidden_token_ids: Collection[int],
        keeps_all: bool = False,
        keeps_behind: int = 0,
    ) -> None:
        """`hidden_token_ids` end the answer when drawn as its last, and are then not shown as text. `keeps_all`: also
        tokens that were acknowledged; `keeps_behind`: the last so many of those, until all were."""
        self.choice = choice
        self._keeps_all = keeps_all
        self._keeps_behind = keeps_behind
        self._num_chars = 0
        self.finished: inference_pb2.ChoiceFinished | None = None
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._scanner = StopScanner(stops)
        self._hidden = frozenset(hidden_token_ids)
        self._kept: list[_Token] = []  # from index _first_kept on
        self._first_kept = 0
        self._next_sent = 0
        self._finish_sent = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer so far, sent or not."""
        return self._first_kept + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Tokens kept for a replay."""
        return len(self._kept)

    def go_on_from(self, token_ids: Sequence[int], ended: bool) -> None:
        """Take the tokens of earlier attempts, which the router has, with their text: they bring the text to where it
        was, and are not sent."""
        for token_id in token_ids:
            self.feed(Drawn(token_id))
        if ended and self.finished is None:
            self._finish(FinishReason.STOP)
        self._next_sent = len(token_ids)
        self._finish_sent = ended
        if not self._keeps_all:
            self._kept.clear()
            self._first_kept = len(token_ids)

    def feed(self, drawn: Drawn) -> bool:
        """Add the next token; True where a stop string that the engine cannot see ended the answer with it.

        Tokens after the last one are dropped: the engine may be a step ahead of the text.
        """
        if self.finished:
            return False
        by_token = drawn.finish is FinishReason.STOP and drawn.token_id in self._hidden
        text = "" if by_token else self._detokenizer.feed([drawn.token_id])
        if drawn.finish:
            text += self._detokenizer.flush()
        shown, stop = self._scanner.feed(text)
        if drawn.finish and stop is None:
            shown += self._scanner.flush()
        self._num_chars += len(shown)
        self._kept.append(_Token(drawn.token_id, shown, logprobs_to_wire(drawn.logprobs)))
        if stop is not None:
            self._finish(FinishReason.STOP, stop=stop)
        elif drawn.finish:
            self._finish(drawn.finish, stop_token_id=drawn.token_id if by_token else None)
        return stop is not None and drawn.finish is None

    def _finish(self, reason: FinishReason, stop: str = "", stop_token_id: int | None = None) -> None:
        self.finished = inference_pb2.ChoiceFinished(
            choice=self.choice,
            reason=finish_to_wire(reason),
            num_tokens=self.num_tokens,
            stop=stop,
            stop_token_id=stop_token_id,
        )

    # --- sending -------------------------------------------------------------------------------

    def take(self, key: worker_pb2.RequestKey) -> worker_pb2.ChoiceOutput | None:
        """What was not sent yet, in one message; None where that is nothing."""
        tokens = self._kept[self._next_sent - self._first_kept :]
        ends = self.finished is not None and not self._finish_sent
        if not tokens and not ends:
            return None
        output = worker_pb2.ChoiceOutput(key=key)
        output.delta.choice = self.choice
        output.delta.first_index = self._next_sent
        output.delta.token_ids.extend(token.token_id for token in tokens)
        output.delta.text = "".join(token.text for token in tokens)
        output.delta.logprobs.extend(token.logprobs for token in tokens if token.logprobs is not None)
        if self.finished is not None:
            output.finished.CopyFrom(self.finished)
            self._finish_sent = True
        self._next_sent = self.num_tokens
        return output

    def since(self, index: int) -> Part | None:
        """The tokens from `index` on, sent or not; None where the first of them is not kept any more, or is not the
        next to be drawn either."""
        if not self._first_kept <= index <= self.num_tokens:
            return None
        tokens = self._kept[index - self._first_kept :]
        text = "".join(token.text for token in tokens)
        return Part(
            first_index=index,
            token_ids=tuple(token.token_id for token in tokens),
            text=text,
            text_offset=self._num_chars - len(text),
            logprobs=tuple(token.logprobs for token in tokens if token.logprobs is not None),
        )

    def acknowledge(self, next_index: int) -> None:
        """Forget tokens before `next_index`; the router has them."""
        next_index = min(next_index, self._next_sent)
        if self.finished is None or next_index < self.num_tokens:
            next_index -= self._keeps_behind
        if next_index > self._first_kept and not self._keeps_all:
            del self._kept[: next_index - self._first_kept]
            self._first_kept = next_index

    def rewind(self, next_index: int) -> bool:
        """Send again from `next_index`; False where those tokens are gone or not drawn yet."""
        if not self._first_kept <= next_index <= self.num_tokens:
            return False
        self._next_sent = next_index
        self._finish_sent = False
        return True

    @property
    def settled(self) -> bool:
        """Whether it ended and the router has acknowledged all of it."""
        return self.finished is not None and self._finish_sent and not self._kept


class Answer:
    """Every choice of one request; a `worker.link.TokenSource`."""

    def __init__(
        self,
        key: worker_pb2.RequestKey,
        tokenizer: Tokenizer,
        task: worker_pb2.GenerationTask,
        keeps_behind: int = 0,
    ) -> None:
        """`keeps_behind`: acknowledged tokens of each choice that are kept for who comes to read them here."""
        hidden = {*task.sampling.stop_token_ids, *task.eos_token_ids}
        # Of an answer that goes on, the logprobs of the known tokens are not known here.
        goes_on = any(known.token_ids for known in task.so_far)
        keeps_all = task.resumable and not (goes_on and task.sampling.HasField("logprobs"))
        self.key = key
        self.is_whole = keeps_all
        """Whether every token from the first on is kept."""
        self.choices = [
            ChoiceAnswer(choice, tokenizer, task.sampling.stop, hidden, keeps_all, keeps_behind)
            for choice in range(task.sampling.n or 1)
        ]
        for answer, known in zip(self.choices, task.so_far, strict=False):
            answer.go_on_from(known.token_ids, known.finished)

    @property
    def finished(self) -> bool:
        """Whether every choice ended."""
        return all(choice.finished for choice in self.choices)

    @property
    def num_kept(self) -> int:
        """Tokens of all choices kept for a replay."""
        return sum(choice.num_kept for choice in self.choices)

    @property
    def settled(self) -> bool:
        """Whether nothing needs to be kept for a replay."""
        return all(choice.settled for choice in self.choices)

    def take(self) -> list[worker_pb2.ChoiceOutput]:
        """What was not sent yet, at most one message a choice."""
        outputs = (choice.take(self.key) for choice in self.choices)
        return [output for output in outputs if output is not None]

    def rewind(self, next_index: Sequence[int]) -> bool:
        """Send again from an index per choice; False, where one cannot be served."""
        if len(next_index) != len(self.choices):
            return False
        pairs = zip(self.choices, next_index, strict=True)
        rewound = [choice.rewind(index) for choice, index in pairs]
        return all(rewound)
