"""Small tokenizers of each family, as the text of a tokenizer.json, for tests of text and of the model store."""

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

CONTROL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
_WORDS = ("th", "the", "in", "ing", "Ġt", "Ġth", "Ġthe", "Ġa", "an", "and", "Ġand")
_PIECES = (*"▁theaslo", "▁t", "▁th", "▁the", "▁a", "lo", "▁h", "▁he", "▁hel", "▁hello")


def byte_level(*, control: tuple[str, ...] = CONTROL, user_defined: tuple[str, ...] = ()) -> str:
    """GPT-2 style: control tokens from id 0, then the 256 bytes, then a few merged words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*control, *alphabet, *_WORDS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[_split(word, vocab) for word in _WORDS]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _add(tokenizer, control, user_defined)
    return str(tokenizer.to_str())


def sentencepiece(*, control: tuple[str, ...] = CONTROL) -> str:
    """Llama 2 style: byte tokens for what has no piece, "▁" for a space and one before every text."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: index for index, token in enumerate(("<unk>", *control, *bytes_, *_PIECES))}
    merges = [_split(piece, vocab) for piece in _PIECES if len(piece) > 1]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _add(tokenizer, ("<unk>", *control), ())
    return str(tokenizer.to_str())


def metaspace(*, scheme: str, control: tuple[str, ...] = CONTROL) -> str:
    """Metaspace as pre-tokenizer and decoder, prepending "first", "always" or "never"."""
    content: dict[str, Any] = json.loads(sentencepiece(control=control))
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, space, {"type": "Fuse"}]}
    return json.dumps(content | {"normalizer": None, "pre_tokenizer": space, "decoder": decoder})


def _split(word: str, vocab: dict[str, int]) -> tuple[str, str]:
    """The longest known head and a known tail that join to `word`."""
    cuts = (cut for cut in range(len(word) - 1, 0, -1) if word[:cut] in vocab and word[cut:] in vocab)
    cut = next(cuts)
    return word[:cut], word[cut:]


def _add(tokenizer: Tokenizer, control: tuple[str, ...], user_defined: tuple[str, ...]) -> None:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user_defined])
