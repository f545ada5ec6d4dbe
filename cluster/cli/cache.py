"""`headrace cache ls | stat | verify | gc`: what this machine's cache tiers hold.

Beside a running cluster its store is asked; otherwise the directory is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from cluster.cli.console import err, out, print_json
from cluster.errors import ClusterError
from cluster.secret import kept_secret
from cluster.state import read_state, run_directory
from cluster.stores import disk_directory, store_address
from kvtransfer.tiers.client import StoreClient, StoreUnavailable
from kvtransfer.tiers.directory import DirectoryInUse
from kvtransfer.tiers.offline import gc_directory, list_directory, stat_directory, verify_directory
from kvtransfer.tiers.store_types import VerifyProgress

DEFAULT_DIRECTORY = "kv"

app = typer.Typer(help="Look into, check and clean this machine's KV cache tiers.", no_args_is_help=True)
Directory = Annotated[
    str,
    typer.Option(
        "--dir",
        help="A disk tier's directory. Default: the running cluster's store, else kv in HEADRACE_HOME.",
        metavar="DIR",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("ls")
def list_entries(directory: Directory = "", json: Json = False) -> None:
    """Show what is held: a line for each segment on disk, and for each tenant in memory."""
    store = _running_store(directory)
    with _told():
        entries = store.entries() if store else list_directory(_directory(directory), _secret())
    if json:
        print_json({"entries": [_plain(entry) for entry in entries]})
        return
    table = Table("tier", "name", "tenant", "fidelity", box=None)
    for heading in ("blocks", "bytes"):
        table.add_column(heading, justify="right")
    for entry in entries:
        blocks, size = f"{entry.num_records:,}", _size(entry.num_bytes)
        table.add_row(entry.tier, entry.name, entry.tenant.hex()[:12], str(entry.fidelity), blocks, size)
    out.print(table)


@app.command("stat")
def show_figures(directory: Directory = "", json: Json = False) -> None:
    """Show how full the tiers are, and how they are."""
    store = _running_store(directory)
    with _told():
        figures = store.stat() if store else stat_directory(_directory(directory), _secret())
    if json:
        print_json(_plain(figures))
        return
    table = Table("figure", box=None, show_header=False)
    table.add_column(justify="right")
    for name, value in _flat(_plain(figures)):
        table.add_row(name, value)
    out.print(table)


@app.command("verify")
def verify(directory: Directory = "", json: Json = False) -> None:
    """Read every block on disk and check it. Exits with 1 where some are damaged."""
    store = _running_store(directory)
    with _told():
        steps = store.verify() if store else verify_directory(_directory(directory), _secret())
        outcome = _watch(steps)
    if json:
        print_json(_plain(outcome))
    else:
        out.print(f"{outcome.done:,} blocks, {_size(outcome.num_bytes)}: {outcome.bad:,} damaged")
    if outcome.bad:
        raise typer.Exit(1)


@app.command("gc")
def collect_garbage(directory: Directory = "", json: Json = False) -> None:
    """Remove files that no store can use: torn ones, another cluster's, another version's."""
    store = _running_store(directory)
    with _told():
        removed = store.gc() if store else gc_directory(_directory(directory), _required_secret())
    if json:
        print_json(_plain(removed))
    else:
        out.print(f"removed {removed.files:,} files, {_size(removed.file_bytes)}")


class _told:
    """What may go wrong here, as errors that the command reports in one line."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise ClusterError(
                f"there is no cache in {error.filename or error}; --dir names another"
            ) from error
        if isinstance(error, StoreUnavailable | DirectoryInUse | OSError):
            raise ClusterError(str(error)) from error


def _running_store(directory: str) -> StoreClient | None:
    """The store of the cluster that is up here, unless a directory is asked for."""
    state = None if directory else read_state(run_directory())
    if state is None or state.is_stale or not any(name.startswith("store-") for name in state.actors):
        return None
    secret = bytes.fromhex(state.cluster_secret)
    return StoreClient(store_address(secret), secret)


def _directory(given: str) -> Path:
    path = Path(given) if given else disk_directory(DEFAULT_DIRECTORY)
    if not path.is_dir():
        raise ClusterError(f"there is no cache in {path}; --dir names another")
    return path


def _secret() -> bytes | None:
    return kept_secret(run_directory())


def _required_secret() -> bytes:
    secret = _secret()
    if secret is None:
        raise ClusterError(
            "no cluster was started from this HEADRACE_HOME: nothing says which files are its own"
        )
    return secret


def _watch(steps: Iterator[VerifyProgress]) -> VerifyProgress:
    """Show how far it is; returns the last step."""
    last = VerifyProgress(0, 0, 0, 0)
    columns = (TextColumn("checking"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=None)
        for last in steps:
            bar.update(task, completed=last.done, total=last.total)
    return last


def _plain(value: object) -> object:
    """Dataclasses, paths and bytes as JSON has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, bytes):
        return value.hex()
    return str(value) if isinstance(value, Path) else value


def _flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _flat(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            label = each.get("tier", index) if isinstance(each, dict) else index
            yield from _flat(each, f"{name}.{label}")
    else:
        yield name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
