"""Starts the actors of a plan on a Ray that this process is connected to, watches them start, ends them."""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray

from cluster.actors import CALL_TIMEOUT_S, ActorFacts, RouterActor, StoreActor, WorkerActor
from cluster.errors import ClusterError, LaunchError
from cluster.placement import Node
from cluster.plan import MALLOC_ENVIRONMENT, environment
from cluster.profile import split_address
from cluster.progress import Progress
from cluster.state import log_file
from cluster.wiring import Wiring

NAMESPACE = "headrace"
STOP_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
LOG_TAIL_LINES = 12
MACHINE_SHARE = 0.001
"""Of the 1.0 that each machine has of the resource that Ray names after its address."""
_POLL_S = 0.5
_ERROR_LINE = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Exit)\b.*")


@contextmanager
def driver(address: str) -> Iterator[None]:
    """Connect this process to the Ray at `address`, host:port of its head. Raises ClusterError."""
    _require_listener(address)
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"cannot use the Ray at {address}: {_last_line(str(error))}") from error
    try:
        yield
    finally:
        ray.shutdown()


def refuse_namesakes(names: Collection[str]) -> None:
    """Raises ClusterError where this Ray runs actors of Headrace by these names."""
    for name in names:
        with suppress(ValueError):
            ray.get_actor(name, namespace=NAMESPACE)
            raise ClusterError(
                f"this Ray runs an actor {name!r} of Headrace already; "
                "stop that cluster with `headrace down` where it was started"
            )


def start_actors(wiring: Wiring, home: Path | None) -> dict[str, Any]:
    """Start the router's actor, every store's and every worker's; returns their handles by name, before they are ready.

    `home` is passed on as HEADRACE_HOME where it means something on the actors' machines: on this one.
    """
    home_variable = {"HEADRACE_HOME": str(home)} if home is not None else {}
    plan = wiring.plan
    started = {
        router.name: _options(RouterActor, router.name, router.node, home_variable).remote(
            wiring.router_config(router), router.cpus
        )
        for router in plan.routers
    }
    for store in plan.stores:
        variables = home_variable | MALLOC_ENVIRONMENT
        actor = _options(StoreActor, store.store_id, store.node, variables)
        started[store.store_id] = actor.remote(wiring.store_settings(store))
    for worker in plan.workers:
        variables = home_variable | environment(worker)
        actor = _options(
            WorkerActor,
            worker.worker_id,
            worker.node,
            variables,
            num_cpus=worker.ray_cpus,
            num_gpus=worker.gpus,
        )
        started[worker.worker_id] = actor.remote(wiring.worker_config(worker))
    return started


def wait_for_actors(
    actors: Mapping[str, Any], run_dir: Path, deadline_s: float, progress: Progress
) -> dict[str, ActorFacts]:
    """Return once every actor's constructor is done. `deadline_s` is on time.monotonic().

    Raises LaunchError for the first that fails, or for one that is not done in time.
    """
    waiting: dict[Any, str] = {actor.facts.remote(): name for name, actor in actors.items()}
    facts: dict[str, ActorFacts] = {}
    for name in actors:
        progress.begin(name, "starting")
    while waiting:
        references: list[Any] = list(waiting)
        done, _ = ray.wait(references, num_returns=1, timeout=_POLL_S)
        for reference in done:
            name = waiting.pop(reference)
            try:
                facts[name] = ray.get(reference)
            except ray.exceptions.RayError as error:
                raise LaunchError(name, _last_line(str(error)), log_tail(run_dir, name)) from error
            progress.end(name, f"ready, process {facts[name].pid}")
        if waiting and time.monotonic() > deadline_s:
            name = next(iter(waiting.values()))
            raise LaunchError(name, "it was not ready in time", log_tail(run_dir, name))
    return facts


def stop_actors(names: Collection[str]) -> None:
    """End the actors for good: asked first, then killed. Actors that are gone are passed over."""
    handles = {}
    for name in names:
        with suppress(ValueError):
            handles[name] = ray.get_actor(name, namespace=NAMESPACE)
    stopping: list[Any] = [actor.stop.remote() for actor in handles.values()]
    if stopping:
        ray.wait(stopping, num_returns=len(stopping), timeout=STOP_TIMEOUT_S)
    for actor in handles.values():
        ray.kill(actor, no_restart=True)


def restart_worker(worker_id: str) -> None:
    """Have a worker that has drained end its process; Ray starts another one. Raises ClusterError where it is gone."""
    try:
        actor: Any = ray.get_actor(worker_id, namespace=NAMESPACE)
    except ValueError as error:
        raise ClusterError(
            f"Ray knows no worker {worker_id!r}: one that left for good comes back with `headrace down` and `up`"
        ) from error
    try:
        ray.get(actor.restart.remote(), timeout=CALL_TIMEOUT_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise ClusterError(f"{worker_id} cannot be restarted: {_last_line(str(error))}") from error


def log_tail(run_dir: Path, actor: str) -> tuple[str, ...]:
    """The last lines that an actor of this machine logged."""
    try:
        text = log_file(run_dir, actor).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    return tuple(text.splitlines()[-LOG_TAIL_LINES:])


def _options(
    actor: type, name: str, node: Node, variables: Mapping[str, str], num_cpus: int = 0, num_gpus: int = 0
) -> Any:
    # Ray's name for the machine, not its id of the node: one that was lost and rejoins gets its actors again.
    machine = {f"node:{node.address}": MACHINE_SHARE} if node.node_id else None
    return ray.remote(actor).options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        max_restarts=-1,
        max_task_retries=0,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        runtime_env={"env_vars": dict(variables)},
        resources=machine,
    )


def _require_listener(address: str) -> None:
    """Ray would look for minutes for a cluster that is not there."""
    try:
        socket.create_connection(split_address(address), timeout=CONNECT_TIMEOUT_S).close()
    except ValueError as error:
        raise ClusterError(f"{error}; expected the Ray head's, such as 10.0.0.5:6379") from error
    except OSError as error:
        raise ClusterError(f"there is no Ray at {address}: {error.strerror or error}") from error


def _last_line(text: str) -> str:
    """The line of an error's text that says what it was: Ray puts the remote traceback around it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    saying = [line for line in lines if _ERROR_LINE.match(line)]
    return (saying or lines or ["no reason given"])[-1]
