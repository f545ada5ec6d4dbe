"""What the router knows of workers and requests when it places them.

Values and the load figures of one worker; the choice itself is in `placement`.
"""

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """Which services a worker offers."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


class WorkerState(StrEnum):
    """How far a worker is from leaving; only a serving one gets requests."""

    SERVING = "serving"
    NO_NEW = "no_new"
    KV_ONLY = "kv_only"
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What must be equal for two workers to hand a sequence over."""

    weights_digest: str
    tokenizer_digest: str
    arithmetic: str
    layout: str
    handoff_major: int

    def difference(self, other: "Identity") -> str:
        """Which parts differ, for people; empty if none does."""
        parts = [
            f"{name} {getattr(self, name)!r} is not {getattr(other, name)!r}"
            for name in ("weights_digest", "tokenizer_digest", "arithmetic", "layout", "handoff_major")
            if getattr(self, name) != getattr(other, name)
        ]
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class WorkerRef:
    """One incarnation of a worker; epochs are compared for equality only."""

    worker_id: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
    """What a worker said of itself when it joined."""

    ref: WorkerRef
    role: Role
    identity: Identity
    block_tokens: int
    num_blocks: int
    max_sequences: int
    max_context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a request needs: its prompt, how long it may get with its answer, and how many answers."""

    num_prompt_tokens: int
    max_total_tokens: int
    num_choices: int = 1

    def num_blocks(self, block_tokens: int) -> int:
        """Blocks to begin with: the prompt's, and one more for each choice to grow into."""
        return -(-self.num_prompt_tokens // block_tokens) + self.num_choices


@dataclass(slots=True)
class Worker:
    """A worker as placement sees it; the charged figures are this router's own doing."""

    facts: WorkerFacts
    state: WorkerState = WorkerState.SERVING
    connected: bool = True
    free_blocks: int = 0
    charged_blocks: int = 0
    charged_sequences: int = 0
    foreign_sequences: int = 0
    prefill_prompts: int = 0
    prefill_tokens: int = 0
    refused_until_s: float = 0.0
    last_placed: int = 0

    @property
    def credits(self) -> int:
        """Blocks of decode memory that may still be spent."""
        return self.free_blocks - self.charged_blocks

    @property
    def num_sequences(self) -> int:
        """Sequences on the worker or on their way to it, those of other routers as last reported."""
        return self.charged_sequences + self.foreign_sequences

    @property
    def is_serving(self) -> bool:
        return self.connected and self.state is WorkerState.SERVING

    @property
    def decodes(self) -> bool:
        return self.facts.role is not Role.PREFILL

    @property
    def prefills(self) -> bool:
        return self.facts.role is not Role.DECODE
