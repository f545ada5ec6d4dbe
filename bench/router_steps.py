"""The pace of mock workers: when the next decode step ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class StepClock:
    """Ticks every `step_s` seconds, without drift; ticks that come too late are left out. At 0 it does not tick: who
    steps then goes on at once. Lives on one event loop."""

    def __init__(self) -> None:
        self.step_s = 0.0
        self._listeners: list[Callable[[], None]] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None

    def listen(self, on_tick: Callable[[], None]) -> None:
        """Call at every tick from now on, and whenever the pace changes."""
        self._listeners.append(on_tick)

    def set_pace(self, step_s: float) -> None:
        """Tick that often from now on.

        Raises:
            ValueError: a step of less than 0 s.
        """
        if step_s < 0:
            raise ValueError(f"a step takes {step_s} s; it must be 0 or more")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.step_s = step_s
        self._tick_at(asyncio.get_running_loop().time())

    async def step(self) -> None:
        """Wait for the next tick."""
        if not self.step_s:
            await asyncio.sleep(0)
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    def _tick_at(self, due_s: float) -> None:
        loop = asyncio.get_running_loop()
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)
        for listener in self._listeners:
            listener()
        if self.step_s:
            next_s = due_s + self.step_s
            if next_s < loop.time():
                next_s = loop.time() + self.step_s
            self._timer = loop.call_at(next_s, self._tick_at, next_s)
