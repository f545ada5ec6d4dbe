"""The gRPC service for workers that join and for operators who look."""

from collections.abc import Callable
from typing import Any, TypeAlias

import grpc

from headrace.v1 import cluster_pb2, cluster_pb2_grpc
from router.auth import DEFAULT_TENANT, Authenticator, ClusterToken
from router.book import RequestBook
from router.config import ModelFacts, RouterConfig
from router.core.admission import MAX_REQUEST_ID_CHARS
from router.core.index_feed import FeedState, IndexFeed
from router.core.lifecycle import RequestState
from router.core.queue import TokenQueue
from router.core.retries import RetryBudget
from router.errors import unknown_request
from router.explain import explanation
from router.membership import Membership
from router.requests import RequestKey

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ClusterServicer(cluster_pb2_grpc.ClusterServicer):
    """Serves headrace.v1.Cluster. Workers prove that they know the cluster secret; whoever may ask for answers,
    or knows the secret, may ask for the status."""

    def __init__(
        self,
        config: RouterConfig,
        router_epoch: int,
        model: ModelFacts,
        authenticator: Authenticator,
        membership: Membership,
        book: RequestBook,
        queue: TokenQueue[RequestKey],
        retries: RetryBudget,
        feed: IndexFeed,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._router_epoch = router_epoch
        self._model = model
        self._authenticator = authenticator
        self._token = ClusterToken(config.cluster_secret)
        self._membership = membership
        self._book = book
        self._queue = queue
        self._retries = retries
        self._feed = feed
        self._clock = clock
        self._started_s = clock()

    async def Register(
        self, request: cluster_pb2.RegisterRequest, context: Context
    ) -> cluster_pb2.RegisterResponse:
        """Takes a worker's announcement; the router then dials it."""
        self._token.require(tuple(context.invocation_metadata() or ()))
        connected = self._membership.register(request.worker_id, request.epoch, request.address)
        return cluster_pb2.RegisterResponse(
            router_id=self._config.router_id, router_epoch=self._router_epoch, connected=connected
        )

    async def Status(
        self, request: cluster_pb2.StatusRequest, context: Context
    ) -> cluster_pb2.StatusResponse:
        """What the cluster is and does now."""
        metadata = tuple(context.invocation_metadata() or ())
        if not self._token.holds(metadata):
            self._authenticator.tenant(metadata)
        counters = self._book.counters
        running = [r for r in self._book.live if r.lifecycle.state is not RequestState.QUEUED]
        return cluster_pb2.StatusResponse(
            router_id=self._config.router_id,
            profile=self._config.profile_name,
            model=self._model.name,
            workers=self._membership.rows(),
            queued_requests=len(self._queue),
            queued_tokens=self._queue.queued_tokens,
            running_requests=len(running),
            finished_requests=counters.finished,
            failed_requests=counters.failed,
            cancelled_requests=counters.cancelled,
            uptime_s=self._clock() - self._started_s,
            recoveries=self._retries.num_granted,
            recoveries_refused=self._retries.num_refused,
            prefix_index=self._prefix_index(),
        )

    async def Explain(
        self, request: cluster_pb2.ExplainRequest, context: Context
    ) -> cluster_pb2.ExplainResponse:
        """Why a request was placed where it was."""
        metadata = tuple(context.invocation_metadata() or ())
        if self._token.holds(metadata):
            tenant = request.tenant or DEFAULT_TENANT
        else:
            tenant = self._authenticator.tenant(metadata)
        known = self._book.get(RequestKey(tenant, request.request_id))
        if known is None:
            raise unknown_request(request.request_id[:MAX_REQUEST_ID_CHARS])
        return explanation(known, self._config.policy, self._clock())

    def _prefix_index(self) -> cluster_pb2.PrefixIndexStatus:
        states, counters = self._feed.num_feeds(), self._feed.counters
        return cluster_pb2.PrefixIndexStatus(
            blocks=self._feed.index.num_entries,
            exact_workers=states[FeedState.EXACT],
            other_workers=sum(states.values()) - states[FeedState.EXACT],
            age_s=self._feed.age_s(self._clock()),
            predictions=counters.predictions,
            false_hit_rate=counters.false_hit_rate,
            repairs=counters.repairs,
        )

    async def SetWorkerState(
        self, request: cluster_pb2.SetWorkerStateRequest, context: Context
    ) -> cluster_pb2.SetWorkerStateResponse:
        """Passes on where a worker shall go; it follows within a moment."""
        self._token.require(tuple(context.invocation_metadata() or ()))
        state = self._membership.set_state(request.worker_id, request.state)
        return cluster_pb2.SetWorkerStateResponse(state=state)
