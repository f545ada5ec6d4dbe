"""The bytes that each token id stands for.

Joining pieces gives text without ever decoding a prefix twice, which is what bounds the cost of a streamed
token. Two families of decoders are known: byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece-like
ones, which write a space as "▁" and may have byte tokens and a space in front of the text (Llama 2,
Mistral).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from text.errors import TokenizerError

_SPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, slots=True)
class DecoderRules:
    """What a tokenizer.json decoder amounts to. `strips_space`: a space at the start of text is dropped."""

    byte_level: bool = False
    replaces_space: bool = False
    byte_fallback: bool = False
    strips_space: bool = False


def decoder_rules(decoder: Mapping[str, Any] | None) -> DecoderRules:
    """Read the `decoder` of a tokenizer.json. Raises TokenizerError if it is of neither family."""
    byte_level = replaces_space = byte_fallback = strips_space = False
    for part in _flattened(decoder):
        match part:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}:
                replaces_space = True
            case {"type": "Metaspace", "replacement": "▁"}:
                replaces_space = True
                scheme = part.get(
                    "prepend_scheme", "always" if part.get("add_prefix_space", True) else "never"
                )
                strips_space = scheme != "never"
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if start <= 1:
                strips_space = start == 1
            case {"type": "Fuse"}:
                pass
            case _:
                raise TokenizerError(
                    f"tokenizer.json has the decoder {part.get('type')!r}, which is not supported"
                )
    if byte_level == replaces_space:
        raise TokenizerError(
            "tokenizer.json has neither a byte-level decoder nor one that writes spaces as '▁'"
        )
    return DecoderRules(byte_level, replaces_space, byte_fallback, strips_space)


def _flattened(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [part for inner in decoder["decoders"] for part in _flattened(inner)]
    return [decoder]


def token_pieces(vocab: Mapping[str, int], added: Mapping[int, str], rules: DecoderRules) -> list[bytes]:
    """The bytes of every id; empty for ids that no token has. Added tokens stand for their own text."""
    num_ids = max([*vocab.values(), *added, -1]) + 1
    pieces = [b""] * num_ids
    for token, token_id in vocab.items():
        pieces[token_id] = _byte_level_piece(token) if rules.byte_level else _spaced_piece(token, rules)
    for token_id, token in added.items():
        pieces[token_id] = token.encode()
    return pieces


def _byte_level_piece(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[char] for char in token)
    except KeyError:  # a token that was never made of byte characters stands for itself
        return token.encode()


def _spaced_piece(token: str, rules: DecoderRules) -> bytes:
    if rules.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
        return bytes([int(match[1], 16)])
    return token.replace(_SPACE, " ").encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where visible, else the next character from 256 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in visible)
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTE_OF = _byte_characters()
