"""What a step gives to whoever drives the engine."""

from __future__ import annotations

from dataclasses import dataclass

from engine.request import Drawn

LAYER_GROUPS = 6  # reports of a chunk's progress within a step


def layers_per_report(num_layers: int) -> int:
    """After every so many layers a step can say that their keys and values are in the cache."""
    return -(-num_layers // LAYER_GROUPS)


@dataclass(frozen=True, slots=True)
class TokenDrawn:
    """Token number `index` (from 0) of one choice's answer."""

    lease_id: bytes
    choice: int
    index: int
    drawn: Drawn


@dataclass(frozen=True, slots=True)
class ChunkDone:
    """KV of a sequence computed for another worker is in the cache: of positions [0, num_tokens), all layers.

    With `num_layers` the chunk that ends at `num_tokens` is that far only: positions before it are whole.
    """

    lease_id: bytes
    num_tokens: int
    num_layers: int | None = None


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The prompt of a sequence computed for another worker is done; `first[i]` is choice i's first token."""

    lease_id: bytes
    first: tuple[Drawn, ...]


@dataclass(frozen=True, slots=True)
class SequenceFailed:
    """One choice, or where `choice` is None the whole lease, cannot go on. `cause` is UPPER_SNAKE."""

    lease_id: bytes
    choice: int | None
    cause: str
    message: str


Event = TokenDrawn | ChunkDone | PrefillDone | SequenceFailed


@dataclass(frozen=True, slots=True)
class StepResult:
    """Events in the order they happened, and what the step was made of. No rows: there was nothing to do.

    `prefill_s`: of `step_s`, what the prompts took beside the answers; 0 where that is not known.
    `num_drafts`: guesses at tokens that were computed; `num_drafts_kept`: those that were the tokens drawn.
    """

    events: tuple[Event, ...] = ()
    num_prefill_tokens: int = 0
    num_decode_rows: int = 0
    num_drafts: int = 0
    num_drafts_kept: int = 0
    step_s: float = 0.0
    prefill_s: float = 0.0
