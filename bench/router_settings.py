"""What the processes of `headrace bench router` are told: passed pickled, and answered in lines of JSON."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from router.config import ModelFacts, RouterConfig

MODEL = "smollm2-135m-instruct"
MAX_CONTEXT = 8192
BLOCK_TOKENS = 64
NUM_BYTES_PER_PROMPT = 512


class ByteTokenizer:
    """A token is a byte: stands in for a model's tokenizer where none is prepared, and weighs next to nothing."""

    eos_token_ids = frozenset({0})
    vocab_size = 256
    digest = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: Any) -> list[int]:
        return self.encode("".join(message["content"] for message in messages))


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """The router. `has_tokenizer`: `config.model_dir` is a prepared model; else tokens are bytes."""

    config: RouterConfig
    has_tokenizer: bool
    log_file: Path

    @property
    def facts(self) -> ModelFacts | None:
        """Of the model, where no directory says them."""
        if self.has_tokenizer:
            return None
        name = self.config.model_name
        return ModelFacts(name=name, architecture="none", digest=name, max_context=self.config.max_context)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersSettings:
    """Mock workers, all in one process, and the bare gRPC server beside them."""

    router: str
    tokenizer_digest: str
    vocab_size: int
    cluster_secret: bytes = field(repr=False)
    num_prefill: int = 1
    num_decode: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientsSettings:
    """The load generator. `targets`: addresses by name."""

    targets: dict[str, str]


def new_secret() -> bytes:
    """A cluster's."""
    return secrets.token_bytes(32)
