"""Brings a cluster up and takes it down: the composition root of everything below.

`up` returns with the cluster running; it outlives the process that started it. What was started is written
down before it is waited for, so that `down` can end a half-started cluster too.
"""

from __future__ import annotations

import dataclasses
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from cluster import local_ray
from cluster.errors import ClusterError, NotRunningError
from cluster.machine import this_machine
from cluster.memory import ModelFacts
from cluster.model_store import ModelStoreError, read_manifest, resolve
from cluster.plan import ClusterPlan, RouterPlan, plan
from cluster.problems import ProfileError
from cluster.profile import LoadedProfile
from cluster.progress import Progress, Silent
from cluster.readiness import wait_until_serving
from cluster.secret import cluster_secret
from cluster.state import (
    ClusterState,
    exclusive,
    read_state,
    remove_state,
    run_directory,
    write_state,
)
from cluster.wiring import Wiring
from engine.models.config_keys import ModelConfigError
from engine.models.families import open_config

START_TIMEOUT_S = 300.0


def up(
    loaded: LoadedProfile,
    *,
    address: str | None = None,
    home: Path | None = None,
    timeout_s: float = START_TIMEOUT_S,
    progress: Progress = Silent(),
) -> ClusterState:
    """Start the cluster of a profile, on a Ray of its own or on the one at `address`.

    Raises ProfileError for what the machines cannot give, before anything starts; ClusterError for what goes
    wrong afterwards, with nothing left running.
    """
    run_dir = run_directory(home)
    with exclusive(run_dir):
        _refuse_second(run_dir)
        launch = _Launch(loaded, find_model(loaded, home), run_dir, progress, time.monotonic() + timeout_s)
        try:
            return launch.on_joined_ray(address) if address else launch.on_local_ray()
        except BaseException:
            # Also for Ctrl-C: whoever interrupts a start wants it gone.
            _take_down(run_dir, progress)
            raise


def down(*, home: Path | None = None, forget: bool = False, progress: Progress = Silent()) -> bool:
    """Stop what `up` started, and nothing else; whether there was anything.

    `forget` drops the record of a cluster whose Ray cannot be reached any more. Raises ClusterError.
    """
    run_dir = run_directory(home)
    with exclusive(run_dir):
        try:
            return _take_down(run_dir, progress)
        except ClusterError:
            if not forget:
                raise
            remove_state(run_dir)
            return True


def running_cluster(home: Path | None = None) -> ClusterState:
    """The cluster that is up here. Raises NotRunningError."""
    state = read_state(run_directory(home))
    if state is None:
        raise NotRunningError("no cluster is up; start one with `headrace up PROFILE`")
    if state.is_stale:
        raise NotRunningError(
            f"the cluster of profile {state.profile} has ended without `headrace down`; "
            "start one with `headrace up PROFILE`"
        )
    return state


@dataclass(frozen=True, slots=True)
class FoundModel:
    """The prepared model of a profile.

    Attributes:
        reference: its name in the store of each node, or the directory that each node has it in.
        name: what clients call it.
    """

    reference: str
    name: str
    facts: ModelFacts


def find_model(loaded: LoadedProfile, home: Path | None = None) -> FoundModel:
    """Look the profile's model up.

    Raises ProfileError, at its place, for one that is not there or that the engine does not know.
    """
    reference = loaded.profile.model.path
    if reference.startswith(("~", ".")) or "/" in reference:
        reference = str((Path(loaded.file).parent / Path(reference).expanduser()).resolve())
    try:
        directory = resolve(reference, home)
        manifest = read_manifest(directory)
        config = open_config(directory)
    except (ModelStoreError, ModelConfigError) as error:
        raise ProfileError([loaded.problem(("model", "path"), str(error))]) from error
    facts = ModelFacts(
        weights_bytes=sum(file.stat().st_size for file in directory.glob("*.safetensors")),
        max_context=manifest.max_context,
        config=config,
    )
    return FoundModel(reference, manifest.name, facts)


@dataclass(frozen=True, slots=True)
class _Launch:
    """One `up`."""

    loaded: LoadedProfile
    model: FoundModel
    run_dir: Path
    progress: Progress
    deadline_s: float

    def on_local_ray(self) -> ClusterState:
        """On a Ray of our own."""
        machine = this_machine()
        planned = self._with_ports(plan(self.loaded, [machine], self.model.facts))
        self.progress.begin("ray", "starting")
        ray = local_ray.start(
            self.run_dir,
            num_cpus=len(machine.cores),
            num_gpus=len(machine.gpu_memory_bytes),
            cores=machine.cores,
        )
        wiring = self._wiring(planned)
        state = self._state(wiring, ray.address, ray)
        write_state(self.run_dir, state)
        from cluster.deployment import driver  # imports ray, which must see the environment of its start

        with driver(ray.address):
            self.progress.end("ray", f"on {ray.address}, for this machine only")
            pids = self._bring_up(wiring, state, home=self.run_dir.parent)
        local_ray.move(ray, planned.routers[0].cpus, but=pids)
        return self._ready(state, wiring)

    def on_joined_ray(self, address: str) -> ClusterState:
        """On a Ray cluster that is up already."""
        from cluster.deployment import driver, refuse_namesakes
        from cluster.joined_ray import cluster_nodes

        self.progress.begin("ray", f"joining {address}")
        with driver(address):
            wiring = self._wiring(plan(self.loaded, cluster_nodes(), self.model.facts))
            if wiring.plan.routers[0].port == 0:
                message = "a router on a Ray cluster needs a port that stays the same when it restarts"
                raise ProfileError([self.loaded.problem(("router", "grpc"), message)])
            self.progress.end("ray", f"joined {address}")
            state = self._state(wiring, address, None)
            # Before the state says that these actors are ours to end.
            refuse_namesakes(state.actors)
            write_state(self.run_dir, state)
            self._bring_up(wiring, state, home=None)
        return self._ready(state, wiring)

    def _bring_up(self, wiring: Wiring, state: ClusterState, home: Path | None) -> set[int]:
        """Start every actor and wait until all serve; returns their process ids."""
        from cluster.deployment import start_actors, wait_for_actors

        actors = start_actors(wiring, home)
        facts = wait_for_actors(actors, self.run_dir, self.deadline_s, self.progress)
        self.progress.begin("cluster", "waiting for every router to reach every worker")
        workers = [worker.worker_id for worker in wiring.plan.workers]
        for address in wiring.router_addresses:
            wait_until_serving(address, wiring.cluster_secret, workers, self.deadline_s)
        return {each.pid for each in facts.values()}

    def _ready(self, state: ClusterState, wiring: Wiring) -> ClusterState:
        self.progress.end("cluster", f"serving at {', '.join(wiring.router_addresses)}")
        state = dataclasses.replace(state, ready=True)
        write_state(self.run_dir, state)
        return state

    def _wiring(self, planned: ClusterPlan) -> Wiring:
        profile = self.loaded.profile
        secret = cluster_secret(self.run_dir)
        return Wiring(profile, planned, self.model.reference, self.model.name, secret)

    def _state(self, wiring: Wiring, address: str, ray: local_ray.LocalRay | None) -> ClusterState:
        return ClusterState(
            profile=self.loaded.profile.name,
            router_address=wiring.router_addresses[0],
            other_routers=wiring.router_addresses[1:],
            cluster_secret=wiring.cluster_secret.hex(),
            ray_address=address,
            local_ray=ray,
            actors=(
                *(router.name for router in wiring.plan.routers),
                *(store.store_id for store in wiring.plan.stores),
                *(worker.worker_id for worker in wiring.plan.workers),
            ),
        )

    def _with_ports(self, planned: ClusterPlan) -> ClusterPlan:
        """The plan with ports that are free on this machine.

        gRPC would share a port that is in use, and requests would reach one of the two servers by chance.
        """
        routers = tuple(self._with_port(router) for router in planned.routers)
        return dataclasses.replace(planned, routers=routers)

    def _with_port(self, router: RouterPlan) -> RouterPlan:
        if router.port == 0:
            return dataclasses.replace(router, port=local_ray.free_port())
        try:
            socket.create_server((router.host, router.port)).close()
        except OSError as error:
            message = f"cannot listen on port {router.port} of {router.host}: {error.strerror}"
            expected = "free ports, one after the other for each replica; 0 takes any"
            raise ProfileError([self.loaded.problem(("router", "grpc"), message, expected)]) from error
        return router


def _refuse_second(run_dir: Path) -> None:
    """Raises ClusterError where a cluster is up; cleans up after one that ended by itself."""
    state = read_state(run_dir)
    if state is None:
        return
    if not state.is_stale:
        raise ClusterError(
            f"the cluster of profile {state.profile} is up at {state.router_address}; "
            "stop it first with `headrace down`"
        )
    _take_down(run_dir, Silent())


def _take_down(run_dir: Path, progress: Progress) -> bool:
    state = read_state(run_dir)
    if state is None:
        return False
    progress.begin("cluster", f"stopping profile {state.profile}")
    if state.local_ray is not None:
        local_ray.stop(state.local_ray)
    elif state.actors:
        from cluster.deployment import driver, stop_actors

        with driver(state.ray_address):
            stop_actors(state.actors)
    remove_state(run_dir)
    progress.end("cluster", "stopped")
    return True
