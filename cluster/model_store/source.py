"""What every kind of model source is turned into before it is written: configuration, weights, tokenizer."""

from dataclasses import dataclass
from typing import Any

from cluster.model_store.tensors import SourceTensor


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """A tokenizer as files' contents.

    `settings` is tokenizer_config.json: bos_token, eos_token, unk_token, pad_token (text, where there is
    one) and add_bos_token. `eos_token_ids` is what the source names; `eos_is_complete` says that it is the
    author's whole list (generation_config.json), to which nothing is added.
    """

    tokenizer_json: str
    settings: dict[str, Any]
    chat_template: str | None
    eos_token_ids: tuple[int, ...]
    eos_is_complete: bool = False


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model ready to be written to the store. Weights are not read before they are written."""

    description: str
    suggested_name: str
    config: dict[str, Any]
    tensors: list[SourceTensor]
    tokenizer: TokenizerSource
