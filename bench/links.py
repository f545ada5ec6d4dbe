"""Links between two processes of one machine: loopback, or two network namespaces joined at a given rate.

A shaped link is a pair of virtual interfaces whose ends lie in namespaces of their own, each with a token
bucket (tc-tbf(8)) for what it sends. It takes root and iproute2; where either is missing, `why_not` says so.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

TIMER_HZ = 250
LEAST_BURST_BYTES = 64 << 10
QUEUE_MS = 50


@dataclass(frozen=True, slots=True)
class Link:
    """Where the two ends run: words to put before their commands, and the address of each."""

    name: str
    sender_prefix: tuple[str, ...] = ()
    sender_host: str = "127.0.0.1"
    receiver_prefix: tuple[str, ...] = ()
    receiver_host: str = "127.0.0.1"


LOOPBACK = Link("loopback")


def why_not() -> str:
    """Why this process cannot make shaped links; empty where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not all(map(shutil.which, ("ip", "tc", "unshare"))):
        return "network namespaces need the commands ip and tc (iproute2) and unshare (util-linux)"
    name = f"hr{secrets.token_hex(3)}"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "netns", "del", name)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces are not allowed here: {_words(error)}"
    return ""


@contextmanager
def shaped(name: str, bits_per_s: float) -> Iterator[Link]:
    """A link of that rate in each direction, gone afterwards. Raises subprocess.CalledProcessError."""
    tag = secrets.token_hex(3)
    near, far = f"hr{tag}a", f"hr{tag}b"
    try:
        for namespace in (near, far):
            _run("ip", "netns", "add", namespace)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
        _run("ip", "link", "add", near, "netns", near, "type", "veth", "peer", "name", far, "netns", far)
        for namespace, host in ((near, "10.97.0.1/30"), (far, "10.97.0.2/30")):
            _run("ip", "-n", namespace, "address", "add", host, "dev", namespace)
            _run("ip", "-n", namespace, "link", "set", namespace, "up")
            _shape(namespace, bits_per_s)
        yield Link(name, _inside(near), "10.97.0.1", _inside(far), "10.97.0.2")
    finally:
        for namespace in (near, far):
            with suppress(subprocess.CalledProcessError):
                _run("ip", "netns", "del", namespace)


def _inside(namespace: str) -> tuple[str, ...]:
    """Also with a /dev/shm of its own, as two machines have: nothing may find its way around the link."""
    own_shm = 'mount -t tmpfs none /dev/shm && exec "$@"'
    return ("ip", "netns", "exec", namespace, "unshare", "--mount", "sh", "-c", own_shm, "sh")


def _shape(namespace: str, bits_per_s: float) -> None:
    # A bucket refilled once a timer tick must hold what the link sends in one.
    burst_bytes = max(LEAST_BURST_BYTES, int(1.5 * bits_per_s / 8 / TIMER_HZ))
    bucket = ("rate", f"{bits_per_s:.0f}bit", "burst", str(burst_bytes), "latency", f"{QUEUE_MS}ms")
    _run("tc", "-n", namespace, "qdisc", "add", "dev", namespace, "root", "tbf", *bucket)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)


def _words(error: OSError | subprocess.CalledProcessError) -> str:
    return error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
