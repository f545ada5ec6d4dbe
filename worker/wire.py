"""Between protobuf messages and the engine's values, both ways. Decides nothing but what is malformed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

from engine.drafter import DraftState
from engine.request import Drawn, FinishReason, Logprobs, SamplingParams
from engine.resumption import NOTHING, SoFar
from headrace.v1 import inference_pb2, kvtransfer_pb2, worker_pb2
from kvtransfer.codecs import Fidelity

if TYPE_CHECKING:
    from engine.engine import Engine

_FINISH_TO_WIRE = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: inference_pb2.FINISH_REASON_CANCELLED,
    FinishReason.FAILED: inference_pb2.FINISH_REASON_FAILED,
}
_FINISH_FROM_WIRE = {wire: reason for reason, wire in _FINISH_TO_WIRE.items()}


class MalformedTask(ValueError):
    """A generation task that no worker of this model can run; the message says what is wrong with it."""


def sampling_params(task: worker_pb2.GenerationTask) -> SamplingParams:
    """The engine's parameters of a task; the router has set seed, max_tokens and n."""
    wire = task.sampling
    return SamplingParams(
        temperature=wire.temperature if wire.HasField("temperature") else 1.0,
        top_k=wire.top_k,
        top_p=wire.top_p if wire.HasField("top_p") else 1.0,
        min_p=wire.min_p,
        repetition_penalty=wire.repetition_penalty if wire.HasField("repetition_penalty") else 1.0,
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        logit_bias=tuple(sorted(wire.logit_bias.items())),
        min_tokens=wire.min_tokens,
        max_tokens=wire.max_tokens,
        seed=wire.seed,
        stop_token_ids=frozenset(wire.stop_token_ids),
        eos_token_ids=frozenset(task.eos_token_ids),
        ignore_eos=wire.ignore_eos,
        logprobs=wire.logprobs if wire.HasField("logprobs") else None,
        n=num_choices(task),
    )


def num_choices(task: worker_pb2.GenerationTask) -> int:
    """Answers asked for."""
    return task.sampling.n or 1


def so_far_of(task: worker_pb2.GenerationTask) -> SoFar:
    """What the answer has from earlier attempts. Raises MalformedTask where that cannot be."""
    if not task.so_far:
        return NOTHING
    if len(task.so_far) != num_choices(task):
        raise MalformedTask(f"{len(task.so_far)} choices so far of {num_choices(task)}")
    ended = frozenset(choice for choice, known in enumerate(task.so_far) if known.finished)
    try:
        return SoFar.of([known.token_ids for known in task.so_far], ended)
    except ValueError as error:
        raise MalformedTask(str(error)) from error


def check_task(task: worker_pb2.GenerationTask, engine: Engine) -> None:
    """Raise MalformedTask for what would never fit this worker's engine, whatever the router checked."""
    if not task.prompt_token_ids:
        raise MalformedTask("the prompt has no tokens")
    if task.sampling.max_tokens < 1:
        raise MalformedTask(f"max_tokens must be at least 1, not {task.sampling.max_tokens}")
    so_far_of(task)
    longest = max((len(known.token_ids) for known in task.so_far), default=0)
    if len(task.prompt_token_ids) + longest >= engine.max_context:
        raise MalformedTask(
            f"a prompt of {len(task.prompt_token_ids)} tokens and an answer of {longest} so far leave no room in "
            f"the worker's context of {engine.max_context}"
        )
    if num_choices(task) > engine.max_sequences:
        raise MalformedTask(f"n is {num_choices(task)}; the worker holds {engine.max_sequences} sequences")
    if task.fidelity and task.fidelity not in list(Fidelity):
        raise MalformedTask(f"fidelity is one of {', '.join(Fidelity)}, not {task.fidelity!r}")
    largest = max(chain(task.prompt_token_ids, *(known.token_ids for known in task.so_far)))
    if largest >= engine.config.vocab_size:
        raise MalformedTask(f"token id {largest} is outside the vocabulary of {engine.config.vocab_size}")


def logprobs_to_wire(logprobs: Logprobs | None) -> inference_pb2.TokenLogprobs | None:
    """None where none were asked for."""
    if logprobs is None:
        return None
    return inference_pb2.TokenLogprobs(
        logprob=logprobs.logprob,
        top=[inference_pb2.TokenLogprob(token_id=token, logprob=value) for token, value in logprobs.top],
    )


def finish_to_wire(reason: FinishReason) -> inference_pb2.FinishReason:
    """The protocol's name of a reason."""
    return _FINISH_TO_WIRE[reason]


def first_tokens_to_wire(first: Sequence[Drawn]) -> list[kvtransfer_pb2.FirstToken]:
    """The handoff record's tokens, one per choice, in order of choice."""
    return [
        kvtransfer_pb2.FirstToken(
            choice=choice,
            token_id=drawn.token_id,
            logprobs=logprobs_to_wire(drawn.logprobs),
            finished=(
                _FINISH_TO_WIRE[drawn.finish] if drawn.finish else inference_pb2.FINISH_REASON_UNSPECIFIED
            ),
        )
        for choice, drawn in enumerate(first)
    ]


def first_tokens_from_wire(first: Sequence[kvtransfer_pb2.FirstToken]) -> list[Drawn]:
    """What the prefill worker drew, in order of choice."""
    return [
        Drawn(
            token_id=token.token_id,
            logprobs=_logprobs_from_wire(token.logprobs) if token.HasField("logprobs") else None,
            finish=_FINISH_FROM_WIRE.get(token.finished),
        )
        for token in sorted(first, key=lambda token: token.choice)
    ]


def drafting_to_wire(state: DraftState) -> kvtransfer_pb2.Drafting:
    """The handoff record's part of a drafter."""
    return kvtransfer_pb2.Drafting(follows=state.follows, hits=state.hits, misses=state.misses)


def drafting_from_wire(handoff: kvtransfer_pb2.Handoff) -> DraftState | None:
    """None where the record has none."""
    if not handoff.HasField("drafting"):
        return None
    wire = handoff.drafting
    return DraftState(wire.follows if wire.HasField("follows") else None, wire.hits, wire.misses)


def _logprobs_from_wire(wire: inference_pb2.TokenLogprobs) -> Logprobs:
    return Logprobs(logprob=wire.logprob, top=tuple((entry.token_id, entry.logprob) for entry in wire.top))


def failure(
    key: worker_pb2.RequestKey, stage: str, cause: str, message: str, *, retryable: bool = False
) -> worker_pb2.WorkerMessage:
    """An attempt's end without an answer. `cause` is UPPER_SNAKE and stable, `message` for people."""
    return worker_pb2.WorkerMessage(
        failed=worker_pb2.AttemptFailed(
            key=key,
            error=inference_pb2.ErrorDetail(
                request_id=key.request_id,
                stage=stage,
                cause=cause,
                message=message,
                retryable=retryable,
                attempt=key.attempt,
            ),
        )
    )


def taken_over(key: worker_pb2.RequestKey, stage: str) -> worker_pb2.WorkerMessage:
    """To the router of an attempt that another router has gone on from."""
    return failure(key, stage, "TAKEN_OVER", "another router goes on with this request")
