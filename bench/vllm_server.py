"""vLLM beside us: its own server from an environment of its own, asked over its own HTTP interface.

`environment` is a virtual environment with vLLM's CPU build; the server listens on this host for as long as it is
measured, in bfloat16 on all cores, and is ended by its process group.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.prompts import distinct_prompt
from bench.speeds import speeds
from cluster.errors import ClusterError
from cluster.local_ray import free_port

START_S, ANSWER_S, END_S = 600.0, 300.0, 30.0
RUNS = 3
_MODEL = "served"


@contextlib.contextmanager
def served(environment: Path, model_dir: Path) -> Iterator[VllmServer]:
    """A server that answers. Raises ClusterError where it does not start."""
    binary = _binary(environment)
    cores = len(os.sched_getaffinity(0))
    arguments = ("--no-enable-prefix-caching",)
    with _serving(binary, model_dir, f"0-{cores - 1}", {}, arguments) as (port, process):
        server = VllmServer(port, process)
        server.wait()
        yield server


@contextlib.contextmanager
def served_pair(environment: Path, model_dir: Path) -> Iterator[Callable[[list[int], int], list[float]]]:
    """Two servers with a core each, the first for prompts, and how to ask them. Raises ClusterError where they do not
    start."""
    binary = _binary(environment)
    handing_over = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    arguments = ("--no-enable-prefix-caching", "--kv-transfer-config", json.dumps(handing_over))
    with contextlib.ExitStack() as stack:
        servers = []
        for core in range(2):
            own = {
                "UCX_TLS": "tcp,sm,self",
                "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            }
            port, process = stack.enter_context(_serving(binary, model_dir, str(core), own, arguments))
            servers.append(VllmServer(port, process))
        for server in servers:
            server.wait()
        prefill, decode = servers

        def ask(prompt: list[int], max_tokens: int) -> list[float]:
            return decode.token_times(prompt, max_tokens, prefill.hand_over(prompt))

        yield ask


def _binary(environment: Path) -> Path:
    binary = environment / "bin" / "vllm"
    if not binary.exists():
        raise ClusterError(
            f"{binary} does not exist: --compare vllm=PATH names a virtual environment with vLLM in it"
        )
    return binary


@contextlib.contextmanager
def _serving(
    binary: Path, model_dir: Path, cores: str, own: dict[str, str], arguments: tuple[str, ...]
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A server's port, and its process, which is ended."""
    port = free_port()
    own = own | {
        "PATH": f"{binary.parent}:{os.environ['PATH']}",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        *(str(binary), "serve", str(model_dir), "--served-model-name", _MODEL, "--dtype", "bfloat16"),
        *("--max-model-len", "8192", "--max-num-seqs", "64", "--host", "127.0.0.1", "--port", str(port)),
        *arguments,
    ]
    process = subprocess.Popen(
        command,
        env=os.environ | own,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield port, process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class VllmServer:
    """What it does, in the metrics of `headrace bench engine`."""

    def __init__(self, port: int, process: subprocess.Popen[bytes]) -> None:
        self._port = port
        self._process = process

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """It gets no processor meanwhile: its workers poll when they have nothing to do."""
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)

    def wait(self) -> None:
        """Until it answers. Raises ClusterError where it ends before or takes too long."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            status = self._process.poll()
            if status is not None:
                raise ClusterError(f"vLLM's server ended with status {status} before it answered")
            with contextlib.suppress(OSError):
                self.token_times([1_000], 1)
                return
            time.sleep(1.0)
        raise ClusterError(f"vLLM's server did not answer within {START_S:.0f} s")

    def measure(
        self, prompts: tuple[int, ...], streams: tuple[int, ...], prompt_tokens: int
    ) -> dict[str, float]:
        """Prefill by time to the first token, steps by the time between tokens of answers to prompts of that length."""
        seeds = iter(range(1_000_000, 2_000_000))
        prefill_s, step_s = {}, {}
        for num_tokens in prompts:
            runs = []
            for _ in range(RUNS):
                began = time.perf_counter()
                runs.append(self.token_times(distinct_prompt(num_tokens, next(seeds)), 1)[0] - began)
            prefill_s[num_tokens] = statistics.median(runs)
        for num_streams in streams:
            asked = [distinct_prompt(prompt_tokens, next(seeds)) for _ in range(num_streams)]
            step_s[num_streams] = self._step_s(num_streams, asked)
        return speeds(prefill_s, step_s)

    def _step_s(self, num_streams: int, prompts: list[list[int]]) -> float:
        """Median time between two tokens of an answer, while all of them are being written."""
        with ThreadPoolExecutor(num_streams) as pool:
            times = list(pool.map(lambda prompt: self.token_times(prompt, 48), prompts))
        first, last = max(each[0] for each in times), min(each[-1] for each in times)
        gaps = [
            after - before
            for each in times
            for before, after in pairwise(each)
            if before >= first and after <= last
        ]
        return statistics.median(gaps)

    def token_times(
        self, prompt: list[int], max_tokens: int, handed_over: dict[str, Any] | None = None
    ) -> list[float]:
        """When each token came. `handed_over`: what the server that has computed the prompt said."""
        asked = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        if handed_over is not None:
            asked["kv_transfer_params"] = handed_over
        with self._asked(asked) as answer:
            return [time.perf_counter() for line in answer if line.startswith(b"data: {")]

    def hand_over(self, prompt: list[int]) -> dict[str, Any]:
        """Compute a prompt for another server; returns what to tell that."""
        nothing = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
        wanted = {"do_remote_decode": True, "do_remote_prefill": False, **dict.fromkeys(nothing)}
        with self._asked({"prompt": prompt, "max_tokens": 1, "kv_transfer_params": wanted}) as answer:
            told: dict[str, Any] = json.load(answer)["kv_transfer_params"]
            return told

    @contextlib.contextmanager
    def _asked(self, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_S)
        with contextlib.closing(connection):
            whole = json.dumps({"model": _MODEL, "temperature": 0, **body})
            connection.request("POST", "/v1/completions", whole, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != http.HTTPStatus.OK:
                raise ClusterError(
                    f"vLLM's server says {answer.status}: {answer.read(300).decode(errors='replace')}"
                )
            yield answer
