"""A model's tokenizer: text and chats to ids, ids to text.

What a caller writes never becomes a control token, and there is never a second BOS. It wraps the `tokenizers`
package and reads a prepared model directory; it knows no torch and nothing of requests.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from text.chat import ChatTemplate, PromptPart
from text.errors import TemplateError, TextInputError, TokenizerError
from text.pieces import decoder_rules, token_pieces
from text.shield import ControlTexts

_DIGESTED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_DIGEST_BYTES = 32
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def tokenizer_digest(model_dir: Path) -> str:
    """BLAKE2b-256 (hex) of what decides how text becomes ids: tokenizer, its settings, the chat template."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for name in _DIGESTED:
        path = model_dir / name
        content = path.read_bytes() if path.is_file() else b""
        digest.update(f"{name}:{len(content)}:".encode() + content)
    return digest.hexdigest()


class Tokenizer:
    """An opened tokenizer; safe to use from several threads.

    `vocab_size` is the largest id plus one; the model's embedding may have more rows. `add_bos` says
    whether a prompt starts with `bos_token_id`. `eos_token_ids` end an answer.
    """

    def __init__(
        self,
        definition: str,
        *,
        settings: Mapping[str, Any],
        eos_token_ids: Iterable[int],
        chat_template: str | None,
        digest: str = "",
    ) -> None:
        """Raises TokenizerError (`definition` is a tokenizer.json) or TemplateError."""
        self._definition = definition
        self._backend = _backend(definition)
        added = self._backend.get_added_tokens_decoder()
        content = json.loads(definition)
        rules = decoder_rules(content.get("decoder"))
        texts = {token_id: token.content for token_id, token in added.items()}
        self._pieces = token_pieces(self._backend.get_vocab(with_added_tokens=False), texts, rules)
        self._control = {token.content: token_id for token_id, token in added.items() if token.special}
        self._flags = {token.content: token for token in added.values() if token.special}
        self._controls = ControlTexts(self._control)
        self.control_token_ids = frozenset(self._control.values())
        # What some vocabularies make of characters that they lack: no control token was spelled there.
        self._unknown = {self._control.get(content["model"].get("unk_token") or "", -1)}
        self.strips_leading_space = rules.strips_space
        self.vocab_size = len(self._pieces)
        self.bos_token_id = self._named_id(settings, "bos_token")
        self.add_bos = bool(settings.get("add_bos_token")) and self.bos_token_id is not None
        longest_bytes = max(map(len, self._pieces), default=1)
        # Normalization can shorten text before it is cut into tokens, at most to a third (NFC).
        self._most_bytes_a_token = longest_bytes * (3 if content.get("normalizer") else 1)
        self._prompt_start = [self.bos_token_id] if self.add_bos and self.bos_token_id is not None else []
        self.eos_token_ids = frozenset(eos_token_ids)
        self.digest = digest
        if wrong := [token_id for token_id in self.eos_token_ids if not 0 <= token_id < self.vocab_size]:
            raise TokenizerError(
                f"the end-of-text id {wrong[0]} is outside the vocabulary of {self.vocab_size}"
            )
        named = {name: settings[name] for name in _NAMED_TOKENS if isinstance(settings.get(name), str)}
        self._chat = ChatTemplate(chat_template, self._controls, named) if chat_template else None

    @classmethod
    def open(cls, model_dir: Path) -> Self:
        """Open the tokenizer of a prepared model directory. Raises TokenizerError or TemplateError."""
        template_path = model_dir / "chat_template.jinja"
        eos = _read_json(model_dir / "generation_config.json").get("eos_token_id")
        return cls(
            _read_text(model_dir / "tokenizer.json"),
            settings=_read_json(model_dir / "tokenizer_config.json"),
            eos_token_ids=eos if isinstance(eos, list) else [] if eos is None else [eos],
            chat_template=_read_text(template_path) if template_path.is_file() else None,
            digest=_manifest_digest(model_dir) or tokenizer_digest(model_dir),
        )

    @cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """For text that follows a control token."""
        return self._variant("first")

    @cached_property
    def _unprefixed(self) -> tokenizers.Tokenizer:
        """For the rest of a text that was cut."""
        return self._variant("first", "always")

    def _variant(self, *schemes: str) -> tokenizers.Tokenizer:
        """The tokenizer without the prefix spaces of `schemes`; itself, if it has none of them."""
        content = json.loads(self._definition)
        parts = {key: content.get(key) for key in ("normalizer", "pre_tokenizer")}
        changed = {key: _without_prefix(part, schemes) for key, part in parts.items()}
        return self._backend if changed == parts else _backend(json.dumps(content | changed))

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """The ids of `text`, all of it ordinary text, after BOS if the model wants one and `add_bos` is set.

        Raises TextInputError if `text` is not valid Unicode.
        """
        ids = self._encode_plain(self._backend, text)
        return self._prompt_start + ids if add_bos else ids

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least, at once: encoding takes seconds per megabyte."""
        return -(-len(text.encode("utf-8", "replace")) // self._most_bytes_a_token)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of a chat, rendered by the model's template (see ChatTemplate.render for the arguments).

        Control tokens are those that the template writes; BOS is added only if the template has not. Raises
        TextInputError, TemplateError (also where the model has no template) or TemplateLimitError.
        """
        if self._chat is None:
            raise TemplateError("this model has no chat template; send it plain text instead of messages")
        parts = self._chat.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, options=options
        )
        ids = self._encode_parts(parts)
        return ids if ids[:1] == self._prompt_start else self._prompt_start + ids

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of `token_ids`, without control tokens; bytes that are no UTF-8 become U+FFFD."""
        text = self.text_bytes(token_ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_leading_space else text

    def text_bytes(self, token_ids: Iterable[int]) -> bytes:
        """The bytes of `token_ids`, without control tokens.

        Ids beyond the vocabulary, which padded embeddings allow a model to draw, stand for nothing.
        """
        return b"".join(
            self._pieces[token_id]
            for token_id in token_ids
            if 0 <= token_id < self.vocab_size and token_id not in self.control_token_ids
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, a control token's text included; empty beyond the vocabulary."""
        return self._pieces[token_id] if 0 <= token_id < self.vocab_size else b""

    def end_of_turn_id(self) -> int | None:
        """The control token that the chat template puts after an assistant's message, if there is one."""
        ending = self._chat.end_of_turn() if self._chat is not None else None
        return self._control[ending] if ending is not None else None

    def _encode_parts(self, parts: list[PromptPart]) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(parts):
            if part.is_control:
                ids.append(self._control[part.text])
                continue
            text = self._stripped(part.text, parts[index - 1 : index], parts[index + 1 : index + 2])
            ids += self._encode_plain(self._continuing if index else self._backend, text)
        return ids

    def _stripped(self, text: str, before: list[PromptPart], after: list[PromptPart]) -> str:
        """Some control tokens are declared to take the white space beside them along."""
        if before and self._flags[before[0].text].rstrip:
            text = text.lstrip()
        if after and self._flags[after[0].text].lstrip:
            text = text.rstrip()
        return text

    def _encode_plain(self, backend: tokenizers.Tokenizer, text: str) -> list[int]:
        try:
            ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise TextInputError("the text is not valid Unicode: it has half of a surrogate pair") from error
        return ids if self.control_token_ids.isdisjoint(ids) else self._encode_cut(backend, text)

    def _encode_cut(self, backend: tokenizers.Tokenizer, text: str) -> list[int]:
        """Some vocabularies let ordinary merges spell a control token; cut its text, so that they cannot."""
        ids: list[int] = []
        start = 0
        while match := self._controls.pattern.search(text, start):
            cut = match.start() + 1
            ids += backend.encode(text[start:cut], add_special_tokens=False).ids
            backend, start = self._unprefixed, cut
        ids += backend.encode(text[start:], add_special_tokens=False).ids
        if not (self.control_token_ids - self._unknown).isdisjoint(ids):
            raise TextInputError("the text holds a character that this model has as a control token only")
        return ids

    def _named_id(self, settings: Mapping[str, Any], name: str) -> int | None:
        token = settings.get(name)
        if token is None:
            return None
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise TokenizerError(f"{name} is {token!r}, which is not in the vocabulary")
        return int(token_id)


def _backend(definition: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:
        raise TokenizerError(f"tokenizer.json cannot be read: {error}") from error
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def _without_prefix(part: Any, schemes: tuple[str, ...]) -> Any:
    """A copy of a normalizer or pre-tokenizer that puts no space before text.

    "first" puts one at the start of a whole prompt only, "always" at the start of each stretch of text
    between control tokens, as does the normalizer Prepend.
    """
    match part:
        case {"type": "Prepend"} if "always" in schemes:
            return None
        case {"type": "Metaspace"} if part.get("prepend_scheme", "always") in schemes:
            return part | {"prepend_scheme": "never"}
        case {"type": "Sequence"}:
            key = "normalizers" if "normalizers" in part else "pretokenizers"
            children = [_without_prefix(child, schemes) for child in part[key]]
            return part | {key: [child for child in children if child is not None]}
    return part


def _manifest_digest(model_dir: Path) -> str:
    """What workers say of this tokenizer when they join, if the directory is a finished model."""
    path = model_dir / "headrace.json"
    return str(_read_json(path).get("tokenizer_digest", "")) if path.is_file() else ""


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise TokenizerError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: it should hold a JSON object")
    return value
