"""The three ways to write a prompt, each checked, digested and turned into tokens by itself."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from headrace.v1 import inference_pb2 as pb
from router.config import Tokenizer
from router.core import admission
from router.core.admission import Limits

MESSAGE_BYTES = 64  # what a template makes of a message beside its content, about


class Prompt(Protocol):
    """What a call asks to be continued."""

    @property
    def num_bytes(self) -> int:
        """How much there is to tokenize."""

    def check(self, limits: Limits) -> None:
        """Raises a Rejection for what cannot be served, before it is tokenized."""

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """The prompt's tokens. Raises ValueError where there are none for it."""

    def digest_into(self, digest: "hashlib.blake2b") -> None:
        """Adds all that determines the tokens."""


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text."""

    text: str

    @property
    def num_bytes(self) -> int:
        return len(self.text)

    def check(self, limits: Limits) -> None:
        admission.check_text(self.text, limits)

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        return tokenizer.encode(self.text)

    def digest_into(self, digest: "hashlib.blake2b") -> None:
        digest.update(b"text\0" + self.text.encode())


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, taken as they are."""

    token_ids: Sequence[int]

    @property
    def num_bytes(self) -> int:
        return 0

    def check(self, limits: Limits) -> None:
        admission.check_token_ids(self.token_ids, limits)

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        return list(self.token_ids)

    def digest_into(self, digest: "hashlib.blake2b") -> None:
        digest.update(b"ids\0" + pb.TokenIds(ids=self.token_ids).SerializeToString())


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, rendered through the model's template."""

    messages: Sequence[pb.ChatMessage]

    @property
    def num_bytes(self) -> int:
        return sum(len(message.content) + MESSAGE_BYTES for message in self.messages)

    def check(self, limits: Limits) -> None:
        admission.check_messages(self.messages, limits)

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        return tokenizer.encode_chat(
            [{"role": message.role, "content": message.content} for message in self.messages]
        )

    def digest_into(self, digest: "hashlib.blake2b") -> None:
        digest.update(b"chat\0" + pb.ChatMessages(messages=self.messages).SerializeToString())


def body_digest(model: str, prompt: Prompt, sampling: pb.SamplingParams) -> bytes:
    """Equal for calls that ask for the same answer: model, prompt and sampling, not how long to wait for it."""
    digest = hashlib.blake2b(digest_size=16)
    prompt.digest_into(digest)
    digest.update(b"\0" + model.encode() + b"\0" + sampling.SerializeToString(deterministic=True))
    return digest.digest()
