"""Requests as workers and clients are told of them: pure construction of the contract's messages."""

from collections.abc import Iterable

from headrace.v1 import inference_pb2 as pb
from headrace.v1 import worker_pb2
from router.core.answer import Answer
from router.requests import Request


def accepted(request: Request) -> pb.Accepted:
    """The first message of an answer."""
    return pb.Accepted(
        request_id=request.key.request_id,
        prompt_tokens=request.demand.num_prompt_tokens if request.demand else 0,
        seed=request.seed,
        resume_handle=request.resume_handle,
    )


def reserve(request: Request, remaining_s: float) -> worker_pb2.RouterMessage:
    """To the decode worker, which prefills by itself where no prefill worker was chosen."""
    local = request.placement is not None and request.placement.prefill is None
    return worker_pb2.RouterMessage(
        reserve=worker_pb2.Reserve(
            key=request.wire_key, task=request.task, remaining_s=remaining_s, local_prefill=local
        )
    )


def take_over(request: Request) -> worker_pb2.RouterMessage:
    """To the decode worker that writes the answer for another router."""
    return worker_pb2.RouterMessage(take_over=worker_pb2.TakeOver(key=request.wire_key))


def start_prefill(
    request: Request, remaining_s: float, sources: Iterable[worker_pb2.CacheSource]
) -> worker_pb2.RouterMessage:
    """To the prefill worker, with the lease to push into, and who else has some of the prompt cached."""
    return worker_pb2.RouterMessage(
        start_prefill=worker_pb2.StartPrefill(
            key=request.wire_key,
            task=request.task,
            remaining_s=remaining_s,
            lease=request.lease,
            sources=sources,
        )
    )


def go_on(task: worker_pb2.GenerationTask, answer: Answer) -> None:
    """Puts into a task how far its answer has come, for the next attempt."""
    del task.so_far[:]
    task.so_far.extend(
        worker_pb2.ChoiceSoFar(token_ids=choice.tokens, finished=choice.finished is not None)
        for choice in answer.choices
    )


def resume(request: Request) -> worker_pb2.RouterMessage:
    """To the decode worker: send tokens again from the first that is missing here."""
    return worker_pb2.RouterMessage(
        resume=worker_pb2.ResumeStream(key=request.wire_key, next_index=request.answer.num_tokens)
    )


def cancel(request: Request, cause: str) -> worker_pb2.RouterMessage:
    """Ends the present attempt."""
    return cancel_key(request.wire_key, cause)


def cancel_key(key: worker_pb2.RequestKey, cause: str) -> worker_pb2.RouterMessage:
    """Ends an attempt by its name."""
    return worker_pb2.RouterMessage(cancel=worker_pb2.CancelAttempt(key=key, cause=cause))
