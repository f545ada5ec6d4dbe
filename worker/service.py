"""The seam between what every worker has and what a role does.

A worker offers a prefill service, a decode service or both; each is made from a `WorkerContext` and spoken
to through `RoleService`, on the service loop's thread only. This package never imports either: whoever
starts a worker hands their constructors in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from engine.engine import Engine
from engine.events import StepResult
from headrace.v1 import worker_pb2
from text.tokenizer import Tokenizer
from worker.config import WorkerConfig
from worker.direct import DirectServer
from worker.kv import KvParts
from worker.leasing import LeaseKeeper
from worker.link import RouterLink
from worker.prefixes import PrefixFetcher


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What a service may use of its worker."""

    config: WorkerConfig
    current_epoch: Callable[[], int]
    identity: worker_pb2.Identity
    kv_address: str
    engine: Engine
    tokenizer: Tokenizer
    leases: LeaseKeeper
    kv: KvParts
    prefixes: PrefixFetcher
    loop: asyncio.AbstractEventLoop
    wake_engine: Callable[[], None]
    accepts_new: Callable[[], bool]
    changed: Callable[[], None]
    """Asks for a report to every router soon: capacity or load changed."""
    clock: Callable[[], float]
    """Monotonic seconds; the service loop's clock."""
    root_key: Callable[[str], bytes]
    """The key that a tenant's block keys start from."""
    direct: DirectServer | None = None
    """Where clients read answers from this worker; None where they do not."""

    @property
    def epoch(self) -> int:
        """The worker's incarnation of now. It changes when the worker fences itself: read it, do not keep it."""
        return self.current_epoch()


class RoleService(Protocol):
    """What a role does. Every method runs on the service loop's thread and returns soon."""

    def handle(self, link: RouterLink, message: worker_pb2.RouterMessage) -> bool:
        """Act on a router's message; False where it concerns another role or a request unknown here."""
        ...

    def disown(self, link: RouterLink, cause: str, before_generation: int) -> None:
        """Cancel the requests of `link` that were not heard of since that generation began."""
        ...

    def on_step(self, result: StepResult) -> None:
        """Act on what an engine step gave; events of other roles' leases are passed over."""
        ...

    def on_engine_failed(self, lease_ids: Collection[bytes] | None, message: str) -> None:
        """The engine lost the sequences of these leases, or where it is None stopped: end the requests."""
        ...

    @property
    def num_requests(self) -> int:
        """Requests that hold a lease."""
        ...

    async def close(self) -> None:
        """End every request and wait for what runs on other threads."""
        ...


class ServiceFactory(Protocol):
    """Makes a role's service; the service's class is one."""

    receives_kv: bool
    """Whether other workers push KV into this role's leases."""

    def __call__(self, context: WorkerContext) -> RoleService:
        """Called on the service loop's thread, once the engine is open."""
        ...
