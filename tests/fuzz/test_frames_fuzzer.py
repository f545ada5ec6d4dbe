"""The short run of the fuzzer, the long one, and that it notices what it is there to notice."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
import torch

from kvtransfer.cache_sink import CacheSink
from kvtransfer.frames import Frame, FrameHeader
from kvtransfer.landing import FrameLander
from kvtransfer.leases import LeaseTable
from tests.fuzz.frames_fuzzer import Found, Summary, run, run_round

NUM_FRAMES = 6_000
NUM_FRAMES_LONG = 1_000_000


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.integration
def test_spoiled_frames_never_land_never_crash_and_leave_nothing() -> None:
    summary = run(NUM_FRAMES, seed=secrets.randbits(32))
    # Every line of defence was tried.
    wanted = {"DAMAGED_FRAME", "BAD_PIECE", "UNKNOWN_CODEC", "LANDING_FAILED", "FIDELITY_EXCEEDED"}
    wanted |= {"STALE_EPOCH", "STALE_ATTEMPT", "UNKNOWN_LEASE", "LEASE_CLOSED", "FRAME_CONFLICT"}
    assert wanted <= set(summary.causes), summary.text()


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_million_spoiled_frames_never_land_never_crash_and_leave_nothing() -> None:
    print(run(NUM_FRAMES_LONG, seed=secrets.randbits(32)).text())  # noqa: T201


def _finds_something() -> str:
    with pytest.raises(Found) as found:
        for number in range(40):
            run_round(5, number, Summary())
    return str(found.value)


@pytest.mark.integration
def test_the_fuzzer_finds_a_table_that_takes_frames_of_any_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    admit = LeaseTable._admit

    def credulous(table: LeaseTable, ref):
        lease = table.get(ref.lease_id)
        return admit(table, ref) if lease is None or not lease.state.is_open else lease

    monkeypatch.setattr(LeaseTable, "_admit", credulous)
    assert "wrong lease, attempt and epochs" in _finds_something()


@pytest.mark.integration
def test_the_fuzzer_finds_a_check_of_pieces_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FrameLander, "_check_piece", lambda _self, _header: None)
    assert "--seed 5 --round" in _finds_something()


@pytest.mark.integration
def test_the_fuzzer_finds_a_sink_that_forgets_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(_self: CacheSink, _header: FrameHeader) -> int:
        return 0

    monkeypatch.setattr(CacheSink, "check", check)
    assert "fidelity" in _finds_something()


@pytest.mark.integration
def test_the_fuzzer_finds_a_write_before_the_decoding_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    write = CacheSink.write

    def hasty(sink: CacheSink, landing, frame: Frame) -> None:
        layer = frame.header.piece.layers.start
        sink._cache.planes[frame.header.piece.plane][layer, 0, 0, 0] = 1.5  # type: ignore[attr-defined]
        write(sink, landing, frame)

    monkeypatch.setattr(CacheSink, "write", hasty)
    assert "memory of plane" in _finds_something()
