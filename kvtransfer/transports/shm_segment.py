"""Segment files: memory that two processes of one user on one host both map, and the proof that they are that.

A segment is one file in a directory that only its user may enter:

    offset  size  content
    0       8     magic "HRSLOT1\\0"
    8       16    token: random, anew for every stream that the segment serves; zero once it serves none
    24      4     number of slots, unsigned little endian
    28      8     bytes of a slot, unsigned little endian, a multiple of the page size
    4096    ...   the slots

Both ends hold a shared lock on the file (flock) as long as they map it. So a file whose lock can be taken
exclusively belongs to nobody alive, and the owner of a retired one learns when its sender has let go of it.
The kernel drops a lock only after the mapping, whatever the process dies of.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
import stat
import struct
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from kvtransfer.transports.carriers import CarrierFailed
from kvtransfer.transports.memory_room import room_in

if TYPE_CHECKING:
    from collections.abc import Mapping

    ByteArray = np.ndarray[Any, np.dtype[np.uint8]]

PAGE_BYTES = 4096
TOKEN_BYTES = 16
MAX_SLOTS = 1024
MAX_SLOT_BYTES = 64 << 20

_MAGIC = b"HRSLOT1\0"
_HEAD = struct.Struct(f"<8s{TOKEN_BYTES}sIQ")
_TOKEN_AT = 8
_NAME = re.compile(r"slots-[0-9a-f-]{36}-[0-9]+-[0-9a-f]{16}")
_NEW_NAME_TRIES = 4
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Of this host's running kernel: two processes with the same one are on one host. Raises CarrierFailed."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError as error:
        raise CarrierFailed(f"this host does not tell its boot id: {error}") from None


def segment_bytes(num_slots: int, slot_bytes: int) -> int:
    """Size of the whole file."""
    return PAGE_BYTES + num_slots * slot_bytes


@dataclass(frozen=True, slots=True)
class SegmentOffer:
    """Where a segment lies and how it is known. `slot_bytes` is a multiple of PAGE_BYTES."""

    boot: str
    directory: str
    name: str
    token: bytes
    num_slots: int
    slot_bytes: int

    def pack(self) -> dict[str, Any]:
        return {
            "kind": "shm",
            "boot": self.boot,
            "dir": self.directory,
            "name": self.name,
            "token": self.token,
            "slots": self.num_slots,
            "bytes": self.slot_bytes,
        }

    @staticmethod
    def parse(offer: Mapping[str, Any]) -> SegmentOffer:
        """Raises CarrierFailed for anything that `pack` does not give."""
        texts = [offer.get(key) for key in ("boot", "dir", "name")]
        token, num_slots, slot_bytes = (offer.get(key) for key in ("token", "slots", "bytes"))
        if (
            not all(isinstance(text, str) for text in texts)
            or not isinstance(token, bytes)
            or len(token) != TOKEN_BYTES
            or type(num_slots) is not int
            or type(slot_bytes) is not int
            or not 0 < num_slots <= MAX_SLOTS
            or not 0 < slot_bytes <= MAX_SLOT_BYTES
            or slot_bytes % PAGE_BYTES
        ):
            raise CarrierFailed("the offer of shared memory is malformed")
        boot, directory, name = cast("list[str]", texts)
        return SegmentOffer(boot, directory, name, token, num_slots, slot_bytes)


class Mapped:
    """A mapped segment, at either end. The memory stays as long as any view of it does."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        # All pages at once: one call instead of two thousand faults while the first frames are written.
        # The mapping keeps a duplicate of `fd`, and with it the lock, until it is gone.
        mapping = mmap.mmap(fd, num_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        # Not torch.frombuffer: its tensors do not keep the mapping from being closed under them.
        self._bytes: ByteArray | None = np.frombuffer(mapping, np.uint8)
        self._mapping: mmap.mmap | None = mapping

    @property
    def array(self) -> ByteArray:
        """uint8 of the whole file. Raises CarrierFailed once it is closed."""
        if self._bytes is None:
            raise CarrierFailed("the shared memory is closed")
        return self._bytes

    @property
    def token(self) -> bytes:
        return self.array[_TOKEN_AT : _TOKEN_AT + TOKEN_BYTES].tobytes()

    def write_head(self, token: bytes, num_slots: int, slot_bytes: int) -> None:
        head = _HEAD.pack(_MAGIC, token, num_slots, slot_bytes)
        self.array[:PAGE_BYTES] = 0
        self.array[: len(head)] = np.frombuffer(head, np.uint8)

    def has_head(self, token: bytes, num_slots: int, slot_bytes: int) -> bool:
        return self.array[: _HEAD.size].tobytes() == _HEAD.pack(_MAGIC, token, num_slots, slot_bytes)

    def close(self) -> None:
        """Unmaps now, or, where views are left, when the last of them goes. Idempotent."""
        self._bytes = None
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            with suppress(BufferError):
                mapping.close()


class Segment:
    """A segment and its file, as the owner holds them."""

    def __init__(self, directory: SegmentDirectory, name: str, fd: int, num_bytes: int) -> None:
        self.name = name
        self.num_bytes = num_bytes
        self.memory = Mapped(fd, num_bytes)
        self._directory = directory
        self._fd = fd

    def retire(self) -> None:
        """Nobody else can open it any more, and this end has no use for it; a sender may still write into it."""
        self.memory.array[_TOKEN_AT : _TOKEN_AT + TOKEN_BYTES] = 0
        self._directory.unlink(self.name)
        self.memory.close()

    def is_free(self) -> bool:
        """Of a retired one: whether nobody else maps it any more. It is gone for good then."""
        if self._fd < 0:
            return True
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        os.close(self._fd)
        self._fd = -1
        return True


class SegmentDirectory:
    """A directory of segments, made with mode 0700 where it is missing. Raises CarrierFailed where it cannot be
    used, or is not this user's alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise CarrierFailed(f"{path} cannot be made: {error}") from None
        self._fd = _open_directory(path)
        weakref.finalize(self, os.close, self._fd)  # not before its last segment

    def room(self) -> int:
        """Bytes that new segments may take here."""
        return room_in(self._fd)

    def create(self, num_bytes: int) -> Segment:
        """A new segment with all of its memory behind it. Raises CarrierFailed."""
        self.sweep()
        room = self.room()
        if num_bytes > room:
            raise CarrierFailed(f"{self.path} has room for {max(0, room)} bytes, a segment takes {num_bytes}")
        for _ in range(_NEW_NAME_TRIES):
            name = f"slots-{boot_id()}-{os.getpid()}-{secrets.token_hex(8)}"
            try:
                segment = self._create(name, num_bytes)
            except OSError as error:
                raise CarrierFailed(f"a segment of {num_bytes} bytes in {self.path}: {error}") from None
            if segment is not None:
                return segment
        raise CarrierFailed(f"{self.path}: every new segment was swept away before it could be locked")

    def sweep(self) -> int:
        """Removes the segments of owners that are gone; gives their number."""
        names = [name for name in os.listdir(self._fd) if _NAME.fullmatch(name)]  # noqa: PTH208 - takes no fd
        return sum(self._remove_if_stale(name) for name in names)

    def unlink(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    def _create(self, name: str, num_bytes: int) -> Segment | None:
        """None where another process's sweep was faster than the lock."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=self._fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink == 0:
                raise BlockingIOError
            os.fchmod(fd, 0o600)  # whatever the umask is
            # Memory that is promised and not there would kill whoever touches it (SIGBUS).
            os.posix_fallocate(fd, 0, num_bytes)
            return Segment(self, name, fd, num_bytes)
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            self.unlink(name)
            os.close(fd)
            raise

    def _remove_if_stale(self, name: str) -> bool:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(name, flags, dir_fd=self._fd)
        except OSError:  # gone by now, a link, or somebody else's: not ours to remove
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_uid != os.geteuid():
                return False
            self.unlink(name)
            return True
        except BlockingIOError:  # its owner lives
            return False
        finally:
            os.close(fd)


def open_segment(offer: SegmentOffer) -> Mapped:
    """The sender's end: maps what is offered when it is what it says. Raises CarrierFailed."""
    if offer.boot != boot_id():
        raise CarrierFailed("the offered shared memory is another host's")
    if not _NAME.fullmatch(offer.name):
        raise CarrierFailed(f"{offer.name!r} is not the name of a segment")
    directory = _open_directory(Path(offer.directory))
    try:
        fd = os.open(offer.name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:  # another container's file system, or the segment is retired
        raise CarrierFailed(f"{offer.directory}/{offer.name} cannot be opened: {error}") from None
    finally:
        os.close(directory)
    try:
        return _map_checked(fd, offer)
    finally:
        os.close(fd)


def _map_checked(fd: int, offer: SegmentOffer) -> Mapped:
    num_bytes = segment_bytes(offer.num_slots, offer.slot_bytes)
    _check_file(os.fstat(fd), offer.name, num_bytes)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CarrierFailed(f"{offer.name} has lost its owner") from None
    # Again under the lock: what could be swept away before it no longer can.
    _check_file(os.fstat(fd), offer.name, num_bytes)
    memory = Mapped(fd, num_bytes)
    if not memory.has_head(offer.token, offer.num_slots, offer.slot_bytes):
        memory.close()
        raise CarrierFailed(f"{offer.name} does not carry the offered token")
    return memory


def _check_file(found: os.stat_result, name: str, num_bytes: int) -> None:
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        raise CarrierFailed(f"{name} is not one regular file with one name")
    if found.st_uid != os.geteuid():
        raise CarrierFailed(f"{name} belongs to user {found.st_uid}, this process is {os.geteuid()}")
    if stat.S_IMODE(found.st_mode) != 0o600:
        raise CarrierFailed(f"{name} has mode {stat.S_IMODE(found.st_mode):04o}, not 0600")
    if found.st_size != num_bytes:
        raise CarrierFailed(f"{name} has {found.st_size} bytes, not {num_bytes}")


def _open_directory(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise CarrierFailed(f"{path} cannot be opened as a directory: {error}") from None
    found = os.fstat(fd)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        os.close(fd)
        text = f"{path} must belong to user {os.geteuid()} with mode 0700"
        raise CarrierFailed(f"{text}, not to {found.st_uid} with {stat.S_IMODE(found.st_mode):04o}")
    return fd
