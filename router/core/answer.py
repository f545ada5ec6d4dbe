"""An answer as it grows, and how far each reader of it has come.

Tokens of each choice are numbered from 0 and kept once, however many clients read them. A worker's delta is
a *segment*: its text belongs to all of its tokens together, since text may lag the tokens. A reader that
starts inside a segment gets the tokens from there on and the whole text. Readers hold positions, not copies,
so what has piled up for a slow one goes out as one message; who keeps up gets each delta as it came, and no delta is
taken apart for that.

Knows no streams and no clock.
"""

from array import array
from enum import StrEnum

from headrace.v1 import inference_pb2 as pb

BYTES_PER_TOKEN = 4
SEGMENT_BYTES = 64  # what a segment costs beside its delta
_DELTA_TAG = bytes([pb.GenerateResponse.DELTA_FIELD_NUMBER << 3 | 2])  # a field of a message's own length


class Arrival(StrEnum):
    """What an incoming delta turned out to be."""

    NEW = "NEW"
    REPEATED = "REPEATED"  # all of it is here already
    MISALIGNED = "MISALIGNED"  # it begins elsewhere than where what is here ends: nothing of it was taken


class ChoiceAnswer:
    """One choice: its tokens, the deltas that brought them, serialized, and where each ends; and its own end."""

    __slots__ = ("bytes_ends", "deltas", "finished", "segment_ends", "tokens")

    def __init__(self) -> None:
        self.tokens = array("I")
        self.segment_ends = array("I")
        self.bytes_ends = array("Q")  # memory up to each segment's end, about
        self.deltas: list[bytes] = []
        self.finished: pb.ChoiceFinished | None = None

    @property
    def num_bytes(self) -> int:
        """Memory held, about."""
        return self.bytes_ends[-1] if self.bytes_ends else 0

    def add(self, delta: pb.Delta) -> Arrival:
        """Takes a delta that follows what is here.

        One that begins before that and ends after it is not taken in part: its text cannot be cut.
        """
        held, first_index, token_ids = len(self.tokens), delta.first_index, delta.token_ids
        end = first_index + len(token_ids)
        if self.finished is not None or (end <= held and first_index < held):
            return Arrival.REPEATED
        if first_index != held:
            return Arrival.MISALIGNED
        if end == held and not delta.text:
            return Arrival.REPEATED
        data = delta.SerializeToString()
        num_bytes = SEGMENT_BYTES + BYTES_PER_TOKEN * (end - held) + len(data)
        self.bytes_ends.append(self.num_bytes + num_bytes)
        self.tokens.extend(token_ids)
        self.segment_ends.append(end)
        self.deltas.append(data)
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

    def bytes_before(self, segment: int) -> int:
        """Memory of the segments before one, about."""
        return self.bytes_ends[segment - 1] if segment else 0


class Answer:
    """All choices of one request."""

    __slots__ = ("choices",)

    def __init__(self, num_choices: int) -> None:
        self.choices = [ChoiceAnswer() for _ in range(num_choices)]

    @property
    def num_bytes(self) -> int:
        """Memory held, about."""
        return sum(choice.num_bytes for choice in self.choices)

    @property
    def num_tokens(self) -> list[int]:
        """Tokens held of each choice."""
        return [len(choice.tokens) for choice in self.choices]

    @property
    def is_complete(self) -> bool:
        """Whether every choice has ended."""
        choices = self.choices
        if len(choices) == 1:
            return choices[0].finished is not None
        return all(choice.finished is not None for choice in choices)


class Reader:
    """How far one client has come with an answer, from `next_index` of every choice on."""

    __slots__ = ("_answer", "_finish_read", "_next_segment", "_next_token", "_turn")

    def __init__(self, answer: Answer, next_index: int) -> None:
        num_choices = len(answer.choices)
        self._answer = answer
        self._next_token = [next_index] * num_choices
        self._next_segment = [0] * num_choices
        self._finish_read = [False] * num_choices
        self._turn = 0

    @property
    def lag_bytes(self) -> int:
        """How much of the answer is here that was not read."""
        return sum(
            choice.num_bytes - choice.bytes_before(segment)
            for choice, segment in zip(self._answer.choices, self._next_segment, strict=True)
        )

    @property
    def total_bytes(self) -> int:
        """How much of the answer is here."""
        return self._answer.num_bytes

    @property
    def has_more(self) -> bool:
        """Whether `read` would give anything now."""
        for choice, answer in enumerate(self._answer.choices):
            if self._next_segment[choice] < len(answer.segment_ends):
                return True
            if answer.finished is not None and not self._finish_read[choice]:
                return True
        return False

    def read(self, max_bytes: int) -> list[bytes]:
        """What is new of the next choice that has news: one delta of about `max_bytes` at most, and the end, each a
        serialized GenerateResponse.

        Choices take turns, so that a long one does not hold back the others.
        """
        num_choices = len(self._next_token)
        for offset in range(num_choices):
            choice = (self._turn + offset) % num_choices
            messages = self._read_choice(choice, max_bytes)
            if messages:
                self._turn = choice + 1
                return messages
        return []

    def _read_choice(self, choice: int, max_bytes: int) -> list[bytes]:
        answer = self._answer.choices[choice]
        delta = self._read_delta(choice, answer, max_bytes)
        messages = [] if delta is None else [_message_of(delta)]
        if answer.finished is None or self._finish_read[choice]:
            return messages
        if self._next_segment[choice] == len(answer.segment_ends):
            self._finish_read[choice] = True
            messages.append(pb.GenerateResponse(choice_finished=answer.finished).SerializeToString())
        return messages

    def _read_delta(self, choice: int, answer: ChoiceAnswer, max_bytes: int) -> bytes | None:
        first, first_token = self._next_segment[choice], self._next_token[choice]
        if first_token != answer.segment_start(first):
            self._skip_known(choice, answer)
            first = self._next_segment[choice]
        num_segments = len(answer.segment_ends)
        if first == num_segments:
            return None
        segment, limit = first + 1, answer.bytes_before(first) + max_bytes
        while segment < num_segments and answer.bytes_ends[segment - 1] < limit:
            segment += 1
        self._next_segment[choice], self._next_token[choice] = segment, answer.segment_ends[segment - 1]
        if segment == first + 1 and first_token == answer.segment_start(first):
            return answer.deltas[first]
        return _joined(answer.deltas[first:segment], first_token)

    def _skip_known(self, choice: int, answer: ChoiceAnswer) -> None:
        """Passes over segments that the client had before it attached."""
        while (segment := self._next_segment[choice]) < len(answer.segment_ends):
            start, end = answer.segment_start(segment), answer.segment_ends[segment]
            known = self._next_token[choice]
            if end > known or (start == end == known):
                return
            self._next_segment[choice] += 1


def _joined(deltas: list[bytes], first_token: int) -> bytes:
    """Several deltas as one, without the tokens before `first_token`."""
    parts = [pb.Delta.FromString(delta) for delta in deltas]
    joined = pb.Delta(
        choice=parts[0].choice, first_index=first_token, text="".join([part.text for part in parts])
    )
    for part in parts:
        joined.token_ids.extend(part.token_ids)
        joined.logprobs.extend(part.logprobs)
    num_known = first_token - parts[0].first_index
    del joined.token_ids[:num_known], joined.logprobs[:num_known]
    return joined.SerializeToString()


def _message_of(delta: bytes) -> bytes:
    """The GenerateResponse that carries a serialized delta: a protobuf message's bytes are its fields', one after the
    other (protobuf.dev/programming-guides/encoding)."""
    size, length = bytearray(), len(delta)
    while length > 0x7F:
        size.append(length & 0x7F | 0x80)
        length >>= 7
    size.append(length)
    return _DELTA_TAG + bytes(size) + delta
