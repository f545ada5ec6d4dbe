"""Offers of landing slots as bytes of strangers, and how much memory they may take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvtransfer.transports import memory_room
from kvtransfer.transports.carriers import CarrierFailed
from kvtransfer.transports.shm_segment import MAX_SLOT_BYTES, PAGE_BYTES, SegmentOffer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit

OFFER = SegmentOffer("boot", "/dev/shm/headrace-0", "slots-x", b"t" * 16, 8, PAGE_BYTES)


def test_an_offer_is_what_it_was_after_packing() -> None:
    assert SegmentOffer.parse(OFFER.pack()) == OFFER
    assert OFFER.pack()["kind"] == "shm"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("boot", 1),
        ("dir", b"/dev/shm"),
        ("name", None),
        ("token", "t" * 16),
        ("token", b"short"),
        ("slots", 0),
        ("slots", True),
        ("slots", 1 << 40),
        ("bytes", -PAGE_BYTES),
        ("bytes", PAGE_BYTES + 1),
        ("bytes", MAX_SLOT_BYTES + PAGE_BYTES),
        ("bytes", 4096.0),
    ],
)
def test_a_malformed_offer_is_refused(key: str, value: Any) -> None:
    with pytest.raises(CarrierFailed, match="malformed"):
        SegmentOffer.parse({**OFFER.pack(), key: value})
    without = OFFER.pack()
    del without[key]
    with pytest.raises(CarrierFailed, match="malformed"):
        SegmentOffer.parse(without)


def _write(path: Path, **files: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)


def test_room_ends_at_the_tightest_limit_of_any_group_above(tmp_path: Path) -> None:
    _write(
        tmp_path / "a",
        memory__max="1000000\n",
        memory__current="400000\n",
        memory__stat="inactive_file 1000\n",
    )
    _write(tmp_path / "a/b", memory__max="max\n", memory__current="300000\n")
    _write(tmp_path / "a/b/c", memory__max="900000\n", memory__current="100000\n", memory__stat="anon 5\n")
    rooms = list(memory_room.limits_above(tmp_path, "/a/b/c", ("memory.max", "memory.current")))
    assert sorted(rooms) == [601000, 800000]


def test_a_group_that_is_not_visible_here_falls_back_to_those_above_it(tmp_path: Path) -> None:
    _write(tmp_path, memory__max="5000\n", memory__current="2000\n")
    assert list(memory_room.limits_above(tmp_path, "/docker/0123", ("memory.max", "memory.current"))) == [
        3000
    ]


def test_others_keep_a_share_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Space:
        f_frsize, f_blocks, f_bavail = 4096, 16384, 16384  # 64 MiB, as containers have it

    monkeypatch.setattr(memory_room.os, "statvfs", lambda path: Space)
    assert memory_room.room_in(tmp_path) <= 48 << 20
