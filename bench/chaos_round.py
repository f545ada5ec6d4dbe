"""One round: an undisturbed run of a load, the same load under faults, and a look at what is left behind."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.chaos_cluster import DISTURBED, UNDISTURBED, ChaosCluster
from bench.chaos_inject import Injected, Injector
from bench.chaos_load import Conversation, Turn
from bench.chaos_plan import STORE, WORKERS, Fault
from bench.chaos_stream import Clients, StrictStream
from bench.chaos_verdict import ChoiceSeen, End, Outcome, Tally, judge, recoveries
from cluster.errors import ClusterError
from headrace import AsyncClient, HeadraceError
from headrace.v1.cluster_pb2 import StatusResponse, WorkerStatus
from headrace.v1.worker_pb2 import WORKER_STATE_SERVING

PATIENCE_S = 240.0
"""Of a request without a short deadline: beyond it, something hangs."""
JOIN_TIMEOUT_S = 120.0
SETTLE_S = 30.0
POLL_S = 0.3
CALM_POLLS = 4
"""Reports in a row, a report's interval apart, in which nothing is held."""


@dataclass(frozen=True, slots=True)
class Expected:
    """A request as it was asked on the undisturbed cluster, with the whole prompt, and the answer it got."""

    prompt: tuple[int, ...]
    turn: Turn
    choices: list[ChoiceSeen]


@dataclass(slots=True)
class RoundResult:
    """What a round gave. `problems`: what went wrong, in words."""

    number: int
    seed: int
    tally: Tally = field(default_factory=Tally)
    faults: list[Fault] = field(default_factory=list)
    recoveries_s: dict[str, list[float]] = field(default_factory=dict)
    """By kind of fault."""
    num_flipped: int = 0
    num_reconnects: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class Round:
    """Runs once, on a cluster that is whole and idle."""

    def __init__(
        self, cluster: ChaosCluster, number: int, seed: int, load: Sequence[Conversation], num_clients: int
    ) -> None:
        self.result = RoundResult(number, seed)
        self._cluster = cluster
        self._load = load
        self._num_clients = min(num_clients, len(load))
        self._outcomes: list[tuple[Outcome, Expected]] = []
        self._is_over = False
        self._name = f"round-{number}-{seed}"

    async def run(self, faults: Sequence[Fault], tell: Callable[[str], None]) -> RoundResult:
        """Raises ClusterError where the cluster cannot serve undisturbed, or does not come back."""
        tell("answers without faults")
        await wait_whole(self._cluster)
        expected = await self._undisturbed()
        flipped_before, crashes_before = self._cluster.num_flipped, self._cluster.num_crashes
        injected = await self._disturbed(expected, faults, tell)
        tell("waiting until nothing is held")
        await wait_whole(self._cluster)
        step_s = await self._look_for_leaks()
        self._judge(injected, step_s)
        self.result.faults = [each.fault for each in injected]
        self.result.num_flipped = self._cluster.num_flipped - flipped_before
        self.result.tally.crashes = self._cluster.num_crashes - crashes_before
        return self.result

    @property
    def _addresses(self) -> list[str]:
        return [relay.address for relay in self._cluster.clients.values()]

    # --- the load ------------------------------------------------------------------------------

    async def _undisturbed(self) -> list[list[Expected]]:
        """Each conversation's requests. Whoever fails here fails the campaign."""
        clients = Clients(self._addresses, UNDISTURBED, random.Random(self.result.seed), [])
        try:
            gate = asyncio.Semaphore(self._num_clients)
            return list(
                await asyncio.gather(
                    *(self._expected(clients, gate, number) for number in range(len(self._load)))
                )
            )
        finally:
            await clients.close()

    async def _expected(self, clients: Clients, gate: asyncio.Semaphore, number: int) -> list[Expected]:
        found: list[Expected] = []
        said: tuple[int, ...] = ()
        async with gate:
            for index, turn in enumerate(self._load[number]):
                prompt = said + turn.new_tokens
                patient = Turn(turn.new_tokens, turn.sampling, None, turn.by_sdk)
                outcome = await clients.ask(f"{self._name}-{number}-{index}", prompt, patient, PATIENCE_S)
                if outcome.end is not End.FINISHED or outcome.num_repeated or outcome.num_skipped:
                    text = f"{outcome.name} failed on the undisturbed cluster: {outcome.end} {outcome.cause}"
                    raise ClusterError(text)
                found.append(Expected(prompt, turn, outcome.choices))
                said = prompt + tuple(outcome.choices[0].token_ids)
        return found

    async def _disturbed(
        self, expected: Sequence[Sequence[Expected]], faults: Sequence[Fault], tell: Callable[[str], None]
    ) -> list[Injected]:
        reading: list[StrictStream] = []
        injector = Injector(self._cluster, reading, self.result.seed)
        readers = [
            asyncio.create_task(self._ask_on(reading, expected, client))
            for client in range(self._num_clients)
        ]
        try:
            tell(f"fault 1 of {len(faults)}")
            await injector.run(
                faults, lambda fault: tell(f"fault {len(injector.done)} of {len(faults)}: {fault.describe()}")
            )
            self._is_over = True
            tell("waiting for the last answers")
            await asyncio.gather(*readers)
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
        return injector.done

    async def _ask_on(
        self, reading: list[StrictStream], expected: Sequence[Sequence[Expected]], client: int
    ) -> None:
        """A client's loop: its share of the conversations, over and over, until the faults are over. Each time as
        another tenant, so that prompts are computed and travel again."""
        for loop in itertools.count():
            rng = random.Random(f"{self.result.seed} {client} {loop}")
            tenant = DISTURBED[loop % len(DISTURBED)]
            # Some know every router, some know one and must wait for it.
            known = self._addresses if rng.random() < 0.5 else [rng.choice(self._addresses)]
            clients = Clients(known, tenant, rng, reading)
            try:
                for number in range(client, len(expected), self._num_clients):
                    for index, each in enumerate(expected[number]):
                        name = f"{self._name}-{number}-{index}-{loop}"
                        outcome = await clients.ask(name, each.prompt, each.turn, PATIENCE_S)
                        self._outcomes.append((outcome, each))
                    if self._is_over:
                        return
            finally:
                await clients.close()

    # --- afterwards ----------------------------------------------------------------------------

    def _judge(self, injected: Sequence[Injected], step_s: float) -> None:
        result = self.result
        for outcome, each in self._outcomes:
            tally = judge(outcome, each.choices, step_s)
            result.tally.add(tally)
            result.ends[outcome.end] = result.ends.get(outcome.end, 0) + 1
            result.num_reconnects += max(0, outcome.num_connections - 1)
            if not tally.is_clean:
                result.problems.append(_describe(outcome, tally))
        found = recoveries(
            [outcome for outcome, _ in self._outcomes], [each_fault.began_s for each_fault in injected]
        )
        for each_fault, seconds in zip(injected, found, strict=True):
            result.recoveries_s.setdefault(each_fault.fault.kind.value, []).extend(seconds)

    async def _look_for_leaks(self) -> float:
        """Wait until nothing is held, note what still is when that takes too long; the longest step of a worker."""
        tally, give_up_at, calm = self.result.tally, time.monotonic() + SETTLE_S, 0
        addresses = self._cluster.router_addresses.values()
        while calm < CALM_POLLS and time.monotonic() < give_up_at:
            statuses = [await _status(address) for address in addresses]
            calm = calm + 1 if not any(map(_held, statuses)) else 0
            await asyncio.sleep(POLL_S)
        workers = statuses[0].workers
        tally.leaked_leases = sum(each.report.leases + each.report.pins for each in workers)
        tally.leaked_blocks = sum(each.report.private_blocks for each in workers)
        if calm < CALM_POLLS:
            held = "; ".join(map(_held, statuses))
            self.result.problems.append(f"not idle after {SETTLE_S:g} s: {held}")
            # Requests that a router still has hold nothing on workers, but are left behind all the same.
            tally.leaked_leases += sum(each.running_requests + each.queued_requests for each in statuses)
        for name in WORKERS:
            facts = await self._cluster.members[name].command()
            if facts.get("idle_violations"):
                self.result.problems.append(f"{name}: {facts}")
            tally.idle_violations += facts.get("idle_violations", 0)
        store = await self._cluster.members[STORE].command()
        tally.leaked_leases += store.get("leases", 0)
        return max((each.report.step_s for each in workers), default=0.0)


async def wait_whole(cluster: ChaosCluster) -> None:
    """Until every process is up and every router reaches every worker. Raises ClusterError."""
    give_up_at = time.monotonic() + JOIN_TIMEOUT_S
    for member in cluster.members.values():
        await member.wait_ready()
    missing: Sequence[str] = WORKERS
    while missing:
        try:
            missing = [
                f"{name} at {router}"
                for router, address in cluster.router_addresses.items()
                for status in [await _status(address)]
                for name in WORKERS
                if not any(_serves(each, name) for each in status.workers)
            ]
        except HeadraceError as error:
            missing = [f"a router: {error}"]
        if missing and time.monotonic() > give_up_at:
            raise ClusterError(
                f"after {JOIN_TIMEOUT_S:g} s there is still no {', '.join(missing)}; see {cluster.directory}"
            )
        await asyncio.sleep(POLL_S if missing else 0.0)


async def _status(address: str) -> StatusResponse:
    """What a router says of itself and its workers. Raises HeadraceError."""
    async with AsyncClient(address, api_key=UNDISTURBED) as client:
        return await client.status(timeout_s=5.0)


def _serves(worker: WorkerStatus, name: str) -> bool:
    return (
        worker.hello.worker_id == name
        and worker.connected
        and worker.HasField("report")
        and worker.report.state == WORKER_STATE_SERVING
    )


def _held(status: StatusResponse) -> str:
    """What is held that should not be, in words; empty where nothing is."""
    held = [
        f"{worker.hello.worker_id} {name} {getattr(worker.report, name)}"
        for worker in status.workers
        for name in ("leases", "pins", "private_blocks", "running_sequences", "waiting_sequences")
        if getattr(worker.report, name)
    ]
    held += [
        f"router {name} {getattr(status, name)}"
        for name in ("queued_requests", "running_requests")
        if getattr(status, name)
    ]
    return ", ".join(held)


def _describe(outcome: Outcome, tally: Tally) -> str:
    wrong = [f"{name} {value}" for name, value in vars_of(tally).items() if value and name != "requests"]
    late_s = outcome.ended_s - outcome.deadline_s
    facts = [f"{outcome.end} {outcome.cause}".strip(), f"{outcome.num_connections} connections", *wrong]
    if tally.overdue_requests:
        facts.append(f"{late_s:.2f} s late" + (", and ran on" if outcome.ran_on else ""))
    return f"{outcome.name}: {', '.join(facts)}"


def vars_of(tally: Tally) -> dict[str, int]:
    """Its numbers by name."""
    return {name: getattr(tally, name) for name in Tally.__slots__}
