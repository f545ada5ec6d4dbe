"""The one thread that steps the engine.

It waits while there is nothing to compute, steps while there is, and hands what a step gave to a listener.
A step that fails as a whole ends the requests that were in it; after several in a row the worker calls
itself unhealthy and stops. Knows no requests, no network and no lease.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from engine.engine import Engine
from engine.events import StepResult
from worker.affinity import give_way, pin_current_thread

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
IDLE_CHECK_S = 1.0
NO_ROOM_WAIT_S = 0.005
COLD_STEPS = 3
_AVERAGE_WEIGHT = 0.1


class EngineListener(Protocol):
    """Hears from the engine's thread; must hand over and return at once."""

    def on_step(self, result: StepResult) -> None:
        """A step was applied."""
        ...

    def on_engine_failed(self, lease_ids: Sequence[bytes], message: str, healthy: bool) -> None:
        """A step failed and these leases' sequences are lost; not `healthy`: it was the last step."""
        ...

    def on_idle(self) -> None:
        """Nothing is there to compute; called when that begins and about once a second after."""
        ...


@dataclass(slots=True)
class EngineCounters:
    """What the thread has done; read by others without a lock, each field by itself."""

    steps: int = 0
    failed_steps: int = 0
    drafts: int = 0
    """Guesses at tokens that were computed."""
    drafts_kept: int = 0
    """Those that were the tokens drawn."""
    decode_steps: int = 0
    """Steps that only decode."""
    decode_step_s: float = 0.0
    """Their moving average, without the first cold ones: a router would pass over a worker that seems slow, which so
    could never show that it is not."""
    decoding: bool = False
    """Whether the last step wrote answers."""


class EngineThread:
    """Opens an engine on its own thread and steps it there until `stop`."""

    def __init__(
        self, open_engine: Callable[[], Engine], listener: EngineListener, cpus: Collection[int] = ()
    ) -> None:
        self.counters = EngineCounters()
        self._open_engine = open_engine
        self._listener = listener
        self._cpus = tuple(cpus)
        self._ready: Future[Engine] = Future()
        self._work = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, timeout_s: float = 1800.0) -> Engine:
        """Open the engine; returns it when it is loaded and warm.

        Raises what opening it raised, or TimeoutError.
        """
        self._thread.start()
        return self._ready.result(timeout_s)

    def wake(self) -> None:
        """Say that there may be work. Any thread."""
        self._work.set()

    def stop(self, timeout_s: float = 30.0) -> None:
        """End the thread after the step in flight."""
        self._stopping.set()
        self._work.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    # --- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            pin_current_thread(self._cpus)
            give_way()
            engine = self._open_engine()
        except BaseException as error:  # noqa: BLE001 - start() raises it in the caller's thread
            self._ready.set_exception(error)
            return
        self._ready.set_result(engine)
        failed_in_a_row = 0
        while not self._stopping.is_set() and failed_in_a_row < MAX_FAILED_STEPS:
            self._work.clear()
            if not engine.has_work():
                self.counters.decoding = False
                self._listener.on_idle()
                self._work.wait(IDLE_CHECK_S)
                continue
            failed_in_a_row = 0 if self._step(engine, failed_in_a_row) else failed_in_a_row + 1

    def _step(self, engine: Engine, failed_before: int) -> bool:
        try:
            result = engine.step()
        except Exception as error:
            # Whatever a step raises, the requests in it must end with a cause and the others must go on.
            logger.exception("an engine step failed")
            self.counters.failed_steps += 1
            lost = _drop_all(engine)
            healthy = failed_before + 1 < MAX_FAILED_STEPS
            self._listener.on_engine_failed(
                lost, f"an engine step failed with {type(error).__name__}", healthy
            )
            return False
        self._count(result)
        self._listener.on_step(result)
        if not (result.events or result.num_prefill_tokens or result.num_decode_rows):
            self._work.wait(NO_ROOM_WAIT_S)  # all that could run waits for blocks
        return True

    def _count(self, result: StepResult) -> None:
        self.counters.steps += 1
        self.counters.drafts += result.num_drafts
        self.counters.drafts_kept += result.num_drafts_kept
        self.counters.decoding = result.num_decode_rows > 0
        if not result.num_decode_rows or result.num_prefill_tokens:
            return
        self.counters.decode_steps += 1
        if self.counters.decode_steps > COLD_STEPS:
            average = self.counters.decode_step_s or result.step_s
            self.counters.decode_step_s = average + _AVERAGE_WEIGHT * (result.step_s - average)


def _drop_all(engine: Engine) -> list[bytes]:
    with engine.lock:
        lease_ids = list({sequence.lease_id: None for sequence in engine.scheduler.sequences})
        for lease_id in lease_ids:
            engine.stop(lease_id)
    return lease_ids
