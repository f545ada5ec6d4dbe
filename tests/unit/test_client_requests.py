"""Arguments become messages; what protobuf cannot carry is refused by name."""

import math

import pytest

from headrace import InvalidRequest, Message
from headrace._requests import chat_request, generate_request, get_request, tokenize_request
from headrace.v1 import inference_pb2 as wire

pytestmark = pytest.mark.unit


SAMPLING = {
    "max_tokens": 64,
    "temperature": 0.5,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.3,
    "logit_bias": {7: -1.5},
    "min_tokens": 2,
    "seed": 2**64 - 1,
    "stop": ["\n", "END"],
    "stop_token_ids": [0, 2],
    "ignore_eos": True,
    "logprobs": 5,
    "n": 3,
}
ENVELOPE = {"model": "m", "request_id": "r-1", "priority": 3, "resumable": True}


def test_every_option_reaches_its_field() -> None:
    assert SAMPLING.keys() == {field.name for field in wire.SamplingParams.DESCRIPTOR.fields}
    request = generate_request("Hi", {**ENVELOPE, **SAMPLING})
    assert request == wire.GenerateRequest(text="Hi", sampling=wire.SamplingParams(**SAMPLING), **ENVELOPE)


def test_what_is_not_given_stays_unset() -> None:
    request = generate_request("Hi", {"request_id": "r-1", "temperature": None, "stop": None})
    assert [field.name for field, _ in request.sampling.ListFields()] == ["seed"]


def test_zero_is_sent_and_not_taken_for_unset() -> None:
    sampling = generate_request("Hi", {"temperature": 0, "logprobs": 0, "max_tokens": 0, "seed": 0}).sampling
    assert all(sampling.HasField(name) for name in ("temperature", "logprobs", "max_tokens", "seed"))
    assert sampling.seed == 0


def test_each_request_gets_an_id_of_its_own() -> None:
    first, second = generate_request("Hi", {}), generate_request("Hi", {})
    assert len(first.request_id) == 32
    assert first.request_id != second.request_id
    assert first.sampling.seed != second.sampling.seed


def test_the_same_id_and_arguments_make_the_same_body() -> None:
    assert generate_request("Hi", {"request_id": "r-1"}) == generate_request("Hi", {"request_id": "r-1"})


def test_one_stop_string_is_one_stop_string() -> None:
    assert list(generate_request("Hi", {"stop": "END"}).sampling.stop) == ["END"]


def test_token_ids_are_a_prompt() -> None:
    assert list(generate_request([1, 2, 3], {}).token_ids.ids) == [1, 2, 3]


@pytest.mark.parametrize(("prompt", "kind"), [("", "text"), ([], "token_ids")])
def test_an_empty_prompt_is_the_routers_to_refuse(prompt: str | list[int], kind: str) -> None:
    assert generate_request(prompt, {}).WhichOneof("prompt") == kind


def test_values_out_of_range_but_of_the_fields_width_are_the_routers_to_refuse() -> None:
    sampling = generate_request(
        "Hi", {"max_tokens": -1, "temperature": math.nan, "stop": ["x"] * 5000}
    ).sampling
    assert sampling.max_tokens == -1
    assert math.isnan(sampling.temperature)
    assert len(sampling.stop) == 5000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "top_k=-1 cannot be sent"),
        ({"max_tokens": 2**40}, "max_tokens=1099511627776 cannot be sent"),
        ({"max_tokens": "64"}, "max_tokens='64' cannot be sent"),
        ({"seed": -5}, "seed=-5 cannot be sent"),
        ({"priority": -1}, "priority cannot be sent"),
        ({"temperature": "hot"}, "temperature='hot' cannot be sent"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias cannot be sent"),
        ({"stop_token_ids": [-1]}, "stop_token_ids cannot be sent"),
        ({"stop": ["a\udfff"]}, "stop is not valid Unicode text: lone surrogate U+DFFF at character 1"),
        ({"request_id": "\ud800"}, "request_id is not valid Unicode text"),
        ({"model": "\ud800"}, "model is not valid Unicode text"),
    ],
)
def test_what_a_field_cannot_carry_is_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        generate_request("Hi", options)
    assert refused.value.message.startswith(message)
    assert (refused.value.stage, refused.value.cause) == ("client", "BAD_ARGUMENT")
    assert not refused.value.retryable


def test_a_prompt_that_is_not_unicode_is_refused_without_quoting_it() -> None:
    with pytest.raises(InvalidRequest) as refused:
        generate_request("secret \ud83d", {})
    assert refused.value.message == "prompt is not valid Unicode text: lone surrogate U+D83D at character 7"


@pytest.mark.parametrize("prompt", [b"bytes", bytearray(b"bytes"), [1, -1], ["a"], [0.5], 7])
def test_a_prompt_of_another_type_is_refused(prompt: object) -> None:
    with pytest.raises(InvalidRequest, match="prompt cannot be sent"):
        generate_request(prompt, {})


def test_an_unknown_option_names_the_nearest_one() -> None:
    with pytest.raises(TypeError, match="'max_token'; did you mean 'max_tokens'"):
        generate_request("Hi", {"max_token": 5})


def test_messages_are_dicts_or_message_objects() -> None:
    request = chat_request([{"role": "system", "content": "Be brief."}, Message("user", "Hi")], {})
    assert [(message.role, message.content) for message in request.messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
    ]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [{"role": "user"}],
            r"messages\[0\] must have the keys 'role' and 'content' and no other, got 'role'",
        ),
        ([Message("user", "Hi"), {"role": "user", "content": "Hi", "name": "A"}], r"messages\[1\] .* 'name'"),
        (["Hi"], r"messages\[0\] .* got a str"),
        ("Hi", "messages must be a list of messages, got one str"),
        ({"role": "user", "content": "Hi"}, "messages must be a list of messages, got one dict"),
        ([{"role": "user", "content": ["Hi"]}], r"messages\[0\]\['content'\] cannot be sent"),
        ([{"role": "user", "content": "\ud800"}], r"messages\[0\]\['content'\] is not valid Unicode"),
    ],
)
def test_a_malformed_message_is_refused_by_its_place(messages: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        chat_request(messages, {})


def test_tokenize_takes_text_or_a_conversation() -> None:
    assert tokenize_request("Hi", None) == wire.TokenizeRequest(text="Hi")
    chat = wire.ChatMessages(messages=[wire.ChatMessage(role="user", content="Hi")])
    assert tokenize_request([Message("user", "Hi")], "m") == wire.TokenizeRequest(model="m", chat=chat)
    assert tokenize_request([], None).WhichOneof("input") == "chat"


def test_a_request_id_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="request_id is not valid Unicode"):
        get_request("\ud800")
