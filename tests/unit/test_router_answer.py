"""Answers as they grow, and their readers."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.v1 import inference_pb2 as pb
from router.core.answer import Answer, Arrival, Reader

pytestmark = pytest.mark.unit


def delta(first_index, token_ids, text="", choice=0, logprobs=()):
    return pb.Delta(choice=choice, first_index=first_index, token_ids=token_ids, text=text, logprobs=logprobs)


def read_all(reader, max_bytes=1 << 20):
    messages = []
    while batch := reader.read(max_bytes):
        messages += map(pb.GenerateResponse.FromString, batch)
    return messages


def tokens_and_text(messages, choice=0):
    deltas = [m.delta for m in messages if m.HasField("delta") and m.delta.choice == choice]
    return [t for d in deltas for t in d.token_ids], "".join(d.text for d in deltas)


def text_of(token_ids):
    return "".join(chr(97 + token_id) for token_id in token_ids)


def test_tokens_are_kept_once_and_in_order():
    answer = Answer(1)
    choice = answer.choices[0]
    assert choice.add(delta(0, [1, 2], "ab")) is Arrival.NEW
    assert choice.add(delta(0, [1, 2], "ab")) is Arrival.REPEATED
    assert choice.add(delta(1, [2], "b")) is Arrival.REPEATED
    assert choice.add(delta(3, [9], "x")) is Arrival.MISALIGNED
    assert choice.add(delta(2, [3], "c")) is Arrival.NEW
    assert list(choice.tokens) == [1, 2, 3]
    assert tokens_and_text(read_all(Reader(answer, 0))) == ([1, 2, 3], "abc")


def test_a_delta_that_is_known_in_part_is_not_cut():
    choice = Answer(1).choices[0]
    choice.add(delta(0, [1, 2], "ab"))
    assert choice.add(delta(1, [2, 3], "bc")) is Arrival.MISALIGNED
    assert list(choice.tokens) == [1, 2]


def test_text_alone_comes_once_with_the_end():
    choice = Answer(1).choices[0]
    choice.add(delta(0, [1], "a"))
    assert choice.add(delta(1, [])) is Arrival.REPEATED
    assert choice.add(delta(1, [], "held back")) is Arrival.NEW
    assert choice.finish(pb.ChoiceFinished(num_tokens=1, reason=pb.FINISH_REASON_STOP))
    assert not choice.finish(pb.ChoiceFinished(num_tokens=1, reason=pb.FINISH_REASON_LENGTH))
    assert choice.add(delta(1, [2], "late")) is Arrival.REPEATED
    assert choice.finished.reason == pb.FINISH_REASON_STOP


def test_an_end_that_comes_before_its_tokens_is_not_taken():
    choice = Answer(1).choices[0]
    assert not choice.finish(pb.ChoiceFinished(num_tokens=1))
    choice.add(delta(0, [1]))
    assert choice.finish(pb.ChoiceFinished(num_tokens=1))


def test_a_reader_that_starts_inside_a_segment_gets_its_text_whole():
    answer = Answer(1)
    answer.choices[0].add(delta(0, [1, 2], "ab"))
    answer.choices[0].add(delta(2, [3, 4, 5], "cde"))
    assert tokens_and_text(read_all(Reader(answer, 2))) == ([3, 4, 5], "cde")
    assert tokens_and_text(read_all(Reader(answer, 3))) == ([4, 5], "cde")
    assert tokens_and_text(read_all(Reader(answer, 5))) == ([], "")


def test_a_reader_that_is_ahead_of_the_answer_waits_for_what_it_lacks():
    answer = Answer(1)
    reader = Reader(answer, 3)
    answer.choices[0].add(delta(0, [1, 2], "ab"))
    assert read_all(reader) == []
    assert reader.lag_bytes == 0
    answer.choices[0].add(delta(2, [3], "c"))
    answer.choices[0].add(delta(3, [4], "d"))
    assert tokens_and_text(read_all(reader)) == ([4], "d")


def test_logprobs_stay_beside_their_tokens():
    answer = Answer(1)
    entries = [pb.TokenLogprobs(logprob=-float(i)) for i in range(3)]
    answer.choices[0].add(delta(0, [1, 2], logprobs=entries[:2]))
    answer.choices[0].add(delta(2, [3], logprobs=entries[2:]))
    (message,) = read_all(Reader(answer, 1))
    assert [entry.logprob for entry in message.delta.logprobs] == [-1.0, -2.0]


def test_messages_are_bounded_and_choices_take_turns():
    answer = Answer(2)
    for index in range(100):
        answer.choices[0].add(delta(index, [index], "x" * 50))
    answer.choices[1].add(delta(0, [7], "y", choice=1))
    messages = read_all(Reader(answer, 0), max_bytes=500)
    assert max(message.ByteSize() for message in messages) < 1000
    assert [message.delta.choice for message in messages[:3]] == [0, 1, 0]


def say(answer, sent, choice, tokens):
    if answer.choices[choice].add(delta(tokens.start, tokens, text_of(tokens), choice)) is Arrival.NEW:
        sent[choice] = tokens.stop


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_reader_ends_with_the_same_answer(seed):
    chance = random.Random(seed)
    lengths = [chance.randint(0, 20) for _ in range(chance.randint(1, 3))]
    answer, sent = Answer(len(lengths)), [0] * len(lengths)
    readers = [(0, Reader(answer, 0), [])]
    for _ in range(40):
        choice = chance.randrange(len(lengths))
        if chance.random() < 0.2:
            start = chance.randint(0, max(sent) + 2)
            readers.append((start, Reader(answer, start), []))
        # Replays and losses make a delta begin anywhere.
        first = min(lengths[choice], max(0, sent[choice] + chance.randint(-3, 2)))
        say(answer, sent, choice, range(first, chance.randint(first, lengths[choice])))
        for _, reader, messages in readers:
            if chance.random() < 0.5:
                messages += map(pb.GenerateResponse.FromString, reader.read(chance.randint(1, 400)))
    for choice, length in enumerate(lengths):
        say(answer, sent, choice, range(sent[choice], length))
        answer.choices[choice].finish(pb.ChoiceFinished(choice=choice, num_tokens=length))
    readers.append((0, Reader(answer, 0), []))
    for start, reader, messages in readers:
        messages += read_all(reader)
        assert not reader.has_more
        assert reader.lag_bytes == 0
        for choice, length in enumerate(lengths):
            tokens, text = tokens_and_text(messages, choice)
            assert tokens == list(range(start, length))
            assert text.endswith(text_of(tokens))
            assert start > 0 or text == text_of(tokens)
        ends = [m.choice_finished.choice for m in messages if m.HasField("choice_finished")]
        assert sorted(ends) == list(range(len(lengths)))
