"""What a codec does to a model's output: the same text continued on a cache that went through it.

The first half of a document fills the cache as a prefill worker would, chunk by chunk; its pieces are encoded and
decoded as they would be on their way; the second half is given token by token (teacher forcing), all in one go, on
top of the decoded cache. The logits are compared with those on top of the cache as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from engine.request import SamplingParams, Sequence
from engine.runner import EngineOptions, ModelRunner
from engine.scheduler import StepPlan, StepRow
from kvtransfer.layouts import Piece, Plane, pieces_for

CHUNK_TOKENS = 512
CONTEXT_TOKENS = 1024
FORCED_TOKENS = 1024

_OWNER = b"bench"


def bench_options() -> EngineOptions:
    """Products in float32 on one core, keys and values in bfloat16."""
    return EngineOptions(
        precision="float32",
        kv_dtype="bfloat16",
        max_context=CONTEXT_TOKENS + FORCED_TOKENS + CHUNK_TOKENS,
        chunk_tokens=CHUNK_TOKENS,
        kv_bytes=256 << 20,
    )


@dataclass(frozen=True, slots=True)
class Effect:
    """Sums over `num_tokens` predictions: likeliest tokens that agree, KL(before || after) in nats, and the
    negative log-likelihood of the text's own next token, before and after."""

    num_tokens: int = 0
    agree: float = 0.0
    kl: float = 0.0
    nll_before: float = 0.0
    nll_after: float = 0.0

    def __add__(self, other: Effect) -> Effect:
        return Effect(
            self.num_tokens + other.num_tokens,
            self.agree + other.agree,
            self.kl + other.kl,
            self.nll_before + other.nll_before,
            self.nll_after + other.nll_after,
        )


class Continued:
    """One document in a runner's cache. Use it as a context manager: it gives the blocks back."""

    def __init__(self, runner: ModelRunner, tokens: list[int]) -> None:
        """`tokens`: CONTEXT_TOKENS + FORCED_TOKENS + 1 of them; the last is only predicted."""
        self._runner = runner
        self._targets = torch.tensor(tokens[CONTEXT_TOKENS + 1 :])
        self._sequence = Sequence(
            sequence_id=-1,
            lease_id=_OWNER,
            choice=0,
            tokens=tokens[:-1],
            num_prompt=len(tokens) - 1,
            sampling=SamplingParams(),
        )

    def __enter__(self) -> Continued:
        num_blocks = self._runner.pool.blocks_for(self._sequence.num_tokens)
        if self._runner.pool.open(_OWNER, [], num_blocks) is None:
            raise RuntimeError(f"the benchmark's cache has no {num_blocks} blocks")
        for start in range(0, CONTEXT_TOKENS, CHUNK_TOKENS):
            self._runner.forward(self._runner.build(StepPlan([self._row(start, draws=False)])))
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.pool.close(_OWNER)

    def pieces(self) -> list[tuple[Plane, Piece, torch.Tensor]]:
        """The context as it would travel: plane, piece and bytes."""
        layout, found = self._runner.layout, []
        for start in range(0, CONTEXT_TOKENS, CHUNK_TOKENS):
            for piece in pieces_for(layout, range(start, start + CHUNK_TOKENS)):
                plane = layout.plane(piece.plane)
                found.append((plane, piece, self._runner.cache.gather(_OWNER, piece, plane)))
        return found

    def put(self, pieces: list[tuple[Plane, Piece, torch.Tensor]]) -> None:
        """Writes pieces of the context over what is there."""
        for plane, piece, raw in pieces:
            self._runner.cache.scatter(_OWNER, piece, plane, raw)

    def predictions(self) -> Iterator[torch.Tensor]:
        """Log-probabilities [CHUNK_TOKENS, vocabulary] of the forced tokens, chunk by chunk, whose own keys and
        values are computed anew."""
        for start in range(CONTEXT_TOKENS, CONTEXT_TOKENS + FORCED_TOKENS, CHUNK_TOKENS):
            row = self._row(start, draws=True)
            batch = self._runner.build(StepPlan([row]))
            every = replace(batch, logit_rows=torch.arange(CHUNK_TOKENS), drawing=(row,) * CHUNK_TOKENS)
            yield torch.from_numpy(self._runner.forward(every)).log_softmax(-1)

    def compare(self, before: list[torch.Tensor]) -> Effect:
        """Of what is in the cache now, against `predictions` from before."""
        total = Effect()
        for index, (was, now) in enumerate(zip(before, self.predictions(), strict=True)):
            target = self._targets[index * CHUNK_TOKENS :][:CHUNK_TOKENS, None]
            total += Effect(
                num_tokens=CHUNK_TOKENS,
                agree=float((was.argmax(-1) == now.argmax(-1)).sum()),
                kl=float((was.exp() * (was - now)).sum(dtype=torch.float64)),
                nll_before=-float(was.gather(1, target).sum(dtype=torch.float64)),
                nll_after=-float(now.gather(1, target).sum(dtype=torch.float64)),
            )
        return total

    def _row(self, start: int, draws: bool) -> StepRow:
        return StepRow(self._sequence, start, CHUNK_TOKENS, draws=draws)
