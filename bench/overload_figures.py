"""What `headrace bench overload` makes of the outcomes of a load. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from bench.overload_load import Outcome
from bench.report import percentile
from router.core.queue import ANSWER_TOKEN_PRICE

WORTHWHILE = 0.05
"""More goodput, in parts of it."""


def good(outcomes: Iterable[Outcome], slo_s: float, seconds: float) -> list[Outcome]:
    """Those that came whole within `seconds` of the load's beginning, and their first token within the service
    level."""
    return [
        each
        for each in outcomes
        if not each.cause and each.ttft_s is not None and each.ttft_s <= slo_s and each.ended_s <= seconds
    ]


def goodput(outcomes: Iterable[Outcome], slo_s: float, seconds: float) -> float:
    """Requests per second that were good."""
    return len(good(outcomes, slo_s, seconds)) / seconds


def goodput_tokens(outcomes: Iterable[Outcome], slo_s: float, seconds: float) -> float:
    """The same in tokens of prompts and answers: many short requests are not much work."""
    tokens = sum(each.prompt_tokens + each.answer_tokens for each in good(outcomes, slo_s, seconds))
    return tokens / seconds


def service(outcomes: Iterable[Outcome], seconds: float) -> dict[str, float]:
    """What each tenant was served by then, weighed as the queue weighs it: an answer's token counts as two of a
    prompt."""
    served: Counter[str] = Counter()
    for each in outcomes:
        if each.accepted and not each.cause and each.ended_s <= seconds:
            served[each.tenant] += round(each.prompt_tokens + ANSWER_TOKEN_PRICE * each.answer_tokens)
    return dict(served)


def share_errors(served: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """By how much of it each tenant's share differs from its weight's: 0.1 is 10 % more than it should have.

    Raises:
        ValueError: nobody was served.
    """
    total, weight = sum(served.get(tenant, 0.0) for tenant in weights), sum(weights.values())
    if not total:
        raise ValueError("nobody was served, so there are no shares")
    return {tenant: served.get(tenant, 0.0) / total / (weights[tenant] / weight) - 1.0 for tenant in weights}


def best_rate(goodputs: Mapping[float, float]) -> float:
    """The rate at which goodput was highest; the lower of two. Raises ValueError for none."""
    return max(sorted(goodputs), key=goodputs.__getitem__)


def is_saturated(goodputs: Sequence[float]) -> bool:
    """Whether the last two of rising rates brought hardly more than those before them."""
    *before, last_but_one, last = [0.0, 0.0, *goodputs]
    return len(goodputs) > 2 and max(last_but_one, last) < (1 + WORTHWHILE) * max(before)


def causes(outcomes: Sequence[Outcome], at: str) -> dict[str, float]:
    """How many requests were offered, were let in, and of those refused and failed how many by which cause."""
    refused = Counter(each.cause for each in outcomes if each.is_refused)
    failed = Counter(each.cause for each in outcomes if each.cause and each.accepted)
    return {
        f"offered_{at}": len(outcomes),
        f"accepted_{at}": sum(each.accepted for each in outcomes),
        f"failed_{at}": failed.total(),
        **{f"refused_{at}_{cause.lower()}": number for cause, number in sorted(refused.items())},
        **{f"failed_{at}_{cause.lower()}": number for cause, number in sorted(failed.items())},
    }


def latencies(outcomes: Sequence[Outcome], at: str = "") -> dict[str, float]:
    """From call to first token of those let in, from call to error of those refused, and how late the clients
    sent: all as the clients saw it."""
    ttft_s = [each.ttft_s for each in outcomes if each.ttft_s is not None]
    refusal_ms = [1e3 * (each.ended_s - each.sent_s) for each in outcomes if each.is_refused]
    lag_ms = [1e3 * (each.sent_s - each.due_s) for each in outcomes]
    found = {
        f"ttft_p50_accepted{at}_s": percentile(ttft_s, 50),
        f"ttft_p99_accepted{at}_s": percentile(ttft_s, 99),
        f"client_lag_p99{at}_ms": percentile(lag_ms, 99),
    }
    if refusal_ms:
        found[f"refusal_p50{at}_ms"] = percentile(refusal_ms, 50)
        found[f"refusal_p99{at}_ms"] = percentile(refusal_ms, 99)
    return found
