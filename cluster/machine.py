"""What this machine has: cores, memory, GPUs. Reads the operating system; knows no profile and no Ray."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path

import psutil
import pynvml  # type: ignore[import-untyped]

from cluster.placement import Node

_TOPOLOGY = Path("/sys/devices/system/cpu")
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def this_machine(address: str = "127.0.0.1") -> Node:
    """The machine that this process runs on, as far as this process may use it."""
    return Node(
        name=socket.gethostname(),
        address=address,
        cores=usable_cores(),
        memory_bytes=usable_memory_bytes(),
        gpu_memory_bytes=gpu_memory_bytes(),
    )


@cache
def usable_cores() -> tuple[int, ...]:
    """The cores that this process could run on when it first asked, hardware threads of one physical core
    side by side. Remembered, because a process that has brought a cluster up moves itself off the engines'.
    """
    if not hasattr(os, "sched_getaffinity"):
        return tuple(range(os.cpu_count() or 1))
    return tuple(sorted(os.sched_getaffinity(0), key=lambda core: (*_physical_core(core), core)))


def usable_memory_bytes() -> int:
    """The machine's memory, or its container's limit where that is lower."""
    limits = [psutil.virtual_memory().total]
    for file in _CGROUP_LIMITS:
        try:
            limits.append(int(file.read_text()))
        except (OSError, ValueError):  # not this kind of cgroup, or "max"
            continue
    return min(limits)


def gpu_memory_bytes() -> tuple[int, ...]:
    """Memory of each GPU that this process may use; empty without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        memory = tuple(int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles)
    finally:
        pynvml.nvmlShutdown()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return memory
    return memory[: len([device for device in visible.split(",") if device.strip() not in ("", "-1")])]


def _physical_core(core: int) -> tuple[int, int]:
    try:
        topology = _TOPOLOGY / f"cpu{core}" / "topology"
        package = int((topology / "physical_package_id").read_text())
        return package, int((topology / "core_id").read_text())
    except (OSError, ValueError):  # a kernel without topology: take the numbers as they are
        return 0, core
