"""What runs where: a profile and the machines at hand become a ClusterPlan. Pure; knows no Ray.

Everything that a profile leaves open is settled here, with the reason, and everything that the machines
cannot give is reported at its place in the file, before anything starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.cores import CoreDemand, CoreDivision, divide
from cluster.memory import (
    ModelFacts,
    Numbers,
    format_gib,
    memory_problems,
    settle_kv_bytes,
    settle_numbers,
    settle_set_aside_bytes,
)
from cluster.placement import Node, Placed, place
from cluster.problems import KeyPath, Problem, ProfileError, one_of
from cluster.profile import Answering, LoadedProfile, is_loopback, split_address
from cluster.units import format_size
from engine.models.layouts import kv_dtypes
from worker.config import WorkerRole

ROUTER_NAME = "router"
"""The first router's actor, and what the others' names begin with; the workers' are called by their worker ids."""
MALLOC_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""gRPC's received messages are large: without these every one of them is given back to the kernel and faulted in
again, page by page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """One worker.

    Attributes:
        group: its section in the profile.
        node: the machine it runs on.
        cpus: the engine's cores; as many compute threads.
        service_cpus: the cores of all its other threads.
        ray_cpus: what Ray reserves: the engine's cores, or 0 where they are shared.
        gpus: 0 or 1. Ray picks the device and shows the worker no other.
    """

    worker_id: str
    group: str
    role: WorkerRole
    node: Node
    cpus: tuple[int, ...]
    service_cpus: tuple[int, ...]
    ray_cpus: int
    gpus: int
    kv_bytes: int
    chunk_tokens: int
    max_sequences: int
    max_drafts: int
    set_aside_bytes: int

    @property
    def device(self) -> str:
        """What torch calls it."""
        return "cuda" if self.gpus else "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterPlan:
    """A router: its name, its machine, its cores, where it listens."""

    name: str
    node: Node
    cpus: tuple[int, ...]
    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePlan:
    """The cache tiers of one machine, beside its workers.

    Attributes:
        disk_path: a directory, relative to HEADRACE_HOME there; empty without a disk tier.
    """

    store_id: str
    node: Node
    cpus: tuple[int, ...]
    host_bytes: int
    disk_path: str
    disk_bytes: int
    tenant_share: float


@dataclass(frozen=True, slots=True)
class Derived:
    """A value that the profile left out."""

    value: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """What runs where, and what was settled on the way.

    Attributes:
        derived: by setting, the values that come from the machine or the model.
    """

    workers: tuple[WorkerPlan, ...]
    routers: tuple[RouterPlan, ...]
    stores: tuple[StorePlan, ...]
    precision: str
    kv_dtype: str
    max_context: int
    derived: Mapping[KeyPath, Derived] = field(default_factory=dict)


def plan(loaded: LoadedProfile, nodes: Sequence[Node], model: ModelFacts = ModelFacts()) -> ClusterPlan:
    """Plan `loaded` for `nodes`, the first of which runs the router.

    Raises ProfileError with everything that these machines or this model cannot give.
    """
    problems = list(_model_problems(loaded, model))
    placed, unplaceable = place(loaded, nodes)
    if problems or unplaceable:
        raise ProfileError([*problems, *unplaceable])
    numbers = settle_numbers(loaded.profile.model, model, on_gpu=bool(placed[0].gpus))
    kv_bytes = settle_kv_bytes(loaded, placed, numbers, model)
    divisions = _divisions(placed, nodes)
    workers = tuple(_worker(slot, divisions[slot.node.address], kv_bytes[slot.group]) for slot in placed)
    host, port = split_address(loaded.profile.router.grpc)
    routers = tuple(
        RouterPlan(
            name=ROUTER_NAME if number == 0 else f"{ROUTER_NAME}-{number}",
            node=nodes[0],
            cpus=divisions[nodes[0].address].service,
            host=host,
            port=port + number if port else 0,
        )
        for number in range(loaded.profile.router.replicas)
    )
    problems = [
        *_mixed_devices(loaded, placed),
        *_wrong_device(loaded, placed),
        *memory_problems(loaded, placed, kv_bytes, numbers, model),
        *_router_problems(loaded, workers, routers[0]),
    ]
    if problems:
        raise ProfileError(problems)
    return ClusterPlan(
        workers=workers,
        routers=routers,
        stores=tuple(_stores(loaded, workers)),
        precision=numbers.precision,
        kv_dtype=numbers.kv_dtype,
        max_context=numbers.max_context,
        derived=_derived(loaded, workers, numbers, model),
    )


def environment(worker: WorkerPlan) -> dict[str, str]:
    """Environment that a worker's process must have before it loads torch or allocates."""
    threads = str(len(worker.cpus))
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        **MALLOC_ENVIRONMENT,
    }


def _model_problems(loaded: LoadedProfile, model: ModelFacts) -> Iterator[Problem]:
    wanted = loaded.profile.model
    if wanted.max_context and model.max_context and wanted.max_context > model.max_context:
        message = f"{wanted.max_context} tokens are more than the model was made for"
        yield loaded.problem(("model", "max_context"), message, expected=f"at most {model.max_context}")
    known = kv_dtypes(model.config) if model.config is not None else (wanted.kv_dtype,)
    if wanted.kv_dtype not in ("auto", *known):
        message = f"this model's cache is not kept in {wanted.kv_dtype}"
        yield loaded.problem(("model", "kv_dtype"), message, expected=f"one of auto, {', '.join(known)}")


def _divisions(placed: Sequence[Placed], nodes: Sequence[Node]) -> dict[str, CoreDivision]:
    divisions = {}
    for node in nodes:
        here = [slot for slot in placed if slot.node == node]
        demands = [CoreDemand(slot.worker_id, slot.role, slot.workers.resources.cpus) for slot in here]
        divisions[node.address] = (
            divide(node.cores, demands) if node.cores else CoreDivision({}, frozenset(), ())
        )
    return divisions


def _worker(slot: Placed, division: CoreDivision, kv_bytes: int) -> WorkerPlan:
    cpus = division.engines[slot.worker_id]
    answering = slot.workers if isinstance(slot.workers, Answering) else None
    return WorkerPlan(
        worker_id=slot.worker_id,
        group=slot.group,
        role=slot.role,
        node=slot.node,
        cpus=cpus,
        service_cpus=division.service,
        ray_cpus=0 if slot.worker_id in division.shared else len(cpus),
        gpus=slot.gpus,
        kv_bytes=kv_bytes,
        chunk_tokens=slot.workers.chunk,
        max_sequences=slot.workers.max_sequences,
        max_drafts=answering.max_drafts if answering else 0,
        set_aside_bytes=settle_set_aside_bytes(slot.workers, kv_bytes),
    )


def _stores(loaded: LoadedProfile, workers: Sequence[WorkerPlan]) -> Iterator[StorePlan]:
    """One for each machine that has workers."""
    tiers = loaded.profile.kvtransfer.tiers
    if tiers is None:
        return
    cpus = {worker.node: worker.service_cpus for worker in workers}
    for index, (node, service_cpus) in enumerate(cpus.items()):
        yield StorePlan(
            store_id=f"store-{index}",
            node=node,
            cpus=service_cpus,
            host_bytes=tiers.host,
            disk_path=tiers.disk.path if tiers.disk else "",
            disk_bytes=tiers.disk.size if tiers.disk else 0,
            tenant_share=tiers.tenant_share,
        )


def _wrong_device(loaded: LoadedProfile, placed: Sequence[Placed]) -> Iterator[Problem]:
    if loaded.profile.model.precision == "int8" and any(slot.gpus for slot in placed):
        message = "int8 runs on CPUs, here workers have GPUs"
        yield loaded.problem(("model", "precision"), message, expected="auto or bfloat16")
    if loaded.profile.model.precision == "fp8" and not all(slot.gpus for slot in placed):
        message = "fp8 runs on GPUs, here workers have none"
        yield loaded.problem(("model", "precision"), message, expected="auto or int8")


def _mixed_devices(loaded: LoadedProfile, placed: Sequence[Placed]) -> Iterator[Problem]:
    on_gpu = {slot.group for slot in placed if slot.gpus}
    on_cpu = {slot.group for slot in placed if not slot.gpus}
    if on_gpu and on_cpu:
        message = f"{one_of(sorted(on_gpu))} would run on GPUs and {one_of(sorted(on_cpu))} on CPUs"
        expected = "the same kind everywhere, since their arithmetic differs"
        yield loaded.problem((max(on_cpu), "resources", "gpus"), message, expected=expected)


def _router_problems(
    loaded: LoadedProfile, workers: Sequence[WorkerPlan], router: RouterPlan
) -> Iterator[Problem]:
    elsewhere = next((worker for worker in workers if worker.node != router.node), None)
    if elsewhere is not None and is_loopback(router.host):
        message = f"{elsewhere.worker_id} on {elsewhere.node.name} could not reach {router.host}"
        expected = f'an address of the network, such as "0.0.0.0:{router.port}"'
        yield loaded.problem(("router", "grpc"), message, expected=expected)


def _derived(
    loaded: LoadedProfile, workers: Sequence[WorkerPlan], numbers: Numbers, model: ModelFacts
) -> dict[KeyPath, Derived]:
    """The values that depend on the machine or the model, for those who want to see them."""
    wanted = loaded.profile.model
    found: dict[KeyPath, Derived] = {}
    if wanted.precision == "auto":
        found["model", "precision"] = Derived(numbers.precision, f"auto, on {workers[0].device}")
    if wanted.kv_dtype == "auto":
        found["model", "kv_dtype"] = Derived(numbers.kv_dtype, f"auto, with {numbers.precision} weights")
    if wanted.max_context is None:
        reason = (
            f"the model was made for {model.max_context}" if model.max_context else "the model is not at hand"
        )
        found["model", "max_context"] = Derived(str(numbers.max_context), reason)
    for name, group in loaded.profile.groups():
        members = [worker for worker in workers if worker.group == name]
        counts = sorted({len(worker.cpus) for worker in members})
        shared = ", shared" if any(worker.ray_cpus == 0 for worker in members) else ""
        num_cores = len(members[0].node.cores)
        if group.resources.cpus is None:
            value = str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
            found[name, "resources", "cpus"] = Derived(value, f"of {num_cores} cores{shared}")
        if group.resources.gpus is None:
            num_gpus = len(members[0].node.gpu_memory_bytes)
            found[name, "resources", "gpus"] = Derived(str(members[0].gpus), f"of {num_gpus} GPUs")
        if group.kv_memory is None:
            node = members[0].node
            room = min(node.gpu_memory_bytes) if members[0].gpus else node.memory_bytes
            reason = f"of {format_gib(room)} on {node.name}{'’s GPU' if members[0].gpus else ''}"
            found[name, "kv_memory"] = Derived(format_size(members[0].kv_bytes), reason)
        if isinstance(group, Answering) and group.set_aside_memory is None:
            value = format_size(members[0].set_aside_bytes)
            found[name, "set_aside_memory"] = Derived(value, "a quarter of kv_memory, at most 256MiB")
    return found
