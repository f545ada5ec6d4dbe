"""What a router is told when it starts, and what it knows of the model that it serves."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from router.core.admission import Limits
from router.core.placement import POLICIES
from router.core.tenants import Tenant

MIN_SECRET_BYTES = 16
STREAMINGS = ("relay", "direct")


class Tokenizer(Protocol):
    """What the router needs of `text.tokenizer.Tokenizer`.

    `encode` and `encode_chat` raise ValueError for what they cannot turn into tokens.
    """

    @property
    def eos_token_ids(self) -> Any:
        """Token ids that end an answer, in any collection."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def digest(self) -> str:
        """What workers call their tokenizer's digest; must be equal for tokens to mean the same."""

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, messages: Any) -> list[int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """One router.

    Raises:
        ValueError: a value that cannot work; the message names the field.
    """

    router_id: str
    model_name: str
    model_dir: Path
    cluster_secret: bytes = field(repr=False)
    listen: str = "127.0.0.1:8460"
    profile_name: str = ""
    max_context: int = 8192
    """Tokens of prompt and answer together."""
    policy: str = "cost"
    streaming: str = "relay"
    """How tokens reach clients: relay, through this router; direct, from the worker that writes them, where the client
    can do that and reaches it."""
    fidelity: str = "exact"
    """Worst class of KV codec that workers may use: exact, near or compact."""
    api_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Key, or a key's digest `sha256:HEX`, to tenant; empty: whoever calls is the tenant `default`."""
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    """What tenants may do, by name; one that is not named has no limits and the weight 1."""
    slo_ttft_s: float | None = None
    """Service level of the time to first token; requests predicted to miss it are refused. None: none are."""
    slo_itl_s: float | None = None
    """Service level of the time between an answer's tokens."""

    queue_tokens: int = 65536
    """Prompt tokens that may wait for placement."""
    prefill_window_tokens: int = 1024
    """A prefill worker gets the running prompt and one more, or as many as stay within this together."""
    default_timeout_s: float = 600.0
    max_timeout_s: float = 86400.0
    resume_grace_s: float = 30.0
    """How long a resumable request runs on without a client."""
    link_grace_s: float = 3.0
    """How long a worker may be out of touch before its requests fail."""
    canary_timeout_s: float = 20.0
    """How long a newcomer may take to move a block with a partner before it counts as ready; 0: none need to."""
    retention_s: float = 120.0
    """How long an ended request can be attached to or read, while `retention_bytes` suffice."""
    retention_bytes: int = 64 << 20
    outbox_bytes: int = 1 << 20
    """How far one client may fall behind a running answer."""
    stalled_client_s: float = 30.0
    """How long one client may take nothing while there is something to take."""
    max_calls: int = 4096
    """Calls open at a time."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r".+:\d{1,5}", self.listen):
            raise ValueError(f"listen is {self.listen!r}; it must be host:port")
        if not self.router_id:
            raise ValueError("router_id must not be empty")
        if len(self.cluster_secret) < MIN_SECRET_BYTES:
            raise ValueError(f"cluster_secret must have at least {MIN_SECRET_BYTES} bytes")
        if self.policy not in POLICIES:
            raise ValueError(f"policy {self.policy!r} is unknown; it must be one of {', '.join(POLICIES)}")
        if self.streaming not in STREAMINGS:
            raise ValueError(
                f"streaming {self.streaming!r} is unknown; it must be one of {', '.join(STREAMINGS)}"
            )
        if any(not key or not tenant for key, tenant in self.api_keys.items()):
            raise ValueError("api_keys must hold neither an empty key nor an empty tenant")
        for name, tenant in self.tenants.items():
            if tenant.name != name:
                raise ValueError(f"tenants holds {tenant.name!r} under the name {name!r}")
        positive = (
            "max_context", "queue_tokens", "default_timeout_s", "max_timeout_s", "resume_grace_s",
            "link_grace_s", "retention_s", "retention_bytes", "outbox_bytes", "stalled_client_s", "max_calls",
        )  # fmt: skip
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        self._check_limits()

    def _check_limits(self) -> None:
        if not self.canary_timeout_s >= 0:
            raise ValueError(f"canary_timeout_s is {self.canary_timeout_s}; it must not be negative")
        for name in ("slo_ttft_s", "slo_itl_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0, or None")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What clients may know of the model. `max_context` in tokens."""

    name: str
    architecture: str
    digest: str
    max_context: int

    @classmethod
    def read(cls, config: RouterConfig) -> "ModelFacts":
        """From a prepared model directory.

        Raises:
            ValueError: a file is missing or is not what `headrace model prepare` writes.
        """
        manifest = _read_json(config.model_dir / "headrace.json")
        architectures = _read_json(config.model_dir / "config.json").get("architectures") or ["unknown"]
        return cls(
            name=config.model_name,
            architecture=str(architectures[0]),
            digest=str(manifest.get("weights_digest", "")),
            max_context=min(config.max_context, int(manifest.get("max_context", config.max_context))),
        )

    def limits(self, vocab_size: int) -> Limits:
        """What a request may ask of this model."""
        return Limits(model=self.name, max_context=self.max_context, vocab_size=vocab_size)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); `headrace model prepare` makes a model directory"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content
