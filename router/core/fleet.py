"""What the router knows of workers and requests when it places them.

Values and the load figures of one worker; the choice itself is in `placement`. What a worker says of its own speed
is taken only where it can be true: finite, positive and within a wide bound. Anything else counts as not measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

MAX_STEP_S = 60.0
MAX_S_PER_TOKEN = 60.0
MAX_LINK_FIXED_S = 60.0
MIN_ROW_PART = 1e-4
"""Of a step with one answer: more answers are never wholly free, nor is a step without them."""
FORGETTING = 1.001
"""By which the quickest pace seen slows down with each report: to half of it in some minutes."""
MIN_LINK_BYTES_PER_S = 1.0
MAX_LINK_BYTES_PER_S = 1e13
MAX_QUEUED_TOKENS = 1 << 40


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


class WorkerRef(NamedTuple):
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
    kv_address: str = ""
    """Where prefill workers push to; what their measured links are named by."""
    kv_bytes_per_token: int = 0
    """Of cache, as it is stored there; 0 where it was not said."""
    key_identity: str = ""
    """What block keys of this worker begin with, beside the tenant's secret."""


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """What pushing to a decode worker costs: bytes a second, and `fixed_s` whatever the size."""

    bytes_per_s: float
    fixed_s: float

    @property
    def is_possible(self) -> bool:
        """Whether such a link can be; NaN cannot."""
        return (
            MIN_LINK_BYTES_PER_S <= self.bytes_per_s <= MAX_LINK_BYTES_PER_S
            and 0 <= self.fixed_s <= MAX_LINK_FIXED_S
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a request needs: its prompt, how long it may get with its answer, and how many answers."""

    num_prompt_tokens: int
    max_total_tokens: int
    num_choices: int = 1

    def num_blocks(self, block_tokens: int) -> int:
        """Blocks to begin with: the prompt's, and one more for each choice to grow into."""
        return -(-self.num_prompt_tokens // block_tokens) + self.num_choices


@dataclass(slots=True, eq=False)
class Worker:
    """A worker as placement sees it; the charged figures are this router's own doing.

    `prefill_tokens` are those of its prompts that are not cached there. The `foreign_` figures are what a report
    named beyond what this router had charged by then. Speeds are 0 until they were measured. `slot` is its bit
    number in masks of workers.
    """

    facts: WorkerFacts
    state: WorkerState = WorkerState.SERVING
    slot: int = 0
    connected: bool = True
    free_blocks: int = 0
    charged_blocks: int = 0
    charged_sequences: int = 0
    foreign_sequences: int = 0
    prefill_prompts: int = 0
    prefill_tokens: int = 0
    foreign_prefill_tokens: int = 0
    refused_until_s: float = 0.0
    last_placed: int = 0
    last_prefilled: int = 0
    """The numbers of the last placements that took it, and that had it prefill."""
    empty_step_s: float = 0.0
    """Of a decode step, what does not depend on the number of answers in it."""
    row_s: float = 0.0
    """What each answer adds to it."""
    prefill_s_per_token: float = 0.0
    quickest_s_per_token: float = 0.0
    """Of late: what it takes when others leave it its cores."""
    link_s_per_byte: float = 0.0
    """The mean of its measured links, for those that are not."""
    link_fixed_s: float = 0.0

    @property
    def idle_part(self) -> float:
        """Of the time that it takes for a prompt now, what it would take on an idle machine."""
        return self.quickest_s_per_token / self.prefill_s_per_token if self.prefill_s_per_token else 1.0

    @property
    def credits(self) -> int:
        """Blocks of decode memory that may still be spent."""
        return self.free_blocks - self.charged_blocks

    @property
    def num_sequences(self) -> int:
        """Sequences on the worker or on their way to it, those of other routers as last reported."""
        return self.charged_sequences + self.foreign_sequences

    @property
    def tokens_ahead(self) -> int:
        """Prompt tokens that a prompt sent now would wait for."""
        return self.prefill_tokens + self.foreign_prefill_tokens

    @property
    def is_serving(self) -> bool:
        return self.connected and self.state is WorkerState.SERVING

    @property
    def decodes(self) -> bool:
        return self.facts.role is not Role.PREFILL

    @property
    def prefills(self) -> bool:
        """Whether it prefills for others."""
        return self.facts.role is not Role.DECODE

    def could_decode(self, demand: Demand) -> bool:
        """Whether it could if it were idle."""
        facts = self.facts
        return (
            demand.num_blocks(facts.block_tokens) <= facts.num_blocks
            and demand.num_choices <= facts.max_sequences
            and demand.max_total_tokens <= facts.max_context
        )

    def could_prefill(self, demand: Demand) -> bool:
        """Whether the prompt is within its context."""
        return demand.num_prompt_tokens < self.facts.max_context

    def line_measured(self, first_row_s: float, row_s: float) -> bool:
        """Takes a report's line through its decode steps: one with a single answer, and what each more adds. False, and
        nothing changed, where it has none, or one that cannot be."""
        if not (0 < first_row_s <= MAX_STEP_S and 0 <= row_s <= first_row_s):
            return False
        self.row_s = max(row_s, MIN_ROW_PART * first_row_s)
        self.empty_step_s = max(first_row_s - row_s, MIN_ROW_PART * first_row_s)
        return True

    def step_measured(self, step_s: float, num_sequences: int) -> None:
        """Takes a report's decode step with so many answers, where that is all it says; one of 0, or one that cannot
        be, leaves what was known before."""
        if 0 < step_s <= MAX_STEP_S:
            most = max(1, self.facts.max_sequences)
            self.empty_step_s = step_s / (1.0 + min(max(num_sequences, 0) / most, 1.0))
            self.row_s = self.empty_step_s / most

    def prefill_measured(self, prefill_s_per_token: float) -> None:
        """As `step_measured`, for seconds a token of a prompt."""
        if 0 < prefill_s_per_token <= MAX_S_PER_TOKEN:
            self.prefill_s_per_token = prefill_s_per_token
            remembered = FORGETTING * self.quickest_s_per_token or prefill_s_per_token
            self.quickest_s_per_token = min(remembered, prefill_s_per_token)

    def links_measured(self, links: Mapping[str, LinkSpeed]) -> None:
        """Takes the mean of a report's links; without any possible one, what was known before stays."""
        speeds = [link for link in links.values() if link.is_possible]
        if speeds:
            self.link_s_per_byte = sum(1.0 / link.bytes_per_s for link in speeds) / len(speeds)
            self.link_fixed_s = sum(link.fixed_s for link in speeds) / len(speeds)
