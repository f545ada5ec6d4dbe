"""What `headrace bench router` prints: each figure beside what other routers take."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from bench.report import BenchReport

PEERS = {
    "added_ttft_p50_ms_c1": "nginx 0.12, sglang-router 0.52, vllm-router 0.66",
    "requests_per_s": "vllm-router 4,400, sglang-router 5,500 (HTTP)",
    "cpu_s_per_1k_requests": "nginx 0.35, sglang-router 0.82, vllm-router 0.94",
    "cpu_s_per_1k_requests_saturated": "nginx 0.024, sglang-router 0.23, vllm-router 0.28",
    "cpu_s_per_100k_tokens": "nginx 1.3, sglang-router 2.6, vllm-router 3.3; gRPC relay, a stream per request 10.5",
}
"""P/D, round robin, in front of mock workers, measured once on such a machine (2 cores) when nothing else ran there."""


@dataclass(frozen=True, slots=True)
class RouterReport:
    """A report with the peers in a column of its own."""

    report: BenchReport

    def to_json(self) -> str:
        """The object that `--json` prints."""
        return self.report.to_json()

    def show(self, console: Console) -> None:
        """A table for people."""
        table = Table(title=self.report.bench, title_justify="left")
        table.add_column("metric")
        table.add_column("value", justify="right")
        table.add_column("peers, on another day")
        for name, value in self.report.metrics.items():
            number = f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"
            table.add_row(name, number, PEERS.get(name, ""))
        console.print(table)
        host = ", ".join(f"{key} {value}" for key, value in self.report.host.items())
        for note in (*self.report.notes, host):
            console.print(f"[dim]{note}[/dim]")
