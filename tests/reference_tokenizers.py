"""Slow tokenizers written from llama.cpp's rules, to compare the fast ones with, id for id.

The regular expressions are those of `llm_tokenizer_bpe` in llama-vocab.cpp, applied as `unicode_regex_split` does:
one after another, each to the pieces that the one before left, what no match covers staying a piece of its own.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import regex

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_CPP_RULES: Mapping[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "llama-bpe": (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL,),
    "llama3": (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL,),
    "llama-v3": (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL,),
    "qwen2": (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL,),
    "deepseek-r1-qwen": (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL,),
}


def split_words(text: str, rules: Sequence[str]) -> list[str]:
    """The words that byte pairs are merged within."""
    pieces = [text]
    for rule in rules:
        pieces = [part for piece in pieces for part in _split(piece, rule)]
    return pieces


def _split(piece: str, rule: str) -> list[str]:
    parts, position = [], 0
    for match in regex.finditer(rule, piece):
        parts += [piece[position : match.start()], match[0]]
        position = match.end()
    return [part for part in (*parts, piece[position:]) if part]


def byte_characters() -> list[str]:
    """GPT-2's character for each byte (`bytes_to_unicode` in its encoder.py)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) if byte in kept else chr(256 + moved.index(byte)) for byte in range(256)]


class ReferenceBpe:
    """Byte-level BPE: in each word, again and again the pair of the lowest rank, the leftmost first."""

    def __init__(self, tokens: Sequence[str], merges: Sequence[str], rules: Sequence[str]) -> None:
        self._ids = {token: index for index, token in enumerate(tokens)}
        pairs = (merge.split(" ") for merge in merges)
        self._ranks = {(left, right): rank for rank, (left, right) in enumerate(pairs)}
        self._rules = rules
        self._characters = byte_characters()

    def encode(self, text: str) -> list[int]:
        words = split_words(text, self._rules)
        symbols = [symbol for word in words for symbol in self._merge(word)]
        # A byte that the vocabulary lacks is left out, by llama.cpp as by the models' own tokenizers.
        return [self._ids[symbol] for symbol in symbols if symbol in self._ids]

    def _merge(self, word: str) -> list[str]:
        symbols = [self._characters[byte] for byte in word.encode()]
        while len(symbols) > 1:
            ranked = [
                (self._ranks[pair], index)
                for index, pair in enumerate(pairwise(symbols))
                if pair in self._ranks
            ]
            if not ranked:
                break
            _, index = min(ranked)
            symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]
        return symbols


class ReferenceSentencePiece:
    """llama.cpp's `llm_tokenizer_spm`: the pair with the best-scored result first, the leftmost of equals."""

    def __init__(self, tokens: Sequence[str], scores: Sequence[float], mergeable: Sequence[bool]) -> None:
        self._ids = {token: index for index, token in enumerate(tokens)}
        self._scores = {
            token: score for token, score, may in zip(tokens, scores, mergeable, strict=True) if may
        }

    def encode(self, text: str) -> list[int]:
        symbols = list(("▁" + text).replace(" ", "▁")) if text else []
        while True:
            joined = (symbols[index] + symbols[index + 1] for index in range(len(symbols) - 1))
            scored = [
                (-self._scores[pair], index) for index, pair in enumerate(joined) if pair in self._scores
            ]
            if not scored:
                return [token_id for symbol in symbols for token_id in self._symbol_ids(symbol)]
            _, index = min(scored)
            symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]

    def _symbol_ids(self, symbol: str) -> list[int]:
        if symbol in self._scores:
            return [self._ids[symbol]]
        return [self._ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
