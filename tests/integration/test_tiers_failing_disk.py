"""The store goes on without a disk that is full, read-only, slow or failing, says so, and comes back to it."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtransfer.frames import LeaseRef
from kvtransfer.sources import FetchRequest, SourceRefused
from kvtransfer.tiers.disk_types import DiskOptions
from kvtransfer.tiers.files import OsFiles
from kvtransfer.tiers.health import TierState
from kvtransfer.tiers.records import Sealer
from kvtransfer.tiers.segments import DiskTier
from kvtransfer.tiers.store import NodeStore
from kvtransfer.tiers.store_types import StoreOptions
from tests.tier_blocks import SECRET, SHAPE, Clock, block, key, same
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from typing_extensions import Buffer

    from kvtransfer.tiers.files import FileFacts
    from kvtransfer.tiers.records import BlockRecord

pytestmark = pytest.mark.integration

MIB = 1 << 20
RETRY_S = 30.0


class SickFiles(OsFiles):
    """Real files, until a test says what is wrong with the disk."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.write_error: int | None = None
        self.publish_error: int | None = None
        self.read_error: int | None = None
        self.remove_error: int | None = None
        self.takes_s = 0.0
        self.hang: threading.Event | None = None

    def write_new(self, path: Path, parts: Iterable[Buffer]) -> FileFacts:
        self._wait()
        facts = super().write_new(path, parts)
        self._raise(self.write_error, path)
        return facts

    def publish(self, temporary: Path, path: Path) -> None:
        self._raise(self.publish_error, path)
        super().publish(temporary, path)

    def read(self, path: Path, offset: int, num_bytes: int) -> bytearray:
        self._wait()
        self._raise(self.read_error, path)
        return super().read(path, offset, num_bytes)

    def remove(self, path: Path) -> None:
        self._raise(self.remove_error, path)
        super().remove(path)

    def _wait(self) -> None:
        self._clock.now += self.takes_s
        if self.hang is not None:
            assert self.hang.wait(20)

    @staticmethod
    def _raise(number: int | None, path: Path) -> None:
        if number is not None:
            raise OSError(number, errno.errorcode[number], str(path))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_tier(clock: Clock) -> Iterator[Callable[..., DiskTier]]:
    made: list[DiskTier] = []

    def make(directory: Path, files: OsFiles | None = None, limit_bytes: int = 64 * MIB) -> DiskTier:
        options = DiskOptions(directory, limit_bytes, slow_s=2.0, retry_s=RETRY_S)
        tier = DiskTier(options, Sealer(SECRET), threading.RLock(), clock, files)
        tier.open()
        made.append(tier)
        return tier

    yield make
    for tier in made:
        tier.close()


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB that really is full or read-only."""
    directory = tmp_path / "mount"
    directory.mkdir()
    mounted = mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory))
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def mount(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        return subprocess.CompletedProcess(arguments, 1, "", str(error))


def blocks_of(numbers: Iterable[int], payload_bytes: int = 2000) -> list[BlockRecord]:
    return [block(number, payload_bytes) for number in numbers]


def test_a_full_disk_is_read_on_and_written_again_when_there_is_room(
    tmpfs: Path, clock: Clock, make_tier: Callable[..., DiskTier]
) -> None:
    tier = make_tier(tmpfs)
    (tmpfs / "foreign").write_bytes(bytes(600_000))
    assert tier.write(blocks_of([1], 300_000)) == 1
    assert tier.write(blocks_of([2], 300_000)) == 0
    status = tier.status()
    assert status.state is TierState.READ_ONLY
    assert "No space left on device" in status.reason
    assert not list(tmpfs.glob("*.tmp"))
    assert same(tier.read(block(1).id), block(1, 300_000))
    (tmpfs / "foreign").unlink()
    assert tier.write(blocks_of([2], 300_000)) == 0  # left alone for a while
    clock.now += RETRY_S
    assert tier.write(blocks_of([2], 300_000)) == 1
    assert tier.status().state is TierState.SERVING


def test_a_disk_that_turns_read_only_still_serves(
    tmpfs: Path, clock: Clock, make_tier: Callable[..., DiskTier]
) -> None:
    tier = make_tier(tmpfs)
    tier.write(blocks_of([1]))
    tier.close()  # a lock that is open for writing keeps the file system writable
    assert mount("-o", "remount,ro", str(tmpfs)).returncode == 0
    again = make_tier(tmpfs)
    assert same(again.read(block(1).id), block(1))
    assert again.write(blocks_of([2])) == 0
    assert again.status().state is TierState.READ_ONLY
    assert "Read-only" in again.status().reason


def test_a_directory_that_cannot_be_had_is_tried_again(
    tmp_path: Path, clock: Clock, make_tier: Callable[..., DiskTier]
) -> None:
    (tmp_path / "file").write_text("in the way")
    tier = make_tier(tmp_path / "file" / "kv")
    assert tier.status().state is TierState.OFF
    assert tier.write(blocks_of([1])) == 0
    assert not tier.is_due
    (tmp_path / "file").unlink()
    clock.now += RETRY_S
    assert tier.is_due
    assert tier.open()
    assert tier.write(blocks_of([1])) == 1


@pytest.mark.parametrize("at", ["write_error", "publish_error"])
def test_a_write_that_fails_leaves_nothing_behind(
    tmp_path: Path, clock: Clock, make_tier: Callable[..., DiskTier], at: str
) -> None:
    files = SickFiles(clock)
    tier = make_tier(tmp_path, files)
    setattr(files, at, errno.EIO)
    assert tier.write(blocks_of([1])) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["LOCK"]
    assert tier.used_bytes == 4096
    assert (tier.counters.write_failures, tier.counters.not_written) == (1, 1)
    assert tier.read(block(1).id) is None
    setattr(files, at, None)
    clock.now += RETRY_S
    assert tier.write(blocks_of([1])) == 1


def test_a_read_that_fails_is_a_miss_and_the_record_is_dropped(
    tmp_path: Path, clock: Clock, make_tier: Callable[..., DiskTier]
) -> None:
    files = SickFiles(clock)
    tier = make_tier(tmp_path, files)
    tier.write(blocks_of([1, 2]))
    files.read_error = errno.EIO
    assert tier.read(block(1).id) is None
    files.read_error = None
    assert tier.read(block(1).id) is None
    assert same(tier.read(block(2).id), block(2))
    assert tier.counters.read_failures == 1
    assert tier.status().state is TierState.SERVING


def test_a_segment_without_readable_records_goes(
    tmp_path: Path, clock: Clock, make_tier: Callable[..., DiskTier]
) -> None:
    files = SickFiles(clock)
    tier = make_tier(tmp_path, files)
    tier.write(blocks_of([1]))
    files.read_error = errno.EIO
    tier.read(block(1).id)
    assert not list(tmp_path.glob("*.kv"))
    assert tier.used_bytes == 4096


def test_what_cannot_be_deleted_stays_counted(
    tmp_path: Path, clock: Clock, make_tier: Callable[..., DiskTier]
) -> None:
    files = SickFiles(clock)
    tier = make_tier(tmp_path, files, limit_bytes=2 * 4096)
    tier.write(blocks_of([1]))
    files.remove_error = errno.EIO
    assert tier.write(blocks_of([2])) == 0
    assert tier.used_bytes == 2 * 4096
    assert tier.status().state is TierState.READ_ONLY
    files.remove_error = None
    clock.now += RETRY_S
    assert tier.write(blocks_of([2])) == 1
    assert tier.used_bytes == 2 * 4096


def test_a_slow_disk_is_left_alone_for_a_while(
    tmp_path: Path, clock: Clock, make_tier: Callable[..., DiskTier]
) -> None:
    files = SickFiles(clock)
    tier = make_tier(tmp_path, files)
    tier.write(blocks_of([1]))
    files.takes_s = 3.0
    assert tier.read(block(1).id) is not None
    files.takes_s = 0.0
    assert tier.status().state is TierState.DEGRADED
    assert list(tier.under(key(1))) == []
    assert tier.write(blocks_of([2])) == 0
    clock.now += RETRY_S
    assert list(tier.under(key(1))) == [block(1).id]
    assert tier.write(blocks_of([2])) == 1
    assert tier.status().state is TierState.SERVING


LIMITED = """
import resource, signal, sys, threading, time
from pathlib import Path
from kvtransfer.tiers.disk_types import DiskOptions
from kvtransfer.tiers.records import Sealer
from kvtransfer.tiers.segments import DiskTier
from tests.tier_blocks import SECRET, block

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
tier = DiskTier(DiskOptions(Path(sys.argv[1]), 64 << 20), Sealer(SECRET), threading.RLock(), time.monotonic)
assert tier.open()
print(tier.write([block(1, 50_000)]), tier.write([block(2, 150_000)]), tier.status().reason)
"""


def test_a_file_that_may_not_grow_is_not_published(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: the kernel writes a part and then fails, as a disk does that fills up in mid-file."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stdout.startswith("1 0 File too large"), done.stderr
    assert len(list(tmp_path.iterdir())) == 2  # the lock and the first segment


# ---- the store around it


@pytest.fixture
def make_store(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., NodeStore]]:
    made: list[NodeStore] = []

    def make(files: OsFiles | None = None, **options: int) -> NodeStore:
        disk = DiskOptions(tmp_path / "kv", 64 * MIB, slow_s=0.2, retry_s=RETRY_S)
        store = NodeStore(StoreOptions(disk=disk, **{"host_bytes": MIB, **options}), SECRET, clock, files)
        store.start()
        assert store.wait_ready(10)
        made.append(store)
        return store

    yield make
    for store in made:
        store.close(5)


def fetch(numbers: Iterable[int]) -> FetchRequest:
    keys = tuple(map(key, numbers))
    lease = LeaseRef(bytes(16), 1, 0, 0)
    return FetchRequest(lease, keys, 0, SHAPE.block_tokens, SHAPE.layout, SHAPE.dtypes, 0, (("raw", 1),))


def test_writes_beyond_the_queue_are_dropped_and_counted_and_nobody_waits(
    clock: Clock, make_store: Callable[..., NodeStore]
) -> None:
    files = SickFiles(clock)
    store = make_store(files, queue_bytes=10_000)
    files.hang = threading.Event()
    for number in range(8):
        store.publish(blocks_of([number]))
    stats = store.stats()
    assert (stats.queued_bytes, stats.dropped_records, stats.dropped_bytes) == (10_000, 3, 6000)
    assert stats.tiers[0].num_records == 8  # all of them are in memory
    files.hang.set()
    assert store.write_back is not None
    assert store.write_back.drain(10)
    assert store.stats().tiers[1].num_records == 5


def test_a_read_that_hangs_ends_the_fetch_and_not_the_store(
    clock: Clock, make_store: Callable[..., NodeStore]
) -> None:
    files = SickFiles(clock)
    store = make_store(files, host_bytes=0)
    store.publish(blocks_of([1, 2]))
    assert store.write_back is not None
    assert store.write_back.drain(10)
    assert store.lookup([key(1), key(2)], 0, SHAPE).num_blocks == 2
    run = store.open(fetch([1, 2]))
    files.hang = threading.Event()
    with pytest.raises(SourceRefused, match="READ_FAILED"):
        list(run.pieces())
    run.close()
    clock.now += 1  # the operation that hangs is beyond the limit
    assert store.lookup([key(1)], 0, SHAPE).num_blocks == 0
    assert store.stats().tiers[1].state is TierState.DEGRADED
    store.publish(blocks_of([3]))
    files.hang.set()


def test_a_block_that_is_damaged_behind_the_stores_back_is_refused_and_then_a_miss(
    tmp_path: Path, make_store: Callable[..., NodeStore]
) -> None:
    store = make_store(host_bytes=0)
    store.publish(blocks_of([1, 2, 3]))
    assert store.write_back is not None
    assert store.write_back.drain(10)
    (path,) = (tmp_path / "kv").glob("*.kv")
    data = bytearray(path.read_bytes())
    data[-2000 - 1500] ^= 1  # in the second of the three
    path.write_bytes(data)
    run = store.open(fetch([1, 2, 3]))
    pieces = []
    with pytest.raises(SourceRefused, match="READ_FAILED"):
        for piece in run.pieces():
            pieces.append(bytes(piece.payload))
    run.close()
    assert pieces == [bytes(part.payload) for part in block(1).parts]
    assert store.lookup([key(1), key(2), key(3)], 0, SHAPE).num_blocks == 1
    assert list(store.verify())[-1].bad == 0  # it is gone already
    wait_until(lambda: store.stats().tiers[1].num_pinned == 0, "the third block, read ahead, to be let go")
