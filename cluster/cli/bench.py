"""`headrace bench NAME`: hands over to the bench package, which lies above this one."""

from __future__ import annotations

import importlib
import importlib.util
import signal
import sys
from typing import Annotated, Protocol, cast

import typer
from rich.console import Console

from cluster.cli.console import err, out
from cluster.problems import nearest_name, one_of

NAMES = (
    "isolation",
    "handoff",
    "transfer",
    "long_cache",
    "windows",
    "codecs",
    "tiers",
    "engine",
    "drafts",
    "pd",
    "router",
    "chaos",
    "overload",
    "replay",
    "shapes",
)


class Report(Protocol):
    """What a benchmark gives."""

    def to_json(self) -> str:
        """One object."""
        ...

    def show(self, console: Console) -> None:
        """For people."""
        ...


class Benchmark(Protocol):
    """A module of the bench package."""

    def run(self, console: Console, **options: str) -> Report:
        """Measure, telling `console` how far it is. Raises ClusterError."""
        ...


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(bench)


def bench(
    name: Annotated[str, typer.Argument(help="Which benchmark. Left out: an error that lists them.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    link: Annotated[
        str, typer.Option(help="transfer only: over a link of this rate, such as 1Gbit.", metavar="RATE")
    ] = "",
    compare: Annotated[
        str,
        typer.Option(
            help="engine, pd: beside a peer, vllm=PATH of its environment (engine: llama-cpp=PATH too).",
            metavar="PEER=PATH",
        ),
    ] = "",
    faults: Annotated[int | None, typer.Option(help="chaos only: how many; 200 by itself.", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="chaos only: of the faults and the load.")] = None,
    resume: Annotated[
        str,
        typer.Option(help="chaos only: keep finished rounds here, and go on behind them.", metavar="FILE"),
    ] = "",
    keep: Annotated[
        str, typer.Option(help="chaos only: keep the processes' logs here.", metavar="DIRECTORY")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="router only: one short run.")] = False,
    trace: Annotated[
        str,
        typer.Option(help="replay only: requests of a real service, to be asked again.", metavar="FILE"),
    ] = "",
    seconds: Annotated[
        float | None,
        typer.Option(help="overload only: of load at the capacity, and beyond it; 60 by itself.", min=1.0),
    ] = None,
) -> None:
    """Run a benchmark and print what it measured."""
    # Looked up by name, because `bench` stands above `cluster` in the order of imports.
    there = [each for each in NAMES if importlib.util.find_spec(f"bench.{each}")]
    if name not in there:
        raise typer.BadParameter(_unknown(name, there), param_hint="NAME")
    if link and name != "transfer":
        raise typer.BadParameter(f"{name} has no link", param_hint="--link")
    if compare and name not in ("engine", "pd"):
        raise typer.BadParameter(f"{name} compares with nobody", param_hint="--compare")
    numbers = {"faults": faults, "seed": seed}
    chaos = {key: "" if value is None else str(value) for key, value in numbers.items()}
    chaos |= {"resume": resume, "keep": keep}
    if any(chaos.values()) and name != "chaos":
        raise typer.BadParameter(f"{name} has no faults", param_hint="--faults, --seed, --resume, --keep")
    if quick and name != "router":
        raise typer.BadParameter(f"{name} has one length", param_hint="--quick")
    if seconds is not None and name != "overload":
        raise typer.BadParameter(f"{name} has a length of its own", param_hint="--seconds")
    if bool(trace) != (name == "replay"):
        problem = f"{name} replays nothing" if trace else "replay needs a trace of requests"
        raise typer.BadParameter(problem, param_hint="--trace")
    benchmark = cast(Benchmark, importlib.import_module(f"bench.{name}"))
    given = {"link": link, "compare": compare, "quick": "yes" if quick else "", "trace": trace, **chaos}
    given["seconds"] = "" if seconds is None else str(seconds)
    # As Ctrl-C: whatever the benchmark started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    report = benchmark.run(err, **{key: value for key, value in given.items() if value})
    if json:
        out.print(report.to_json(), markup=False, soft_wrap=True)
    else:
        report.show(out)


def _unknown(name: str, there: list[str]) -> str:
    known = f"there is {one_of(there)}" if there else "this installation has none"
    nearest = nearest_name(name, there)
    hint = f'; did you mean "{nearest}"?' if nearest else ""
    return f'"{name}" is not a benchmark{hint}; {known}' if name else known
