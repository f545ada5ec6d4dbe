"""The public surface, and its agreement with the protos."""

import dataclasses
from enum import StrEnum
from types import ModuleType

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor

import headrace
from headrace.v1 import inference_pb2 as wire

pytestmark = pytest.mark.unit


def test_all_names_exactly_what_is_public() -> None:
    public = {
        name
        for name, value in vars(headrace).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public == set(headrace.__all__)
    assert headrace.__all__ == sorted(headrace.__all__)


def test_everything_public_is_documented() -> None:
    assert [name for name in headrace.__all__ if not getattr(headrace, name).__doc__] == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (headrace.Usage, wire.Usage.DESCRIPTOR),
        (headrace.Timing, wire.Timing.DESCRIPTOR),
        (headrace.Model, wire.Model.DESCRIPTOR),
        (headrace.RequestInfo, wire.GetResponse.DESCRIPTOR),
        (headrace.Delta, wire.Delta.DESCRIPTOR),
        (headrace.Message, wire.ChatMessage.DESCRIPTOR),
        (headrace.TokenLogprob, wire.TokenLogprob.DESCRIPTOR),
        (headrace.TokenLogprobs, wire.TokenLogprobs.DESCRIPTOR),
    ],
)
def test_a_value_has_the_fields_of_its_message(value: type, message: Descriptor) -> None:
    # Where a worker's text begins is for the SDK to put it together.
    sent = {field.name for field in message.fields} - {"text_offset"}
    assert {field.name for field in dataclasses.fields(value)} == sent


@pytest.mark.parametrize(
    ("states", "enum"),
    [
        (headrace.FinishReason, wire.FinishReason.DESCRIPTOR),
        (headrace.RequestState, wire.RequestState.DESCRIPTOR),
    ],
)
def test_an_enum_has_the_words_of_its_message(states: type[StrEnum], enum: EnumDescriptor) -> None:
    prefix = enum.values[0].name.removesuffix("UNSPECIFIED")
    words = {value.name.removeprefix(prefix) for value in enum.values[1:]}
    assert words == {state.name for state in states} - {"UNKNOWN"}


def test_the_options_are_the_fields_of_a_request() -> None:
    sampling = {field.name for field in wire.SamplingParams.DESCRIPTOR.fields}
    request = {field.name for field in wire.GenerateRequest.DESCRIPTOR.fields}
    # How an answer is attached to, and which way it comes, is the SDK's business.
    request -= {"text", "token_ids", "sampling", "next_index", "resume_handle", "direct"}
    assert set(headrace.AnswerOptions.__annotations__) == sampling | request
