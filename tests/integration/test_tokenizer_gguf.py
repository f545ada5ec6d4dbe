"""Tokenizers rebuilt from GGUF metadata against slow ones that follow llama.cpp's rules."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.model_store.gguf_header import open_gguf
from cluster.model_store.gguf_tokenizer import TokenType, gguf_tokenizer
from cluster.model_store.pretokenizers import BPE_RULES
from tests.real_prompts import ARTICLE_1
from tests.reference_tokenizers import (
    LLAMA_CPP_RULES,
    ReferenceBpe,
    ReferenceSentencePiece,
    byte_characters,
    split_words,
)
from tests.tiny_gguf import default_metadata, write_gguf
from text.tokenizer import Tokenizer

pytestmark = pytest.mark.integration

_TRICKY = (
    "it's IT'LL 1234567 ½²٣ a\u0301 \t\n\r\n  x   \u00a0\u3000y!?$+<=>^~|`_-—“”«» 中文 かな 한글 🙂👩‍🚀 don't"
)
# Characters that this Python knows: libraries differ over later versions of Unicode.
_ASSIGNED = st.characters(exclude_categories=["Cn", "Cs"])
_TEXT = st.one_of(st.text(_ASSIGNED, max_size=40), st.text(alphabet=st.sampled_from(_TRICKY), max_size=40))


_PRE_TOKENIZERS = {name: rules.pre_tokenizer() for name, rules in BPE_RULES.items()}
_BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}


def _rebuild(path: Path, **metadata: Any) -> Tokenizer:
    changes = {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}
    source = gguf_tokenizer(open_gguf(write_gguf(path, {}, metadata=changes)))
    return Tokenizer(
        source.tokenizer_json,
        settings=source.settings,
        eos_token_ids=source.eos_token_ids,
        chat_template=source.chat_template,
    )


def test_every_supported_pre_tokenizer_has_a_reference() -> None:
    assert BPE_RULES.keys() == LLAMA_CPP_RULES.keys()


def _words(name: str, text: str) -> list[str]:
    """The words of our pre-tokenizer, as text."""
    words = _PRE_TOKENIZERS[name].pre_tokenize_str(text)
    return [bytes(_BYTE_OF[character] for character in word).decode() for word, _ in words]


@settings(max_examples=300, deadline=None)
@given(text=_TEXT, name=st.sampled_from(sorted(BPE_RULES)))
def test_words_are_those_of_llama_cpps_expressions(text: str, name: str) -> None:
    assert _words(name, text) == split_words(text, LLAMA_CPP_RULES[name])


@pytest.mark.parametrize("name", BPE_RULES)
def test_words_of_real_texts_are_those_of_llama_cpps_expressions(name: str) -> None:
    for text in [_TRICKY, *ARTICLE_1.values(), Path(__file__).read_text(encoding="utf-8")]:
        assert _words(name, text) == split_words(text, LLAMA_CPP_RULES[name])


@pytest.fixture(scope="module")
def trained() -> tuple[list[str], list[str]]:
    """Tokens and merges of a small byte-level BPE, trained greedily on a few texts."""
    metadata = default_metadata("llama")
    tokens, merges = list(metadata["tokenizer.ggml.tokens"]), list(metadata["tokenizer.ggml.merges"])
    chance, alphabet = random.Random(0), [*byte_characters()]
    common = [alphabet[byte] for byte in b"etaoin shrdlu1234\n'"]
    for _ in range(400):
        left, right = (chance.choice([*common, *tokens[-60:]]) for _ in range(2))
        if left + right not in tokens:
            tokens.append(left + right)
            merges.append(f"{left} {right}")
    return tokens, merges


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe", "default"])
def test_ids_of_a_rebuilt_vocabulary_are_those_of_the_rules(
    pre: str, trained: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    tokens, merges = trained
    types = [TokenType.CONTROL if token.startswith(("<s", "</s", "<|im_")) else 1 for token in tokens]
    tokenizer = _rebuild(tmp_path / "t.gguf", pre=pre, tokens=tokens, merges=merges, token_type=types)
    reference = ReferenceBpe(tokens, merges, LLAMA_CPP_RULES[pre])
    chance = random.Random(1)
    for _ in range(300):
        text = "".join(chance.choices("etaoin shrdlu1234\n'é中", k=30))
        ids = tokenizer.encode(text, add_bos=False)
        if not BPE_RULES[pre].ignore_merges:
            assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == text


def test_llama3_takes_a_word_that_is_a_token_whole(tmp_path: Path) -> None:
    metadata = default_metadata("llama")
    tokens = [*metadata["tokenizer.ggml.tokens"], "xyz"]
    types = [*metadata["tokenizer.ggml.token_type"], 1]
    for pre, num_tokens in (("llama-bpe", 1), ("qwen2", 3)):
        tokenizer = _rebuild(tmp_path / "t.gguf", pre=pre, tokens=tokens, token_type=types)
        assert len(tokenizer.encode("xyz", add_bos=False)) == num_tokens


def test_qwen2_composes_characters_as_its_own_tokenizer_does(tmp_path: Path) -> None:
    tokenizer = _rebuild(tmp_path / "t.gguf", pre="qwen2")
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


@pytest.mark.parametrize(("pre", "expected"), [("llama-bpe", True), ("smollm", False)])
def test_bos_without_a_flag_follows_the_pre_tokenizer(pre: str, expected: bool, tmp_path: Path) -> None:
    assert _rebuild(tmp_path / "t.gguf", pre=pre, add_bos_token=None).add_bos is expected


def test_token_types_decide_what_is_control_and_what_is_text(tmp_path: Path) -> None:
    metadata = default_metadata("llama")
    tokens = [*metadata["tokenizer.ggml.tokens"], "<tool>", "[PAD1]"]
    types = [*metadata["tokenizer.ggml.token_type"], TokenType.USER_DEFINED, TokenType.UNUSED]
    tokenizer = _rebuild(tmp_path / "t.gguf", tokens=tokens, token_type=types)
    tool = tokens.index("<tool>")
    assert tokenizer.encode("<tool>") == [tool]
    assert tool not in tokenizer.control_token_ids
    assert tokenizer.decode([tokens.index("[PAD1]")]) == ""
    assert tokenizer.control_token_ids == {
        tokens.index(name) for name in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
    }


# A SentencePiece vocabulary as converters write it: unknown, control, bytes, then pieces by falling score.
_SPM_WORDS = """
▁t he in er ▁a re on at en ▁the or es ing ▁s ▁o is it an al ▁w ▁c to ▁of ed ▁in nd ▁b ▁f st ▁and
s> <s <s> ▁▁ ▁▁▁▁ hello ▁hello llo ll lo he▁ ell
"""
_SPM_PIECES = [*_SPM_WORDS.split(), *"▁etaoinshrdlucmfwypvbgkjqxz<>/|é中"]
_SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
_SPM_TYPES = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]


def _sentencepiece(path: Path, **changes: Any) -> tuple[Tokenizer, ReferenceSentencePiece]:
    pieces = [piece for piece in dict.fromkeys(_SPM_PIECES) if piece not in _SPM_TOKENS]
    tokens, types = [*_SPM_TOKENS, *pieces], [*_SPM_TYPES, *[TokenType.NORMAL] * len(pieces)]
    scores = [0.0] * len(_SPM_TOKENS) + [-float(index) for index in range(len(pieces))]
    spm = {"model": "llama", "pre": "default", "merges": None, "tokens": tokens, "scores": scores}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": None}
    tokenizer = _rebuild(path, **{**spm, **ids, "token_type": types, **changes})
    return tokenizer, ReferenceSentencePiece(tokens, scores, [kind == TokenType.NORMAL for kind in types])


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, ReferenceSentencePiece]:
    return _sentencepiece(tmp_path_factory.mktemp("spm") / "t.gguf")


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="the indorasl<>s/ é中🙂\n", max_size=30))
def test_sentencepiece_ids_are_those_of_llama_cpps_rules(
    text: str, sentencepiece: tuple[Tokenizer, ReferenceSentencePiece]
) -> None:
    tokenizer, reference = sentencepiece
    assert tokenizer.encode(text, add_bos=False) == reference.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_models_start_with_bos_and_never_spell_one(
    sentencepiece: tuple[Tokenizer, ReferenceSentencePiece],
) -> None:
    tokenizer, _ = sentencepiece
    ids = tokenizer.encode("<s></s>")
    assert ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.control_token_ids.isdisjoint(ids[1:])
    assert tokenizer.decode(ids) == "<s></s>"


def test_a_sentencepiece_model_without_prefix_space_puts_none(tmp_path: Path) -> None:
    tokenizer, _ = _sentencepiece(tmp_path / "t.gguf", add_space_prefix=False)
    assert tokenizer.token_bytes(tokenizer.encode("the", add_bos=False)[0]) != b" the"
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


def test_the_rebuilt_definition_is_plain_json(tmp_path: Path) -> None:
    source = gguf_tokenizer(open_gguf(write_gguf(tmp_path / "t.gguf", {})))
    assert json.loads(source.tokenizer_json)["model"]["type"] == "BPE"
