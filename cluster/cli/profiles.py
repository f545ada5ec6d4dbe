"""`headrace profile check | show | schema`."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.cli.console import note, out, print_json
from cluster.explain import explain, render
from cluster.launch import find_model
from cluster.machine import this_machine
from cluster.memory import ModelFacts
from cluster.plan import ClusterPlan, plan
from cluster.problems import ProfileError
from cluster.profile import LoadedProfile, json_schema
from cluster.profiles import find_profile
from engine.models.published_models import published_config, published_names
from engine.models.shapes import published_bytes

app = typer.Typer(help="Check, show and describe profiles.", no_args_is_help=True)

Name = Annotated[
    str, typer.Argument(metavar="PROFILE", help="A profile's name (see deploy/profiles) or file.")
]


@app.command()
def check(
    profile: Name,
    anywhere: Annotated[
        bool, typer.Option("--anywhere", help="Leave out whether this machine has what the profile wants.")
    ] = False,
) -> None:
    """Report everything that is wrong with a profile, each with its place in the file."""
    loaded = find_profile(profile)
    if anywhere:
        _facts(loaded)
    else:
        plan_here(loaded)
    out.print(f"{loaded.file}: good", markup=False, soft_wrap=True)


@app.command()
def show(profile: Name) -> None:
    """Print the whole of a profile, and where each value came from."""
    loaded = find_profile(profile)
    out.print(render(explain(loaded, plan_here(loaded))), markup=False, soft_wrap=True)


@app.command()
def schema() -> None:
    """Print the JSON Schema of profiles, for editors."""
    print_json(json_schema())


def plan_here(loaded: LoadedProfile) -> ClusterPlan:
    """The plan for this machine. Raises ProfileError."""
    return plan(loaded, [this_machine()], _facts(loaded))


def _facts(loaded: LoadedProfile) -> ModelFacts:
    """Of the model, at hand or not; notes what stands in the way of serving it."""
    name = loaded.profile.model.path
    try:
        return find_model(loaded).facts
    except ProfileError as error:
        if name not in published_names():
            for problem in error.problems:
                note(str(problem))
            return ModelFacts()
    config = published_config(name)
    weights_bytes = published_bytes(config)
    note(
        f"{name} can be planned for, not served: its weights, {weights_bytes / 1e9:.0f} GB as published, need parallel "
        f"workers (one model over several GPUs), which are not built yet; `headrace plan kv --model {name}` shows its "
        "cache"
    )
    # A worker's part of the weights is not known while there are no parallel workers.
    return ModelFacts(max_context=config.max_context, config=config)
