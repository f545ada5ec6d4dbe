"""An asyncio loop on a thread of its own: everything of a worker that is neither compute nor KV bytes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class ServiceLoop:
    """Runs from `start` to `stop`."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(_ignore_late_poll)
        self._thread = threading.Thread(target=self._run, name="service-loop", daemon=True)

    @property
    def is_running(self) -> bool:
        """Between `start` and `stop`."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to run what is handed in."""
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Run a coroutine on the loop and wait for it, from any other thread.

        Raises what it raised, or TimeoutError.
        """
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Cancel what still runs, and end the thread. Idempotent."""
        if self.loop.is_closed():
            return
        if self.is_running:
            self.run(self._cancel_tasks(), timeout_s)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(timeout_s)
        self.loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    async def _cancel_tasks(self) -> None:
        tasks = asyncio.all_tasks(self.loop) - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.loop.shutdown_default_executor()


def _ignore_late_poll(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Pass over a wake-up of grpc.aio that another loop of the process answered first.

    Its completion queue wakes every loop for every event; a loop that comes late finds an empty socket.
    """
    if isinstance(context.get("exception"), BlockingIOError):
        return
    loop.default_exception_handler(context)
