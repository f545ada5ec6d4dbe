"""How much shared memory may still be taken without anybody being killed for it.

Pages of a tmpfs count against the file system and against the memory limit of the container that touches
them first. The one limit answers with an error when it is passed, the other with a kill, so both are asked
before.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# Of the file system: others (torch, Ray) live there too, and a container's /dev/shm often has 64 MiB in all.
_KEPT_SHARE = 0.25
_KEPT_BYTES = 1 << 30
_CGROUP = Path("/sys/fs/cgroup")
_V2_NAMES = ("memory.max", "memory.current")
_V1_NAMES = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def room_in(directory: int | Path) -> int:
    """Bytes that new files in `directory` (a path or a descriptor) may take; 0 or less where there is none."""
    space = os.statvfs(directory)
    kept = min(int(_KEPT_SHARE * space.f_blocks * space.f_frsize), _KEPT_BYTES)
    return min([space.f_bavail * space.f_frsize - kept, *_memory_limits()])


def _memory_limits() -> Iterator[int]:
    """What each limit above this process leaves; nothing where there is none, or none that can be read."""
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            yield from limits_above(_CGROUP / "memory", path, _V1_NAMES)
        elif not controllers:
            yield from limits_above(_CGROUP, path, _V2_NAMES)


def limits_above(root: Path, path: str, names: tuple[str, str]) -> Iterator[int]:
    """What is left below the limit of group `path` and of every group above it. `names`: of the files that hold a
    limit and its use."""
    # Inside a container the path is the host's, and often only the root is there: what exists is asked.
    group = root / path.lstrip("/")
    for place in (group, *group.parents):
        try:
            limit, used = (int((place / name).read_text()) for name in names)
        except (OSError, ValueError):  # not here, or "max"
            pass
        else:
            yield limit - used + _reclaimable(place)
        if place == root:
            return


def _reclaimable(group: Path) -> int:
    """Bytes that count as used and are given up when somebody needs them: pages of files read long ago."""
    for line in _lines(group / "memory.stat"):
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
