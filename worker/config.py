"""What a worker process is told when it starts. Plain values; knows no YAML, no Ray and no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from engine.record_policy import RecordPolicy
from kvtransfer.keys import MIN_CLUSTER_SECRET_BYTES


class WorkerRole(StrEnum):
    """Which services a worker offers."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    @property
    def prefills_for_others(self) -> bool:
        """Whether the worker takes prompts whose answers another worker decodes."""
        return self is not WorkerRole.DECODE

    @property
    def decodes(self) -> bool:
        """Whether the worker takes reservations."""
        return self is not WorkerRole.PREFILL


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """One worker's settings.

    Cores are numbers as the operating system counts them; an empty tuple leaves the threads where they
    are. Ports 0 are chosen by the operating system.

    Raises ValueError, naming the setting, for a value that cannot work.
    """

    worker_id: str
    role: WorkerRole
    model_dir: Path
    cluster_secret: bytes = field(repr=False)
    precision: str = "auto"
    kv_dtype: str = "auto"
    max_context: int = 8192
    """Tokens of prompt and answer together."""
    chunk_tokens: int = 512
    max_sequences: int = 64
    max_drafts: int = 8
    """Guesses at an answer's next tokens in one step; 0: none."""
    itl_s: float | None = None
    """How long answers should at most wait for a token while prompts are computed beside them."""
    window_records: RecordPolicy = field(default_factory=RecordPolicy)
    """Where a prefix can be taken up, of a model with windows."""
    set_aside_bytes: int = 256 << 20
    """Host memory for the KV of answers that had to give way."""
    kv_bytes: int = 1 << 30
    cpus: tuple[int, ...] = ()
    """The engine thread's cores; their number is the number of compute threads (1 where empty)."""
    service_cpus: tuple[int, ...] = ()
    """Every other thread's cores."""
    device: str = "cpu"
    routers: tuple[str, ...] = ()
    """Addresses (host:port) of the routers to register with."""
    host: str = "127.0.0.1"
    """Listened on, and announced to routers and other workers."""
    port: int = 0
    kv_port: int = 0
    direct_port: int | None = None
    """Where clients stream answers from this worker, on `host`; None: they do not."""
    fidelity: str = "exact"
    """The worst class of KV that a request may get, and codecs may make."""
    codec: str = "auto"
    """How KV travels: "auto", or a codec's name."""
    store_address: str = ""
    """Of this node's KV store, as gRPC takes it; empty without cache tiers."""
    tenant_share: float = 1.0
    """The part of the cached blocks here that one tenant may hold while others have none to lose."""
    lease_ttl_s: float = 10.0
    """A lease expires this long after its last push or renewal."""
    resume_grace_s: float = 10.0
    """Requests of a router whose stream broke are cancelled unless resumed within this time."""
    dead_after_s: float = 30.0
    """Without any router, or frozen, for longer than this, the worker fences itself: it drops what it holds and
    goes on as a new incarnation. Longer than `resume_grace_s`."""
    max_prompts: int = 2
    """Prompts that a prefill worker computes or holds ready: the running one and one more."""
    prompt_window_tokens: int = 4096
    """Short prompts that together stay within it may be more."""
    report_interval_s: float = 0.2

    def __post_init__(self) -> None:
        """Check what can be checked without opening the model."""
        positive = {
            "max_context": self.max_context,
            "chunk_tokens": self.chunk_tokens,
            "max_sequences": self.max_sequences,
            "kv_bytes": self.kv_bytes,
            "lease_ttl_s": self.lease_ttl_s,
            "resume_grace_s": self.resume_grace_s,
            "dead_after_s": self.dead_after_s,
            "max_prompts": self.max_prompts,
            "prompt_window_tokens": self.prompt_window_tokens,
            "report_interval_s": self.report_interval_s,
        }
        for name, value in positive.items():
            if value <= 0:
                raise ValueError(f"WorkerConfig.{name} must be above 0, not {value}")
        if self.max_drafts < 0 or self.set_aside_bytes < 0 or (self.itl_s is not None and self.itl_s <= 0):
            raise ValueError(
                f"WorkerConfig: max_drafts ({self.max_drafts}) and set_aside_bytes ({self.set_aside_bytes}) are not "
                f"negative, itl_s ({self.itl_s}) is above 0 where it is given"
            )
        if self.dead_after_s <= self.resume_grace_s:
            raise ValueError(
                f"WorkerConfig.dead_after_s ({self.dead_after_s:g}) must be longer than resume_grace_s "
                f"({self.resume_grace_s:g})"
            )
        if not self.worker_id:
            raise ValueError("WorkerConfig.worker_id must not be empty")
        if len(self.cluster_secret) < MIN_CLUSTER_SECRET_BYTES:
            raise ValueError(
                f"WorkerConfig.cluster_secret must have at least {MIN_CLUSTER_SECRET_BYTES} bytes, "
                f"not {len(self.cluster_secret)}"
            )

    @property
    def num_threads(self) -> int:
        """Compute threads of the engine."""
        return max(1, len(self.cpus))
