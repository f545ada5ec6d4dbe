"""How the command speaks: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress as RichBars
from rich.progress import SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def fail(message: str) -> None:
    """One line on what went wrong."""
    err.print("[red]error:[/red]", end=" ")
    err.print(message, markup=False, soft_wrap=True)


def note(message: str) -> None:
    """Something that is worth knowing and stops nothing."""
    err.print("[yellow]note:[/yellow]", end=" ")
    err.print(message, markup=False, soft_wrap=True)


def print_json(content: object) -> None:
    """One JSON object, as programs like it."""
    out.print(json.dumps(content, indent=2, ensure_ascii=False), markup=False, soft_wrap=True)


def stream(text: str) -> None:
    """A piece of an answer, at once and unchanged."""
    sys.stdout.write(text)
    sys.stdout.flush()


class LaunchProgress:
    """Shows what a launch is doing: a spinner for each part on a terminal, a line for each elsewhere."""

    def __init__(self) -> None:
        columns = (SpinnerColumn(finished_text="[green]✓[/green]"), TextColumn("{task.fields[name]:<12}"))
        texts = (TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self._bars = RichBars(*columns, *texts, console=err, disable=not err.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def begin(self, name: str, doing: str) -> None:
        """Start a spinner."""
        self._tasks[name] = self._bars.add_task(doing, total=1, name=name)

    def end(self, name: str, result: str) -> None:
        """Turn it into a tick."""
        self._bars.update(self._tasks[name], description=result, completed=1)
        if not err.is_terminal:
            err.print(f"{name}: {result}", markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
