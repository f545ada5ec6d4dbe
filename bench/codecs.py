"""What does each codec save, cost and change?

Keys and values of SmolLM2 in bfloat16 from five real texts (bench.codecs_effect says how). Of each codec: ratio of
bfloat16 bytes to payload bytes; GB of bfloat16 per second of encoding and of decoding, on one core, the fastest of
a few runs; how often the likeliest next token stays the same; the mean KL divergence in nats; the relative change
of perplexity. `…_f32` are ratio and speeds on float32 sources, in bytes of float32.
"""

from __future__ import annotations

import argparse
import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pydoc_data.topics import topics
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import Progress

from bench.codecs_effect import CONTEXT_TOKENS, FORCED_TOKENS, Continued, Effect, bench_options
from bench.kv_sample import MODEL
from bench.report import BenchReport
from cluster.model_store import resolve
from engine.runner import ModelRunner
from kvtransfer.codecs import CODECS, Codec, Fidelity
from kvtransfer.layouts import Piece, Plane
from text.tokenizer import Tokenizer

RUNS = 3
"""Each piece is coded so often; the fastest run counts, because machines are shared."""

_Result = TypeVar("_Result")


@dataclass(slots=True)
class _Tally:
    """What a codec did so far: bytes, seconds, effect."""

    raw_bytes: int = 0
    payload_bytes: int = 0
    encode_s: float = 0.0
    decode_s: float = 0.0
    effect: Effect = field(default_factory=Effect)

    def code(self, codec: Codec, plane: Plane, piece: Piece, raw: torch.Tensor) -> torch.Tensor:
        """Take one piece there and back; what came back."""
        payload, encode_s = _fastest(lambda: codec.encode(raw, plane, piece))
        decoded, decode_s = _fastest(lambda: codec.decode(payload, plane, piece))
        self.raw_bytes += raw.numel()
        self.payload_bytes += memoryview(payload).nbytes
        self.encode_s += encode_s
        self.decode_s += decode_s
        return decoded


def run(console: Console) -> BenchReport:
    """Every codec on every text."""
    runner = ModelRunner(resolve(MODEL), bench_options())
    narrow = {codec.name: _Tally() for codec in CODECS}
    wide = {codec.name: _Tally() for codec in CODECS}
    texts = real_texts()
    with Progress(console=console, transient=True) as progress:
        work = progress.add_task("", total=len(texts) * (1 + len(CODECS)))
        for name, tokens in texts.items():
            progress.update(work, description=f"{name}: exact logits")
            with Continued(runner, tokens) as document:
                pieces, before = document.pieces(), list(document.predictions())
                progress.advance(work)
                for codec in CODECS:
                    progress.update(work, description=f"{name}: {codec.name}")
                    _measure(codec, document, pieces, before, narrow[codec.name])
                    _measure_wide(codec, pieces, wide[codec.name])
                    progress.advance(work)
    metrics: dict[str, float] = {}
    for codec in CODECS:
        metrics |= _metrics(codec.name, narrow[codec.name], wide[codec.name])
    notes = (
        f"{', '.join(texts)}: {CONTEXT_TOKENS} tokens of context and {FORCED_TOKENS} predicted ones each",
        "one core; codecs of class exact gave back the same bytes, so their effect was not computed",
    )
    return BenchReport("codecs", metrics, notes)


def real_texts() -> dict[str, list[int]]:
    """Texts that every Python installation carries, as token ids: its documentation, and source code."""
    tokenizer = Tokenizer.open(resolve(MODEL))
    texts = {
        "objects": "\n\n".join(topics[name] for name in ("naming", "objects", "numeric-types", "typesseq")),
        "special methods": topics["specialnames"],
        "debugger": topics["debugger"],
        "compound statements": topics["compound"],
        "source code": inspect.getsource(argparse),
    }
    length = CONTEXT_TOKENS + FORCED_TOKENS + 1
    tokens = {name: tokenizer.encode(text[: 8 * length])[:length] for name, text in texts.items()}
    short = [name for name, ids in tokens.items() if len(ids) < length]
    if short:
        raise RuntimeError(f"this Python's documentation is too short for the benchmark: {', '.join(short)}")
    return tokens


def _measure(
    codec: Codec,
    document: Continued,
    pieces: list[tuple[Plane, Piece, torch.Tensor]],
    before: list[torch.Tensor],
    tally: _Tally,
) -> None:
    decoded = [(plane, piece, tally.code(codec, plane, piece, raw)) for plane, piece, raw in pieces]
    if codec.fidelity is Fidelity.EXACT:
        if not all(torch.equal(after, raw) for (*_, after), (*_, raw) in zip(decoded, pieces, strict=True)):
            raise RuntimeError(f"codec {codec.name} is not exact")
        num_tokens = FORCED_TOKENS
        tally.effect += Effect(num_tokens, agree=num_tokens, nll_before=num_tokens, nll_after=num_tokens)
        return
    document.put(decoded)
    tally.effect += document.compare(before)


def _measure_wide(codec: Codec, pieces: list[tuple[Plane, Piece, torch.Tensor]], tally: _Tally) -> None:
    """The same numbers as float32, in pieces of half as many entries: as many bytes."""
    for plane, piece, raw in pieces:
        shape = (len(piece.layers), len(piece.entries), -1)
        half = len(piece.entries) // 2
        numbers = raw.view(torch.bfloat16).view(shape)[:, :half].to(torch.float32)
        # bfloat16's mantissa would leave float32's lower half zero, which real float32 never is.
        numbers = numbers * torch.empty_like(numbers).uniform_(1, 1 + 2**-8)
        smaller = replace(piece, entries=range(piece.entries.start, piece.entries.start + half))
        tally.code(
            codec, plane.with_dtypes(["float32"]), smaller, numbers.contiguous().view(torch.uint8).view(-1)
        )


def _fastest(work: Callable[[], _Result]) -> tuple[_Result, float]:
    best = math.inf
    for _ in range(RUNS):
        begun = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - begun)
    return result, best


def _metrics(name: str, narrow: _Tally, wide: _Tally) -> dict[str, float]:
    effect = narrow.effect
    return {
        f"{name}_ratio": narrow.raw_bytes / narrow.payload_bytes,
        f"{name}_encode_gbps": narrow.raw_bytes / narrow.encode_s / 1e9,
        f"{name}_decode_gbps": narrow.raw_bytes / narrow.decode_s / 1e9,
        f"{name}_top1": effect.agree / effect.num_tokens,
        f"{name}_kl": effect.kl / effect.num_tokens,
        f"{name}_ppl_delta": math.expm1((effect.nll_after - effect.nll_before) / effect.num_tokens),
        f"{name}_ratio_f32": wide.raw_bytes / wide.payload_bytes,
        f"{name}_encode_gbps_f32": wide.raw_bytes / wide.encode_s / 1e9,
        f"{name}_decode_gbps_f32": wide.raw_bytes / wide.decode_s / 1e9,
    }
