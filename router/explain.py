"""Why a request went where it went, as the contract tells it."""

import math

from headrace.v1 import cluster_pb2
from router.core.candidates import Candidate
from router.requests import Decision, Request


def explanation(request: Request, policy: str, now: float) -> cluster_pb2.ExplainResponse:
    """Every placement that is remembered of a request, oldest first."""
    return cluster_pb2.ExplainResponse(
        request_id=request.key.request_id,
        state=request.lifecycle.state,
        decisions=[_decision(decision, policy, now) for decision in request.decisions],
    )


def _decision(decision: Decision, policy: str, now: float) -> cluster_pb2.PlacementDecision:
    placement = decision.placement
    return cluster_pb2.PlacementDecision(
        attempt=decision.attempt,
        age_s=now - decision.decided_s,
        policy=policy,
        reason=placement.reason,
        decode_worker=placement.decode.worker_id,
        prefill_worker=placement.prefill.worker_id if placement.prefill is not None else "",
        predicted_ttft_s=placement.predicted_ttft_s or 0.0,
        decode=[_candidate(candidate) for candidate in placement.decode_candidates],
        prefill=[_candidate(candidate) for candidate in placement.prefill_candidates],
        ended=decision.ended,
    )


def _candidate(candidate: Candidate) -> cluster_pb2.Candidate:
    return cluster_pb2.Candidate(
        worker_id=candidate.worker_id,
        chosen=candidate.chosen,
        cost_s=candidate.cost_s if math.isfinite(candidate.cost_s) else 0.0,
        queue_s=candidate.queue_s,
        compute_s=candidate.compute_s,
        transfer_s=candidate.transfer_s,
        step_s=candidate.step_s,
        cached_tokens=candidate.cached_tokens,
        tokens_ahead=max(0, candidate.tokens_ahead),
        free_blocks=max(0, candidate.free_blocks),
        note=candidate.note,
    )
