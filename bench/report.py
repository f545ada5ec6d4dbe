"""What a benchmark gives: flat numbers, and on what they were measured."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

_LIBRARIES = ("torch", "grpcio", "ray")


@dataclass(frozen=True, slots=True)
class BenchReport:
    """One run. `metrics` are the names of the design's table; `notes` say what the numbers alone do not."""

    bench: str
    metrics: dict[str, float]
    notes: tuple[str, ...] = ()
    host: dict[str, str] = field(default_factory=lambda: describe_host())

    def to_json(self) -> str:
        """The object that `--json` prints."""
        return json.dumps(
            {"bench": self.bench, "host": self.host, "metrics": self.metrics, "notes": self.notes}
        )

    def show(self, console: Console) -> None:
        """A table for people."""
        table = Table(title=self.bench, title_justify="left")
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name, value in self.metrics.items():
            table.add_row(name, f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}")
        console.print(table)
        for note in (*self.notes, ", ".join(f"{key} {value}" for key, value in self.host.items())):
            console.print(f"[dim]{note}[/dim]")


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear-interpolated percentile; NaN of nothing."""
    return float(np.percentile(values, percent)) if len(values) else float("nan")


def times_as_fast(name: str, value: float, peer: float) -> float:
    """How many times as fast as a peer, of a metric of this name: milliseconds or a rate."""
    return peer / value if "_ms_" in name else value / peer


def describe_host() -> dict[str, str]:
    """Processor, cores, memory and the versions that matter."""
    return {
        "cpu": _cpu_name(),
        "cores": str(psutil.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
