"""Keeps the engine's thread on its own cores and everything else off them.

A thread inherits its creator's cores, so two moves at start are enough: `pin_process` moves every thread
that exists to the service cores, and the engine's thread then moves itself (`pin_current_thread`) before
it opens the model, so that torch's compute threads, its children, follow it. Where there are not cores enough, the
router and others share the engine's: then they go first (`give_way`), since they need little and somebody waits.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Collection
from pathlib import Path

logger = logging.getLogger(__name__)

GIVE_WAY_NICE = 5
"""A third of the weight of a thread with the ordinary priority."""


def pin_current_thread(cpus: Collection[int]) -> None:
    """Run the calling thread, and threads it starts later, on `cpus`. Empty: leaves it where it is.

    Raises ValueError where the machine lets this process use none of them.
    """
    _pin(0, cpus)


def give_way() -> None:
    """Lower the priority of the calling thread, and of threads it starts later. On Linux; elsewhere a priority is a
    whole process's, and stays."""
    if sys.platform != "linux":
        return
    thread_id = threading.get_native_id()
    before = os.getpriority(os.PRIO_PROCESS, thread_id)
    os.setpriority(os.PRIO_PROCESS, thread_id, max(before, GIVE_WAY_NICE))


def pin_process(cpus: Collection[int]) -> None:
    """Run every thread that this process has now on `cpus`. Empty: leaves them where they are.

    Raises ValueError where the machine lets this process use none of them.
    """
    if not cpus or not hasattr(os, "sched_setaffinity"):
        return
    for task in Path("/proc/self/task").iterdir():
        try:
            _pin(int(task.name), cpus)
        except ProcessLookupError:  # the thread ended while we listed
            continue


def _pin(thread_id: int, cpus: Collection[int]) -> None:
    if not cpus or not hasattr(os, "sched_setaffinity"):
        return
    try:
        os.sched_setaffinity(thread_id, cpus)
    except OSError as error:
        if isinstance(error, ProcessLookupError):
            raise
        raise ValueError(
            f"cannot run on cores {sorted(cpus)}: {error.strerror}; this machine has {os.cpu_count()}"
        ) from error
