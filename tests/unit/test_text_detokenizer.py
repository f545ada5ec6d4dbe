"""Incremental detokenization: whole characters only, and together the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_tokenizers import byte_level, metaspace, sentencepiece
from text.detokenizer import IncrementalDetokenizer
from text.tokenizer import Tokenizer

pytestmark = pytest.mark.unit

_FAMILIES = {
    "byte level": byte_level(),
    "sentencepiece": sentencepiece(),
    "metaspace": metaspace(scheme="first"),
}
_TOKENIZERS = {
    name: Tokenizer(text, settings={}, eos_token_ids=[], chat_template=None)
    for name, text in _FAMILIES.items()
}
_TEXT = st.text(alphabet=st.sampled_from("the hello and\n\t 1é中🙂👩‍🚀\u0301אब"), max_size=40)


@pytest.fixture(params=_TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return _TOKENIZERS[request.param]


@settings(max_examples=150, deadline=None)
@given(text=_TEXT, name=st.sampled_from(sorted(_TOKENIZERS)))
def test_pieces_join_to_the_text_and_split_no_character(text: str, name: str) -> None:
    tokenizer = _TOKENIZERS[name]
    if name == "metaspace":
        text = text.lstrip(
            " "
        )  # Metaspace puts no space before a text that has one: that one is lost for good
    detokenizer = IncrementalDetokenizer(tokenizer, at_start=True)
    parts = [detokenizer.feed([token_id]) for token_id in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts) + detokenizer.flush() == text == tokenizer.decode(tokenizer.encode(text))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(_TOKENIZERS)))
def test_any_ids_in_any_chunks_give_what_decoding_all_of_them_gives(data: st.DataObject, name: str) -> None:
    tokenizer = _TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=30))
    cut = data.draw(st.integers(0, len(ids)))
    detokenizer = IncrementalDetokenizer(tokenizer, at_start=True)
    text = detokenizer.feed(ids[:cut]) + detokenizer.feed(ids[cut:]) + detokenizer.flush()
    assert text == tokenizer.decode(ids)


def test_a_character_appears_with_its_last_byte() -> None:
    tokenizer = _TOKENIZERS["byte level"]
    detokenizer = IncrementalDetokenizer(tokenizer)
    ids = tokenizer.encode("🙂")
    assert [detokenizer.feed([token_id]) for token_id in ids] == ["", "", "", "🙂"]


def test_an_unfinished_character_at_the_end_becomes_a_replacement_character(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.feed(tokenizer.encode("🙂")[:-1]).strip() == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_an_answer_keeps_the_space_that_separates_it_from_its_prompt() -> None:
    tokenizer = _TOKENIZERS["sentencepiece"]
    ids = tokenizer.encode("hello")
    assert IncrementalDetokenizer(tokenizer).feed(ids) == " hello"
    assert IncrementalDetokenizer(tokenizer, at_start=True).feed(ids) == "hello"


def test_control_tokens_and_ids_beyond_the_vocabulary_are_not_text(tokenizer: Tokenizer) -> None:
    control = sorted(tokenizer.control_token_ids)
    assert IncrementalDetokenizer(tokenizer).feed([*control, tokenizer.vocab_size, 10**9]) == ""


def test_bytes_that_are_no_utf8_become_replacement_characters_without_swallowing_what_follows() -> None:
    tokenizer = _TOKENIZERS["sentencepiece"]
    byte_id = tokenizer.encode("中")[1]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.feed([byte_id]) == ""
    assert detokenizer.feed(tokenizer.encode("hello")) == "\ufffd hello"
