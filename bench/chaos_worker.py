"""A worker of a chaos cluster: one that announces relays, whose clock can jump, and whose messages can be repeated."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from bench.chaos_hooks import Disturbed, Jump, Mischief
from bench.chaos_settings import WorkerSettings
from cluster.services import services_of
from kvtransfer.transports.choose_carrier import SenderCarriers
from worker.fencing import running_s
from worker.node import WorkerNode

Say = Callable[..., None]


class RelayedNode(WorkerNode):
    """Announces relays; says where they find it, as soon as it listens."""

    def __init__(self, settings: WorkerSettings, mischief: Mischief, jump: Jump, say: Say) -> None:
        self._settings = settings
        self._say = say
        services = [Disturbed(factory, mischief) for factory in services_of(settings.config.role)]
        super().__init__(
            settings.config, services, clock=jump.over(time.monotonic), running_clock=jump.over(running_s)
        )

    @property
    def address(self) -> str:
        """The relay's, for routers."""
        return self._settings.announced

    @address.setter
    def address(self, own: str) -> None:
        if own:
            self._say(control=own)

    @property
    def kv_address(self) -> str:
        """The relay's, for other workers."""
        return self._settings.kv_announced

    @kv_address.setter
    def kv_address(self, own: str) -> None:
        if own:
            self._say(kv=own, tcp_port=self._tcp_port())

    def _tcp_port(self) -> int:
        """Where carrier tcp listens, from an offer of it; 0 where there is none."""
        offered = self.kv.landing_carriers.open_slots([("headrace-carriers", "tcp")])
        ports = [slots.offer()["port"] for slots in offered]
        for slots in offered:
            slots.close(clean=True)
        return ports[0] if ports else 0


class ChaosWorker:
    """Serves from its making until `stop`, and obeys."""

    def __init__(self, settings: WorkerSettings, say: Say) -> None:
        self._jump, self._mischief = Jump(), Mischief(random.Random(settings.seed))
        self._node = RelayedNode(settings, self._mischief, self._jump, say)
        self._node.start()
        self._carriers = {
            "shm": self._node.kv.sending_carriers,
            "tcp": SenderCarriers(shm=False),
            "inline": SenderCarriers(shm=False, tcp=False),
        }

    def act(self, command: dict[str, Any]) -> dict[str, Any]:
        """What it should not have done so far."""
        if "carrier" in command:
            self._node.kv.sending_carriers = self._carriers[command["carrier"]]
        self._jump.ahead_s += command.get("jump_s", 0.0)
        self._mischief.is_on = command.get("repeat", self._mischief.is_on)
        return {"idle_violations": self._node.num_idle_violations}

    def stop(self) -> None:
        """End every request."""
        self._node.stop()
