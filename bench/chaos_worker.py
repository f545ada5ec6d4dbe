"""A worker of a chaos cluster: one that announces relays, whose clock can jump, and whose messages can be repeated."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import worker.kv
import worker.node
from bench.chaos_hooks import Disturbed, JumpingClock, Mischief
from bench.chaos_settings import WorkerSettings
from cluster.services import services_of
from kvtransfer.transports.choose_carrier import SenderCarriers
from worker.fencing import running_s

Say = Callable[..., None]


class RelayedNode(worker.node.WorkerNode):
    """Announces relays; says where they find it, as soon as it listens."""

    def __init__(self, settings: WorkerSettings, mischief: Mischief, say: Say) -> None:
        self._settings = settings
        self._say = say
        services = [Disturbed(factory, mischief) for factory in services_of(settings.config.role)]
        super().__init__(settings.config, services)

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
        self._clock, self._mischief = JumpingClock(), Mischief(random.Random(settings.seed))
        _hand_in(self._clock)
        self._node = RelayedNode(settings, self._mischief, say)
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
        self._clock.ahead_s += command.get("jump_s", 0.0)
        self._mischief.is_on = command.get("repeat", self._mischief.is_on)
        return {"idle_violations": self._node.num_idle_violations}

    def stop(self) -> None:
        """End every request."""
        self._node.stop()


def _hand_in(clock: JumpingClock) -> None:
    """A node hands one clock to its leases, its roles and its transfers, and takes it too: there is no other seam."""
    vars(worker.node).update(time=clock, running_s=lambda: running_s() + clock.ahead_s)
    vars(worker.kv).update(time=clock)
