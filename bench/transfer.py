"""How fast does KV move between two processes, beside a bare TCP socket?

The cache of a 4,096-token prompt (bfloat16, from real text) goes from one paged cache to another: in each codec as
between two hosts (gRPC, payloads by carrier `tcp`), raw with payloads in the gRPC messages (`inline`), through shared
memory and NIXL (over TCP); over a bare socket, a bare gRPC stream and NIXL alone for comparison. Loopback first; then,
where network namespaces are allowed, over links of 50 Mbit/s, 1 Gbit/s and 10 Gbit/s. Seconds run from the first
byte to the acknowledged commit; GB are bytes of the cache, whatever the codec made of them. Processor time is that
of both ends for the move alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import links, tcp
from bench.kv_sample import write_sample
from bench.link_cluster import first_tokens
from bench.report import BenchReport
from cluster.errors import ClusterError
from cluster.plan import MALLOC_ENVIRONMENT
from cluster.units import UnitError, parse_rate
from kvtransfer.codecs import CODECS, Fidelity

NUM_TOKENS = 4096
REPEATS = 5
SLOW_BITS_PER_S = 1e8
"""On links up to this rate, time to first token is measured too: there the codec decides it."""
LINKS = ("50Mbit", "1Gbit", "10Gbit")
CUBIC = "cubic"
NIXL_ENVIRONMENT = {"UCX_TLS": "tcp,self"}
"""As between two hosts without RDMA."""
ANSWER_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Method:
    """One way to move the sample; its name begins the metrics."""

    name: str
    codec: str = ""
    carrier: str = ""
    congestion: str = ""

    @property
    def is_bare(self) -> bool:
        """A socket or a stream without a cache behind it."""
        return not self.codec


@dataclass(frozen=True, slots=True)
class Move:
    """One run of a method. `cpu_s`: of both processes."""

    seconds: float
    cpu_s: float
    wire_bytes: int


BARE_GRPC = Method("grpc")
BARE_NIXL = Method("nixl_paged")


class BenchEnd:
    """A process of `bench.transfer_end`, asked line by line."""

    def __init__(self, prefix: Sequence[str], role: str, host: str) -> None:
        self._role = role
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "bench.transfer_end", role, host],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=NIXL_ENVIRONMENT | os.environ | MALLOC_ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one command. Raises RuntimeError when the process has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self._role} end failed at {do!r}; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Pair:
    """Both ends of one link, with the sample in the sender's cache."""

    def __init__(self, link: links.Link, sample: Path) -> None:
        self.link = link
        self.receiver = BenchEnd(link.receiver_prefix, "receive", link.receiver_host)
        self.sender = BenchEnd(link.sender_prefix, "send", link.sender_host)
        served = self.receiver.ask("serve", sample=str(sample))
        loaded = self.sender.ask("load", sample=str(sample))
        self.kv_bytes: int = loaded["kv_bytes"]
        self._expected = loaded["checksums"]
        self._num_moves = 0
        self.sender.ask("connect", address=served["address"])

    def move(self, method: Method) -> Move:
        """Once. Raises RuntimeError where an exact codec did not bring the same bytes."""
        return self._bare(method) if method.is_bare else self._push(method)

    def close(self) -> None:
        """End both processes."""
        self.sender.close()
        self.receiver.close()

    def _bare(self, method: Method) -> Move:
        if method is BARE_GRPC:
            return self._timed("grpc_send", num_bytes=self.kv_bytes)
        if method is BARE_NIXL:
            where = self.receiver.ask("nixl_paged_listen", num_bytes=self.kv_bytes)
            return self._timed("nixl_paged_send", num_bytes=self.kv_bytes, **where)
        arguments = {"congestion": method.congestion, "num_bytes": self.kv_bytes}
        port = self.receiver.ask("tcp_listen", **arguments)["port"]
        return self._timed("tcp_send", host=self.link.receiver_host, port=port, **arguments)

    def _push(self, method: Method) -> Move:
        self._num_moves += 1
        lease = self.receiver.ask("grant", request=str(self._num_moves))["lease"]
        move = self._timed("push", lease=lease, codec=method.codec, carrier=method.carrier)
        landed = self.receiver.ask("release", lease=lease)["checksums"]
        if _is_exact(method.codec) and landed != self._expected:
            raise RuntimeError(f"{method.name}: what landed is not what was sent")
        return move

    def _timed(self, do: str, **arguments: Any) -> Move:
        """Preparing and checking stay outside."""
        cpu_before = self._cpu_s()
        answer = self.sender.ask(do, **arguments)
        return Move(answer["seconds"], self._cpu_s() - cpu_before, answer.get("wire_bytes", self.kv_bytes))

    def _cpu_s(self) -> float:
        return sum(end.ask("cpu")["cpu_s"] for end in (self.sender, self.receiver))


def run(console: Console, link: str = "") -> BenchReport:
    """Medians. `link`: only over a link of that rate, such as "1Gbit". Raises ClusterError where it cannot be."""
    try:
        rates = {name: parse_rate(name) for name in ([link] if link else LINKS)}
    except UnitError as error:
        raise ClusterError(f"--link: {error}") from error
    obstacle = links.why_not()
    if link and obstacle:
        raise ClusterError(f"--link {link}: {obstacle}")
    metrics: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        sample = Path(directory) / "sample.safetensors"
        with console.status("computing the cache of a real text …"):
            write_sample(sample, NUM_TOKENS)
        if not link:
            metrics |= _measure(console, links.LOOPBACK, sample, REPEATS, "")
        for name, rate in {} if obstacle else rates.items():
            repeats = REPEATS if rate >= 5e8 else 1
            suffix = "" if link else f"_{name.lower()}"
            with links.shaped(name, rate) as shaped:
                metrics |= _measure(console, shaped, sample, repeats, suffix)
                if rate <= SLOW_BITS_PER_S:
                    metrics |= _first_tokens(console, shaped, Path(directory), suffix)
    notes = [f"the kernel's default congestion control is {tcp.default_congestion()}"]
    notes += [f"no shaped links: {obstacle}"] if obstacle else []
    return BenchReport("transfer", metrics, tuple(notes))


def methods(*, shaped: bool) -> list[Method]:
    """What is compared. Carriers that need one host are left out of shaped links."""
    bare = [Method("tcp"), Method("tcp_cubic", congestion=CUBIC), BARE_GRPC]
    coded = [Method(codec.name, codec=codec.name, carrier="tcp") for codec in CODECS]
    inline = Method("inline", codec="raw")
    if shaped:
        return [*bare, *coded, inline]
    shm, nixl = (Method(name, codec="raw", carrier=name) for name in ("shm", "nixl"))
    return [*bare, *coded, inline, shm, *((nixl, BARE_NIXL) if find_spec("nixl") else ())]


def _measure(console: Console, link: links.Link, sample: Path, repeats: int, suffix: str) -> dict[str, float]:
    with _pair(link, sample) as pair:
        compared = methods(shaped=link is not links.LOOPBACK)
        moves: dict[Method, list[Move]] = {method: [] for method in compared}
        for repeat in range(-1, repeats):  # the first round warms connections and memory up
            for method in compared:
                with console.status(f"{link.name}: {method.name}, {max(repeat, 0) + 1} of {repeats} …"):
                    move = pair.move(method)
                if repeat >= 0 or repeats == 1:
                    moves[method].append(move)
            if repeats == 1:
                break
        return _metrics(moves, pair.kv_bytes, suffix)


def _first_tokens(console: Console, link: links.Link, directory: Path, suffix: str) -> dict[str, float]:
    """Of a whole 1P1D over the link: raw, and `auto` within exact."""
    found = {}
    for codec in ("raw", "auto"):
        with console.status(f"{link.name}: time to first token, codec {codec} …"):
            found[codec] = first_tokens(link, directory, codec)
    return {
        f"ttft_raw_s{suffix}": found["raw"].cold_s,
        f"ttft_auto_s{suffix}": found["auto"].cold_s,
        f"ttft_auto_to_raw{suffix}": found["auto"].cold_s / found["raw"].cold_s,
        f"ttft_cached_raw_s{suffix}": found["raw"].cached_s,
        f"ttft_cached_auto_s{suffix}": found["auto"].cached_s,
        f"ttft_cached_auto_to_raw{suffix}": found["auto"].cached_s / found["raw"].cached_s,
    }


def _metrics(moves: Mapping[Method, Sequence[Move]], kv_bytes: int, suffix: str) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for method, runs in moves.items():
        seconds = statistics.median(run.seconds for run in runs)
        metrics[f"{method.name}_gbps{suffix}"] = kv_bytes / seconds / 1e9
        metrics[f"{method.name}_cpu_s_per_gb{suffix}"] = statistics.median(run.cpu_s for run in runs) / (
            kv_bytes / 1e9
        )
        if not method.is_bare:
            metrics[f"{method.name}_ratio{suffix}"] = kv_bytes / runs[-1].wire_bytes
    raw = metrics[f"raw_gbps{suffix}"]
    for method in moves:
        if method.name != "raw":
            metrics[f"{method.name}_to_raw{suffix}"] = metrics[f"{method.name}_gbps{suffix}"] / raw
    return metrics


@contextmanager
def _pair(link: links.Link, sample: Path) -> Iterator[Pair]:
    pair = Pair(link, sample)
    try:
        yield pair
    finally:
        pair.close()


def _is_exact(codec: str) -> bool:
    return any(each.name == codec and each.fidelity is Fidelity.EXACT for each in CODECS)
