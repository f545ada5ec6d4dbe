"""An idle worker checks itself: no request means no lease, no pin and no private block (design §3.1)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.engine import Engine
    from worker.leasing import LeaseKeeper
    from worker.service import RoleService

logger = logging.getLogger(__name__)


class IdleCheck:
    """Run on the service loop while the engine has nothing to do.

    What is being given back takes a moment; a violation is what two checks in a row find.
    """

    def __init__(
        self,
        engine: Engine,
        keepers: Sequence[LeaseKeeper],
        services: Sequence[RoleService],
        is_moving: Callable[[], bool],
    ) -> None:
        """`is_moving()`: whether blocks are held for KV that comes or goes beside requests: served to another worker,
        written to the store, fetched for a request that has ended. Called under the engine's lock."""
        self.num_violations = 0
        self._engine = engine
        self._keepers = keepers
        self._services = services
        self._is_moving = is_moving
        self._found_before = False

    def run(self) -> None:
        """Look once."""
        problem = self._look()
        if problem and self._found_before:
            self.num_violations += 1
            logger.error("an idle worker holds what it should not: %s", problem)
        self._found_before = bool(problem)

    def _look(self) -> str:
        if any(service.num_requests for service in self._services):
            return ""
        with self._engine.lock:  # such blocks are taken and given back under it
            if self._is_moving():
                return ""
            pool = self._engine.pool.stats()
            counts = {
                "leases": sum(keeper.num_live for keeper in self._keepers),
                "leases in the engine": self._engine.num_leases,
                "private blocks": pool.private,
                "pins": pool.pins,
            }
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count)
