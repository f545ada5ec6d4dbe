"""What a placement is predicted to cost, in seconds.

A decode worker D, with `n` sequences and this request's `c` more:

    step     = empty_step + row x (n + c)                 a line that the worker fits to its steps; where it says but
                                                          one step, a full batch's is taken for twice an empty one's
    itl      = step x (1 + used) x slo_ttft / slo_itl     `used`: the share of its blocks that is taken afterwards
    own      = its own prompt tokens ahead x its seconds a token
    carried  = tokens it lacks x bytes a token x the fleet's mean seconds a byte
    rank     = itl + own + carried

An inter-token latency as long as its objective thus weighs as much as a time to first token as long as its own.
A worker whose memory is nearly full counts as up to twice as slow: its answers are about to be preempted.

A prefill worker P that pushes to D:

    queue    = tokens ahead x seconds a token              charged by this router, and what a report names beyond it
    compute  = tokens not cached on P x seconds a token
    transfer = tokens that D lacks x bytes a token x seconds a byte from P to D
    ttft     = queue + max(compute, transfer) + the link's fixed time + D's step
    cost     = ttft + itl + harm                           harm: where P decodes too, else 0

The transfer runs beside the computation; only what it takes longer is waited for. The prompt prefilled on D itself:

    ttft     = own + compute + step
    cost     = ttft + itl + harm

On a worker that decodes, each running answer waits for the prompt's chunks:

    harm     = (n + 1) x compute x (step + compute) / slo_itl

A second of that weighs as much as the gap it makes is long, in ITL objectives. So a short prompt does next to no harm,
and a long one goes to a worker that does nothing else, unless that is slow, far or busy. The one more stands for the
answers that come while it computes: an idle D is no place for a long prompt either. Staying on one worker is preferred
where a handover is predicted to save little: a tenth of the cost, or of the objective for the time to first token where
that is less.

What was not measured is the mean of the workers of the same identity that do the same work, then of all of that
identity, then a constant, which makes equal workers differ by their load alone. The pace of one that has not had a
prompt for long is taken for the quickest one's, bit by bit, so that it is tried again.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from router.core.columns import Floats, WorkerTable

DEFAULT_STEP_S = 0.02
DEFAULT_S_PER_TOKEN = 0.0005
DEFAULT_KV_BYTES_PER_TOKEN = 32 << 10
DEFAULT_LINK_BYTES_PER_S = 1e9
DEFAULT_LINK_FIXED_S = 0.005
HANDOVER_GAIN = 0.1
"""Predictions are off by about that, and a handover takes the best of what is predicted of two workers; what it costs
beside the link's time (messages, landing, both workers' attention) is not in them."""
FORGETTING_PROMPTS = 16
"""What a worker's prompts took is forgotten once so many prompts a worker went elsewhere."""

Number = TypeVar("Number", float, Floats)


@dataclass(frozen=True, slots=True)
class Figures:
    """Speeds of one identity's workers, nothing unknown: arrays by row of the table that they are of."""

    decode: Floats
    """[5, rows]: a step of an empty batch, what a sequence adds to it, seconds a prompt token, a token's bytes, and
    what it takes to get there over a link of the mean speed."""
    prefill: Floats
    """[3, rows]: seconds a prompt token; of links that were not measured, seconds a byte and fixed seconds."""
    is_measured: bool
    """Whether steps and prefill both rest on a measurement of some worker."""
    prefill_tokens_per_s: float
    """Of all prefill workers together; 0 where nothing is measured."""
    decode_tokens_per_s: float
    """The same of workers that only decode, were they to prefill."""


def figures_of(decoders: WorkerTable, prefillers: WorkerTable, num_placed: int) -> Figures:
    """Fills in what was not measured, and what was measured long ago; `num_placed` prompts were placed by now."""
    step_s = _filled(decoders.empty_step_s, DEFAULT_STEP_S)
    s_per_byte, fixed_s = prefillers.link_s_per_byte, prefillers.link_fixed_s
    is_linked = s_per_byte > 0
    num_linked = int(np.count_nonzero(is_linked))
    mean_s_per_byte = float(s_per_byte.sum()) / num_linked if num_linked else 1.0 / DEFAULT_LINK_BYTES_PER_S
    mean_fixed_s = float(fixed_s[is_linked].mean()) if num_linked else DEFAULT_LINK_FIXED_S
    kv_bytes = _filled(decoders.kv_bytes_per_token, DEFAULT_KV_BYTES_PER_TOKEN)
    decode_s_per_token = _of_late(decoders, num_placed, prefillers)
    prefill_s_per_token = _of_late(prefillers, num_placed, decoders)
    is_measured = _is_known(decoders.empty_step_s) and (
        _is_known(decoders.s_per_token) or _is_known(prefillers.s_per_token)
    )
    return Figures(
        decode=np.stack(
            (step_s, _rows_filled(decoders), decode_s_per_token, kv_bytes, kv_bytes * mean_s_per_byte)
        ),
        prefill=np.stack(
            (
                prefill_s_per_token,
                np.where(is_linked, s_per_byte, mean_s_per_byte),
                np.where(is_linked, fixed_s, mean_fixed_s),
            )
        ),
        is_measured=is_measured,
        prefill_tokens_per_s=_together(prefill_s_per_token) if is_measured else 0.0,
        decode_tokens_per_s=_together(decode_s_per_token[decoders.is_both == 0]) if is_measured else 0.0,
    )


@dataclass(frozen=True, slots=True)
class CostModel:
    """The formulas above, over numbers or columns of them.

    Raises:
        ValueError: an objective is not positive.
    """

    slo_ttft_s: float
    slo_itl_s: float

    def __post_init__(self) -> None:
        for name in ("slo_ttft_s", "slo_itl_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} is {getattr(self, name)}; an objective is above 0 seconds and finite"
                )

    @property
    def ttft_per_itl(self) -> float:
        """Seconds of time to first token that weigh as much as one between tokens."""
        return self.slo_ttft_s / self.slo_itl_s

    def least_gain_s(self, cost_s: float) -> float:
        """What a handover is to save of what staying on one worker costs."""
        return HANDOVER_GAIN * min(cost_s, self.slo_ttft_s)

    def harm_s(self, compute_s: Number, step_s: Number, num_sequences: Number) -> Number:
        """As the function, by this objective."""
        return harm_s(compute_s, step_s, num_sequences, self.slo_itl_s)


def harm_s(compute_s: Number, step_s: Number, num_sequences: Number, slo_itl_s: float) -> Number:
    """What the answers on a worker suffer from a prompt that is computed beside them."""
    return (num_sequences + 1.0) * compute_s * (step_s + compute_s) / slo_itl_s


def _together(s_per_token: Floats) -> float:
    """Tokens a second of workers side by side."""
    return float((1.0 / s_per_token).sum())


def _mean(column: Floats) -> float:
    """Of what is known in it; 0 if nothing is."""
    num_known = int(np.count_nonzero(column))
    return float(column.sum()) / num_known if num_known else 0.0


def _is_known(column: Floats) -> bool:
    return int(np.count_nonzero(column)) > 0


def _of_late(table: WorkerTable, num_placed: int, others: WorkerTable) -> Floats:
    """Seconds a token of a prompt. The more prompts went elsewhere since a worker's last one, the more it is taken for
    as quick as the quickest: one slow measurement must not keep prompts from it for good."""
    filled = _filled(table.s_per_token, DEFAULT_S_PER_TOKEN, others.s_per_token)
    if not len(table):
        return filled
    age = (num_placed - table.last_prefilled) / (FORGETTING_PROMPTS * len(table))
    known = others.s_per_token[others.s_per_token > 0]
    quickest = min(float(filled.min()), float(known.min()) if len(known) else math.inf)
    return quickest + np.maximum(1.0 - age, 0.0) * (filled - quickest)


def _rows_filled(decoders: WorkerTable) -> Floats:
    """What a sequence adds to a step; where no step was measured, the mean, or as much as makes a full batch's step
    twice an empty one's."""
    known = decoders.empty_step_s > 0
    num_known = int(np.count_nonzero(known))
    if num_known == len(known):
        return decoders.row_s
    if not num_known:
        return DEFAULT_STEP_S / decoders.max_sequences
    return np.where(known, decoders.row_s, decoders.row_s.sum() / num_known)


def _filled(column: Floats, otherwise: float, others: Floats | None = None) -> Floats:
    """The unknown ones replaced by the mean of the known, then by that of `others`, then by `otherwise`."""
    if int(np.count_nonzero(column)) == len(column):
        return column
    mean = _mean(column) or (0.0 if others is None else _mean(others))
    return np.where(column > 0, column, mean or otherwise)
