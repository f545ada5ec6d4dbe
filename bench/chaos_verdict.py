"""What came of a request beside what came of it on the undisturbed cluster: pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from itertools import pairwise

AFFECTED_GAP_FACTOR = 4.0
AFFECTED_GAP_S = 0.5
DEADLINE_MARGIN_S = 1.0
"""Beside one step: the SDK's own grace of 0.5 s, which matters where no router says anything, and as much for a
machine whose cores all processes share."""


class End(StrEnum):
    """How a request ended for its client."""

    FINISHED = "FINISHED"
    DEADLINE = "DEADLINE"
    LEFT = "LEFT"  # the client hung up and did not come back
    FAILED = "FAILED"


@dataclass(slots=True)
class ChoiceSeen:
    """One choice as it was received. `text` None: not comparable, since a connection began in the middle."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[object] = field(default_factory=list)
    text: str | None = ""
    finish: tuple[int, str, int | None] | None = None
    """Reason, stop string, stop token."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One request, as its client saw it. Times are monotonic seconds; `token_times` of every new token.

    `num_repeated`: tokens that came twice on one connection; `num_skipped`: indices that a connection left out;
    `num_changed`: tokens that another connection had brought otherwise.
    """

    name: str
    sent_s: float
    deadline_s: float
    choices: list[ChoiceSeen]
    end: End = End.FAILED
    cause: str = ""
    ended_s: float = 0.0
    expects_deadline: bool = False
    num_repeated: int = 0
    num_skipped: int = 0
    num_changed: int = 0
    num_connections: int = 0
    ran_on: bool = False
    """The cluster still had it some time after its deadline."""
    token_times: list[float] = field(default_factory=list)

    def is_overdue(self, step_s: float) -> bool:
        """Whether it outlived its deadline by more than a step."""
        return self.ran_on or self.ended_s - self.deadline_s > step_s + DEADLINE_MARGIN_S


@dataclass(slots=True)
class Tally:
    """Numbers that should all be 0 but `requests`. Tokens, but for `failed`, `different_*` in answers, `overdue`."""

    requests: int = 0
    lost_tokens: int = 0
    duplicated_tokens: int = 0
    different_tokens: int = 0
    different_texts: int = 0
    different_finishes: int = 0
    different_logprobs: int = 0
    failed_requests: int = 0
    overdue_requests: int = 0
    leaked_leases: int = 0
    leaked_blocks: int = 0
    idle_violations: int = 0
    crashes: int = 0

    def add(self, other: Tally) -> None:
        """Field by field."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    @property
    def is_clean(self) -> bool:
        """Whether nothing went wrong."""
        return not any(getattr(self, each.name) for each in fields(self) if each.name != "requests")


def judge(outcome: Outcome, expected: Sequence[ChoiceSeen], step_s: float) -> Tally:
    """`expected`: every choice of the undisturbed answer. `step_s`: the longest step of a worker.

    Whatever a request failed of, tokens that its client got must be the undisturbed ones; those it did not get are
    lost, unless the deadline was meant to pass or the client left.
    """
    tally = Tally(requests=1, duplicated_tokens=outcome.num_repeated, different_tokens=outcome.num_changed)
    tally.lost_tokens = outcome.num_skipped
    tally.overdue_requests = int(outcome.is_overdue(step_s))
    is_whole = outcome.end is End.FINISHED
    is_excused = outcome.end is End.LEFT or (outcome.end is End.DEADLINE and outcome.expects_deadline)
    tally.failed_requests = int(not is_whole and not is_excused)
    if len(outcome.choices) != len(expected):
        raise ValueError(f"{outcome.name}: {len(outcome.choices)} choices beside {len(expected)}")
    for seen, known in zip(outcome.choices, expected, strict=True):
        _compare(tally, seen, known, is_whole=is_whole, is_excused=is_excused)
    return tally


def _compare(tally: Tally, seen: ChoiceSeen, known: ChoiceSeen, *, is_whole: bool, is_excused: bool) -> None:
    pairs = zip(seen.token_ids, known.token_ids, strict=False)
    tally.different_tokens += sum(ours != theirs for ours, theirs in pairs)
    # Tokens behind the end are as wrong as others in their place.
    tally.different_tokens += max(0, len(seen.token_ids) - len(known.token_ids))
    if not is_excused:
        tally.lost_tokens += max(0, len(known.token_ids) - len(seen.token_ids))
    wanted = known.logprobs if is_whole else known.logprobs[: len(seen.logprobs)]
    tally.different_logprobs += int(seen.logprobs != wanted)
    if seen.finish is not None or is_whole:
        tally.different_finishes += int(seen.finish != known.finish)
    if seen.text is None:
        return
    is_same = seen.text == known.text if is_whole else (known.text or "").startswith(seen.text)
    tally.different_texts += int(not is_same)


def recoveries(outcomes: Iterable[Outcome], faults_s: Sequence[float]) -> list[list[float]]:
    """Of each fault, in seconds from then on, when the next token came of every stream that it held up.

    A stream is one that had brought tokens already; held up is one whose gap around the fault is four times its
    median gap, and half a second at least. A gap around several faults is the first one's. `faults_s`: when each came.
    """
    found: list[list[float]] = [[] for _ in faults_s]
    for outcome in outcomes:
        gaps = list(pairwise(outcome.token_times))
        if not gaps:
            continue
        median_s = statistics.median(later - earlier for earlier, later in gaps)
        limit_s = max(AFFECTED_GAP_S, AFFECTED_GAP_FACTOR * median_s)
        for earlier, later in gaps:
            within = [(time_s, index) for index, time_s in enumerate(faults_s) if earlier <= time_s < later]
            if within and later - earlier > limit_s:
                time_s, index = min(within)
                found[index].append(later - time_s)
    return found
