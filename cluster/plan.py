"""What runs where: a profile and the machines at hand become a ClusterPlan. Pure; knows no Ray.

Everything that a profile leaves open is settled here, with the reason, and everything that the machines
cannot give is reported at its place in the file, before anything starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.cores import CoreDemand, CoreDivision, divide
from cluster.placement import Node, Placed, place
from cluster.problems import KeyPath, Problem, ProfileError, one_of
from cluster.profile import LoadedProfile, is_loopback, split_address
from cluster.units import format_size
from worker.config import WorkerRole

PRECISIONS = ("float32", "bfloat16")
"""What the engine of this version computes in."""
DEFAULT_MAX_CONTEXT = 8192
_KV_STEP_BYTES = 64 << 20
_KV_MOST_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of the prepared model; zeros where it is not at hand."""

    weights_bytes: int = 0
    max_context: int = 0


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

    @property
    def device(self) -> str:
        """What torch calls it."""
        return "cuda" if self.gpus else "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterPlan:
    """The router: its machine, its cores, where it listens."""

    node: Node
    cpus: tuple[int, ...]
    host: str
    port: int


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
        notices: settings that this version reads and does not act on.
    """

    workers: tuple[WorkerPlan, ...]
    router: RouterPlan
    precision: str
    kv_dtype: str
    max_context: int
    derived: Mapping[KeyPath, Derived] = field(default_factory=dict)
    notices: tuple[Problem, ...] = ()


def plan(loaded: LoadedProfile, nodes: Sequence[Node], model: ModelFacts = ModelFacts()) -> ClusterPlan:
    """Plan `loaded` for `nodes`, the first of which runs the router.

    Raises ProfileError with everything that these machines or this model cannot give.
    """
    problems = list(_model_problems(loaded, model))
    placed, unplaceable = place(loaded, nodes)
    if problems or unplaceable:
        raise ProfileError([*problems, *unplaceable])
    divisions = _divisions(placed, nodes)
    kv_bytes = _kv_bytes(loaded, placed, model)
    workers = tuple(_worker(slot, divisions[slot.node.address], kv_bytes[slot.group]) for slot in placed)
    host, port = split_address(loaded.profile.router.grpc)
    router = RouterPlan(node=nodes[0], cpus=divisions[nodes[0].address].service, host=host, port=port)
    problems = [
        *_mixed_devices(loaded, workers),
        *_memory_problems(loaded, workers, model),
        *_router_problems(loaded, workers, router),
    ]
    if problems:
        raise ProfileError(problems)
    precision = _precision(loaded, workers)
    return ClusterPlan(
        workers=workers,
        router=router,
        precision=precision,
        kv_dtype=_kv_dtype(loaded, precision),
        max_context=_max_context(loaded, model),
        derived=_derived(loaded, workers, precision, model),
        notices=tuple(_notices(loaded)),
    )


def environment(worker: WorkerPlan, precision: str) -> dict[str, str]:
    """Environment that a worker's process must have before it loads torch or allocates."""
    threads = str(len(worker.cpus))
    variables = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # gRPC's received messages are large: without these every one of them is given back to the kernel and
        # faulted in again, page by page.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
        "MALLOC_TOP_PAD_": str(1 << 26),
    }
    if precision == "bfloat16":
        # AMX kernels change with the number of rows, which breaks the numeric contract: a token's KV must
        # not depend on what else is in its batch.
        variables["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
    return variables


def _model_problems(loaded: LoadedProfile, model: ModelFacts) -> Iterator[Problem]:
    wanted = loaded.profile.model
    if wanted.precision not in ("auto", *PRECISIONS):
        message = f'"{wanted.precision}" is not built into this version'
        yield loaded.problem(("model", "precision"), message, expected=one_of(("auto", *PRECISIONS)))
    if wanted.max_context and model.max_context and wanted.max_context > model.max_context:
        message = f"{wanted.max_context} tokens are more than the model was made for"
        yield loaded.problem(("model", "max_context"), message, expected=f"at most {model.max_context}")


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
    )


def _kv_bytes(loaded: LoadedProfile, placed: Sequence[Placed], model: ModelFacts) -> dict[str, int]:
    """Of each group: what the profile says, else what fits on the smallest of its machines."""
    return {
        name: group.kv_memory or min(_kv_room(slot, placed, model) for slot in placed if slot.group == name)
        for name, group in loaded.profile.groups()
    }


def _kv_room(slot: Placed, placed: Sequence[Placed], model: ModelFacts) -> int:
    """A GPU's memory beside the weights, less a fifth for activations; on a CPU a modest share, because
    the machine has other things to do."""
    if slot.gpus:
        room = min(slot.node.gpu_memory_bytes) * 4 // 5 - model.weights_bytes
    else:
        neighbours = sum(other.node == slot.node for other in placed)
        room = min(slot.node.memory_bytes // (4 * neighbours), _KV_MOST_BYTES)
    return max(room // _KV_STEP_BYTES, 1) * _KV_STEP_BYTES


def _mixed_devices(loaded: LoadedProfile, workers: Sequence[WorkerPlan]) -> Iterator[Problem]:
    on_gpu = {worker.group for worker in workers if worker.gpus}
    on_cpu = {worker.group for worker in workers if not worker.gpus}
    if on_gpu and on_cpu:
        message = f"{one_of(sorted(on_gpu))} would run on GPUs and {one_of(sorted(on_cpu))} on CPUs"
        expected = "the same kind everywhere, since their arithmetic differs"
        yield loaded.problem((max(on_cpu), "resources", "gpus"), message, expected=expected)


def _memory_problems(
    loaded: LoadedProfile, workers: Sequence[WorkerPlan], model: ModelFacts
) -> Iterator[Problem]:
    for node in dict.fromkeys(worker.node for worker in workers if not worker.gpus):
        here = [worker for worker in workers if worker.node == node and not worker.gpus]
        wanted = sum(worker.kv_bytes + model.weights_bytes for worker in here)
        if wanted > node.memory_bytes:
            largest = max(here, key=lambda worker: worker.kv_bytes)
            message = (
                f"{len(here)} workers on {node.name} want {format_gib(wanted)} of KV blocks and weights, "
                f"it has {format_gib(node.memory_bytes)}"
            )
            yield loaded.problem((largest.group, "kv_memory"), message)
    for worker in workers:
        if worker.gpus and worker.kv_bytes + model.weights_bytes > min(worker.node.gpu_memory_bytes):
            have = format_gib(min(worker.node.gpu_memory_bytes))
            message = f"{format_size(worker.kv_bytes)} and the weights do not fit into a GPU with {have}"
            yield loaded.problem((worker.group, "kv_memory"), message)
            break


def _router_problems(
    loaded: LoadedProfile, workers: Sequence[WorkerPlan], router: RouterPlan
) -> Iterator[Problem]:
    elsewhere = next((worker for worker in workers if worker.node != router.node), None)
    if elsewhere is not None and is_loopback(router.host):
        message = f"{elsewhere.worker_id} on {elsewhere.node.name} could not reach {router.host}"
        expected = f'an address of the network, such as "0.0.0.0:{router.port}"'
        yield loaded.problem(("router", "grpc"), message, expected=expected)


def _precision(loaded: LoadedProfile, workers: Sequence[WorkerPlan]) -> str:
    asked = loaded.profile.model.precision
    if asked != "auto":
        return asked
    return "bfloat16" if workers[0].gpus else "float32"


def _kv_dtype(loaded: LoadedProfile, precision: str) -> str:
    asked = loaded.profile.model.kv_dtype
    if asked != "auto":
        return asked
    return "float32" if precision == "float32" else "bfloat16"


def _max_context(loaded: LoadedProfile, model: ModelFacts) -> int:
    return loaded.profile.model.max_context or min(
        DEFAULT_MAX_CONTEXT, model.max_context or DEFAULT_MAX_CONTEXT
    )


def _derived(
    loaded: LoadedProfile, workers: Sequence[WorkerPlan], precision: str, model: ModelFacts
) -> dict[KeyPath, Derived]:
    """The values that depend on the machine or the model, for those who want to see them."""
    wanted = loaded.profile.model
    found: dict[KeyPath, Derived] = {}
    if wanted.precision == "auto":
        found["model", "precision"] = Derived(precision, f"auto, on {workers[0].device}")
    if wanted.kv_dtype == "auto":
        found["model", "kv_dtype"] = Derived(_kv_dtype(loaded, precision), f"auto, with {precision} weights")
    if wanted.max_context is None:
        reason = (
            f"the model was made for {model.max_context}" if model.max_context else "the model is not at hand"
        )
        found["model", "max_context"] = Derived(str(_max_context(loaded, model)), reason)
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
    return found


def _notices(loaded: LoadedProfile) -> Iterator[Problem]:
    profile = loaded.profile
    if profile.router.policy == "cost":
        yield loaded.problem(("router", "policy"), '"cost" is not built yet; "least-loaded" is used')
    if profile.router.slo is not None:
        yield loaded.problem(("router", "slo"), "read, and not acted on by this version")
    if profile.kvtransfer.tiers is not None:
        yield loaded.problem(("kvtransfer", "tiers"), "read, and not acted on by this version")
    if profile.kvtransfer.fidelity != "exact":
        message = f'no codec of class "{profile.kvtransfer.fidelity}" is built yet; KV travels exact'
        yield loaded.problem(("kvtransfer", "fidelity"), message)


def format_gib(size_bytes: int) -> str:
    """`23.4GiB`."""
    return f"{size_bytes / 2**30:.1f}GiB"
