"""A Ray of our own on this machine: loopback only, with a token, in a session of its own.

`ray stop` ends every Ray on the machine, so this one is ended by its session instead: all of Ray's processes
stay in the session that their first one opens (ray_head), and nothing else is in it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.errors import ClusterError

OBJECT_STORE_BYTES = 100 << 20
"""Ray's minimum is 75 MiB. Headrace puts nothing into it: KV and tokens travel by gRPC."""
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
CLOCK_SLACK_S = 2.0
"""When a process started is computed from the time of boot, which shifts as the clock is set."""
LOOPBACK = "127.0.0.1"
# Ray's Unix sockets lie below it, and their paths may have 107 characters; $TMPDIR can be long.
_SHORT_TEMPORARY = "/tmp"


@dataclass(frozen=True, slots=True)
class LocalRay:
    """A running local Ray.

    Attributes:
        pid: its first process, which leads the session.
        started_s: when that process started, by the system's clock: process ids are used again.
        temp_dir: its files; removed when it stops.
    """

    pid: int
    started_s: float
    address: str
    temp_dir: str

    def is_running(self) -> bool:
        """Whether any of it lives: an answer does not need the first process."""
        return bool(self.processes())

    def is_first(self, process: psutil.Process) -> bool:
        """Whether `process`, which has the id of the first one, is that one and not a later one."""
        return abs(process.create_time() - self.started_s) < CLOCK_SLACK_S

    def processes(self) -> list[psutil.Process]:
        """The living processes of its session."""
        with suppress(psutil.NoSuchProcess):
            # A process id is not given out again while a session has its number.
            if not self.is_first(psutil.Process(self.pid)):
                return []
        return processes_of_session(self.pid)


def processes_of_session(session_id: int) -> list[psutil.Process]:
    """The living processes of a session."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == session_id and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def set_environment(run_dir: Path) -> None:
    """Make this process a driver of our local Ray. Call before the first import of ray, which reads it."""
    for name in (
        "RAY_ADDRESS",
        "RAY_AUTH_TOKEN",
        "RAY_REDIS_ADDRESS",
    ):  # of another Ray, and stronger than ours
        os.environ.pop(name, None)
    os.environ.update(_environment(run_dir))


def start(run_dir: Path, *, num_cpus: int, num_gpus: int, cores: Collection[int]) -> LocalRay:
    """Start Ray, on all of `cores` so that it starts fast; `move` it when the engines need theirs.

    Raises ClusterError, with the end of Ray's log, if it does not come up in time.
    """
    set_environment(run_dir)
    temp_dir = tempfile.mkdtemp(prefix="headrace-", dir=_SHORT_TEMPORARY)
    port, client_port, agent_port = _free_ports(3)
    arguments = [
        *("-m", "cluster.ray_head", str(port), f"--node-ip-address={LOOPBACK}"),
        *(f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}", f"--temp-dir={temp_dir}"),
        *("--include-dashboard=false", "--include-log-monitor=false", "--no-monitor"),
        *("--disable-usage-stats", f"--object-store-memory={OBJECT_STORE_BYTES}"),
        f"--dashboard-agent-listen-port={agent_port}",
        # Not used, and not to be had without; only kept off Ray's fixed port, which another Ray may have.
        f"--ray-client-server-port={client_port}",
    ]
    log = run_dir / "logs" / "ray.log"
    log.parent.mkdir(exist_ok=True, mode=0o700)
    with _running_on(cores):
        pid = _spawn_session([sys.executable, *arguments], {**os.environ, **_gcs_store(temp_dir)}, log)
    local_ray = LocalRay(pid, psutil.Process(pid).create_time(), f"{LOOPBACK}:{port}", temp_dir)
    try:
        _wait_for_port(local_ray, port, log)
    except BaseException:
        stop(local_ray)
        raise
    return local_ray


def move(local_ray: LocalRay, cores: Collection[int], *, but: Collection[int]) -> None:
    """Run Ray's processes, and what they start from now on, on `cores`; the process ids in `but` see to
    themselves."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        return
    for _ in range(2):  # again for what was started meanwhile by one that had not moved yet
        for process in local_ray.processes():
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                for thread in process.threads() if process.pid not in but else ():
                    os.sched_setaffinity(thread.id, cores)


def stop(local_ray: LocalRay) -> None:
    """End every process of its session and remove its files. Harmless where it has ended before.

    Raises ClusterError if a process outlives SIGKILL.
    """
    first = [process for process in local_ray.processes() if process.pid == local_ray.pid]
    for process in first:
        with suppress(psutil.NoSuchProcess):
            process.terminate()  # it knows the order
    ended = _wait_until_empty(local_ray, STOP_TIMEOUT_S if first else 0.0)
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        if ended:
            break
        for process in local_ray.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal_number)
        ended = _wait_until_empty(local_ray, STOP_TIMEOUT_S)
    if left := [process.pid for process in local_ray.processes()]:
        raise ClusterError(f"Ray's processes {left} do not end; end them by hand")
    shutil.rmtree(local_ray.temp_dir, ignore_errors=True)


def _environment(run_dir: Path) -> dict[str, str]:
    token_file = run_dir / "ray-token"
    if not token_file.exists():
        descriptor = os.open(token_file, os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    return {
        # Ray's ports carry pickle: whoever reaches them runs code as this user.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        # Despite its name what keeps a Ray on any system at the loopback address it was given.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray runs actors at niceness 15, where any other process of the machine would stall an answer.
        "RAY_worker_niceness": "0",
        # Nothing to drain: `down` means now.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }


def _gcs_store(temp_dir: str) -> dict[str, str]:
    """Where Ray's GCS keeps its tables, so that another one can go on with them. It ends with this Ray."""
    path = Path(temp_dir, "gcs")
    path.mkdir(mode=0o700)
    return {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(path)}


def _spawn_session(command: list[str], environment: dict[str, str], log: Path) -> int:
    """Start `command` in a session of its own, to outlive this process. Returns its process id."""
    write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    return os.posix_spawn(
        command[0],
        command,
        environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), write, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )


@contextmanager
def _running_on(cores: Collection[int]) -> Iterator[None]:
    """This thread, and what it starts meanwhile, on `cores`."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _wait_for_port(local_ray: LocalRay, port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if not local_ray.is_running():
            break
        with suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=1.0):
            return
        time.sleep(0.1)
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["it wrote nothing"]
    raise ClusterError(f"Ray did not start: {last[0]} (all of it in {log})")


def _free_ports(count: int) -> list[int]:
    """Ports free at this moment, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def free_port() -> int:
    """A port free at this moment."""
    return _free_ports(1)[0]


def _wait_until_empty(local_ray: LocalRay, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while local_ray.processes():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    with suppress(ChildProcessError):
        os.waitpid(local_ray.pid, os.WNOHANG)
    return True
