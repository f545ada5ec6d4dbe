"""A GGUF file's tokenizer metadata as tokenizer.json, tokenizer settings and a chat template.

Byte-level BPE ("gpt2") and SentencePiece BPE ("llama") are rebuilt; other kinds are refused by name.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from cluster.model_store.errors import DamagedSourceError, UnsupportedTokenizerError
from cluster.model_store.gguf_header import GgufFile
from cluster.model_store.pretokenizers import BPE_RULES
from cluster.model_store.source import TokenizerSource

_KINDS = ("gpt2", "llama")
# llama.cpp adds BOS for these without being told (`llm_load_vocab`): their files carry no flag.
_BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3")
_NAMED_TOKENS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
_SPACE = "▁"


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    tokens: list[str]
    types: list[int]
    scores: list[float]

    def used(self) -> dict[str, int]:
        """Id by token, without the unused ones: they pad the embedding and are never text."""
        return {t: i for i, t in enumerate(self.tokens) if self.types[i] != TokenType.UNUSED}


def gguf_tokenizer(file: GgufFile) -> TokenizerSource:
    """Rebuild the tokenizer of `file`.

    Raises UnsupportedTokenizerError (kind or pre-tokenizer) or DamagedSourceError (metadata missing or at
    odds).
    """
    keys = _Keys(file)
    kind = keys.get("model")
    if kind not in _KINDS:
        raise UnsupportedTokenizerError(
            f"{file.path}: tokenizer.ggml.model is {kind!r}; supported are {' and '.join(map(repr, _KINDS))}"
        )
    vocabulary = _vocabulary(keys)
    tokenizer = _byte_level(keys, vocabulary) if kind == "gpt2" else _sentencepiece(keys, vocabulary)
    _add_tokens(tokenizer, vocabulary)
    template = file.metadata.get("tokenizer.chat_template")
    return TokenizerSource(
        tokenizer_json=tokenizer.to_str(pretty=False),
        settings=_settings(keys, vocabulary, kind),
        chat_template=template if isinstance(template, str) and template.strip() else None,
        eos_token_ids=keys.ids("eos_token_id", "eot_token_id", "eom_token_id"),
    )


class _Keys:
    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.path = file.path

    def get(self, key: str) -> Any:
        return self._file.metadata.get(f"tokenizer.ggml.{key}")

    def strings(self, key: str) -> list[str]:
        values = self.get(key)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self.damaged(f"tokenizer.ggml.{key} is missing or not a list of strings")
        return values

    def numbers(self, key: str, default: float, length: int) -> list[Any]:
        values = self.get(key)
        if values is None:
            return [default] * length
        if not isinstance(values, list) or len(values) != length:
            raise self.damaged(f"tokenizer.ggml.{key} does not have the {length} entries of the vocabulary")
        return values

    def ids(self, *names: str) -> tuple[int, ...]:
        """The token ids under `names` that are there, each once, in order."""
        found = [self.get(name) for name in names]
        return tuple(dict.fromkeys(token_id for token_id in found if isinstance(token_id, int)))

    def damaged(self, reason: str) -> DamagedSourceError:
        return DamagedSourceError(f"{self.path}: {reason}")


def _vocabulary(keys: _Keys) -> _Vocabulary:
    tokens = keys.strings("tokens")
    types = keys.numbers("token_type", TokenType.NORMAL, len(tokens))
    return _Vocabulary(tokens, types, keys.numbers("scores", 0.0, len(tokens)))


def _byte_level(keys: _Keys, vocabulary: _Vocabulary) -> Tokenizer:
    rules = BPE_RULES.get(keys.get("pre") or "")
    if rules is None:
        raise UnsupportedTokenizerError(
            f"{keys.path}: pre-tokenizer {keys.get('pre')!r} (tokenizer.ggml.pre) is not supported; supported"
            f" are {', '.join(BPE_RULES)}. A wrong one would give wrong ids without any error"
        )
    merges = [_split_merge(keys, merge) for merge in keys.strings("merges")]
    tokenizer = Tokenizer(_bpe(keys, vocabulary.used(), merges, ignore_merges=rules.ignore_merges))
    if rules.normalizer is not None:
        tokenizer.normalizer = rules.normalizer()
    tokenizer.pre_tokenizer = rules.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split_merge(keys: _Keys, merge: str) -> tuple[str, str]:
    left, separator, right = merge.partition(" ")
    if not separator or not left or not right or " " in right:
        raise keys.damaged(f"tokenizer.ggml.merges holds {merge!r}, which is not a pair of tokens")
    return left, right


def _bpe(keys: _Keys, vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    for left, right in merges:
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise keys.damaged(
                f"the merge of {left!r} and {right!r} names a token that is not in the vocabulary"
            )
    return models.BPE(vocab=vocab, merges=merges, **options)


def _sentencepiece(keys: _Keys, vocabulary: _Vocabulary) -> Tokenizer:
    """SentencePiece BPE: pieces carry scores, and the best-scored adjacent pair is merged first."""
    vocab = vocabulary.used()
    unknown = next(
        (t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == 2), None
    )
    merges = _merges_by_score(vocabulary)
    model = _bpe(keys, vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback="<0x00>" in vocab)
    tokenizer = Tokenizer(model)
    prefixed = keys.get("add_space_prefix") is not False
    prepend = [normalizers.Prepend(_SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_by_score(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a piece, the best-scored result first.

    Control, unknown and byte pieces are never made by merging, so plain text can never become one.
    """
    mergeable = {
        token: score
        for token, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True)
        if kind in (TokenType.NORMAL, TokenType.USER_DEFINED)
    }
    order = {token: rank for rank, token in enumerate(vocabulary.tokens)}
    merges: list[tuple[str, str]] = []
    for token in sorted(mergeable, key=lambda piece: (-mergeable[piece], order[piece])):
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [(left, right) for left, right in splits if left in mergeable and right in mergeable]
    return merges


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Control tokens as special (never matched in user text), user-defined ones as whole words of text."""
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    added = [
        AddedToken(token, special=kind in special, normalized=False)
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (*special, TokenType.USER_DEFINED)
    ]
    tokenizer.add_tokens(added)


def _settings(keys: _Keys, vocabulary: _Vocabulary, kind: str) -> dict[str, Any]:
    """tokenizer_config.json: the named tokens as text, and whether a prompt starts with BOS."""
    settings: dict[str, Any] = {}
    for name, short in _NAMED_TOKENS.items():
        token_id = keys.get(f"{name}_token_id")
        if token_id is None:
            continue
        if not isinstance(token_id, int) or not 0 <= token_id < len(vocabulary.tokens):
            raise keys.damaged(f"tokenizer.ggml.{name}_token_id is {token_id!r}, outside the vocabulary")
        settings[f"{short}_token"] = vocabulary.tokens[token_id]
    add_bos = keys.get("add_bos_token")
    if add_bos is None:
        add_bos = kind == "llama" or keys.get("pre") in _BOS_BY_DEFAULT
    settings["add_bos_token"] = bool(add_bos) and "bos_token" in settings
    return settings
