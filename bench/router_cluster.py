"""A router, mock workers and clients for `headrace bench router`: each a process of its own, asked line by line."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.router_load import Load
from bench.router_settings import (
    MAX_CONTEXT,
    MODEL,
    ByteTokenizer,
    ClientsSettings,
    RouterSettings,
    WorkersSettings,
    new_secret,
)
from cluster.errors import ClusterError
from cluster.model_store import resolve
from cluster.model_store.errors import ModelNotFoundError
from cluster.plan import MALLOC_ENVIRONMENT
from router.config import RouterConfig, Tokenizer
from text.tokenizer import Tokenizer as ModelTokenizer

ROUTED, DIRECT = "routed", "direct"
STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class Window:
    """What happened in `seconds` of load. CPU seconds are those of one process each."""

    seconds: float
    num_requests: int
    num_tokens: int
    num_messages: int
    ttft_s: list[float]
    router_cpu_s: float
    workers_cpu_s: float
    clients_cpu_s: float


class BenchProcess:
    """A process of `bench.router_process`, asked line by line."""

    def __init__(self, name: str, settings: object, directory: Path, environment: dict[str, str]) -> None:
        file = directory / f"{name}.pickle"
        file.touch(mode=0o600)
        file.write_bytes(pickle.dumps(settings))
        self._name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.router_process", str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._times = psutil.Process(self._process.pid)
        try:
            self.address: str = self._answer("start")["address"]
        except RuntimeError:
            self.close()
            raise

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one command. Raises RuntimeError when the process has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer(do)

    def cpu_s(self) -> float:
        """What it has used since it started, all of its threads."""
        times = self._times.cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _answer(self, do: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self._name} process failed at {do!r}; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(frozen=True, slots=True)
class BenchCluster:
    """All processes, up."""

    router: BenchProcess
    workers: BenchProcess
    clients: BenchProcess
    tokenizer: str

    def under(self, load: Load, step_s: float, warm_up_s: float, window_s: float) -> Window:
        """What happens in `window_s` seconds, `warm_up_s` after the load was put on. `step_s`: of mock workers."""
        self.workers.ask("pace", step_s=step_s)
        self.clients.ask("begin", **asdict(load))
        try:
            time.sleep(warm_up_s)
            before, began_s = self._cpu_s(), self.clients.ask("look")["at_s"]
            time.sleep(window_s)
            seen, after = self.clients.ask("look"), self._cpu_s()
        finally:
            self.clients.ask("end")
        if seen["failure"]:
            raise ClusterError(f"{load}: {seen['failure']}")
        router, workers, clients = (now - then for now, then in zip(after, before, strict=True))
        return Window(
            seconds=seen["at_s"] - began_s,
            num_requests=seen["num_requests"],
            num_tokens=seen["num_tokens"],
            num_messages=seen["num_messages"],
            ttft_s=seen["ttft_s"],
            router_cpu_s=router,
            workers_cpu_s=workers,
            clients_cpu_s=clients,
        )

    def prefilled_elsewhere(self) -> float:
        """The share of all prompts so far that another worker prefilled than the one that decoded."""
        first, *others = self.workers.ask("count").values()
        return float(first / max(1, first + sum(others)))

    def _cpu_s(self) -> list[float]:
        return [process.cpu_s() for process in (self.router, self.workers, self.clients)]


@contextmanager
def running(environment: dict[str, str]) -> Iterator[BenchCluster]:
    """1P1D of mock workers behind a router, with the clients, until the end of the context."""
    has_model, tokenizer = _tokenizer()
    secret = new_secret()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-bench-")))
        config = RouterConfig(
            router_id="bench",
            model_name=MODEL if has_model else tokenizer.digest,
            model_dir=resolve(MODEL) if has_model else directory,
            cluster_secret=secret,
            listen="127.0.0.1:0",
            max_context=MAX_CONTEXT,
            streaming="direct",
        )

        def start(name: str, settings: object) -> BenchProcess:
            process = BenchProcess(name, settings, directory, environment | MALLOC_ENVIRONMENT)
            stack.callback(process.close)
            return process

        router = start(
            "router",
            RouterSettings(config=config, has_tokenizer=has_model, log_file=directory / "router.log"),
        )
        workers = start(
            "workers",
            WorkersSettings(
                router=router.address,
                tokenizer_digest=tokenizer.digest,
                vocab_size=tokenizer.vocab_size,
                cluster_secret=secret,
            ),
        )
        targets = {ROUTED: router.address, DIRECT: workers.address}
        clients = start("clients", ClientsSettings(targets=targets))
        yield BenchCluster(router, workers, clients, MODEL if has_model else "bytes")


def _tokenizer() -> tuple[bool, Tokenizer]:
    try:
        return True, ModelTokenizer.open(resolve(MODEL))
    except ModelNotFoundError:
        return False, ByteTokenizer()
