"""Whose an attempt is: that of the router that asked for it. Routers that do not know of each other count alike."""

from __future__ import annotations

from typing import Protocol

from headrace.v1 import worker_pb2
from worker.link import RouterLink
from worker.wire import taken_over


class Held(Protocol):
    """What a role keeps of an attempt."""

    @property
    def key(self) -> worker_pb2.RequestKey: ...

    link: RouterLink


def is_anothers(held: Held | None, link: RouterLink, key: worker_pb2.RequestKey) -> bool:
    """Whether what is held of a request is another router's, and this attempt or a later one."""
    return held is not None and held.link is not link and held.key.attempt >= key.attempt


def tell_taken_over(held: Held | None, link: RouterLink, stage: str) -> None:
    """The router of the attempt that is held, if it is another one, must not wait for it, nor go on with it."""
    if held is not None and held.link is not link:
        held.link.send(taken_over(held.key, stage))
