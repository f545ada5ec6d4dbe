"""What SIGTERM does to a worker's process: the worker drains within a grace; a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Protocol

GRACE_S = 20.0
"""What still runs then is handed back to the routers."""
EXIT_CODE = 128 + signal.SIGTERM


class Drainable(Protocol):
    """A worker, as far as a signal needs it."""

    def terminate(self, hand_back_after_s: float) -> None:
        """Begin to leave; returns at once, and may be called by a signal's handler."""
        ...


def drain_on_sigterm(worker: Drainable, grace_s: float = GRACE_S) -> None:
    """From now on SIGTERM has `worker` leave; whoever waits for that stops it and ends the process.

    Raises RuntimeError in any other thread than the main one, which alone may handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("drain_on_sigterm must be called in the main thread")
    asked = False

    def on_sigterm(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os._exit(EXIT_CODE)
        asked = True
        worker.terminate(grace_s)

    signal.signal(signal.SIGTERM, on_sigterm)
