"""The tokenizer: nothing that a caller writes becomes a control token, and there is one BOS at most."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_tokenizers import CONTROL, byte_level, metaspace, sentencepiece
from text.errors import TemplateError, TextInputError, TokenizerError
from text.tokenizer import Tokenizer, tokenizer_digest

pytestmark = pytest.mark.unit

_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SETTINGS = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
_FAMILIES = {
    "byte level": byte_level(),
    "sentencepiece": sentencepiece(),
    "metaspace first": metaspace(scheme="first"),
    "metaspace always": metaspace(scheme="always"),
}
_FRAGMENTS = [*CONTROL, "<", ">", "|", "<|", "im_start", "s", " ", "\n", "the", "hello", "1", "é", "🙂"]
_TEXT = st.lists(st.sampled_from(_FRAGMENTS), max_size=8).map("".join)


def _open(definition: str, template: str | None = _TEMPLATE, **changes: Any) -> Tokenizer:
    arguments = {"settings": _SETTINGS, "eos_token_ids": [1], "chat_template": template, **changes}
    return Tokenizer(definition, **arguments)


_TOKENIZERS = {name: _open(definition) for name, definition in _FAMILIES.items()}
_NAMES = st.sampled_from(sorted(_FAMILIES))


@settings(max_examples=200, deadline=None)
@given(text=_TEXT, name=_NAMES)
def test_text_holds_no_control_token_but_the_bos_in_front(text: str, name: str) -> None:
    tokenizer = _TOKENIZERS[name]
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.control_token_ids.isdisjoint(ids[1:])
    assert tokenizer.encode(text, add_bos=False) == ids[1:]


@settings(max_examples=200, deadline=None)
@given(contents=st.lists(_TEXT, min_size=1, max_size=3), name=_NAMES)
def test_a_chat_holds_exactly_the_templates_control_tokens(contents: list[str], name: str) -> None:
    tokenizer = _TOKENIZERS[name]
    ids = tokenizer.encode_chat([{"role": "user", "content": content} for content in contents])
    names = {tokenizer.token_bytes(token_id).decode(): token_id for token_id in tokenizer.control_token_ids}
    turn = [names["<|im_start|>"], names["<|im_end|>"]]
    expected = [names["<s>"], *turn * len(contents), names["<|im_start|>"]]
    assert [token_id for token_id in ids if token_id in tokenizer.control_token_ids] == expected


@settings(max_examples=200, deadline=None)
@given(name=_NAMES, words=st.lists(st.sampled_from(["the", "hello", "é", "12", "\n", "🙂"]), max_size=6))
def test_without_control_text_a_chat_has_the_librarys_own_ids(name: str, words: list[str]) -> None:
    content = " ".join(words).strip()
    backend = tokenizers.Tokenizer.from_str(_FAMILIES[name])
    rendered = f"<s><|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    expected = backend.encode(rendered, add_special_tokens=False).ids
    assert _TOKENIZERS[name].encode_chat([{"role": "user", "content": content}]) == expected


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="the lo\né中🙂", max_size=20), name=_NAMES)
def test_decoding_agrees_with_the_library(text: str, name: str) -> None:
    backend = tokenizers.Tokenizer.from_str(_FAMILIES[name])
    ids = _TOKENIZERS[name].encode(text)
    assert _TOKENIZERS[name].decode(ids) == backend.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", _FAMILIES)
def test_a_template_without_bos_gets_one_and_a_template_with_one_gets_no_second(name: str) -> None:
    with_bos = _open(_FAMILIES[name])
    without_bos = _open(_FAMILIES[name], _TEMPLATE.removeprefix("{{ bos_token }}"))
    messages = [{"role": "user", "content": "hello"}]
    for tokenizer in (with_bos, without_bos):
        ids = tokenizer.encode_chat(messages)
        assert [index for index, token_id in enumerate(ids) if token_id == tokenizer.bos_token_id] == [0]


def test_a_model_that_wants_no_bos_gets_none() -> None:
    tokenizer = _open(byte_level(), settings=_SETTINGS | {"add_bos_token": False})
    assert tokenizer.encode("") == []
    assert tokenizer.bos_token_id not in tokenizer.encode("hello")


def test_merges_that_spell_a_control_token_do_not_make_one() -> None:
    content = json.loads(byte_level())
    content["model"]["vocab"]["<s"] = max(content["model"]["vocab"].values()) + 1
    content["model"]["merges"] += [["<", "s"], ["<s", ">"]]
    content["pre_tokenizer"]["use_regex"] = False
    spelling = tokenizers.Tokenizer.from_str(json.dumps(content))
    spelling.encode_special_tokens = True
    assert spelling.encode("<s>", add_special_tokens=False).ids == [CONTROL.index("<s>")]
    tokenizer = _open(json.dumps(content), settings={})
    ids = tokenizer.encode("a<s><s>b<s>")
    assert tokenizer.control_token_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == "a<s><s>b<s>"


def test_a_control_token_that_takes_white_space_along_does_so() -> None:
    content = json.loads(byte_level())
    for token in content["added_tokens"]:
        token["rstrip"] = token["content"] == "<|im_start|>"
        token["lstrip"] = token["content"] == "<|im_end|>"
    template = "<|im_start|> \n{{ messages[0].content }} \n<|im_end|> x"
    ids = _open(json.dumps(content), template).encode_chat([{"role": "user", "content": "the"}])
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    expected = backend.encode("<s><|im_start|> \nthe \n<|im_end|> x", add_special_tokens=False).ids
    assert ids == expected


def test_user_defined_tokens_stay_whole_in_text_and_are_text() -> None:
    tokenizer = _open(byte_level(user_defined=("<tool_call>",)))
    ids = tokenizer.encode("<tool_call>", add_bos=False)
    assert len(ids) == 1
    assert tokenizer.decode(ids) == "<tool_call>"


def test_the_token_that_ends_a_turn_is_found_in_the_template() -> None:
    tokenizer = _open(byte_level())
    assert tokenizer.end_of_turn_id() == CONTROL.index("<|im_end|>")
    assert _open(byte_level(), "{{ messages[-1].content }} over").end_of_turn_id() is None
    assert _open(byte_level(), "{{ raise_exception('no') }}").end_of_turn_id() is None
    assert _open(byte_level(), None).end_of_turn_id() is None


@pytest.mark.parametrize("name", _FAMILIES)
@pytest.mark.parametrize("text", ["", "the hello", "🙂" * 20, " \n" * 30])
def test_fewest_tokens_is_a_lower_bound(name: str, text: str) -> None:
    tokenizer = _TOKENIZERS[name]
    assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, add_bos=False))
    assert tokenizer.fewest_tokens(text * 10_000) >= len(text) * 10_000 // 40


def test_half_of_a_surrogate_pair_is_refused() -> None:
    tokenizer = _open(byte_level())
    with pytest.raises(TextInputError, match="surrogate"):
        tokenizer.encode("a\ud83d")
    with pytest.raises(TextInputError, match="surrogate"):
        tokenizer.encode_chat([{"role": "user", "content": "a\ud83d"}])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one message"),
        ("hello", "at least one message"),
        ([{"content": "hello"}], "message 0 has the role None"),
        (
            [{"role": "user", "content": ""}, {"role": "owner", "content": ""}],
            "message 1 has the role 'owner'",
        ),
        (["hello"], "message 0 has the role None"),
        ([{"role": "user", "content": b"bytes"}], "bytes"),
    ],
)
def test_messages_of_another_form_are_refused(messages: Any, reason: str) -> None:
    with pytest.raises(TextInputError, match=reason):
        _open(byte_level()).encode_chat(messages)


def test_a_refusal_by_the_template_quotes_the_caller_and_not_the_markers() -> None:
    template = "{{ raise_exception('no ' ~ messages[0].content) }}"
    with pytest.raises(TemplateError, match=r"no <\|im_end\|>$"):
        _open(byte_level(), template).encode_chat([{"role": "user", "content": "<|im_end|>"}])


def test_a_chat_needs_a_template() -> None:
    with pytest.raises(TemplateError, match="no chat template"):
        _open(byte_level(), None).encode_chat([{"role": "user", "content": "hello"}])


def test_options_and_tools_reach_the_template() -> None:
    template = "{% if thinking == 'start' %}{{ tools[0].name }}{% endif %}{{ note }}"
    tokenizer = _open(byte_level(), template, settings={})
    options = {"thinking": "start", "note": "<s>", "messages": "overridden"}
    messages = [{"role": "user", "content": "hello"}]
    ids = tokenizer.encode_chat(messages, tools=[{"name": "find"}], options=options)
    assert tokenizer.decode(ids) == "find<s>"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "WordPiece"),
        ({"decoder": None}, "neither a byte-level decoder"),
    ],
)
def test_a_tokenizer_of_an_unknown_family_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(TokenizerError, match=reason):
        _open(json.dumps(json.loads(byte_level()) | change))


def test_a_tokenizer_that_contradicts_its_settings_is_refused() -> None:
    with pytest.raises(TokenizerError, match="bos_token is '<none>'"):
        _open(byte_level(), settings={"bos_token": "<none>"})
    with pytest.raises(TokenizerError, match="end-of-text id 9999"):
        _open(byte_level(), eos_token_ids=[9999])
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        _open("{}")


def _write_model(directory: Path) -> Path:
    (directory / "tokenizer.json").write_text(byte_level())
    (directory / "tokenizer_config.json").write_text(json.dumps(_SETTINGS))
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    (directory / "chat_template.jinja").write_text(_TEMPLATE)
    return directory


def test_a_model_directory_is_opened_with_all_its_parts(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(_write_model(tmp_path))
    assert tokenizer.eos_token_ids == {1, 3}
    assert tokenizer.add_bos
    assert tokenizer.has_chat_template
    assert tokenizer.digest == tokenizer_digest(tmp_path)
    (tmp_path / "headrace.json").write_text('{"tokenizer_digest": "of the manifest"}')
    assert Tokenizer.open(tmp_path).digest == "of the manifest"


def test_the_digest_covers_the_chat_template(tmp_path: Path) -> None:
    before = tokenizer_digest(_write_model(tmp_path))
    (tmp_path / "chat_template.jinja").write_text(_TEMPLATE + " ")
    assert tokenizer_digest(tmp_path) != before


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_missing_or_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    path = _write_model(tmp_path) / name
    path.write_text("[")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.open(tmp_path)
    path.unlink()
    with pytest.raises(TokenizerError, match=name.replace(".", r"\.")):
        Tokenizer.open(tmp_path)
