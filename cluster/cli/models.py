"""`headrace model prepare | list`."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster.cli.console import err, out
from cluster.model_store import ModelNotFoundError, list_models, prepare, resolve, store_root
from cluster.model_store.random_model import random_names

COMPILE_TIMEOUT_S = 600.0

app = typer.Typer(help="Prepare models for serving, and list them.", no_args_is_help=True)


@app.command("prepare")
def prepare_model(
    source: Annotated[
        str,
        typer.Argument(
            help="A GGUF file, a Hugging Face style directory, an installed package with a GGUF, or a model with "
            f"random weights: {', '.join(random_names())}."
        ),
    ],
    name: Annotated[str, typer.Option(help="What to call it. Default: made from the source.")] = "",
    if_missing: Annotated[
        bool, typer.Option("--if-missing", help="Do nothing where a model of this name is prepared.")
    ] = False,
) -> None:
    """Turn a model into a directory that workers open, once."""
    if if_missing and not name:
        raise typer.BadParameter("--if-missing needs --name")
    if if_missing and _is_prepared(name):
        err.print(f"model {name} is prepared", markup=False)
        _compile_kernels(resolve(name))
        return
    columns = (TextColumn("{task.description:<10}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, fraction: float) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=1.0)
            bars.update(tasks[stage], completed=fraction)

        directory = prepare(source, name=name or None, progress=report)
    _compile_kernels(directory)
    out.print(f"prepared {directory.name} in {directory}", markup=False, soft_wrap=True)


@app.command("list")
def list_prepared() -> None:
    """Show the prepared models."""
    found = list_models()
    if not found:
        err.print(f"no models in {store_root() / 'models'}", markup=False, soft_wrap=True)
        return
    table = Table("model", "context", "source", "weights", box=None)
    for model in found:
        table.add_row(model.name, str(model.max_context), model.source, model.weights_digest[:12])
    out.print(table)


def _compile_kernels(directory: Path) -> None:
    """In a process of its own, which loads torch. Where it fails a worker will compile for itself, or say what is
    wrong with the model."""
    waiting = err.status("compiling the engine's kernels for this machine (once, about a minute) …")
    with waiting, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, "-m", "engine.compiling", str(directory)],
            timeout=COMPILE_TIMEOUT_S,
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def _is_prepared(name: str) -> bool:
    try:
        resolve(name)
    except ModelNotFoundError:
        return False
    return True
