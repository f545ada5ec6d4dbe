"""`headrace up`, `down`, `status`."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from rich.markup import escape
from rich.table import Table

from cluster.cli.console import LaunchProgress, err, out, print_json
from cluster.cli.profiles import plan_here
from cluster.errors import NotRunningError
from cluster.launch import down as take_down
from cluster.launch import running_cluster
from cluster.launch import up as bring_up
from cluster.plan import ROUTER_NAME
from cluster.profiles import find_profile
from cluster.readiness import fetch_status
from cluster.state import log_file, run_directory
from headrace.v1 import cluster_pb2, worker_pb2

PROFILE_HELP = "A profile's name (see deploy/profiles) or file."


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(up)
    app.command()(down)
    app.command()(status)


def up(
    profile: Annotated[str, typer.Argument(help=PROFILE_HELP)],
    address: Annotated[str, typer.Option(help="HOST:PORT of the head of a Ray cluster to run on.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds that the start may take.", min=1)] = 300.0,
) -> None:
    """Start a cluster and leave it running."""
    loaded = find_profile(profile)
    if not address:
        plan_here(loaded)
    with LaunchProgress() as progress:
        state = bring_up(loaded, address=address or None, timeout_s=timeout, progress=progress)
    out.print(f"[green]{state.profile}[/green] is up at [bold]{state.router_address}[/bold]")
    out.print('Try: headrace generate "Once upon a time"   Stop it: headrace down')


def down(
    forget: Annotated[
        bool, typer.Option("--forget", help="Also where its Ray cluster cannot be reached any more.")
    ] = False,
) -> None:
    """Stop what `headrace up` started."""
    with LaunchProgress() as progress:
        was_up = take_down(forget=forget, progress=progress)
    if not was_up:
        err.print("no cluster is up")


def status(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what the cluster is doing."""
    state = running_cluster()
    try:
        answer = fetch_status(state.router_address, bytes.fromhex(state.cluster_secret))
    except grpc.RpcError as error:
        reason = error.code().name if isinstance(error, grpc.Call) else str(error)
        log = log_file(run_directory(), ROUTER_NAME)
        message = f"the router at {state.router_address} does not answer ({reason}); its log is {log}"
        raise NotRunningError(message) from error
    if json:
        content = MessageToDict(
            answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        print_json({"router_address": state.router_address, **content})
        return
    out.print(_summary(state.router_address, answer))
    out.print(_workers_table(answer))


def _summary(address: str, status: cluster_pb2.StatusResponse) -> str:
    return (
        f"profile [bold]{status.profile}[/bold] serves [bold]{status.model}[/bold] at {address}, "
        f"up for {timedelta(seconds=round(status.uptime_s))}\n"
        f"requests: {status.running_requests} running, {status.queued_requests} queued "
        f"({status.queued_tokens} tokens), {status.finished_requests} finished, "
        f"{status.cancelled_requests} cancelled, {status.failed_requests} failed"
    )


def _workers_table(status: cluster_pb2.StatusResponse) -> Table:
    table = Table("worker", "state", "process", "cores", box=None, pad_edge=False)
    for heading in ("running", "waiting", "free blocks", "leases", "step"):
        table.add_column(heading, justify="right")
    for worker in sorted(status.workers, key=lambda worker: worker.hello.worker_id):
        hello, report = worker.hello, worker.report
        table.add_row(
            hello.worker_id,
            _state(worker),
            str(hello.pid),
            ",".join(map(str, hello.cpus)),
            str(report.running_sequences),
            str(report.waiting_sequences),
            f"{report.free_blocks}/{hello.num_blocks}",
            str(report.leases),
            f"{report.step_s * 1000:.1f} ms" if report.step_s else "–",
        )
    return table


def _state(worker: cluster_pb2.WorkerStatus) -> str:
    word = state_word(worker)
    if not worker.connected:
        return word if word == "gone" else f"[red]unreachable[/red] {escape(worker.last_error)}".rstrip()
    return f"[green]{word}[/green]" if word == "serving" else word


def state_word(worker: cluster_pb2.WorkerStatus) -> str:
    """What a worker last said that it was: `serving`, `no_new`, `kv_only`, `gone`."""
    state = worker.hello.state if worker.report.state == 0 else worker.report.state
    return worker_pb2.WorkerState.Name(state).removeprefix("WORKER_STATE_").lower()
