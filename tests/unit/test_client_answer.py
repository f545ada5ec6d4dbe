"""The fold of an answer's events, whole, broken and replayed."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace import (
    Choice,
    Delta,
    FinishReason,
    InternalError,
    RequestFailed,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from headrace._answer import AnswerState
from headrace.v1 import inference_pb2 as wire

pytestmark = pytest.mark.unit


def delta(first_index: int, token_ids: list[int], text: str, choice: int = 0) -> wire.GenerateResponse:
    return wire.GenerateResponse(
        delta=wire.Delta(choice=choice, first_index=first_index, token_ids=token_ids, text=text)
    )


def finished(reason: wire.FinishReason, choice: int = 0, **facts: object) -> wire.GenerateResponse:
    return wire.GenerateResponse(choice_finished=wire.ChoiceFinished(choice=choice, reason=reason, **facts))


DONE = wire.GenerateResponse(
    done=wire.Done(usage=wire.Usage(prompt_tokens=4, completion_tokens=3), timing=wire.Timing(total_s=0.5))
)


def state() -> AnswerState:
    return AnswerState("r-1", seed=7)


def test_deltas_add_up_to_the_answer() -> None:
    answer = state()
    assert answer.fold(delta(0, [10, 11], "Hel")) == Delta(
        choice=0, first_index=0, token_ids=(10, 11), text="Hel"
    )
    assert answer.fold(delta(2, [12], "lo")) == Delta(choice=0, first_index=2, token_ids=(12,), text="lo")
    answer.fold(finished(wire.FINISH_REASON_STOP, stop="END", num_tokens=3))
    answer.fold(DONE)
    assert answer.choices() == (
        Choice(
            index=0,
            text="Hello",
            token_ids=(10, 11, 12),
            finish_reason=FinishReason.STOP,
            stop="END",
            stop_token_id=None,
            logprobs=(),
        ),
    )
    assert answer.usage == Usage(
        prompt_tokens=4,
        completion_tokens=3,
        cached_tokens=0,
        computed_tokens=0,
        transferred_tokens=0,
        kv_bytes=0,
        wire_bytes=0,
        fetched_tokens=0,
        codec="",
        codec_reason="",
    )
    assert answer.timing is not None
    assert answer.timing.total_s == 0.5


def test_choices_are_kept_apart() -> None:
    answer = state()
    answer.fold(delta(0, [1], "a", choice=0))
    answer.fold(delta(0, [2], "b", choice=1))
    answer.fold(delta(1, [3], "A", choice=0))
    answer.fold(finished(wire.FINISH_REASON_LENGTH, choice=1))
    answer.fold(finished(wire.FINISH_REASON_STOP, choice=0, stop_token_id=0))
    assert [(choice.text, choice.token_ids, choice.finish_reason) for choice in answer.choices()] == [
        ("aA", (1, 3), FinishReason.STOP),
        ("b", (2,), FinishReason.LENGTH),
    ]
    assert answer.choice(0).stop_token_id == 0


def test_accepted_tells_what_is_in_force() -> None:
    answer = state()
    accepted = wire.Accepted(request_id="r-1", prompt_tokens=12, seed=99, resume_handle=b"handle")
    assert answer.fold(wire.GenerateResponse(accepted=accepted)) is None
    assert (answer.seed, answer.prompt_tokens, answer.resume_handle) == (99, 12, b"handle")


def test_logprobs_come_one_per_token() -> None:
    answer = state()
    event = delta(0, [5, 6], "ab")
    for token_id in (5, 6):
        top = wire.TokenLogprob(token_id=token_id, logprob=-0.5)
        event.delta.logprobs.append(wire.TokenLogprobs(logprob=-0.5, top=[top]))
    folded = answer.fold(event)
    expected = tuple(TokenLogprobs(-0.5, (TokenLogprob(token_id, -0.5),)) for token_id in (5, 6))
    assert folded is not None
    assert folded.logprobs == expected
    answer.reconnect()
    assert answer.fold(event) is None
    assert answer.choice(0).logprobs == expected


def test_text_that_lags_its_tokens_comes_later() -> None:
    answer = state()
    answer.fold(delta(0, [240, 159], ""))
    last = answer.fold(delta(2, [], "🙂"))
    assert last is not None
    assert (last.text, last.token_ids) == ("🙂", ())
    assert answer.choice(0).text == "🙂"


def test_a_replay_gives_only_what_is_new() -> None:
    answer = state()
    # Two tokens seen, but the text of the first alone: the second was held back.
    answer.fold(delta(0, [1], "one "))
    answer.fold(delta(1, [2], ""))
    answer.reconnect()
    assert answer.fold(delta(0, [1, 2], "one two ")) == Delta(
        choice=0, first_index=2, token_ids=(), text="two "
    )
    assert answer.fold(delta(2, [3], "three")) == Delta(choice=0, first_index=2, token_ids=(3,), text="three")
    assert answer.choice(0).text == "one two three"


def test_a_replay_of_the_end_changes_nothing() -> None:
    answer = state()
    events = [delta(0, [1], "one"), finished(wire.FINISH_REASON_LENGTH), DONE]
    for event in events:
        answer.fold(event)
    before = answer.choices()
    answer.reconnect()
    assert [answer.fold(event) for event in events] == [None, None, None]
    assert answer.choices() == before


def test_a_replay_that_differs_is_an_error_and_not_spliced() -> None:
    answer = state()
    answer.fold(delta(0, [1, 2], "one two"))
    answer.reconnect()
    with pytest.raises(
        RequestFailed, match=r"choice 0 was generated anew .* differs at token 0 or later"
    ) as changed:
        answer.fold(delta(0, [1, 3], "one three"))
    assert (changed.value.cause, changed.value.request_id) == ("ANSWER_CHANGED", "r-1")
    assert not changed.value.retryable


def test_a_gap_in_the_tokens_is_an_error() -> None:
    answer = state()
    answer.fold(delta(0, [1], "one"))
    with pytest.raises(InternalError, match="no token 1 came for choice 0"):
        answer.fold(delta(3, [4], "four"))


def test_a_stream_that_ends_before_it_is_done_is_an_error() -> None:
    answer = state()
    answer.fold(delta(0, [1], "one"))
    with pytest.raises(InternalError, match="ended before the answer did"):
        answer.fold(None)
    answer.fold(DONE)
    answer.fold(None)
    assert answer.ended


def test_hanging_up_cancels_what_has_not_finished() -> None:
    answer = state()
    answer.fold(finished(wire.FINISH_REASON_STOP, choice=1))
    answer.hang_up()
    assert [choice.finish_reason for choice in answer.choices()] == [
        FinishReason.CANCELLED,
        FinishReason.STOP,
    ]


def test_events_and_reasons_newer_than_this_sdk_are_survived() -> None:
    answer = state()
    assert answer.fold(wire.GenerateResponse()) is None
    unknown = wire.GenerateResponse()
    unknown.choice_finished.MergeFromString(b"\x10\x63")  # reason 99
    answer.fold(unknown)
    assert answer.choice(0).finish_reason is FinishReason.UNKNOWN


@dataclass(frozen=True)
class Told:
    """An answer of one choice: the text that each token decides, possibly none."""

    pieces: list[str]

    def events(self, cuts: list[int]) -> Iterator[wire.GenerateResponse]:
        """The same answer, cut into deltas at other places."""
        edges = sorted({0, len(self.pieces), *(cut % (len(self.pieces) + 1) for cut in cuts)})
        for start, stop in itertools.pairwise(edges):
            yield delta(start, list(range(start, stop)), "".join(self.pieces[start:stop]))
        yield finished(wire.FINISH_REASON_LENGTH)
        yield DONE


@settings(deadline=None, max_examples=200)
@given(
    told=st.builds(Told, st.lists(st.text(max_size=4), max_size=12)),
    connections=st.lists(st.tuples(st.lists(st.integers(0, 12)), st.integers(0, 8)), max_size=4),
    last=st.lists(st.integers(0, 12)),
)
def test_an_answer_is_the_same_however_often_it_breaks_and_is_replayed(
    told: Told, connections: list[tuple[list[int], int]], last: list[int]
) -> None:
    answer, given_out = state(), []
    for cuts, num_events in connections:
        given_out += [
            answer.fold(event) for event, _ in zip(told.events(cuts), range(num_events), strict=False)
        ]
        answer.reconnect()
    given_out += [answer.fold(event) for event in told.events(last)]
    answer.fold(None)
    deltas = [part for part in given_out if part is not None]
    assert "".join(part.text for part in deltas) == "".join(told.pieces) == answer.choice(0).text
    tokens = [token_id for part in deltas for token_id in part.token_ids]
    assert tokens == list(range(len(told.pieces))) == list(answer.choice(0).token_ids)
