"""What the tokens that a step drew do to its sequences. Pure: it knows the scheduler, no tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engine.drawing import Result
from engine.events import ChunkDone, Event, PrefillDone, SequenceFailed, TokenDrawn
from engine.request import Drawn, SequenceStatus
from engine.request import Sequence as EngineSequence
from engine.sampling import SampleFailure
from engine.scheduler import Scheduler, StepPlan, StepRow


def apply_draws(
    plan: StepPlan,
    drawn: dict[int, list[Result]],
    scheduler: Scheduler,
    begin_answers: Callable[[EngineSequence, Sequence[Drawn]], Any],
) -> list[Event]:
    """Events in the order of the plan's rows. `drawn`: as `engine.drawing.draw` gives it; `begin_answers` starts the
    choices of a prompt that was computed here for an answer here."""
    events: list[Event] = []
    for row in plan.rows:
        sequence = row.sequence
        if sequence.status is not SequenceStatus.RUNNING:
            continue  # stopped while the step computed
        results = drawn[sequence.sequence_id] if row.draws else []
        if not sequence.is_head:
            events += _apply_answer(row, results, scheduler)
            continue
        scheduler.computed(row)
        if sequence.prefill_only:
            events.append(ChunkDone(sequence.lease_id, sequence.num_computed))
        if row.draws:
            events += _apply_first(sequence, results, scheduler, begin_answers)
    return events


def _apply_answer(row: StepRow, results: list[Result], scheduler: Scheduler) -> list[Event]:
    """The next tokens of an answer, in order."""
    sequence, events = row.sequence, list[Event]()
    for result in results:
        if isinstance(result, SampleFailure):
            return [*events, _failed(sequence, sequence.choice, result, scheduler)]
        sequence.append(result.token_id)
        events.append(TokenDrawn(sequence.lease_id, sequence.choice, sequence.num_generated - 1, result))
    scheduler.computed(row, num_drafts_kept=max(len(results) - 1, 0))
    if events and results[-1].finish is not None:  # type: ignore[union-attr]  # nothing is drawn after it
        scheduler.remove(sequence, SequenceStatus.FINISHED)
    return events


def _apply_first(
    sequence: EngineSequence,
    results: list[Result],
    scheduler: Scheduler,
    begin_answers: Callable[[EngineSequence, Sequence[Drawn]], Any],
) -> list[Event]:
    """The token after the head of every choice that draws it there."""
    tokens = [result for result in results if isinstance(result, Drawn)]
    failure = next((result for result in results if isinstance(result, SampleFailure)), None)
    if failure is not None:
        of_all = len(results) > 1 or sequence.prefill_only
        return [_failed(sequence, None if of_all else sequence.choice, failure, scheduler)]
    if sequence.prefill_only:
        scheduler.remove(sequence, SequenceStatus.HELD)
        return [PrefillDone(sequence.lease_id, tuple(tokens))]
    scheduler.remove(sequence, SequenceStatus.FINISHED)
    so_far = sequence.so_far
    begin_answers(sequence, tokens)
    return [
        TokenDrawn(sequence.lease_id, choice, so_far.num_shared, token)
        for choice, token in enumerate(tokens)
        if so_far.draws(choice)
    ]


def _failed(
    sequence: EngineSequence, choice: int | None, failure: SampleFailure, scheduler: Scheduler
) -> SequenceFailed:
    scheduler.remove(sequence, SequenceStatus.FINISHED)
    return SequenceFailed(sequence.lease_id, choice, failure.cause, failure.message)
