"""Places requests: what placement weighs of a request, and what is to be remembered of each choice.

Between the request (its tokens, its earlier attempts) and the two pure cores: the prefix index, which says who has
how much of the prompt cached, and the placement, which decides. Lives on the router's event loop.
"""

from collections.abc import Callable

from headrace.v1 import worker_pb2
from router.core.fleet import WorkerRef
from router.core.index_feed import IndexFeed
from router.core.placement import Placement, PlacementState, Wait
from router.prompt_keys import KeyRoots, PromptKeys
from router.requests import Decision, Request, RequestKey

MAX_SOURCES = 2
AVOID_S = 5.0
"""How long a request rather waits for others than to go back where an attempt of it failed. Afterwards it goes back
where nobody else has room: the failure may have been the other end's, and its worker would stand idle."""


class Placer:
    """`placement` and `feed` number workers alike."""

    def __init__(
        self,
        placement: PlacementState[RequestKey],
        feed: IndexFeed,
        roots: KeyRoots,
        clock: Callable[[], float],
    ) -> None:
        self._placement = placement
        self._feed = feed
        self._roots = roots
        self._clock = clock

    def tokens_changed(self, request: Request) -> None:
        """What is to be computed for a request is known, or more than before: the answer has grown."""
        if request.task is not None:
            token_ids = list(request.task.prompt_token_ids)
            if len(request.answer.choices) == 1:  # choices go different ways
                token_ids += request.answer.choices[0].tokens
            request.keys = PromptKeys(self._roots, request.key.tenant, token_ids)

    def place(self, request: Request) -> Placement | Wait:
        """Chooses workers for the next attempt, without charging them."""
        now = self._clock()
        assert request.demand is not None
        return self._placement.place(
            request.demand,
            now,
            self._cached(request, now),
            avoid=_failed_lately(request, now),
            prefer=request.landed_on,
            spare=request.failed_on,
        )

    def predict_ttft_s(self, request: Request, idle: bool = False) -> float | None:
        """From placement to the first token, as workers stand, or as if no prompt were ahead; None while that is
        unknown."""
        now = self._clock()
        assert request.demand is not None
        return self._placement.predict_ttft_s(request.demand, now, self._cached(request, now), idle)

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """What the workers that may prefill compute together; None while that is unknown."""
        return self._placement.prefill_tokens_per_s

    def dispatched(self, request: Request, placement: Placement) -> None:
        """The next attempt goes there: it is charged, and its prompt counts as cached there from now on."""
        now = self._clock()
        assert request.demand is not None
        self._placement.charge(request.key, placement, request.demand)
        request.decisions.append(Decision(request.attempt, now, placement))
        if request.keys is not None:
            for ref in placement.workers:
                self._feed.assume(ref, request.keys, now)

    def sources(self, request: Request) -> list[worker_pb2.CacheSource]:
        """Workers that have more of the prompt cached than its own two, the one with most first: who prefills may fetch
        from them. Those that take no requests any more may have it too. Nobody where the policy knows nothing of
        caches."""
        placement, now = request.placement, self._clock()
        if placement is None or not self._placement.names_sources:
            return []
        known = max(placement.cached_decode_tokens, placement.cached_prefill_tokens)
        more = [(mask, tokens) for mask, tokens in self._cached(request, now) if tokens > known]
        found = [
            worker_pb2.CacheSource(
                kv_address=worker.facts.kv_address, epoch=worker.facts.ref.epoch, cached_tokens=tokens
            )
            for mask, tokens in more
            for worker in self._placement.workers_in(mask, MAX_SOURCES)
            if worker.connected and worker.facts.ref not in placement.workers
        ]
        return found[:MAX_SOURCES]

    def granted(self, request: Request, cached_tokens: int) -> None:
        """The decode worker has taken the request, and found so much of it cached."""
        self._placement.granted(request.key)
        placement = request.placement
        if placement is not None and placement.prefill is not None:
            self._feed.confirm(placement.decode, placement.cached_decode_tokens, cached_tokens)

    def prefilled(self, request: Request) -> None:
        """The prompt is prefilled: the worker has room for another."""
        self._placement.prefilled(request.key)

    def found_cached(self, request: Request, cached_tokens: int) -> None:
        """So much of the prompt was not computed by whoever prefilled it."""
        placement = request.placement
        if placement is not None:
            ref = placement.prefill or placement.decode
            self._feed.confirm(ref, placement.cached_prefill_tokens, cached_tokens)

    def refused(self, request: Request, until_s: float) -> None:
        """The decode worker had no room."""
        self._placement.refused(request.key, until_s)

    def ended(self, request: Request, cause: str) -> None:
        """The present attempt is over; what was charged for it is returned. Repeats change nothing."""
        self._placement.release(request.key)
        if request.decisions and not request.decisions[-1].ended:
            request.decisions[-1].ended = cause

    def is_here(self, ref: WorkerRef) -> bool:
        """Whether that incarnation has not left."""
        return self._placement.worker(ref) is not None

    def _cached(self, request: Request, now: float) -> list[tuple[int, int]]:
        return self._feed.cached(request.keys, now) if request.keys is not None else []


def _failed_lately(request: Request, now: float) -> set[WorkerRef]:
    """Those of the workers on which an attempt failed that had one placed within the last `AVOID_S`."""
    if not request.failed_on:
        return set()
    lately = [decision for decision in request.decisions if now - decision.decided_s < AVOID_S]
    return {ref for decision in lately for ref in decision.placement.workers if ref in request.failed_on}
