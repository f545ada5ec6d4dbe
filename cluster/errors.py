"""What can go wrong with a cluster, said so that the command line can print it as it is.

ClusterError
├── LaunchError      an actor did not become ready
└── NotRunningError  there is no cluster to talk to
"""

from __future__ import annotations


class ClusterError(Exception):
    """Base. The message says what was wrong and what to do."""


class NotRunningError(ClusterError):
    """There is no cluster to talk to."""


class LaunchError(ClusterError):
    """An actor did not become ready.

    Attributes:
        actor: which.
        log_tail: its last lines; empty where it wrote none.
    """

    def __init__(self, actor: str, cause: str, log_tail: tuple[str, ...] = ()) -> None:
        super().__init__(f"{actor} did not start: {cause}")
        self.actor = actor
        self.log_tail = log_tail
