"""Brings cached blocks of a prompt here before it is computed, where that is predicted to be faster.

The blocks may be on the prompt's decode worker (the answer of the turn before was written there), on workers that
the router names, or in this node's store. They come by Fetch into a lease of its own, and stay behind as cached
prefix: the prompt's ordinary reservation then finds them. Whatever goes wrong costs a bounded time, and the
prompt is computed.

    service loop                       a fetch thread
    ------------                       --------------
    bring(wanted, then) ─────────────▶ asks the store, decides, opens a lease, loads
    then(brought) ◀────────────────── lease over, blocks cached or given back
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from kvtransfer.cluster_token import cluster_metadata
from kvtransfer.codecs import CODECS
from kvtransfer.fetching import FetchCause, FetchOutcome
from kvtransfer.frames import LeaseRef
from kvtransfer.lease_types import RequestId
from kvtransfer.sources import FetchRequest
from kvtransfer.transports.grpc_fetch import FetchSession
from worker.kv import KvParts
from worker.leasing import LeaseKeeper, NotReserved
from worker.prefix_sources import STORE, Holder, Source, SourceFinder, Wanted

logger = logging.getLogger(__name__)

MAX_AT_ONCE = 4
MAX_OPEN = 16
"""Fetches that run or wait for a thread; prompts beyond are computed."""
STALL_S = 2.0
UNMEASURED_S = 10.0
"""What a fetch may take where nothing says how long computing would."""


@dataclass(frozen=True, slots=True)
class Brought:
    """What a fetch brought. `source`: a worker's kv address, "store", or empty; `reason`: why so much. `fetch_s`: what
    the prompt waited for it, looking up and deciding included."""

    num_tokens: int = 0
    source: str = ""
    fetch_s: float = 0.0
    reason: str = ""


class PrefixFetcher:
    """One role's fetches, into leases of `leases`. Lives on the service loop. `current_epoch()`: this incarnation."""

    def __init__(
        self,
        kv: KvParts,
        leases: LeaseKeeper,
        current_epoch: Callable[[], int],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._kv = kv
        self._finder = SourceFinder(kv)
        self._loading = _Loading(kv, leases, current_epoch)
        self._loop = loop
        self._threads = ThreadPoolExecutor(MAX_AT_ONCE, thread_name_prefix="fetch")
        self._open: set[PrefixFetch] = set()

    @property
    def num_open(self) -> int:
        """Fetches that may hold blocks, also after their prompts have ended."""
        return len(self._open)

    def anybody(self, holders: Sequence[Holder] = ()) -> bool:
        """Whether there is anybody to ask at all: without, no keys need to be made for `bring`."""
        return self._finder.anybody(holders)

    def bring(self, wanted: Wanted, then: Callable[[Brought], None]) -> PrefixFetch | None:
        """Load what is worth it, on a thread. `then` is called on the loop when that is over, however it ends.

        None where nobody may have anything, or too many fetches are open: `then` is not called.
        """
        if len(self._open) >= MAX_OPEN or not self._finder.may_help(wanted):
            return None
        fetch = PrefixFetch(wanted, self._finder, self._loading, self._kv.clock)
        self._open.add(fetch)
        self._threads.submit(fetch.run).add_done_callback(
            lambda done: self._loop.call_soon_threadsafe(self._ended, fetch, done, then)
        )
        return fetch

    def _ended(self, fetch: PrefixFetch, done: Future[Brought], then: Callable[[Brought], None]) -> None:
        self._open.discard(fetch)
        error = done.exception()
        if error is not None:
            logger.error("fetching a prefix failed", exc_info=error)
        then(Brought() if error is not None else done.result())

    async def close(self) -> None:
        """End every fetch and wait for their threads."""
        for fetch in self._open:
            fetch.cancel()
        await self._loop.run_in_executor(None, self._threads.shutdown)


class PrefixFetch:
    """One prompt's fetch. `cancel` may be called by any thread."""

    def __init__(
        self, wanted: Wanted, finder: SourceFinder, loading: _Loading, clock: Callable[[], float]
    ) -> None:
        self._wanted = wanted
        self._finder = finder
        self._loading = loading
        self._clock = clock
        self._began_at = clock()
        self._lock = threading.Lock()
        self._session: FetchSession | None = None
        self._is_cancelled = False

    def run(self) -> Brought:
        """Decide, and load what is worth it. Returns in bounded time."""
        source = None if self._is_cancelled else self._finder.find(self._wanted)
        if source is None or self._is_cancelled:
            return Brought(fetch_s=self._clock() - self._began_at)
        num_tokens, reason = self._loading.load(self._wanted, source, self._attach)
        name = source.name if num_tokens else ""
        self._loading.count(source, num_tokens)
        return Brought(num_tokens, name, self._clock() - self._began_at, reason)

    def cancel(self) -> None:
        """End it soon."""
        with self._lock:
            self._is_cancelled = True
            session = self._session
        if session is not None:
            session.cancel()

    def _attach(self, session: FetchSession) -> None:
        with self._lock:
            self._session = session
            is_cancelled = self._is_cancelled
        if is_cancelled:
            session.cancel()


class _Loading:
    """Loads blocks into leases of one role; on threads that may wait."""

    def __init__(self, kv: KvParts, leases: LeaseKeeper, current_epoch: Callable[[], int]) -> None:
        self._kv = kv
        self._engine = kv.engine
        self._leases = leases
        self._target = kv.target(leases)
        self._current_epoch = current_epoch

    def count(self, source: Source, num_tokens: int) -> None:
        """For the worker's reports."""
        self._kv.counters.note_fetch(STORE if source.name == STORE else "worker", num_tokens)

    def load(self, wanted: Wanted, source: Source, attach: Callable[[FetchSession], None]) -> tuple[int, str]:
        """Tokens that are cached here now, of those that `source` has, and why so many."""
        limit_s = min(wanted.deadline - self._kv.clock(), self._worth_s(source))
        if limit_s <= 0:
            return 0, "the deadline has passed"
        request = RequestId(wanted.tenant, f"fetch:{secrets.token_hex(8)}")
        lease_id = self._leases.grant(
            request, 1, limit_s, local=False, fidelity=wanted.bound, peer_epoch=source.epoch
        )
        if isinstance(lease_id, NotReserved):
            return 0, f"{lease_id.cause}: {lease_id.message}"
        try:
            return self._load_into(lease_id, limit_s, wanted, source, attach)
        finally:
            self._leases.release(lease_id, "FETCH_OVER")

    def _load_into(
        self,
        lease_id: bytes,
        limit_s: float,
        wanted: Wanted,
        source: Source,
        attach: Callable[[FetchSession], None],
    ) -> tuple[int, str]:
        keys = wanted.keys[: source.end_block]
        num_hit = self._leases.open_prefix(lease_id, keys, wanted.bound)
        if num_hit is None:
            return 0, "no room to load into"
        if num_hit == len(keys):
            return 0, "all of it is here meanwhile"

        def on_fetched(lease_id: bytes, num_blocks: int, fidelity: int) -> None:
            self._engine.seal_prefix(lease_id, keys, num_hit + num_blocks, fidelity)

        session = FetchSession(
            channel=source.channel,
            request=self._request(lease_id, source.epoch, wanted, keys, num_hit),
            target=self._target,
            on_fetched=on_fetched,
            remaining_s=limit_s,
            stall_s=STALL_S,
            metadata=cluster_metadata(self._kv.config.cluster_secret),
            clock=self._kv.clock,
        )
        attach(session)
        return self._result(source, session.run())

    def _request(
        self, lease_id: bytes, source_epoch: int, wanted: Wanted, keys: Sequence[bytes], num_hit: int
    ) -> FetchRequest:
        layout = self._engine.layout
        return FetchRequest(
            lease=LeaseRef(lease_id, 1, source_epoch, self._current_epoch()),
            keys=tuple(keys[num_hit:]),
            first_block=num_hit,
            block_tokens=layout.block_tokens,
            layout=layout.identity(),
            dtypes=layout.dtypes,
            fidelity=wanted.bound,
            codecs=tuple((each.name, each.version) for each in CODECS if each.fidelity.rank <= wanted.bound),
        )

    def _result(self, source: Source, outcome: FetchOutcome) -> tuple[int, str]:
        if outcome.num_blocks:
            # A store is asked in bytes as it keeps them, a worker in bytes of the cache.
            num_bytes = outcome.wire_bytes if source.name == STORE else outcome.kv_bytes
            self._kv.speeds.note_load(source.name, num_bytes, outcome.fetch_s)
            return outcome.num_blocks * self._engine.layout.block_tokens, source.decision.reason
        logger.info("nothing fetched from %s: %s: %s", source.name, outcome.cause, outcome.message)
        if outcome.cause == FetchCause.PEER_UNAVAILABLE or outcome.fetch_s >= STALL_S:
            # So that the prompts after this one do not wait for it in vain as well.
            self._kv.speeds.note_load(source.name, source.num_bytes, max(outcome.fetch_s, STALL_S))
        return 0, f"{outcome.cause}: {outcome.message}"

    @staticmethod
    def _worth_s(source: Source) -> float:
        """A fetch that has taken as long as computing would is not worth waiting for any more."""
        predicted = source.decision.predicted_compute_s
        return UNMEASURED_S if predicted is None else max(STALL_S, predicted)
