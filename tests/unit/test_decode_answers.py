"""Tokens to text, stop strings, numbering and replay of one answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode.answers import Answer, ChoiceAnswer
from engine.request import Drawn, FinishReason, Logprobs
from headrace.v1 import inference_pb2, worker_pb2

pytestmark = pytest.mark.unit

EOS = 256
KEY = worker_pb2.RequestKey(tenant="t", request_id="r", attempt=1)


class ByteTokenizer:
    """A token is a byte; the end token is no text."""

    strips_leading_space = False

    def text_bytes(self, token_ids: Iterable[int]) -> bytes:
        return bytes(token for token in token_ids if token < 256)


def _choice(*stops: str) -> ChoiceAnswer:
    return ChoiceAnswer(0, ByteTokenizer(), stops, {EOS})  # type: ignore[arg-type]


def _draws(text: str, finish: FinishReason | None = FinishReason.LENGTH) -> list[Drawn]:
    tokens = [Drawn(byte) for byte in text.encode()]
    tokens[-1] = Drawn(tokens[-1].token_id, finish=finish)
    return tokens


def _feed(choice: ChoiceAnswer, draws: Sequence[Drawn]) -> list[bool]:
    return [choice.feed(drawn) for drawn in draws]


def _taken(choice: ChoiceAnswer) -> worker_pb2.ChoiceOutput:
    output = choice.take(KEY)
    assert output is not None
    return output


def test_the_finish_comes_with_the_last_token() -> None:
    choice = _choice()
    _feed(choice, _draws("héllo"))
    output = _taken(choice)
    assert output.delta.text == "héllo"
    assert list(output.delta.token_ids) == list("héllo".encode())
    assert output.finished.reason == inference_pb2.FINISH_REASON_LENGTH
    assert output.finished.num_tokens == 6
    assert not output.finished.HasField("stop_token_id")
    assert choice.take(KEY) is None


def test_a_character_appears_with_its_last_token() -> None:
    choice = _choice()
    texts = []
    for drawn in _draws("a€", finish=None):
        choice.feed(drawn)
        texts.append(_taken(choice).delta.text)
    assert texts == ["a", "", "", "€"]


def test_an_end_token_is_counted_and_not_shown() -> None:
    choice = _choice()
    _feed(choice, [*_draws("hi", finish=None), Drawn(EOS, finish=FinishReason.STOP)])
    output = _taken(choice)
    assert (output.delta.text, list(output.delta.token_ids)) == ("hi", [104, 105, EOS])
    assert output.finished.stop_token_id == EOS
    assert output.finished.reason == inference_pb2.FINISH_REASON_STOP


def test_a_half_character_at_the_end_is_shown_as_a_replacement() -> None:
    choice = _choice()
    _feed(choice, [Drawn(0xE2), Drawn(0x82, finish=FinishReason.LENGTH)])
    assert _taken(choice).delta.text == "�"


def test_a_stop_string_over_several_tokens_is_never_shown() -> None:
    choice = _choice("STOP")
    ended = _feed(choice, _draws("say STOP and more", finish=None))
    assert ended == [False] * 7 + [True] + [False] * 9
    output = _taken(choice)
    assert output.delta.text == "say "
    assert bytes(output.delta.token_ids) == b"say STOP"
    assert (output.finished.stop, output.finished.num_tokens) == ("STOP", 8)
    assert output.finished.reason == inference_pb2.FINISH_REASON_STOP


def test_text_that_only_began_like_a_stop_string_comes_at_the_end() -> None:
    choice = _choice("STOP")
    _feed(choice, _draws("say STO", finish=None))
    assert _taken(choice).delta.text == "say "
    choice.feed(Drawn(EOS, finish=FinishReason.STOP))
    assert _taken(choice).delta.text == "STO"


def test_a_stop_string_completed_by_the_last_token_counts_as_the_stop() -> None:
    choice = _choice("lo")
    assert _feed(choice, _draws("hello"))[-1] is False  # the engine has ended it by itself
    output = _taken(choice)
    assert (output.delta.text, output.finished.stop) == ("hel", "lo")
    assert output.finished.reason == inference_pb2.FINISH_REASON_STOP


def test_each_token_comes_with_its_logprobs() -> None:
    choice = _choice()
    choice.feed(Drawn(97, Logprobs(-0.5, ((97, -0.5), (98, -1.25)))))
    [logprobs] = _taken(choice).delta.logprobs
    assert logprobs.logprob == -0.5
    assert [(entry.token_id, entry.logprob) for entry in logprobs.top] == [(97, -0.5), (98, -1.25)]


def test_what_was_acknowledged_is_forgotten_and_cannot_be_sent_again() -> None:
    choice = _choice()
    _feed(choice, _draws("hello"))
    _taken(choice)
    choice.acknowledge(3)
    assert not choice.rewind(2)
    assert choice.rewind(3)
    again = _taken(choice)
    assert (again.delta.first_index, again.delta.text) == (3, "lo")
    assert again.finished.num_tokens == 5
    assert not choice.settled
    choice.acknowledge(5)
    assert choice.settled


def test_an_acknowledgement_of_tokens_not_sent_yet_forgets_nothing() -> None:
    choice = _choice()
    _feed(choice, _draws("hello", finish=None))
    choice.acknowledge(5)
    assert _taken(choice).delta.text == "hello"


def test_a_finish_alone_is_sent_again() -> None:
    choice = _choice()
    _feed(choice, _draws("hello"))
    _taken(choice)
    assert choice.rewind(5)
    output = _taken(choice)
    assert (output.delta.first_index, list(output.delta.token_ids)) == (5, [])
    assert output.HasField("finished")


def test_an_index_beyond_the_answer_cannot_be_served() -> None:
    choice = _choice()
    _feed(choice, _draws("hi", finish=None))
    assert not choice.rewind(3)


@given(
    text=st.text(min_size=1, max_size=30),
    rewinds=st.lists(st.tuples(st.integers(0, 120), st.integers(0, 120)), max_size=6),
)
def test_any_replay_joins_to_the_same_answer(text: str, rewinds: list[tuple[int, int]]) -> None:
    choice = _choice()
    draws = _draws(text)
    received: list[int] = []
    shown: dict[int, str] = {}
    when = dict(rewinds)
    for number, drawn in enumerate(draws):
        choice.feed(drawn)
        if number in when and when[number] <= len(received):
            assert choice.rewind(when[number])
            del received[when[number] :]
        output = _taken(choice)
        assert output.delta.first_index == len(received)
        received.extend(output.delta.token_ids)
        shown[output.delta.first_index] = output.delta.text
        shown = {index: part for index, part in shown.items() if index <= output.delta.first_index}
    assert bytes(received) == text.encode()
    assert "".join(shown[index] for index in sorted(shown)) == text


def test_choices_are_numbered_and_sent_apart() -> None:
    task = worker_pb2.GenerationTask(sampling=inference_pb2.SamplingParams(n=2, stop=["x"]))
    answer = Answer(KEY, ByteTokenizer(), task)  # type: ignore[arg-type]
    _feed(answer.choices[0], _draws("ab"))
    _feed(answer.choices[1], _draws("cx", finish=None))
    outputs = answer.take()
    assert [(o.delta.choice, o.delta.text, o.finished.stop) for o in outputs] == [
        (0, "ab", ""),
        (1, "c", "x"),
    ]
    assert answer.finished
    assert not answer.settled
    assert answer.rewind([2, 0])
    assert not answer.rewind([0])
    for choice in answer.choices:
        choice.take(KEY)
        choice.acknowledge(2)
    assert answer.settled
