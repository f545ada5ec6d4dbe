"""What the router says of a request when it is over: its usage and where its time went."""

from headrace.v1 import inference_pb2 as pb
from router.requests import Request


def done_message(request: Request, now: float) -> pb.Done:
    """Usage and timing of a finished request, from its own clock and what the workers told."""
    return pb.Done(usage=_usage(request), timing=_timing(request, now))


def _usage(request: Request) -> pb.Usage:
    prompt_tokens = request.accepted.prompt_tokens if request.accepted else 0
    usage = pb.Usage(prompt_tokens=prompt_tokens, completion_tokens=sum(request.answer.num_tokens))
    for prefill in request.prefills:  # of every attempt: what was lost with a worker was paid for too
        usage.computed_tokens += prefill.computed_tokens
        usage.transferred_tokens += prefill.transferred_tokens
        usage.kv_bytes += prefill.kv_bytes
        usage.wire_bytes += prefill.wire_bytes
        usage.fetched_tokens += prefill.fetched_tokens
    if request.prefill is not None:
        usage.codec = request.prefill.codec
        usage.codec_reason = request.prefill.codec_reason
    if not request.prefills and request.lease is not None:
        usage.computed_tokens = prompt_tokens - request.lease.cached_tokens
    usage.cached_tokens = max(0, prompt_tokens - usage.computed_tokens)
    return usage


def _timing(request: Request, now: float) -> pb.Timing:
    times = request.lifecycle.times(now)
    timing = pb.Timing(
        queue_s=times.queue_s,
        reserve_s=times.reserve_s,
        prefill_s=times.prefill_s,
        decode_s=times.decode_s,
        ttft_s=times.ttft_s,
        total_s=times.total_s,
        first_step_s=times.first_step_s,
        predicted_ttft_s=_predicted_ttft_s(request),
        attempts=request.num_moves + 1,
    )
    if request.prefill is not None:
        timing.prefill_s = request.prefill.prefill_s
        timing.transfer_s = request.prefill.transfer_s
        timing.handoff_s = request.prefill.handoff_s
        timing.frame_s = request.prefill.frame_s
        timing.fetch_s = request.prefill.fetch_s
        timing.fetched_from = request.prefill.fetched_from
    if request.placement is not None:
        timing.decode_worker = request.placement.decode.worker_id
        timing.prefill_worker = (request.placement.prefill or request.placement.decode).worker_id
    return timing


def _predicted_ttft_s(request: Request) -> float:
    """When it was placed first; 0 where nothing had been measured."""
    return (request.decisions[0].placement.predicted_ttft_s or 0.0) if request.decisions else 0.0
