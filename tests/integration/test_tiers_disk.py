"""The disk tier on real files: what a restart finds, what it never serves, and limits that hold to the byte."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtransfer.tiers.directory import DirectoryInUse, DirectoryLock, lock_holder
from kvtransfer.tiers.disk_types import DiskOptions
from kvtransfer.tiers.health import TierState
from kvtransfer.tiers.offline import gc_directory, list_directory, stat_directory, verify_directory
from kvtransfer.tiers.records import Sealer
from kvtransfer.tiers.segments import DiskTier
from tests.tier_blocks import ALICE, BOB, SECRET, Clock, block, same

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvtransfer.tiers.records import BlockRecord

pytestmark = pytest.mark.integration

MIB = 1 << 20
PAGE = 4096


_opened: list[DiskTier] = []


@pytest.fixture(autouse=True)
def _close_tiers() -> Iterator[None]:
    yield
    while _opened:
        _opened.pop().close()


def open_tier(directory: Path, secret: bytes = SECRET, **options: int) -> DiskTier:
    options = {"limit_bytes": 64 * MIB, **options}
    tier = DiskTier(DiskOptions(directory, **options), Sealer(secret), threading.RLock(), Clock())
    _opened.append(tier)
    assert tier.open(), tier.status()
    return tier


def bytes_on_disk(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.iterdir())


def held_numbers(tier: DiskTier, numbers: range) -> list[int]:
    """Which of these blocks the tier serves; one served with a wrong byte fails the test."""
    found = []
    for number in numbers:
        record = tier.read(block(number).id)
        if record is not None:
            assert same(record, block(number, record.payload_bytes)), f"block {number} has wrong bytes"
            found.append(number)
    return found


def test_a_restart_finds_what_was_written(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, segment_bytes=5000)
    assert tier.write([block(number) for number in range(5)]) == 5
    assert len(list(tmp_path.glob("*.kv"))) == 3  # two blocks fit a segment
    tier.close()
    again = open_tier(tmp_path)
    assert held_numbers(again, range(6)) == [0, 1, 2, 3, 4]
    assert again.used_bytes == tier.used_bytes == bytes_on_disk(tmp_path)
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {"0o600"}


def test_the_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "a" / "kv")
    assert oct((tmp_path / "a" / "kv").stat().st_mode & 0o777) == "0o700"
    tier.close()


def test_what_is_held_already_is_not_written_again(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    tier.write([block(1)])
    assert tier.write([block(1), block(2)]) == 1
    assert tier.counters.written == 2


def test_the_segment_unused_for_longest_goes_first(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, limit_bytes=4 * PAGE)  # the lock's page and three segments of one block
    for number in range(3):
        tier.write([block(number)])
    tier.touch(block(0).id)
    tier.write([block(3)])
    assert held_numbers(tier, range(5)) == [0, 2, 3]
    assert bytes_on_disk(tmp_path) == 4 * PAGE


def test_a_segment_that_is_being_read_is_not_deleted(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, limit_bytes=2 * PAGE)
    tier.write([block(1)])
    segment = tier.pin(block(1).id)
    assert tier.write([block(2)]) == 0
    assert held_numbers(tier, range(3)) == [1]
    tier.unpin(segment)
    assert tier.write([block(2)]) == 1
    assert held_numbers(tier, range(3)) == [2]


def test_no_tenant_can_evict_anothers_share(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, limit_bytes=5 * PAGE)
    for number in range(2):
        tier.write([block(number, tenant=BOB)])
    for number in range(10, 30):
        tier.write([block(number)])
    assert tier.read(block(0, tenant=BOB).id) is not None
    assert tier.read(block(1, tenant=BOB).id) is not None
    assert tier.index.tenants == {ALICE: 2 * PAGE, BOB: 2 * PAGE}


def test_a_smaller_limit_is_kept_from_the_start(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    for number in range(8):
        tier.write([block(number)])
    tier.close()
    again = open_tier(tmp_path, limit_bytes=4 * PAGE)
    assert len(held_numbers(again, range(8))) == 3
    assert bytes_on_disk(tmp_path) == 4 * PAGE


def test_a_bit_flipped_anywhere_is_never_served(tmp_path: Path) -> None:
    """Every byte of the table and of the records' headers, and some of the payloads, one at a time."""
    tier = open_tier(tmp_path)
    tier.write([block(number, 400) for number in range(2)])
    tier.close()
    (path,) = tmp_path.glob("*.kv")
    clean = path.read_bytes()
    offsets = [*range(0, len(clean), 7), len(clean) - 1]
    served = 0
    for offset in offsets:
        damaged = bytearray(clean)
        damaged[offset] ^= 1 << offset % 8
        path.write_bytes(damaged)
        again = open_tier(tmp_path)
        served += len(held_numbers(again, range(2)))
        again.close()
        path.unlink(missing_ok=True)
    assert 0 < served < 2 * len(offsets)  # the undamaged one of the two is still served


@pytest.mark.parametrize(
    ("cut", "survivors"), [(1, [0, 1]), (700, [0]), (1300, []), (2000, []), (10_000, [])]
)
def test_a_torn_tail_costs_only_what_it_tore(tmp_path: Path, cut: int, survivors: list[int]) -> None:
    tier = open_tier(tmp_path)
    tier.write([block(number, 400) for number in range(3)])
    tier.close()
    (path,) = tmp_path.glob("*.kv")
    os.truncate(path, max(0, path.stat().st_size - cut))
    (tmp_path / f"{'0' * 32}.tmp").write_bytes(b"what a dying store was writing")
    again = open_tier(tmp_path)
    assert held_numbers(again, range(3)) == survivors
    assert not list(tmp_path.glob("*.tmp"))
    assert again.counters.torn_files + again.counters.bad_records >= 2
    assert again.used_bytes == bytes_on_disk(tmp_path)


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    for name in ("notes.txt", "x.kv", "0.tmp"):
        (tmp_path / name).write_text("somebody's")
    tier = open_tier(tmp_path)
    assert tier.gc() == (0, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "x.kv", "0.tmp", "LOCK"}


def test_another_clusters_segments_take_room_until_gc(tmp_path: Path) -> None:
    other = b"another cluster's secret........"
    tier = open_tier(tmp_path, secret=other)
    tier.write([block(1)])
    tier.close()
    mine = open_tier(tmp_path, limit_bytes=3 * PAGE)
    assert held_numbers(mine, range(3)) == []
    assert mine.used_bytes == 2 * PAGE
    assert mine.write([block(1)]) == 1
    assert mine.write([block(2)]) == 1  # in place of the first: there is room for one beside theirs
    assert bytes_on_disk(tmp_path) == 3 * PAGE
    assert mine.gc() == (1, PAGE)
    assert mine.write([block(3)]) == 1
    assert held_numbers(mine, range(4)) == [2, 3]


def test_the_second_store_of_a_directory_is_told_who_has_it(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    second = DiskTier(DiskOptions(tmp_path, MIB), Sealer(SECRET), threading.RLock(), Clock())
    assert not second.open()
    status = second.status()
    assert status.state is TierState.OFF
    assert f"process {os.getpid()}" in status.reason
    assert lock_holder(tmp_path) == f"process {os.getpid()} on {os.uname().nodename}"
    with pytest.raises(DirectoryInUse, match="give each its own"):
        gc_directory(tmp_path, SECRET)
    tier.close()
    assert lock_holder(tmp_path) is None
    assert second.open()
    second.close()


def test_a_directory_can_be_looked_at_without_a_store(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    tier.write([block(number) for number in range(3)])
    tier.write([block(9, tenant=BOB, fidelity=1)])
    tier.close()
    (tmp_path / f"{'0' * 32}.tmp").write_bytes(b"torn")
    before = sorted(path.name for path in tmp_path.iterdir())
    entries = list_directory(tmp_path, SECRET)
    assert [(entry.tenant, entry.fidelity, entry.num_records) for entry in entries] == [
        (ALICE, 0, 3),
        (BOB, 1, 1),
    ]
    stats = stat_directory(tmp_path, SECRET)
    assert (stats.num_segments, stats.num_records, stats.torn_files, stats.holder) == (2, 4, 1, None)
    for secret in (SECRET, None):
        outcome = list(verify_directory(tmp_path, secret))[-1]
        assert (outcome.done, outcome.total, outcome.bad) == (4, 4, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == before  # looking changes nothing
    segment = next(path for path in tmp_path.glob("*.kv") if path.name == entries[0].name)
    data = bytearray(segment.read_bytes())
    data[-5] ^= 1
    segment.write_bytes(data)
    assert list(verify_directory(tmp_path, SECRET))[-1].bad == 1
    assert gc_directory(tmp_path, SECRET).files == 1
    assert not list(tmp_path.glob("*.tmp"))


class DiskMachine(RuleBasedStateMachine):
    """Random batches of random sizes and tenants, reads, and restarts with other limits: never a byte too many."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="headrace-tiers-"))
        self.limit = 40 * PAGE
        self.tier = open_tier(self.directory, limit_bytes=self.limit, segment_bytes=3 * PAGE)
        self.next = 0
        self.written: dict[int, BlockRecord] = {}

    @rule(
        sizes=st.lists(st.integers(2, 30_000), min_size=1, max_size=6), tenant=st.sampled_from([ALICE, BOB])
    )
    def write(self, sizes: list[int], tenant: bytes) -> None:
        records = [block(self.next + i, size, tenant=tenant) for i, size in enumerate(sizes)]
        self.written.update({self.next + i: record for i, record in enumerate(records)})
        self.next += len(sizes)
        self.tier.write(records)

    @rule(number=st.integers(0, 60))
    def read(self, number: int) -> None:
        record = self.written.get(number)
        if record is not None:
            served = self.tier.read(record.id)
            assert served is None or same(served, record)

    @rule(pages=st.integers(1, 60))
    def restart(self, pages: int) -> None:
        self.tier.close()
        self.limit = pages * PAGE
        self.tier = open_tier(self.directory, limit_bytes=self.limit, segment_bytes=3 * PAGE)

    @invariant()
    def the_limit_holds_and_the_books_agree(self) -> None:
        on_disk = bytes_on_disk(self.directory)
        assert on_disk == self.tier.used_bytes
        assert on_disk <= max(self.limit, PAGE)  # the lock's page is there whatever the limit

    def teardown(self) -> None:
        self.tier.close()
        shutil.rmtree(self.directory)


TestDiskMachine = DiskMachine.TestCase
TestDiskMachine.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

WRITER = """
import sys, threading, time
from pathlib import Path
from kvtransfer.tiers.disk_types import DiskOptions
from kvtransfer.tiers.records import Sealer
from kvtransfer.tiers.segments import DiskTier
from tests.tier_blocks import SECRET, block

first = int(sys.argv[2])
options = DiskOptions(Path(sys.argv[1]), 6 << 20, segment_bytes=200_000)
tier = DiskTier(options, Sealer(SECRET), threading.RLock(), time.monotonic)
assert tier.open(), tier.status()
print("open", flush=True)
for start in range(first, first + 100_000, 5):
    tier.write([block(start + i, 60_000) for i in range(5)])
    print(start + 5, flush=True)
"""


def test_a_store_killed_while_writing_leaves_only_right_bytes(tmp_path: Path) -> None:
    """Five times, at moments that differ: what is served afterwards is right, and what was reported as written
    before is there as far as the limit goes."""
    rng = np.random.default_rng(20)
    root = Path(__file__).parents[2]
    start = 0
    for _ in range(5):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(start)],
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        with writer.stdout:
            assert writer.stdout.readline() == "open\n"
            for _ in range(int(rng.integers(1, 12))):
                reached = int(writer.stdout.readline())
            time.sleep(float(rng.uniform(0, 0.01)))
            writer.kill()
            rest = writer.stdout.read().split()
        writer.wait(10)
        reached = max([reached, *map(int, rest[:-1])])
        again = open_tier(tmp_path, limit_bytes=6 * MIB)
        found = [number for number in range(reached + 10) if block(number).id in again]
        for number in found:
            assert same(again.read(block(number).id), block(number, 60_000))
        assert set(range(max(0, reached - 60), reached)) <= set(found)
        assert again.used_bytes == bytes_on_disk(tmp_path) <= 6 * MIB
        assert not list(tmp_path.glob("*.tmp"))
        again.close()
        start = reached


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    lock.close()
    lock.close()
    DirectoryLock(tmp_path).close()
