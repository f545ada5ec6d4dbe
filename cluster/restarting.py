"""Starts workers anew, one after the other, so that requests go on meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import local_ray
from cluster.draining import Operator, Watch, drain
from cluster.errors import LaunchError
from cluster.state import ClusterState
from headrace.v1 import cluster_pb2
from headrace.v1.worker_pb2 import WORKER_STATE_KV_ONLY, WORKER_STATE_SERVING


@contextmanager
def ray_of(state: ClusterState, run_dir: Path) -> Iterator[None]:
    """This process as a driver of the cluster's Ray, as `restart` needs it. Raises ClusterError."""
    if state.local_ray is not None:
        local_ray.set_environment(run_dir)
    from cluster.deployment import driver  # imports ray, which reads the environment

    with driver(state.ray_address):
        yield


def restart(
    cluster: Operator,
    worker_id: str,
    run_dir: Path,
    *,
    timeout_s: float | None,
    start_timeout_s: float,
    watch: Watch,
) -> None:
    """Drain a worker (draining.drain), end its process, and return once a new one serves.

    Raises ClusterError; LaunchError, with the end of its log, where it does not come back in time.
    """
    from cluster.deployment import log_tail, restart_worker

    old_epoch = cluster.worker(worker_id).hello.epoch
    drain(cluster, worker_id, WORKER_STATE_KV_ONLY, timeout_s=timeout_s, watch=watch)
    restart_worker(worker_id)
    give_up_at = time.monotonic() + start_timeout_s

    def is_back(status: cluster_pb2.WorkerStatus) -> bool:
        watch(status)
        if time.monotonic() > give_up_at:
            cause = f"it was not back within {start_timeout_s:.0f} s"
            raise LaunchError(worker_id, cause, log_tail(run_dir, worker_id))
        is_new = status.connected and status.hello.epoch != old_epoch
        return is_new and status.report.state == WORKER_STATE_SERVING

    cluster.wait_for(worker_id, is_back)
