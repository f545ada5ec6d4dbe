"""Where requests' time went, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from headrace import Answer, Timing, Usage


def stages_table(answers: Sequence[tuple[str, Answer]]) -> Table:
    """One column for each finished answer."""
    table = Table(title="Where the time went", title_justify="left")
    table.add_column("stage")
    for name, _ in answers:
        table.add_column(name, justify="right")
    rows = [_rows(answer.timing, answer.usage) for _, answer in answers]
    for labels in zip(*rows, strict=True):
        table.add_row(labels[0][0], *(value for _, value in labels))
    return table


def _rows(timing: Timing, usage: Usage) -> list[tuple[str, str]]:
    # The first token is prefill's; decode's time runs from it to the last.
    decoded = max(usage.completion_tokens - 1, 0)
    return [
        ("prompt", f"{usage.prompt_tokens:,} tokens"),
        ("  cached", f"{usage.cached_tokens:,} tokens"),
        ("  fetched", _fetched(timing, usage)),
        ("  transferred", f"{usage.transferred_tokens:,} tokens"),
        ("queue", _ms(timing.queue_s)),
        ("reserve", _ms(timing.reserve_s)),
        ("prefill", _ms(timing.prefill_s)),
        ("  on", timing.prefill_worker),
        ("  speed", _rate(usage.computed_tokens, timing.prefill_s)),
        ("transfer, beside prefill", _ms(timing.transfer_s)),
        ("handoff", _ms(timing.handoff_s)),
        ("time to first token", _ms(timing.ttft_s)),
        ("first decode step", _ms(timing.first_step_s)),
        ("decode", _ms(timing.decode_s)),
        ("  on", timing.decode_worker),
        ("  speed", _rate(decoded, timing.decode_s)),
        ("answer", f"{usage.completion_tokens} tokens"),
        ("KV cache", _bytes(usage.kv_bytes)),
        ("bytes on the wire", _bytes(usage.wire_bytes)),
        ("  codec", usage.codec or "–"),
        ("total", _ms(timing.total_s)),
    ]


def _fetched(timing: Timing, usage: Usage) -> str:
    if not usage.fetched_tokens:
        return "–"
    return f"{usage.fetched_tokens:,} tokens from {timing.fetched_from} in {_ms(timing.fetch_s)}"


def _ms(duration_s: float) -> str:
    return f"{duration_s * 1000:,.1f} ms"


def _rate(tokens: int, duration_s: float) -> str:
    return f"{tokens / duration_s:,.1f} tokens/s" if tokens and duration_s > 0 else "–"


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"
