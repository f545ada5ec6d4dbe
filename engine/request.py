"""What the engine is asked for and what it tracks: sampling parameters, sequences, drawn tokens.

Plain values without torch: the scheduler and the sampler read them, the services build them. Nothing here
knows blocks, tensors, leases' lifecycles or text.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from engine.drafter import Drafter
from engine.resumption import NOTHING, SoFar
from engine.windows import TakenUp


class FinishReason(StrEnum):
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"


class SequenceStatus(StrEnum):
    """Where a sequence is in the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    HELD = "held"
    """Prefilled for another worker: it computes nothing more, and its blocks stay until the lease is
    released."""
    FINISHED = "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn: the engine's side of `SamplingParams` in inference.proto, already checked by the
    router.

    Temperature 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and penalties 1, 0, 0 are off. `logprobs` None
    asks for none, 0 for the drawn token's only, n for the n likeliest besides. `seed` is a concrete number
    below 2**64 here: a request without one was given one at random before it got here, so that a draw can be
    repeated on another worker.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    max_tokens: int = 16
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken instead of a random one."""
        return self.temperature == 0.0

    @property
    def stopping_token_ids(self) -> frozenset[int]:
        """The tokens that end a choice once `min_tokens` are drawn."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids | self.eos_token_ids


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities from the raw logits, before any processor (natural logarithm).

    `logprob` is the drawn token's; `top` holds the likeliest (token id, logprob), likeliest first, ties by
    lower id.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One drawn token, and `finish` when it is the choice's last."""

    token_id: int
    logprobs: Logprobs | None = None
    finish: FinishReason | None = None


class SetAside(Protocol):
    """Keys and values of a preempted sequence, out of the cache: of its first `num_tokens` positions, with the worst
    fidelity rank in them."""

    num_tokens: int
    rank: int


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request inside the engine.

    `tokens` is the prompt followed by the answer so far; `num_computed` says for how many of its first
    positions keys and values are in the cache. `root_key` starts the chain of block keys (kvtransfer.keys):
    it separates tenants and models. `bound` and `tenant` are its lease's, for when it takes blocks from the
    cache again (engine/pool.py). `drafter` guesses at its next tokens; None where none are wanted. `so_far`: where the
    answer goes on.
    Where windows are brought back by computing: there are none before `window_start`, and of tokens before
    `replayed_to` all else is cached.
    """

    sequence_id: int
    lease_id: bytes
    choice: int
    tokens: list[int]
    num_prompt: int
    sampling: SamplingParams
    num_computed: int = 0
    status: SequenceStatus = SequenceStatus.WAITING
    prefill_only: bool = False
    root_key: bytes = b""
    bound: int = 0
    tenant: str = ""
    drafter: Drafter | None = None
    so_far: SoFar = NOTHING
    set_aside: SetAside | None = None
    window_start: int = 0
    replayed_to: int = 0

    @property
    def num_tokens(self) -> int:
        """Prompt and answer tokens known so far."""
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        """Answer tokens drawn so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def is_head(self) -> bool:
        """Whether it is still what all choices share: the prompt, of a resumed answer more."""
        return self.num_generated == self.so_far.num_shared and not self.choice

    def take_up(self, taken_up: TakenUp) -> None:
        """Go on from a cached prefix."""
        self.num_computed, self.replayed_to = taken_up.num_tokens, taken_up.replayed_to
        self.window_start = taken_up.num_tokens if taken_up.replayed_to else 0

    def append(self, token_id: int) -> None:
        """The answer's next token."""
        self.tokens.append(token_id)
        if self.drafter is not None:
            self.drafter.observe(token_id)

    @property
    def generated(self) -> list[int]:
        """The answer so far (a copy)."""
        return self.tokens[self.num_prompt :]
