"""Does a cluster lose, repeat or change a token, whatever is done to it?

2P2D with two routers and a store, real processes and sockets, fidelity exact. Round after round a load is answered
undisturbed, and then again, as another tenant, under faults that a seed chose (`bench.chaos_plan`): processes killed
and stopped, links cut, slowed and corrupted, a full disk, clocks that jump, messages that come twice and late, clients
that vanish. Answers are compared token for token; afterwards nothing may be held, and nothing may have outlived its
deadline.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from bench.chaos_cluster import ChaosCluster, ClusterSizes
from bench.chaos_journal import Journal
from bench.chaos_load import LoadSizes, conversations
from bench.chaos_plan import KILLS, Fault, Kind, Limits, Pace, kinds_of, plan, round_seed, share_of_kills
from bench.chaos_round import Round, RoundResult, vars_of, wait_whole
from bench.chaos_verdict import Tally
from bench.prompts import documentation
from bench.report import BenchReport, percentile
from cluster.errors import ClusterError
from cluster.model_store import resolve
from text.tokenizer import Tokenizer

MODEL = "smollm2-135m-instruct"
PRECISION = "int8"
DEFAULT_FAULTS = 200
FAULTS_A_ROUND = 8
TEXT_CHARS = 120_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """A campaign's size and shape. `keep`: a directory for the processes' logs, instead of a temporary one."""

    seed: int
    num_faults: int
    cluster: ClusterSizes
    load: LoadSizes = field(default_factory=LoadSizes)
    limits: Limits = field(default_factory=Limits)
    pace: Pace = field(default_factory=Pace)
    num_clients: int = 6
    faults_a_round: int = FAULTS_A_ROUND
    journal: Path | None = None
    keep: Path | None = None

    @property
    def num_rounds(self) -> int:
        """The last may be shorter."""
        return -(-self.num_faults // self.faults_a_round)

    def faults_of(self, number: int) -> list[Fault]:
        """What a round injects."""
        first = number * self.faults_a_round
        kinds = kinds_of(self.seed, self.num_faults)[first : first + self.faults_a_round]
        return plan(round_seed(self.seed, number), kinds, self.limits, self.pace)


def run(console: Console, faults: str = "", seed: str = "", resume: str = "", keep: str = "") -> BenchReport:
    """A campaign on the real model. Raises ClusterError."""
    campaign = Campaign(
        seed=int(seed) if seed else secrets.randbits(31),
        num_faults=int(faults) if faults else DEFAULT_FAULTS,
        cluster=ClusterSizes(model_dir=resolve(MODEL), model_name=MODEL, precision=PRECISION),
        journal=Path(resume) if resume else None,
        keep=Path(keep) if keep else None,
    )
    return report(campaign, conduct(campaign, console))


def conduct(campaign: Campaign, console: Console) -> list[RoundResult]:
    """Every round that the journal lacks, one after the other; all of them. Raises ClusterError."""
    facts = {
        "seed": campaign.seed,
        "faults": campaign.num_faults,
        "model": campaign.cluster.model_name,
        "precision": campaign.cluster.precision,
    }
    try:
        journal = Journal(campaign.journal, facts)
    except ValueError as error:
        raise ClusterError(str(error)) from None
    missing = [number for number in range(campaign.num_rounds) if number not in journal.rounds]
    console.print(
        f"chaos: seed {campaign.seed}, {campaign.num_faults} faults in {campaign.num_rounds} rounds"
    )
    if missing:
        with tempfile.TemporaryDirectory(prefix="headrace-chaos-") as temporary:
            directory = campaign.keep or Path(temporary)
            directory.mkdir(parents=True, exist_ok=True)
            asyncio.run(_rounds(campaign, missing, journal, directory, console))
    return [journal.rounds[number] for number in sorted(journal.rounds)]


async def _rounds(
    campaign: Campaign, missing: Sequence[int], journal: Journal, directory: Path, console: Console
) -> None:
    text = real_text(campaign.cluster.model_dir)
    cluster = ChaosCluster(campaign.cluster, campaign.limits, directory, random.Random(campaign.seed))
    with console.status("chaos: starting …") as status:
        try:
            await cluster.start()
            await wait_whole(cluster)
            for number in missing:
                seed = round_seed(campaign.seed, number)
                head = f"round {number + 1} of {campaign.num_rounds} (seed {seed})"
                load = conversations(seed, text, campaign.load)
                each = Round(cluster, number, seed, load, campaign.num_clients)
                result = await each.run(campaign.faults_of(number), _teller(status.update, head))
                journal.add(result)
                _tell_result(console, head, result)
        finally:
            await cluster.stop()


def real_text(model_dir: Path) -> list[int]:
    """Tokens of the documentation that every Python installation carries."""
    return Tokenizer.open(model_dir).encode(documentation()[:TEXT_CHARS])


def report(campaign: Campaign, rounds: Sequence[RoundResult]) -> BenchReport:
    """All rounds together."""
    total, kinds = Tally(), Counter[Kind]()
    by_kind: dict[str, list[float]] = {}
    for each in rounds:
        total.add(each.tally)
        kinds.update(fault.kind for fault in each.faults)
        for kind, found in each.recoveries_s.items():
            by_kind.setdefault(kind, []).extend(found)
    metrics: dict[str, float] = {"faults": kinds.total()}
    metrics |= vars_of(total)
    metrics |= {
        "other_than_kills_share": 1.0 - share_of_kills(list(kinds.elements())),
        "flipped_frames": sum(each.num_flipped for each in rounds),
        "reconnects": sum(each.num_reconnects for each in rounds),
    }
    metrics |= _recovery("recovery", [seconds for found in by_kind.values() for seconds in found])
    killed = [seconds for kind, found in by_kind.items() if Kind(kind) in KILLS for seconds in found]
    metrics |= _recovery("recovery_kill", killed)
    metrics |= {f"faults_{kind}": kinds[kind] for kind in Kind}
    ends = sum((Counter(each.ends) for each in rounds), Counter[str]())
    notes = (
        f"seed {campaign.seed}, rounds {', '.join(str(each.seed) for each in rounds)}",
        f"{campaign.cluster.model_name} {campaign.cluster.precision}, 2P2D, {campaign.num_clients} clients; "
        f"requests ended: {', '.join(f'{end} {count}' for end, count in sorted(ends.items()))}",
        *(
            f"round {each.number} (seed {each.seed}): {problem}"
            for each in rounds
            for problem in each.problems
        ),
    )
    return BenchReport("chaos", metrics, notes)


def _recovery(name: str, found: Sequence[float]) -> dict[str, float]:
    """Of the streams that were held up, where any were."""
    if not found:
        return {f"{name}_streams": 0}
    return {
        f"{name}_streams": len(found),
        f"{name}_p50_s": percentile(found, 50),
        f"{name}_p95_s": percentile(found, 95),
        f"{name}_max_s": max(found),
    }


def _teller(update: Callable[[str], None], head: str) -> Callable[[str], None]:
    return lambda what: update(f"chaos: {head}: {what} …")


def _tell_result(console: Console, head: str, result: RoundResult) -> None:
    verdict = "nothing lost" if result.tally.is_clean else "[red]not clean[/red]"
    console.print(f"{head}: {len(result.faults)} faults, {result.tally.requests} requests, {verdict}")
    for problem in result.problems:
        console.print(f"  {problem}", markup=False)
