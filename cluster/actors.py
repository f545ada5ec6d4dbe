"""The Ray actors: one process for each worker, one for the router. Thin; what they hold knows no Ray.

The constructors start the servers, because Ray runs them again when it restarts an actor whose process
died: a worker that was killed comes back with a new epoch and registers with the routers by itself. So does one
whose process was to end (SIGTERM, `restart`), once it has drained; one that an operator had leave does not.
"""

from __future__ import annotations

import dataclasses
import logging
import logging.handlers
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from cluster import garbage
from cluster.model_store import resolve
from cluster.state import log_file, run_directory
from cluster.stores import StoreSettings, store_config
from router.config import RouterConfig
from worker.affinity import pin_process
from worker.config import WorkerConfig
from worker.service_loop import ServiceLoop
from worker.termination import GRACE_S, drain_on_sigterm

logger = logging.getLogger(__name__)

RESTART_PAUSE_S = 5.0
CALL_TIMEOUT_S = 30.0
DISK_TIMEOUT_S = 60.0
_LOG_BYTES = 4 << 20
_RESTART_ME = 1
"""The exit code of a process that Ray shall start another one for."""


@dataclass(frozen=True, slots=True)
class ActorFacts:
    """What an actor says of itself once it is ready."""

    pid: int
    address: str
    """host:port of its gRPC server."""


class WorkerActor:
    """A worker in its own process."""

    def __init__(self, config: WorkerConfig) -> None:
        """Open the model and serve; returns once routers can dial.

        `config.model_dir` may be a name in the model store of the machine that this runs on.
        """
        _log_to(log_file(run_directory(), config.worker_id))
        with _failure_logged():
            # Imports and the model's loading may use the engine's cores too, until it computes.
            pin_process({*config.cpus, *config.service_cpus})
            # These import torch, which the command line, which imports this module, must not wait for.
            from cluster.services import services_of
            from worker.node import WorkerNode

            config = dataclasses.replace(config, model_dir=resolve(str(config.model_dir)))
            self._node = WorkerNode(config, services_of(config.role))
            self._node.start()
            garbage.settle()
        self._ending = threading.Lock()
        # Ray runs this in the main thread, and looks for signals there while nothing is called.
        drain_on_sigterm(self._node)
        threading.Thread(target=self._end_when_gone, name="end-when-gone", daemon=True).start()

    def facts(self) -> ActorFacts:
        """Answers once the worker is ready."""
        return ActorFacts(os.getpid(), self._node.address)

    def restart(self) -> None:
        """Begin to leave; the process ends then, and Ray starts another one. Returns at once."""
        self._node.terminate(GRACE_S)

    def stop(self) -> None:
        """End all sessions in order."""
        with self._ending:
            self._node.stop()

    def _end_when_gone(self) -> None:
        self._node.wait_until_gone()
        self.stop()
        logger.info("left%s", " for good" if self._node.is_retired else "")
        if self._node.is_retired:
            # An actor that only ends its process is restarted.
            ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
            return
        os._exit(_RESTART_ME)


class RouterActor:
    """The router in its own process."""

    def __init__(self, config: RouterConfig, cpus: tuple[int, ...]) -> None:
        """Serve; `cpus` are the cores that it may use."""
        _log_to(log_file(run_directory(), config.router_id))
        with _failure_logged():
            from router.server import RouterServer

            pin_process(cpus)
            config = dataclasses.replace(config, model_dir=resolve(str(config.model_dir)))
            self._server = RouterServer(config)
            self._loop = ServiceLoop()
            self._loop.start()
            self._loop.run(self._server.start(), CALL_TIMEOUT_S)
            garbage.settle()

    def facts(self) -> ActorFacts:
        """Answers once the router listens."""
        return ActorFacts(os.getpid(), self._server.address)

    def stop(self) -> None:
        """Refuse new requests and end the running ones."""
        self._loop.run(self._server.stop(), CALL_TIMEOUT_S)


class StoreActor:
    """A node's cache tiers in a process of their own, for the workers of that node."""

    def __init__(self, settings: StoreSettings) -> None:
        """Serve; the disk tier is opened meanwhile, and what cannot be opened is done without."""
        _log_to(log_file(run_directory(), settings.store_id))
        with _failure_logged():
            from kvtransfer.tiers.server import StoreServer

            pin_process(settings.cpus)
            self._address = settings.address
            self._server = StoreServer(store_config(settings))
            self._server.start()
            self._server.wait_ready(DISK_TIMEOUT_S)
            garbage.settle()

    def facts(self) -> ActorFacts:
        """Answers once the store serves."""
        return ActorFacts(os.getpid(), self._address)

    def stop(self) -> None:
        """Write what waits for the disk, and end."""
        self._server.close()


@contextmanager
def _failure_logged() -> Iterator[None]:
    """Log why a constructor failed. A restart that fails is tried again; a first start is left to `up`."""
    try:
        yield
    except Exception:
        logger.exception("could not start")
        if ray.get_runtime_context().was_current_actor_reconstructed:
            # Ray gives an actor up for good when its constructor raises, but restarts one whose process ends.
            time.sleep(RESTART_PAUSE_S)
            os._exit(_RESTART_ME)
        raise


def _log_to(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handler = logging.handlers.RotatingFileHandler(file, maxBytes=_LOG_BYTES, backupCount=1, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(os.environ.get("HEADRACE_LOG", "INFO").upper())
