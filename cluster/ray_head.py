"""The first process of a Ray of our own: starts its head, keeps its GCS, and ends with it.

    python -m cluster.ray_head PORT ARGUMENTS     # of `ray start`; PORT is the GCS's

As `ray start --block`, but for a GCS that dies: that one is started again (gcs_keeper).
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

import psutil

from cluster.errors import ClusterError
from cluster.gcs_keeper import CHECK_INTERVAL_S, GcsKeeper
from cluster.local_ray import processes_of_session

logger = logging.getLogger(__name__)

RAYLET_TIMEOUT_S = 3.0
"""For its end in order, within local_ray.STOP_TIMEOUT_S."""


def main(arguments: Sequence[str] = sys.argv[1:]) -> int:
    """Run until SIGTERM (then 0), or until Ray's head has ended by itself or could not start."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    port, *ray_arguments = arguments
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        f"--port={port}",
        *ray_arguments,
    ]
    code = subprocess.run(command, check=False).returncode
    if code:
        return code
    try:
        keeper = GcsKeeper(int(port))
    except ClusterError as error:
        logger.error("%s", error)
        return 1
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    while keeper.check() and not stopping.is_set():
        stopping.wait(CHECK_INTERVAL_S)
    if not stopping.is_set():
        logger.error("Ray's raylet has died; ending the rest of Ray")
    _end(keeper.raylet)
    return 0 if stopping.is_set() else 1


def _end(raylet: psutil.Process) -> None:
    """End the raylet in order, and with it the actors; then whatever is left of this session."""
    with suppress(psutil.NoSuchProcess):
        raylet.terminate()
    psutil.wait_procs([raylet], timeout=RAYLET_TIMEOUT_S)
    for process in processes_of_session(os.getpid()):
        if process.pid != os.getpid():
            with suppress(psutil.NoSuchProcess):
                process.kill()


if __name__ == "__main__":
    sys.exit(main())
