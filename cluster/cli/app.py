"""The command's entry: sub-commands, and errors as one line each.

Exit codes: 0 done, 1 it failed, 2 it was called wrongly (also: a profile with problems), 130 interrupted.
"""

from __future__ import annotations

import os
import sys

import typer

from cluster.cli import ask, bench, cache, demo, drain, explain, lifecycle, models, plans, profiles, tenants
from cluster.cli.console import err, fail
from cluster.errors import ClusterError, LaunchError
from cluster.model_store import ModelStoreError
from cluster.problems import ProfileError
from headrace import HeadraceError, InvalidRequest

FAILED, WRONG, INTERRUPTED = 1, 2, 130
DEBUG_VARIABLE = "HEADRACE_DEBUG"

app = typer.Typer(
    help="Serve a large language model with prefill and decode on separate workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
lifecycle.add_to(app)
drain.add_to(app)
ask.add_to(app)
app.add_typer(models.app, name="model")
app.add_typer(profiles.app, name="profile")
app.add_typer(tenants.app, name="tenants")
app.add_typer(cache.app, name="cache")
app.add_typer(plans.app, name="plan")
explain.add_to(app)
bench.add_to(app)
demo.add_to(app)


def main() -> None:
    """Run the command and exit."""
    try:
        app()
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        sys.exit(_report(error))
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(INTERRUPTED)


def _report(error: Exception) -> int:
    """Say what went wrong; returns the exit code."""
    match error:
        case ProfileError():
            for problem in error.problems:
                fail(str(problem))
            return WRONG
        case LaunchError():
            fail(str(error))
            for line in error.log_tail:
                err.print(f"  {line}", markup=False, style="dim", soft_wrap=True)
            return FAILED
        case InvalidRequest():
            fail(str(error))
            return WRONG
        case ClusterError() | HeadraceError() | ModelStoreError():
            fail(str(error))
            return FAILED
        case _:
            kind = type(error).__name__
            fail(f"{kind}: {error} (a defect of Headrace; {DEBUG_VARIABLE}=1 shows where)")
            return FAILED
