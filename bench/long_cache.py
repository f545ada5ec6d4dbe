"""`headrace bench long_cache`: DeepSeek-V4-Flash's cache of a million tokens, from one process to another.

Its real shape in the paper's storage (3.4 GiB), filled with random bytes, through every carrier and once more into the
same memory. Both ends say how much more memory they had at their peak than before; a bare socket moves as many bytes
beside them.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import dataclass

from rich.console import Console

from bench.report import BenchReport
from bench.transfer import BenchEnd
from cluster.errors import ClusterError

MODEL, KV_DTYPE, CONTEXT_TOKENS = "deepseek-v4-flash", "fp8", 1 << 20
CARRIERS = {"raw": "", "tcp": "tcp", "shm": "shm"}
"""How a carrier is called in the metrics: payloads in gRPC's own messages, past it, in shared memory."""
ROUNDS = 2
SOCKET_BYTES = 1 << 30
HOST = "127.0.0.1"
MIB, GIGA = 1 << 20, 1e9


@dataclass(frozen=True, slots=True)
class Move:
    """One trip of the whole cache."""

    seconds: float
    sender_extra_bytes: int
    receiver_extra_bytes: int


def run(console: Console) -> BenchReport:
    """Measure. Raises ClusterError where a byte was lost on the way, or an end failed."""
    try:
        with ExitStack() as stack, console.status("filling the cache …"):
            receiver, sender = (BenchEnd((), role, HOST) for role in ("receive", "send"))
            stack.callback(receiver.close)
            stack.callback(sender.close)
            return _measure(sender, receiver, console)
    except RuntimeError as error:
        raise ClusterError(str(error)) from error


def _measure(sender: BenchEnd, receiver: BenchEnd, console: Console) -> BenchReport:
    model = {"model": MODEL, "kv_dtype": KV_DTYPE, "num_tokens": CONTEXT_TOKENS}
    served = receiver.ask("serve_model", **model)
    loaded = sender.ask("load_model", **model)
    sender.ask("connect", address=served["address"])
    sockets, moves = [], {name: list[Move]() for name in CARRIERS}
    for number in range(ROUNDS):
        sockets.append(_socket_gbps(sender, receiver))
        for name, carrier in CARRIERS.items():
            console.print(f"round {number + 1} of {ROUNDS}: {name}")
            moves[name].append(_move(sender, receiver, f"{name}-{number}", carrier, loaded["sums"]))
    metrics = {
        "context_tokens": CONTEXT_TOKENS,
        "kv_bytes": loaded["kv_bytes"],
        "tcp_gbps": statistics.median(sockets),
    }
    for name, taken in moves.items():
        seconds = statistics.median(move.seconds for move in taken)
        gbps = loaded["kv_bytes"] / seconds / GIGA
        prefix = name if name != "tcp" else "carried"
        metrics |= {
            f"{prefix}_s": seconds,
            f"{prefix}_gbps": gbps,
            f"{prefix}_to_socket": gbps / metrics["tcp_gbps"],
            f"{prefix}_sender_extra_mib": max(move.sender_extra_bytes for move in taken) / MIB,
            f"{prefix}_receiver_extra_mib": max(move.receiver_extra_bytes for move in taken) / MIB,
        }
    note = f"{MODEL}, {CONTEXT_TOKENS:,} tokens in {KV_DTYPE}, random bytes; gbps: GB/s; carried: payloads past gRPC"
    return BenchReport("long_cache", metrics, (note,))


def _socket_gbps(sender: BenchEnd, receiver: BenchEnd) -> float:
    port = receiver.ask("tcp_listen", congestion="", num_bytes=SOCKET_BYTES)["port"]
    sent = sender.ask("tcp_send", host=HOST, port=port, congestion="", num_bytes=SOCKET_BYTES)
    return SOCKET_BYTES / float(sent["seconds"]) / GIGA


def _move(sender: BenchEnd, receiver: BenchEnd, request: str, carrier: str, expected: list[int]) -> Move:
    lease = receiver.ask("grant", request=request)["lease"]
    before = [end.ask("memory", forget_peak=True)["resident"] for end in (sender, receiver)]
    pushed = sender.ask("push", lease=lease, codec="raw", carrier=carrier)
    extra = [end.ask("memory")["peak"] - was for end, was in zip((sender, receiver), before, strict=True)]
    if receiver.ask("sums", lease=lease)["sums"] != expected:
        raise RuntimeError("what landed is not what was sent")
    return Move(pushed["seconds"], *extra)
