"""The pre-tokenizers that GGUF files name in `tokenizer.ggml.pre`, as `tokenizers` objects.

A wrong pre-tokenizer gives other ids, and a worse model, without any error: a name that is not listed here is
refused. The rules are those of the models' own tokenizer.json files and agree with llama.cpp's table
(`llm_tokenizer_bpe` in llama-vocab.cpp).
"""

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

# Written as alternatives in lower and upper case by llama.cpp; the originals use the inline flag.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL


@dataclass(frozen=True, slots=True)
class BpeRules:
    """How text becomes words before byte-level BPE, and whether a word that is a token skips the merges."""

    pre_tokenizer: Callable[[], PreTokenizer]
    normalizer: Callable[[], Normalizer] | None = None
    ignore_merges: bool = False


def _gpt2() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_gpt2() -> PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(pattern: str) -> Callable[[], PreTokenizer]:
    return lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _llama_cpp_default() -> PreTokenizer:
    """What llama.cpp does under the name "default": punctuation, GPT-2, runs of digits, threes of digits."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\p{P}\$\+<=>\^~\|]+"), behavior="isolated"),
            pre_tokenizers.Split(
                Regex(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
                behavior="isolated",
            ),
            pre_tokenizers.Split(Regex(r"\p{N}+"), behavior="isolated"),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_DIGITS = BpeRules(_digits_then_gpt2)
_LLAMA3_RULES = BpeRules(_split(_LLAMA3), ignore_merges=True)
_QWEN2_RULES = BpeRules(_split(_QWEN2), normalizer=normalizers.NFC)

BPE_RULES: dict[str, BpeRules] = {
    "default": BpeRules(_llama_cpp_default),
    "gpt-2": BpeRules(_gpt2),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "llama-bpe": _LLAMA3_RULES,
    "llama3": _LLAMA3_RULES,
    "llama-v3": _LLAMA3_RULES,
    "qwen2": _QWEN2_RULES,
    "deepseek-r1-qwen": _QWEN2_RULES,
}
