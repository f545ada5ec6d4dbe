"""Which machine each worker of a profile goes to. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.problems import KeyPath, Problem, nearest_name
from cluster.profile import LoadedProfile, Workers
from worker.config import WorkerRole

ROLES = {"prefill": WorkerRole.PREFILL, "decode": WorkerRole.DECODE, "colocated": WorkerRole.BOTH}


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine.

    Attributes:
        name: what people call it.
        address: where other machines reach it; loopback for a cluster on one machine.
        node_id: Ray's id of it; empty until Ray runs.
        cores: those that Headrace may use, neighbours sharing hardware.
        memory_bytes: of the machine, or its container's limit.
        gpu_memory_bytes: of each GPU.
        types: the node types it answers to; None answers to every type (a single machine).
    """

    name: str
    address: str
    cores: tuple[int, ...]
    memory_bytes: int
    node_id: str = ""
    gpu_memory_bytes: tuple[int, ...] = ()
    types: frozenset[str] | None = None

    def answers_to(self, node_type: str | None) -> bool:
        """Whether workers of this node type may run here."""
        return node_type is None or self.types is None or node_type in self.types


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """One worker and its machine. `gpus` is 0 or 1."""

    worker_id: str
    group: str
    workers: Workers
    node: Node
    gpus: int

    @property
    def role(self) -> WorkerRole:
        """Which services it offers."""
        return ROLES[self.group]


def place(loaded: LoadedProfile, nodes: Sequence[Node]) -> tuple[list[Placed], list[Problem]]:
    """Give every worker a machine, the demanding ones first, each where most is free.

    Returns what was placed, in the profile's order, and one problem for each group that was not.
    """
    search = _Search(loaded, nodes)
    slots = [
        (name, index, group) for name, group in loaded.profile.groups() for index in range(group.replicas)
    ]
    demanding_first = sorted(slots, key=lambda slot: -(slot[2].resources.cpus or 0))
    placed: dict[str, Placed] = {}
    problems: dict[str, Problem] = {}
    for name, index, group in demanding_first:
        node = search.find(name, group)
        if node is None:
            problems.setdefault(name, search.explain(name, group, num_placed=index))
            continue
        worker_id = f"{name}-{index}"
        placed[worker_id] = Placed(
            worker_id=worker_id, group=name, workers=group, node=node, gpus=search.gpus_of(group)
        )
    return [placed[f"{name}-{index}"] for name, index, _ in slots if f"{name}-{index}" in placed], [
        *problems.values()
    ]


class _Search:
    """What is left on each machine while workers are placed."""

    def __init__(self, loaded: LoadedProfile, nodes: Sequence[Node]) -> None:
        self._loaded = loaded
        self._nodes = nodes
        self._taken_cores: Counter[str] = Counter()
        self._taken_gpus: Counter[str] = Counter()
        self._default_gpus = self._gpus_for_all()

    def gpus_of(self, group: Workers) -> int:
        """GPUs of each worker of `group`."""
        return self._default_gpus if group.resources.gpus is None else group.resources.gpus

    def find(self, name: str, group: Workers) -> Node | None:
        """Take room for one more worker of `group`, or return None."""
        gpus = self.gpus_of(group)
        fitting = [node for node in self._nodes if self._fits(node, group, gpus)]
        if not fitting:
            return None
        node = max(fitting, key=lambda node: len(node.cores) - self._taken_cores[node.address])
        self._taken_cores[node.address] += group.resources.cpus or 1
        self._taken_gpus[node.address] += gpus
        return node

    def explain(self, name: str, group: Workers, num_placed: int) -> Problem:
        """Why no machine takes one more worker of `group`."""
        typed = [node for node in self._nodes if node.answers_to(group.node_type)]
        if not typed:
            types = sorted({kind for node in self._nodes for kind in node.types or ()})
            known = ", ".join(types) or "no node types"
            message = f'no node is of type "{group.node_type}"; this cluster has {known}'
            nearest = nearest_name(group.node_type or "", types)
            return self._loaded.problem((name, "node_type"), message, nearest=nearest)
        gpus = self.gpus_of(group)
        if gpus and not any(self._free_gpus(node) >= gpus for node in typed):
            wanted = sum(
                member.replicas * self.gpus_of(member) for _, member in self._loaded.profile.groups()
            )
            have = sum(len(node.gpu_memory_bytes) for node in self._nodes)
            return self._loaded.problem(
                (name, "resources", "gpus"), f"{_gpus(wanted)} wanted in all, {have} here"
            )
        return self._too_few_cores(name, group, typed, num_placed)

    def _too_few_cores(self, name: str, group: Workers, typed: Sequence[Node], num_placed: int) -> Problem:
        path: KeyPath = (name, "resources", "cpus")
        largest = max(typed, key=lambda node: len(node.cores))
        have = f"{largest.name} has {_cores(len(largest.cores))}"
        if not largest.cores:
            return self._loaded.problem((name,), f"no node has cores to give; {have}")
        each = group.resources.cpus or 1
        if each > len(largest.cores):
            return self._loaded.problem(path, f"{_cores(each)} wanted by each worker; {have}")
        others = ", ".join(
            f"{other}: {member.replicas} × {member.resources.cpus or 'a share'}"
            for other, member in self._loaded.profile.groups()
        )
        total = sum(len(node.cores) for node in self._nodes)
        message = f"room for {num_placed} of {group.replicas} workers; wanted {others}; {_cores(total)} here"
        return self._loaded.problem(path, message)

    def _fits(self, node: Node, group: Workers, gpus: int) -> bool:
        free_cores = len(node.cores) - self._taken_cores[node.address]
        wanted = group.resources.cpus
        # Without a number of its own a worker shares a core when none is free.
        enough_cores = bool(node.cores) if wanted is None else free_cores >= wanted
        return node.answers_to(group.node_type) and enough_cores and self._free_gpus(node) >= gpus

    def _free_gpus(self, node: Node) -> int:
        return len(node.gpu_memory_bytes) - self._taken_gpus[node.address]

    def _gpus_for_all(self) -> int:
        """1 where no group says a number but 1 and every worker can have a GPU, else 0."""
        groups = [group for _, group in self._loaded.profile.groups()]
        have = sum(len(node.gpu_memory_bytes) for node in self._nodes)
        willing = all(group.resources.gpus != 0 for group in groups)
        return int(willing and have >= sum(group.replicas for group in groups))


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"
