"""`headrace drain`, `headrace restart`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import typer
from rich.status import Status

from cluster.cli.console import err, out
from cluster.cli.lifecycle import state_word
from cluster.draining import Operator, begin_drain, drain, named, operator, undo_drain
from cluster.launch import START_TIMEOUT_S, running_cluster
from cluster.restarting import ray_of, restart
from cluster.state import ClusterState, run_directory
from headrace.v1 import cluster_pb2, worker_pb2

Timeout = Annotated[
    float | None,
    typer.Option(
        help="Seconds after which another worker goes on with what still runs; 0: at once. Default: wait for it.",
        min=0,
    ),
]


class Goal(StrEnum):
    """Where a drained worker ends."""

    KV_ONLY = "kv-only"
    GONE = "gone"

    @property
    def state(self) -> worker_pb2.WorkerState:
        """As the protocol calls it."""
        return worker_pb2.WORKER_STATE_GONE if self is Goal.GONE else worker_pb2.WORKER_STATE_KV_ONLY


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("drain")(drain_worker)
    app.command("restart")(restart_workers)


def drain_worker(
    worker: Annotated[str, typer.Argument(help="A worker's id, as `headrace status` shows it.")],
    to: Annotated[
        Goal,
        typer.Option(
            help="kv-only: keeps serving its cached blocks, and can be undone. gone: ends for good."
        ),
    ] = Goal.KV_ONLY,
    timeout: Timeout = None,
    undo: Annotated[bool, typer.Option("--undo", help="Have it serve again.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Return when it is there, or when it was told.")
    ] = True,
) -> None:
    """Take a worker out of service: it gets nothing new, and what it has is finished or goes on elsewhere."""
    if timeout is not None and (undo or not wait):
        raise typer.BadParameter("--timeout goes with waiting for a drain", param_hint="--timeout")
    with _cluster(running_cluster()) as cluster:
        if undo:
            undo_drain(cluster, worker)
            out.print(f"{worker} serves", markup=False)
            return
        if not wait:
            begin_drain(cluster, worker, to.state)
            out.print(f"{worker} drains", markup=False)
            return
        with _shown(worker) as shown:
            drain(cluster, worker, to.state, timeout_s=timeout, watch=shown.show)
    out.print(f"{worker} is {to}", markup=False)


def restart_workers(
    workers: Annotated[
        list[str] | None, typer.Argument(metavar="[WORKER]...", help="Workers' ids, in this order.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every worker of the cluster.")] = False,
    timeout: Timeout = None,
) -> None:
    """Start workers anew one after the other, each once the one before serves again; nothing is lost."""
    if bool(workers) == every:
        raise typer.BadParameter("name workers, or give --all", param_hint="WORKER")
    state = running_cluster()
    with _cluster(state) as cluster, ray_of(state, run_directory()):
        known = cluster.workers()
        chosen = workers or [name for name, status in sorted(known.items()) if status.connected]
        for worker in chosen:
            named(known, worker)
        for worker in chosen:
            with _shown(worker) as shown:
                restart(
                    cluster,
                    worker,
                    run_directory(),
                    timeout_s=timeout,
                    start_timeout_s=START_TIMEOUT_S,
                    watch=shown.show,
                )
            out.print(f"{worker} serves anew", markup=False)


@contextmanager
def _cluster(state: ClusterState) -> Iterator[Operator]:
    with operator(state.router_address, bytes.fromhex(state.cluster_secret)) as cluster:
        yield cluster


class _Shown:
    """How far a worker is: one line that changes on a terminal, a line for each state elsewhere."""

    def __init__(self, worker: str, line: Status) -> None:
        self._worker = worker
        self._line = line
        self._said = ""

    def show(self, status: cluster_pb2.WorkerStatus) -> None:
        report = status.report
        state = state_word(status) if status.connected else "away"
        left = (
            f"{report.running_sequences} running, {report.waiting_sequences} waiting, {report.leases} leases"
        )
        self._line.update(f"{self._worker}: {state}; {left}")
        if not err.is_terminal and state != self._said:
            err.print(f"{self._worker}: {state}; {left}", markup=False, soft_wrap=True)
        self._said = state


@contextmanager
def _shown(worker: str) -> Iterator[_Shown]:
    with err.status(f"{worker}: asked") as line:
        yield _Shown(worker, line)
