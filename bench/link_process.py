"""One process of a cluster whose workers lie on two ends of a link: `python -m bench.link_process FILE`.

The file is a pickled WorkerConfig or RouterConfig, written by the benchmark itself. Says its address when it
serves, and ends when its input does.
"""

from __future__ import annotations

import asyncio
import pickle
import sys
from pathlib import Path

from cluster.services import services_of
from router.config import RouterConfig
from router.server import RouterServer
from worker.config import WorkerConfig
from worker.node import WorkerNode


def main() -> None:
    """Serve until the input ends."""
    config = pickle.loads(Path(sys.argv[1]).read_bytes())
    if isinstance(config, WorkerConfig):
        node = WorkerNode(config, services_of(config.role))
        node.start()
        _say(node.address)
        sys.stdin.read()
        node.stop()
    else:
        asyncio.run(_route(config))


async def _route(config: RouterConfig) -> None:
    server = RouterServer(config)
    await server.start()
    _say(server.address)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()


def _say(address: str) -> None:
    sys.stdout.write(address + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
