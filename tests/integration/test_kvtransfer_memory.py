"""However long the sequence, both ends stay within the memory that their modules state."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from kvtransfer.transports.carriers import CARRIED_FRAME_BYTES, DEFAULT_NUM_SLOTS, DEFAULT_SLOT_BYTES
from tests.integration.kvtransfer_memory_peer import FRAME_BYTES

pytestmark = pytest.mark.integration

ALLOWANCE_BYTES = 8 << 20
"""What gRPC and the interpreter take beside the messages: measured, up to 6 MiB with eight streams."""

MALLOC_GIVES_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "MALLOC_ARENA_MAX": "1",
}
"""So that resident memory is what is in use: otherwise malloc keeps freed blocks, for every thread its own (on busy
cores up to 20 MiB of what gRPC reads into)."""

LANDED_PER_S = 300e6  # bytes; a sender alone is faster


class Peaks(NamedTuple):
    receiver: int
    sender: int


class Peer:
    def __init__(self, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.kvtransfer_memory_peer", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | MALLOC_GIVES_BACK,
        )

    def hear(self) -> list[str]:
        assert self._process.stdout is not None
        return self._process.stdout.readline().split()

    def go_on(self, *words: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def peaks_of(
    num_tokens: int, num_streams: int, landing_bytes: int, window_bytes: int, carrier: str = "inline"
) -> Peaks:
    receiver = Peer("receive", landing_bytes, num_tokens, num_streams, LANDED_PER_S, carrier)
    sender = Peer("send", num_tokens, window_bytes, carrier)
    try:
        sender.go_on(*receiver.hear())
        assert sender.hear() == ["warm"]
        receiver.go_on()
        assert receiver.hear() == ["ready"]
        sender.go_on()
        (sender_grew,) = sender.hear()
        receiver.go_on()
        receiver_grew, is_whole = receiver.hear()
        assert is_whole == "True"
        return Peaks(int(receiver_grew), int(sender_grew))
    finally:
        sender.end()
        receiver.end()


def check_bounds(peaks: Peaks, num_streams: int, landing_bytes: int, window_bytes: int) -> None:
    """As grpc_receive.py and grpc_push.py state them; a sender's frames are in the receiver's credit, too."""
    copies = 3 * FRAME_BYTES * num_streams
    assert peaks.receiver <= landing_bytes + copies + ALLOWANCE_BYTES
    assert peaks.sender <= min(num_streams * window_bytes, landing_bytes) + copies + ALLOWANCE_BYTES


@pytest.mark.parametrize(
    ("num_tokens", "num_streams", "landing_bytes"), [(1024, 1, 8 << 20), (256, 4, 24 << 20)]
)
def test_256_mib_through_a_slow_receiver_stay_within_the_bounds(
    num_tokens: int, num_streams: int, landing_bytes: int
) -> None:
    window_bytes = 1 << 30  # so that only the receiver's credit holds the sender back
    peaks = peaks_of(num_tokens, num_streams, landing_bytes, window_bytes)
    check_bounds(peaks, num_streams, landing_bytes, window_bytes)


@pytest.mark.parametrize("num_tokens", [1024, pytest.param(4096, marks=pytest.mark.slow)])
def test_slots_and_staging_of_a_stream_are_all_that_tcp_takes(num_tokens: int) -> None:
    """However large the landing budget and the window."""
    peaks = peaks_of(num_tokens, 1, 1 << 30, 1 << 30, "tcp")
    bound = DEFAULT_NUM_SLOTS * DEFAULT_SLOT_BYTES + 3 * CARRIED_FRAME_BYTES + ALLOWANCE_BYTES
    assert max(peaks) <= bound


@pytest.mark.slow
@pytest.mark.parametrize("window_bytes", [16 << 20, 1 << 30])
def test_1_gib_through_a_receiver_of_64_mib_stays_within_the_bounds(window_bytes: int) -> None:
    peaks = peaks_of(4096, 1, 64 << 20, window_bytes)
    check_bounds(peaks, 1, 64 << 20, window_bytes)
