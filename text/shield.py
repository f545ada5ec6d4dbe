"""Keeps what callers write apart from what a template writes, across rendering.

A control token is one only where the template wrote it. Any part of a caller's string that is a control
token's text, or that could become one together with its surroundings, is replaced by a random marker before
rendering and put back afterwards, where it is encoded as ordinary text.
"""

import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from text.errors import TextInputError

_MAX_DEPTH = 64
_INDEX_DIGITS = 6
# Strings that templates compare and write out as part of their own syntax; they must look like identifiers.
_VERBATIM_KEYS = frozenset({"role", "type"})
_IDENTIFIER = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class ControlTexts:
    """The texts of a vocabulary's control tokens, prepared for searching. Immutable."""

    def __init__(self, tokens: Iterable[str]) -> None:
        ordered = sorted({token for token in tokens if token}, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        self._heads = {token[:cut] for token in ordered for cut in range(1, len(token))}
        self._tails = {token[cut:] for token in ordered for cut in range(1, len(token))}
        self._longest = len(ordered[0]) if ordered else 0
        self._joined = "\0".join(ordered)

    def within(self, text: str) -> bool:
        """Is `text` part of a control token (or all of one)?"""
        return text in self._joined

    def edges(self, text: str) -> tuple[int, int]:
        """How many characters at the start of `text` could end a control token, and at its end start one."""
        lengths = range(min(self._longest - 1, len(text)), 0, -1)
        head = next((length for length in lengths if text[:length] in self._tails), 0)
        tail = next((length for length in lengths if text[-length:] in self._heads), 0)
        return head, tail


class Shield:
    """One rendering's markers. Markers are digits, so that changes of case and trimming leave them whole."""

    def __init__(self, controls: ControlTexts) -> None:
        self._controls = controls
        self._nonce = f"{secrets.randbelow(10**38):038d}"
        self._marker = re.compile(rf"{self._nonce}(\d{{{_INDEX_DIGITS}}})")
        self._marker_of: dict[str, str] = {}
        self._originals: list[str] = []

    def protect(self, value: Any) -> Any:
        """A copy of a JSON-like value with every string made safe.

        Raises TextInputError for what is not JSON, or is nested too deeply.
        """
        return self._protect(value, 0)

    def restore(self, text: str) -> str:
        """Put the callers' parts back."""
        return self._marker.sub(lambda match: self._originals[int(match[1])], text)

    def split(self, rendered: str) -> list[tuple[str, bool]]:
        """`rendered` as (text, is it a control token) in order; the text of plain parts is restored."""
        parts: list[tuple[str, bool]] = []
        position = 0
        for match in self._controls.pattern.finditer(rendered):
            if match.start() > position:
                parts.append((self.restore(rendered[position : match.start()]), False))
            parts.append((match[0], True))
            position = match.end()
        if position < len(rendered):
            parts.append((self.restore(rendered[position:]), False))
        return parts

    def _protect(self, value: Any, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise TextInputError(f"messages are nested more than {_MAX_DEPTH} levels deep")
        if isinstance(value, str):
            return self._safe(str(value))
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, Mapping):
            return {self._key(key): self._field(key, item, depth) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._protect(item, depth + 1) for item in value]
        raise TextInputError(f"messages hold a {type(value).__name__}; only JSON values may be in them")

    def _key(self, key: Any) -> str:
        if not isinstance(key, str):
            raise TextInputError(
                f"messages hold an object with a {type(key).__name__}, not a string, as a key"
            )
        return key if _IDENTIFIER.fullmatch(key) else self._safe(key)

    def _field(self, key: str, value: Any, depth: int) -> Any:
        if key in _VERBATIM_KEYS and isinstance(value, str) and _IDENTIFIER.fullmatch(value):
            return value
        return self._protect(value, depth + 1)

    def _safe(self, text: str) -> str:
        """Hide whole control tokens, and what could join with the template's own text at either end.

        Templates trim, so the ends are those of the text without the white space around it.
        """
        body = text.strip()
        if not body:
            return text
        start = text.index(body)
        head, tail = self._controls.edges(body)
        if self._controls.within(body) or head + tail > len(body):
            safe = self._hide(body)
        else:
            middle = body[head : len(body) - tail]
            middle = self._controls.pattern.sub(lambda match: self._hide(match[0]), middle)
            safe = self._hide(body[:head]) + middle + self._hide(body[len(body) - tail :])
        return text[:start] + safe + text[start + len(body) :]

    def _hide(self, part: str) -> str:
        if not part:
            return ""
        if part not in self._marker_of:
            if len(self._originals) >= 10**_INDEX_DIGITS:
                raise TextInputError("messages hold too many different parts of control tokens")
            self._marker_of[part] = f"{self._nonce}{len(self._originals):0{_INDEX_DIGITS}d}"
            self._originals.append(part)
        return self._marker_of[part]
