"""`headrace tenants key`."""

from __future__ import annotations

import re
import secrets
from typing import Annotated

import typer

from cluster.cli.console import err, out
from cluster.profile import NAME_PATTERN
from router.auth import key_digest

KEY_BYTES = 32

app = typer.Typer(help="Keys for those who share a cluster.", no_args_is_help=True)


@app.callback()
def _tenants() -> None:
    """Keeps `key` a sub-command though it is the only one."""


@app.command()
def key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The tenant, as the profile names it.")],
) -> None:
    """Draw an API key: print it, this once, and the line of the profile that lets it in.

    The profile holds only the key's digest, so it may be committed.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise typer.BadParameter(
            f"{name!r} is not up to 63 lower-case letters, digits, dots, dashes and underscores",
            param_hint="NAME",
        )
    drawn = f"hr-{secrets.token_urlsafe(KEY_BYTES)}"
    err.print("The key, which is not shown again, and its line under router.tenants in the profile:")
    out.print(drawn, markup=False, soft_wrap=True)
    out.print(f"{name}: {{keys: [{key_digest(drawn)}]}}", markup=False, soft_wrap=True)
