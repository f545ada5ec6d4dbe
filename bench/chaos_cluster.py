"""A cluster made to be broken: 2P2D, two routers and a store, each a process of its own, with relays between them.

A small supervisor in place of Ray's: it starts a process again, as a new incarnation, a moment after it has died. What
it adds is that every process can be stopped, woken and spoken to, and that every link goes through a relay.

    clients ──relay──▶ routers ──relay──▶ worker ◀──relay── workers (KV: pushes, fetches, carrier tcp)
                         ▲                 │
                         └─────relay───────┘ (Register)        workers ── store (a socket in the file system)
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.chaos_member import Member
from bench.chaos_plan import DECODE, PREFILL, ROUTERS, STORE, WORKERS, Limits
from bench.chaos_relay import Relay
from bench.chaos_settings import RouterSettings, StoreSettings, WorkerSettings
from router.config import RouterConfig
from worker.config import WorkerConfig, WorkerRole

UNDISTURBED = "undisturbed"
DISTURBED = tuple(f"disturbed-{number}" for number in range(16))
KEYS = {name: name for name in (UNDISTURBED, *DISTURBED)}
"""API keys, and their tenants: no prefix that one has cached is of use to another."""
KV_HOST = "127.7.0.{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSizes:
    """The model, and what each process gets."""

    model_dir: Path
    model_name: str
    precision: str = "auto"
    max_context: int = 2048
    kv_bytes: int = 256 << 20
    chunk_tokens: int = 256
    host_bytes: int = 128 << 20
    disk_bytes: int = 1 << 30


@dataclass(slots=True)
class WorkerRelays:
    """Of one worker: what the routers dial, what workers dial for KV and for carrier tcp, and what it registers by
    with each router."""

    control: Relay
    kv: Relay
    register: dict[str, Relay]
    tcp: Relay | None = None

    def of_routers(self) -> list[Relay]:
        """Both ways between it and the routers."""
        return [self.control, *self.register.values()]

    def of_kv(self) -> list[Relay]:
        """All ways of KV into it, and out of it where others fetch."""
        return [self.kv, *([self.tcp] if self.tcp is not None else [])]


@dataclass(slots=True)
class ChaosCluster:
    """Processes and relays by name; made by `start`, ended by `stop`. Belongs to one event loop."""

    sizes: ClusterSizes
    limits: Limits
    directory: Path
    rng: random.Random
    members: dict[str, Member] = field(default_factory=dict)
    relays: dict[str, WorkerRelays] = field(default_factory=dict)
    clients: dict[str, Relay] = field(default_factory=dict)
    """What clients dial, by router."""
    router_addresses: dict[str, str] = field(default_factory=dict)
    """Past the relays."""
    _flipped_before: int = 0
    _opening: set[asyncio.Task[None]] = field(default_factory=set)
    cluster_secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    async def start(self) -> None:
        """Every process up. Raises ClusterError."""
        for name in ROUTERS:
            self.clients[name] = await self._relay("127.0.0.1")
        for name in WORKERS:
            self.relays[name] = WorkerRelays(
                control=await self._relay("127.0.0.1"),
                kv=await self._relay(KV_HOST.format(WORKERS.index(name) + 1)),
                register={router: await self._relay("127.0.0.1") for router in ROUTERS},
            )
        for name, settings in self._settings():
            member = Member(name, settings, self.directory, self._listener(name))
            self.members[name] = member
            member.start()
        for member in self.members.values():
            await member.wait_ready()

    async def stop(self) -> None:
        """Processes first."""
        await asyncio.gather(*(member.stop() for member in self.members.values()))
        for relay in (*self.all_relays(), *self.clients.values()):
            await relay.close()

    def all_relays(self) -> Iterator[Relay]:
        """Of workers."""
        for relays in self.relays.values():
            yield from relays.of_routers()
            yield from relays.of_kv()

    @property
    def num_flipped(self) -> int:
        """Frames that were damaged on their way."""
        return self._flipped_before + sum(relay.num_flipped for relay in self.all_relays())

    @property
    def num_crashes(self) -> int:
        """Processes that ended by themselves."""
        return sum(member.num_crashes for member in self.members.values())

    async def use_carrier(self, carrier: str) -> None:
        """How prefill workers send KV from now on: shm, tcp or inline."""
        for name in PREFILL:
            if not self.members[name].is_frozen:
                await self.members[name].command(carrier=carrier)

    async def _relay(self, host: str) -> Relay:
        relay = Relay(host, self.rng)
        await relay.open()
        return relay

    def _listener(self, name: str) -> Callable[[dict[str, Any]], None]:
        def heard(said: Mapping[str, Any]) -> None:
            if name in ROUTERS and "control" in said:
                self.router_addresses[name] = said["control"]
                registers = (relays.register[name] for relays in self.relays.values())
                for relay in (self.clients[name], *registers):
                    relay.target = _split(said["control"])
            elif "control" in said:
                self.relays[name].control.target = _split(said["control"])
            elif "kv" in said:
                self.relays[name].kv.target = _split(said["kv"])
                task = asyncio.create_task(self._relay_tcp(self.relays[name], said["tcp_port"]))
                self._opening.add(task)
                task.add_done_callback(self._opening.discard)

        return heard

    async def _relay_tcp(self, relays: WorkerRelays, port: int) -> None:
        """Carrier tcp dials the announced host at a port that is the worker's own: the relay takes that port there."""
        before, relays.tcp = relays.tcp, None
        if before is not None:
            self._flipped_before += before.num_flipped
            await before.close()
        if port:
            host = relays.kv.address.rpartition(":")[0]
            relay = Relay(host, self.rng, speaks_http2=False)
            relay.target = ("127.0.0.1", port)
            await relay.open(port)
            relays.tcp = relay

    def _settings(self) -> Iterator[tuple[str, Any]]:
        sizes, limits = self.sizes, self.limits
        store_address = f"unix:{self.directory / 'store.sock'}"
        yield (
            STORE,
            StoreSettings(
                store_address,
                self.cluster_secret,
                self.directory / "disk",
                sizes.host_bytes,
                sizes.disk_bytes,
            ),
        )
        for name in ROUTERS:
            router = RouterConfig(
                router_id=name,
                model_name=sizes.model_name,
                model_dir=sizes.model_dir,
                cluster_secret=self.cluster_secret,
                listen="127.0.0.1:0",
                max_context=sizes.max_context,
                api_keys=KEYS,
                link_grace_s=limits.link_grace_s,
                resume_grace_s=limits.client_grace_s,
                streaming="direct",  # which the SDK's clients use; the strict ones are relayed to
            )
            yield name, RouterSettings(router)
        for name in WORKERS:
            config = WorkerConfig(
                worker_id=name,
                role=WorkerRole.DECODE if name in DECODE else WorkerRole.PREFILL,
                model_dir=sizes.model_dir,
                cluster_secret=self.cluster_secret,
                precision=sizes.precision,
                max_context=sizes.max_context,
                chunk_tokens=sizes.chunk_tokens,
                kv_bytes=sizes.kv_bytes,
                set_aside_bytes=32 << 20,
                routers=tuple(relay.address for relay in self.relays[name].register.values()),
                store_address=store_address,
                lease_ttl_s=limits.lease_ttl_s,
                resume_grace_s=limits.resume_grace_s,
                dead_after_s=limits.dead_after_s,
                direct_port=0,
            )
            yield (
                name,
                WorkerSettings(
                    config,
                    self.relays[name].control.address,
                    self.relays[name].kv.address,
                    self.rng.getrandbits(32),
                ),
            )


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)
