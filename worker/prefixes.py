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
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from kvtransfer.transports.grpc_fetch import FetchSession
from worker.kv import KvParts
from worker.leasing import LeaseKeeper
from worker.loading import Loading
from worker.prefix_sources import Holder, SourceFinder, Wanted

logger = logging.getLogger(__name__)

MAX_AT_ONCE = 4
MAX_OPEN = 16
"""Fetches that run or wait for a thread; prompts beyond are computed."""


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
        self._loading = Loading(kv, leases, current_epoch)
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
        self, wanted: Wanted, finder: SourceFinder, loading: Loading, clock: Callable[[], float]
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
