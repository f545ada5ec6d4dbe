"""What a worker tells routers of its cache's size and of its links."""

from __future__ import annotations

import pytest

from headrace.v1 import worker_pb2
from kvtransfer.layouts import CacheLayout, Field, Paged, Plane, Window
from kvtransfer.load_speeds import LoadSpeeds
from worker.facts import MAX_REPORTED_LINKS, bytes_per_token, link_speeds
from worker.prefix_sources import pushes_to

pytestmark = pytest.mark.unit

MIB = 1 << 20


def _plane(name: str, kind: Paged | Window) -> Plane:
    return Plane(name, layers=3, kind=kind, heads=2, fields=(Field("k", 8, "bfloat16"),))


def test_a_token_takes_what_its_paged_entries_take_and_windows_take_nothing() -> None:
    keys, sparse = _plane("keys", Paged(1)), _plane("sparse", Paged(128))
    assert bytes_per_token(CacheLayout((keys,), 16)) == 3 * 2 * 16
    assert bytes_per_token(CacheLayout((keys, _plane("window", Window(128, 1))), 16)) == 96
    assert bytes_per_token(CacheLayout((keys, _plane("tail", Window(128, 128))), 16)) == 96
    assert bytes_per_token(CacheLayout((keys, sparse), 128)) == 97  # three quarters of a byte, rounded up


def test_links_are_pushes_by_address_those_used_last_where_there_are_many() -> None:
    now = [0.0]
    speeds = LoadSpeeds(lambda: now[0])
    speeds.note_load("10.0.0.1:5", 2 * MIB, 1.0)  # a fetch from there is another direction
    for number in range(MAX_REPORTED_LINKS + 1):
        now[0] += 1.0
        speeds.note_load(pushes_to(f"10.0.0.2:{number}"), 2 * MIB, 1.0)
    links = link_speeds(speeds)
    assert len(links) == MAX_REPORTED_LINKS
    assert links[0] == worker_pb2.LinkSpeed(
        kv_address=f"10.0.0.2:{MAX_REPORTED_LINKS}", bytes_per_s=2 * MIB, fixed_s=0.0
    )
    assert "10.0.0.2:0" not in {link.kv_address for link in links}
