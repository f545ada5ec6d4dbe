"""`headrace explain`: why a request was placed where it was."""

from __future__ import annotations

from typing import Annotated

import typer
from google.protobuf.json_format import MessageToDict
from rich.markup import escape
from rich.table import Table

from cluster.cli.console import out, print_json
from cluster.draining import operator
from cluster.launch import running_cluster
from headrace.v1 import cluster_pb2


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(explain)


def explain(
    request_id: Annotated[str, typer.Argument(metavar="REQUEST_ID", help="As the client gave or got it.")],
    tenant: Annotated[str, typer.Option(help="Whose request it is.")] = "default",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show where a request was placed, and what placement weighed."""
    state = running_cluster()
    with operator(state.router_address, bytes.fromhex(state.cluster_secret)) as cluster:
        answer = cluster.explain(tenant, request_id)
    if json:
        print_json(MessageToDict(answer, preserving_proto_field_name=True))
        return
    out.print(f"request [bold]{escape(answer.request_id)}[/bold] is {answer.state}")
    for decision in answer.decisions:
        _show(decision)


def _show(decision: cluster_pb2.PlacementDecision) -> None:
    ended = f", ended by {decision.ended}" if decision.ended else ""
    predicted = f"; first token predicted after {_ms(decision.predicted_ttft_s)}"
    out.print(
        f"\nattempt {decision.attempt}, {decision.age_s:.1f} s ago, policy {decision.policy}{ended}\n"
        f"{escape(decision.reason)}{predicted if decision.predicted_ttft_s else ''}"
    )
    for role, candidates in (("decode", decision.decode), ("prefill", decision.prefill)):
        if candidates:
            out.print(_table(role, candidates))


def _table(role: str, candidates: object) -> Table:
    table = Table("", role, box=None, pad_edge=False)
    for heading in ("cost", "queue", "compute", "transfer", "step", "cached", "ahead", "free blocks"):
        table.add_column(heading, justify="right")
    table.add_column("note")
    for each in candidates:  # type: ignore[attr-defined]  # a repeated field of Candidate
        times = (each.cost_s, each.queue_s, each.compute_s, each.transfer_s, each.step_s)
        counts = (each.cached_tokens, each.tokens_ahead, each.free_blocks)
        mark = "[green]→[/green]" if each.chosen else ""
        table.add_row(mark, each.worker_id, *map(_ms, times), *map(str, counts), escape(each.note))
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds else "–"
