"""`headrace plan kv`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cluster.cli.console import note, out, print_json
from cluster.kv_plan import CODEC_RATIOS, KvPlan, plan_kv
from cluster.model_store import ModelNotFoundError, resolve
from cluster.units import UnitError, parse_rate, parse_size, parse_tokens
from engine.models.config_keys import ModelConfigError
from engine.models.families import AnyConfig, open_config
from engine.models.layouts import kv_dtypes
from engine.models.published_models import published_config, published_names

_WHOLE = "; its entries have one head, so that GPUs that share a layer keep all of them each"

app = typer.Typer(help="Work out what a model takes, without running it.", no_args_is_help=True)


@app.callback()
def _plan() -> None:
    """Keeps `kv` a sub-command though it is the only one."""


@app.command()
def kv(
    model: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(published_names())}, a prepared model, or a directory with a config.json."
        ),
    ],
    context: Annotated[str, typer.Option(help="Tokens, such as 8192, 128K or 1M.")] = "128K",
    kv_dtype: Annotated[
        str, typer.Option(help="How the cache is kept: bfloat16, float32, or fp8 for DeepSeek's models.")
    ] = "bfloat16",
    codec: Annotated[str, typer.Option(help=f"On the link: {', '.join(CODEC_RATIOS)}.")] = "raw",
    link: Annotated[
        str, typer.Option(help="What it travels over, such as 10Gbit.", metavar="RATE")
    ] = "400Gbit",
    kv_memory: Annotated[
        str, typer.Option(help="Of one GPU's memory, what is left for the cache.", metavar="SIZE")
    ] = "64GiB",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show how large a context's cache is, how long it travels, and how many fit a GPU."""
    config = _config(model)
    if kv_dtype not in kv_dtypes(config):
        raise typer.BadParameter(f"{kv_dtype}: this model's cache is kept as {', '.join(kv_dtypes(config))}")
    if codec not in CODEC_RATIOS:
        raise typer.BadParameter(f"{codec}: codecs are {', '.join(CODEC_RATIOS)}")
    if codec != "raw" and kv_dtype != "bfloat16":
        raise typer.BadParameter(f"{codec}: its ratio has been measured for bfloat16, not for {kv_dtype}")
    try:
        planned = plan_kv(
            config,
            parse_tokens(context),
            kv_dtype=kv_dtype,
            codec_ratio=CODEC_RATIOS[codec],
            link_bits_per_s=parse_rate(link),
            memory_bytes=parse_size(kv_memory),
        )
    except UnitError as error:
        raise typer.BadParameter(f"{error}; {error.expected} is needed") from error
    if as_json:
        print_json({"model": model, "codec": codec, "link": link, **_as_json(planned)})
        return
    _show(planned, model, codec, link, kv_memory)


def _config(model: str) -> AnyConfig:
    if model in published_names():
        return published_config(model)
    try:
        return open_config(Path(model) if "/" in model or model.startswith(".") else resolve(model))
    except (ModelConfigError, ModelNotFoundError) as error:
        known = ", ".join(published_names())
        raise typer.BadParameter(f"{error}; known without being prepared are {known}") from error


def _as_json(planned: KvPlan) -> dict[str, object]:
    """`kv_bytes`: the whole context's in bfloat16, whatever it is kept as."""
    facts = asdict(planned)
    facts["kv_bytes"] = facts.pop("bf16_bytes")
    return facts


def _show(planned: KvPlan, model: str, codec: str, link: str, kv_memory: str) -> None:
    table = Table("plane", "layers", "entries", "bytes", "a token more", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for plane in planned.planes:
        growth = "window" if plane.is_window else f"{plane.bytes_per_token:,.0f} B"
        table.add_row(plane.name, str(plane.layers), f"{plane.entries:,}", _size(plane.kv_bytes), growth)
    out.print(table)
    lines = [
        f"{model}, {planned.context_tokens:,} tokens in {planned.kv_dtype}",
        f"cache {_size(planned.cache_bytes)}, tails {_size(planned.tail_bytes)}, "
        f"{planned.bytes_per_token:,.0f} B a token more",
        f"in bfloat16 {_size(planned.bf16_bytes)}; weights as published {_size(planned.weights_bytes)}",
        f"fixed part {_size(planned.fixed_bytes)}, at most {_size(planned.most_fixed_bytes)}",
        f"wire {_size(planned.wire_bytes)} as {codec}, {_time(planned.wire_s)} at {link}",
        f"{planned.num_fit} such requests fit {kv_memory} of one GPU"
        + (_WHOLE if planned.is_replicated else ""),
    ]
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)
    if planned.context_tokens > planned.max_context:
        note(f"the model's positions are good for {planned.max_context:,} tokens")


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.2f} {unit}"
    return f"{num_bytes} B"


def _time(duration_s: float | None) -> str:
    assert duration_s is not None
    return f"{duration_s:.2f} s" if duration_s >= 1 else f"{1e3 * duration_s:.1f} ms"
