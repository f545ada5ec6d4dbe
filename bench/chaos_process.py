"""One process of a chaos cluster: `python -m bench.chaos_process FILE`.

The file is a pickled `WorkerSettings`, `RouterSettings` or `StoreSettings`, written by the benchmark itself. Says what
it is reached by, and then that it serves, in lines of JSON; obeys lines of JSON; ends when its input does, and at once
when its parent does, even while it is stopped.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.chaos_settings import RouterSettings, StoreSettings, WorkerSettings

_PR_SET_PDEATHSIG = 1
READY_S = 60.0


def main() -> None:
    """Serve until the input ends."""
    _die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = pickle.loads(Path(sys.argv[1]).read_bytes())
    match settings:
        case WorkerSettings():
            _work(settings)
        case RouterSettings():
            asyncio.run(_route(settings))
        case StoreSettings():
            _store(settings)
        case _:
            raise TypeError(
                f"{sys.argv[1]} holds a {type(settings).__name__}, which is no process's settings"
            )


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _say(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def _obey(act: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Each command's answer, until the input ends."""
    for line in sys.stdin:
        _say(answer=act(json.loads(line)))


def _work(settings: WorkerSettings) -> None:
    from bench.chaos_worker import ChaosWorker  # imports torch

    chaos_worker = ChaosWorker(settings, _say)
    _say(ready=True)
    _obey(chaos_worker.act)
    chaos_worker.stop()


async def _route(settings: RouterSettings) -> None:
    from router.server import RouterServer

    server = RouterServer(settings.config)
    await server.start()
    _say(control=server.address)
    _say(ready=True)
    await asyncio.to_thread(_obey, lambda _command: {})
    await server.stop()


def _store(settings: StoreSettings) -> None:
    from bench.chaos_hooks import FullDisk
    from kvtransfer.tiers.disk_types import DiskOptions
    from kvtransfer.tiers.server import StoreConfig, StoreServer
    from kvtransfer.tiers.store_types import StoreOptions

    disk = FullDisk()
    options = StoreOptions(
        host_bytes=settings.host_bytes,
        disk=DiskOptions(settings.directory, settings.disk_bytes, slow_s=2.0, retry_s=1.0),
    )
    config = StoreConfig(cluster_secret=settings.cluster_secret, options=options, listen=settings.address)
    server = StoreServer(config, disk)
    server.start()
    server.wait_ready(READY_S)

    def act(command: dict[str, Any]) -> dict[str, Any]:
        disk.is_full = command.get("disk_full", disk.is_full)
        stats = server.stats()
        failures = sum(tier.counters.write_failures for tier in stats.tiers if tier.counters is not None)
        return {"leases": stats.num_leases, "fetches": stats.num_fetches, "write_failures": failures}

    _say(ready=True)
    _obey(act)
    server.close()


if __name__ == "__main__":
    main()
