"""Which services a role consists of: the one place that knows worker, prefill and decode together."""

from __future__ import annotations

from decode.service import DecodeService
from prefill.service import PrefillService
from worker.config import WorkerRole
from worker.service import ServiceFactory


def services_of(role: WorkerRole) -> tuple[ServiceFactory, ...]:
    """The services of a worker in this role."""
    factories: list[ServiceFactory] = []
    if role.prefills_for_others:
        factories.append(PrefillService)
    if role.decodes:
        factories.append(DecodeService)
    return tuple(factories)
