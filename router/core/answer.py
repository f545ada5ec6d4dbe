"""An answer as it grows, and how far each reader of it has come.

Tokens of each choice are numbered from 0 and kept once, however many clients read them. A worker's delta is
a *segment*: its text belongs to all of its tokens together, since text may lag the tokens. A reader that
starts inside a segment gets the tokens from there on and the whole text. Readers hold positions, not copies,
so what has piled up for a slow one goes out as one message.

Knows no streams and no clock.
"""

from array import array
from enum import StrEnum

from headrace.v1 import inference_pb2 as pb

BYTES_PER_TOKEN = 4
SEGMENT_BYTES = 64  # what a segment costs beside its text


class Arrival(StrEnum):
    """What an incoming delta turned out to be."""

    NEW = "NEW"
    REPEATED = "REPEATED"  # all of it is here already
    MISALIGNED = "MISALIGNED"  # it begins elsewhere than where what is here ends: nothing of it was taken


class ChoiceAnswer:
    """One choice: its tokens, the text of its segments and the memory that each takes, about, and how it ended."""

    __slots__ = (
        "finished", "logprobs", "num_bytes", "segment_bytes", "segment_ends", "segment_texts", "tokens",
    )  # fmt: skip

    def __init__(self) -> None:
        self.tokens = array("I")
        self.segment_ends = array("I")
        self.segment_bytes = array("Q")
        self.segment_texts: list[str] = []
        self.logprobs: list[pb.TokenLogprobs] = []
        self.finished: pb.ChoiceFinished | None = None
        self.num_bytes = 0

    def add(self, delta: pb.Delta) -> Arrival:
        """Takes a delta that follows what is here.

        One that begins before that and ends after it is not taken in part: its text cannot be cut.
        """
        held, first_index, token_ids, text = len(self.tokens), delta.first_index, delta.token_ids, delta.text
        num_new = len(token_ids)
        end = first_index + num_new
        if self.finished is not None or (end <= held and first_index < held):
            return Arrival.REPEATED
        if first_index != held:
            return Arrival.MISALIGNED
        if not num_new and not text:
            return Arrival.REPEATED
        num_bytes = SEGMENT_BYTES + BYTES_PER_TOKEN * num_new + len(text.encode())
        if delta.logprobs:
            self.logprobs.extend(delta.logprobs)
            num_bytes += sum(entry.ByteSize() for entry in delta.logprobs)
        self.tokens.extend(token_ids)
        self.segment_ends.append(end)
        self.segment_bytes.append(num_bytes)
        self.segment_texts.append(text)
        self.num_bytes += num_bytes
        return Arrival.NEW

    def finish(self, finished: pb.ChoiceFinished) -> bool:
        """Takes the end of the choice; False if it had ended, or tokens before the end are missing."""
        if self.finished is not None or finished.num_tokens > len(self.tokens):
            return False
        self.finished = finished
        return True

    def segment_start(self, segment: int) -> int:
        """Index of a segment's first token."""
        return self.segment_ends[segment - 1] if segment else 0


class Answer:
    """All choices of one request."""

    __slots__ = ("choices",)

    def __init__(self, num_choices: int) -> None:
        self.choices = [ChoiceAnswer() for _ in range(num_choices)]

    @property
    def num_bytes(self) -> int:
        """Memory held, about."""
        choices = self.choices
        return choices[0].num_bytes if len(choices) == 1 else sum(choice.num_bytes for choice in choices)

    @property
    def num_tokens(self) -> list[int]:
        """Tokens held of each choice."""
        return [len(choice.tokens) for choice in self.choices]

    @property
    def is_complete(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finished is not None for choice in self.choices)


class Reader:
    """How far one client has come with an answer, from `next_index` of every choice on."""

    __slots__ = ("_answer", "_finish_read", "_next_segment", "_next_token", "_read_bytes", "_turn")

    def __init__(self, answer: Answer, next_index: int) -> None:
        num_choices = len(answer.choices)
        self._answer = answer
        self._next_token = [next_index] * num_choices
        self._next_segment = [0] * num_choices
        self._finish_read = [False] * num_choices
        self._read_bytes = 0
        self._turn = 0

    @property
    def lag_bytes(self) -> int:
        """How much of the answer is here that was not read."""
        return self._answer.num_bytes - self._read_bytes

    @property
    def total_bytes(self) -> int:
        """How much of the answer is here."""
        return self._answer.num_bytes

    @property
    def has_more(self) -> bool:
        """Whether `read` would give anything now."""
        return any(self._has_more(choice) for choice in range(len(self._next_token)))

    def read(self, max_bytes: int) -> list[pb.GenerateResponse]:
        """What is new of the next choice that has news: one delta of about `max_bytes` at most, and the end.

        Choices take turns, so that a long one does not hold back the others.
        """
        num_choices = len(self._next_token)
        for offset in range(num_choices):
            choice = (self._turn + offset) % num_choices
            events = self._read_choice(choice, max_bytes)
            if events:
                self._turn = choice + 1
                return events
        return []

    def _has_more(self, choice: int) -> bool:
        answer = self._answer.choices[choice]
        ended = answer.finished is not None and not self._finish_read[choice]
        return ended or self._next_segment[choice] < len(answer.segment_ends)

    def _read_choice(self, choice: int, max_bytes: int) -> list[pb.GenerateResponse]:
        answer = self._answer.choices[choice]
        events: list[pb.GenerateResponse] = []
        delta = self._read_delta(choice, answer, max_bytes)
        if delta is not None:
            events.append(pb.GenerateResponse(delta=delta))
        at_end = self._next_segment[choice] == len(answer.segment_ends)
        if at_end and answer.finished is not None and not self._finish_read[choice]:
            self._finish_read[choice] = True
            events.append(pb.GenerateResponse(choice_finished=answer.finished))
        return events

    def _read_delta(self, choice: int, answer: ChoiceAnswer, max_bytes: int) -> pb.Delta | None:
        first_segment, first_token = self._next_segment[choice], self._next_token[choice]
        if first_token != answer.segment_start(first_segment):
            self._skip_known(choice, answer)
            first_segment = self._next_segment[choice]
        segment, num_bytes = first_segment, 0
        while segment < len(answer.segment_ends) and (segment == first_segment or num_bytes < max_bytes):
            num_bytes += answer.segment_bytes[segment]
            segment += 1
        if segment == first_segment:
            return None
        end = answer.segment_ends[segment - 1]
        self._next_segment[choice], self._next_token[choice] = segment, end
        self._read_bytes += num_bytes
        delta = pb.Delta(
            choice=choice,
            first_index=first_token,
            token_ids=answer.tokens[first_token:end],
            text="".join(answer.segment_texts[first_segment:segment]),
        )
        if answer.logprobs:
            delta.logprobs.extend(answer.logprobs[first_token:end])
        return delta

    def _skip_known(self, choice: int, answer: ChoiceAnswer) -> None:
        """Passes over segments that the client had before it attached."""
        while (segment := self._next_segment[choice]) < len(answer.segment_ends):
            start, end = answer.segment_start(segment), answer.segment_ends[segment]
            known = self._next_token[choice]
            if end > known or (start == end == known):
                return
            self._next_segment[choice] += 1
            self._read_bytes += answer.segment_bytes[segment]
