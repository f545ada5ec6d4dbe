"""What a Ray cluster consists of: asks each node for what it has. Needs a connected driver."""

from __future__ import annotations

import dataclasses
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import machine
from cluster.errors import ClusterError
from cluster.placement import Node

PROBE_TIMEOUT_S = 60.0
NODE_TYPE_LABELS = ("headrace/node-type", "ray.io/node-group")
_HEAD = "node:__internal_head__"


def cluster_nodes() -> list[Node]:
    """The living nodes, Ray's head first.

    Raises ClusterError where a node does not answer, or runs no Headrace.
    """
    every: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = [node for node in every if node["Alive"]]
    alive.sort(key=lambda node: _HEAD not in node["Resources"])
    if not alive:
        raise ClusterError("the Ray cluster has no living node")
    probe: Any = ray.remote(num_cpus=0, max_retries=0)(machine.this_machine)
    answers = [
        probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            node["NodeManagerAddress"]
        )
        for node in alive
    ]
    try:
        found = ray.get(answers, timeout=PROBE_TIMEOUT_S)
    except ray.exceptions.RayError as error:
        cause = str(error).strip().splitlines()[-1]
        raise ClusterError(f"a node cannot run Headrace (is it installed there?): {cause}") from error
    return [_within_ray(node, facts) for node, facts in zip(alive, found, strict=True)]


def _within_ray(facts: dict[str, Any], node: Node) -> Node:
    """What the machine has, cut to what its Ray was told to give."""
    resources = facts["Resources"]
    labels = facts.get("Labels", {})
    return dataclasses.replace(
        node,
        node_id=facts["NodeID"],
        cores=node.cores[: int(resources.get("CPU", 0))],
        memory_bytes=min(node.memory_bytes, int(resources.get("memory", node.memory_bytes))),
        gpu_memory_bytes=node.gpu_memory_bytes[: int(resources.get("GPU", 0))],
        types=frozenset(labels[key] for key in NODE_TYPE_LABELS if key in labels),
    )
