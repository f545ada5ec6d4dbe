"""Does to a cluster what a plan says, and mends it again."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.chaos_cluster import ChaosCluster
from bench.chaos_member import Member
from bench.chaos_plan import ROUTERS, Fault, Kind
from bench.chaos_relay import FAIR, Relay, Weather
from bench.chaos_stream import StrictStream
from cluster.errors import ClusterError

READER_PATIENCE_S = 60.0
POLL_S = 0.05
DEFAULT_CARRIER = "shm"


@dataclass(slots=True)
class Injected:
    """A fault that was injected; times are monotonic seconds."""

    fault: Fault
    began_s: float
    ended_s: float = 0.0


class Injector:
    """Injects a round's faults at their times. One fault waits for its target to be up; several last at once."""

    def __init__(self, cluster: ChaosCluster, reading: Sequence[StrictStream], seed: int) -> None:
        """`reading`: the streams that clients read at any moment."""
        self.done: list[Injected] = []
        self._cluster = cluster
        self._reading = reading
        self._rng = random.Random(seed)
        self._weathers: dict[int, list[Weather]] = {}
        self._num_carried = 0

    async def run(self, faults: Sequence[Fault], tell: Callable[[Fault], None]) -> None:
        """Until every fault is mended. Raises ClusterError where a process does not come up again."""
        try:
            await self._run(faults, tell)
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _run(self, faults: Sequence[Fault], tell: Callable[[Fault], None]) -> None:
        began_s = time.monotonic()
        async with asyncio.TaskGroup() as lasting:
            for fault in faults:
                await asyncio.sleep(max(0.0, began_s + fault.at_s - time.monotonic()))
                # With one router at a time away, whoever knows both has one.
                for name in ROUTERS if fault.target in ROUTERS else (fault.target,):
                    if name in self._cluster.members:
                        await self._until_up(self._cluster.members[name])
                member = self._cluster.members.get(fault.target)
                injected = Injected(fault, time.monotonic())
                self.done.append(injected)
                tell(fault)
                lasting.create_task(self._one(injected, member))

    async def _until_up(self, member: Member) -> None:
        await member.wait_ready()
        while member.is_frozen:
            await asyncio.sleep(POLL_S)
            await member.wait_ready()

    async def _one(self, injected: Injected, member: Member | None) -> None:
        fault = injected.fault
        match fault.kind:
            case Kind.KILL_PREFILL | Kind.KILL_DECODE | Kind.KILL_STORE | Kind.KILL_ROUTER:
                assert member is not None
                await member.kill()
            case Kind.FREEZE_WORKER | Kind.FREEZE_STORE | Kind.FREEZE_ROUTER:
                assert member is not None
                member.freeze()
                await asyncio.sleep(fault.lasts_s)
                member.wake()
            case Kind.FILL_DISK:
                await self._told(member, fault, {"disk_full": True}, {"disk_full": False})
            case Kind.REPEAT_MESSAGES:
                await self._told(member, fault, {"repeat": True}, {"repeat": False})
            case Kind.JUMP_CLOCK:
                assert member is not None
                await member.command(jump_s=fault.parameters["jump_s"])
            case Kind.CLIENT_RETURNS | Kind.CLIENT_VANISHES:
                await self._hang_up(injected)
            case _:
                await self._weather(fault)
        injected.ended_s = time.monotonic()

    async def _told(
        self, member: Member | None, fault: Fault, begin: dict[str, bool], end: dict[str, bool]
    ) -> None:
        assert member is not None
        await member.command(**begin)
        await asyncio.sleep(fault.lasts_s)
        await member.command(**end)

    async def _hang_up(self, injected: Injected) -> None:
        """Of a stream in mid-answer; waits for one."""
        give_up_at = time.monotonic() + READER_PATIENCE_S
        while not (readers := [each for each in self._reading if each.num_tokens > 1]):
            if time.monotonic() > give_up_at:
                raise ClusterError(f"nobody read an answer for {READER_PATIENCE_S:g} s")
            await asyncio.sleep(POLL_S)
        injected.began_s = time.monotonic()
        self._rng.choice(readers).leave(for_good=injected.fault.kind is Kind.CLIENT_VANISHES)

    async def _weather(self, fault: Fault) -> None:
        parameters = fault.parameters
        is_cut = fault.kind in (Kind.CUT_WORKER, Kind.CUT_KV, Kind.CUT_CLIENTS)
        weather = Weather(
            refuses=is_cut and not parameters["silent"],
            silent=is_cut and parameters["silent"],
            bytes_per_s=parameters.get("bytes_per_s", 0.0),
            delay_s=parameters.get("delay_s", 0.0),
            flip_share=parameters.get("flip_share", 0.0),
        )
        if "carrier" in parameters:
            self._num_carried += 1
            await self._cluster.use_carrier(parameters["carrier"])
        relays = self._relays(fault)
        for relay in relays:
            self._weathers.setdefault(id(relay), []).append(weather)
            self._apply(relay)
        await asyncio.sleep(fault.lasts_s)
        for relay in relays:
            self._weathers[id(relay)].remove(weather)
            self._apply(relay)
        if "carrier" in parameters:
            self._num_carried -= 1
            if not self._num_carried:
                await self._cluster.use_carrier(DEFAULT_CARRIER)

    def _apply(self, relay: Relay) -> None:
        """Where several faults lie on one link, the one that came last."""
        weathers = self._weathers[id(relay)]
        relay.set_weather(weathers[-1] if weathers else FAIR)

    def _relays(self, fault: Fault) -> list[Relay]:
        if fault.kind is Kind.CUT_CLIENTS:
            return [self._cluster.clients[fault.target]]
        relays = self._cluster.relays[fault.target]
        if fault.kind in (Kind.CUT_WORKER, Kind.SLOW_WORKER):
            return relays.of_routers()
        return relays.of_kv()
