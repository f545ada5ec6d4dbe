"""Starts the GCS of a Ray head again when its process dies, under the actors that run on.

The GCS is Ray's list of nodes and actors. While it is away no actor is started or restarted, and after
`RAY_gcs_rpc_server_reconnect_timeout_s` (60 s) without it every node of Ray ends itself, with its actors. A GCS
that comes back before that goes on where the old one stopped, provided that its tables are in a durable store:
Redis (RAY_REDIS_ADDRESS) or files (RAY_gcs_storage=rocksdb with RAY_gcs_storage_path). Ray itself never starts
it again: `ray start --block` ends the head when its GCS dies, and `ray start` watches nothing.

    python -m cluster.gcs_keeper PORT     # of the Ray head on this machine, once it is up
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from cluster.errors import ClusterError

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = 0.5
RETRY_S = 5.0
"""Between the starts of a GCS that does not stay up; the head's own patience bounds how often."""


@dataclass(slots=True)
class Restarts:
    """Decides when a GCS that is gone is started. Pure."""

    not_before_s: float = 0.0

    def is_due(self, *, is_gone: bool, now: float) -> bool:
        """Whether to start it at `now`, on a monotonic clock; True counts as a start."""
        if not is_gone or now < self.not_before_s:
            return False
        self.not_before_s = now + RETRY_S
        return True


@dataclass(frozen=True, slots=True)
class GcsCommand:
    """How a GCS was started, and so how it is started again."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def node_id(self) -> str:
        """Of the head that it belongs to, as Ray writes it. Raises ClusterError where it does not say so."""
        return self._value("--node-id")

    @property
    def is_durable(self) -> bool:
        """Whether a GCS started anew finds what the old one knew."""
        return self.environment.get("RAY_gcs_storage") == "rocksdb" or any(
            argument.startswith("--redis_address=") for argument in self.arguments
        )

    def _value(self, flag: str) -> str:
        for argument in self.arguments:
            if argument.startswith(f"{flag}="):
                return argument.removeprefix(f"{flag}=")
        raise ClusterError(f"Ray's GCS was started without {flag}; this version of Ray is not known")


class GcsKeeper:
    """Watches one Ray head. Must be made while its GCS lives.

    Attributes:
        raylet: of the head; with it the head ends.
    """

    def __init__(self, port: int) -> None:
        """Find the head whose GCS listens on `port` of this machine.

        Raises ClusterError where there is none, or where its GCS keeps its tables in memory.
        """
        self._gcs, self._command = _find_gcs(port)
        if not self._command.is_durable:
            raise ClusterError(
                "this GCS keeps its tables in memory: started again it would know no node and no actor; "
                "start Ray with RAY_REDIS_ADDRESS, or with RAY_gcs_storage=rocksdb and RAY_gcs_storage_path"
            )
        self.raylet = _find_raylet(self._command.node_id)
        self._restarts = Restarts()

    def check(self) -> bool:
        """Start the GCS where it is due; whether the head still runs."""
        # `ray stop` ends the raylet first: a GCS that goes after it is to stay away.
        if not is_alive(self.raylet):
            return False
        if self._restarts.is_due(is_gone=not is_alive(self._gcs), now=time.monotonic()):
            self._gcs = self._start()
            logger.warning("Ray's GCS had died; started again as process %d", self._gcs.pid)
        return True

    def _start(self) -> psutil.Process:
        return psutil.Popen(
            self._command.arguments,
            env=dict(self._command.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def is_alive(process: psutil.Process) -> bool:
    """Whether this very process runs; one that nobody has waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _find_gcs(port: int) -> tuple[psutil.Process, GcsCommand]:
    for process in _named("gcs_server"):
        with suppress(psutil.Error):
            arguments = process.cmdline()
            if f"--gcs_server_port={port}" in arguments:
                return process, GcsCommand(tuple(arguments), process.environ())
    raise ClusterError(f"no GCS of Ray that listens on port {port} was started by this user on this machine")


def _find_raylet(node_id: str) -> psutil.Process:
    for process in _named("raylet"):
        with suppress(psutil.Error):
            if f"--node_id={node_id}" in process.cmdline():
                return process
    raise ClusterError(f"the raylet of Ray's head, node {node_id}, does not run")


def _named(name: str) -> Iterable[psutil.Process]:
    for process in psutil.process_iter(["name"]):
        if process.info["name"] == name:
            yield process


def main(arguments: Sequence[str] = sys.argv[1:]) -> int:
    """Keep the GCS of the head at the port given until that head ends. Returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if len(arguments) != 1 or not arguments[0].isdigit():
        logger.error("usage: python -m cluster.gcs_keeper PORT, the GCS's of the Ray head on this machine")
        return 2
    try:
        keeper = GcsKeeper(int(arguments[0]))
    except ClusterError as error:
        logger.error("%s", error)
        return 1
    logger.info("keeping the GCS of the Ray head at port %s", arguments[0])
    while keeper.check():
        time.sleep(CHECK_INTERVAL_S)
    logger.info("the Ray head has ended")
    return 0


if __name__ == "__main__":
    sys.exit(main())
