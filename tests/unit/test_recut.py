"""A cache cut over ranks is whole: every layer and head of every plane is somewhere, and once."""

from __future__ import annotations

from typing import cast

import pytest

from kvtransfer.cache_store import CacheStore
from kvtransfer.layouts import CacheLayout, Field, Paged, Plane
from kvtransfer.recut import Cut, ShardedStore

pytestmark = pytest.mark.unit

NOBODY = cast("CacheStore", None)  # no store is called while the cuts are checked


def plane(name: str, layers: int, heads: int) -> Plane:
    return Plane(name, layers, Paged(1), heads, (Field(name, 8, "float32"),))


LAYOUT = CacheLayout((plane("k", 6, 4), plane("v", 6, 4)), 16)
WITH_LATENT = CacheLayout((plane("k", 6, 4), plane("latent", 6, 1)), 16)


def cuts(*parts: tuple[range, range]) -> list[tuple[Cut, CacheStore]]:
    return [(Cut(layers, heads), NOBODY) for layers, heads in parts]


@pytest.mark.parametrize("layout", [LAYOUT, WITH_LATENT])
@pytest.mark.parametrize(
    "parts",
    [
        [(range(6), range(4))],
        [(range(6), range(2)), (range(6), range(2, 4))],
        [(range(6), range(3, 4)), (range(6), range(3))],
        [(range(2), range(4)), (range(2, 6), range(4))],
        [(range(layer, layer + 3), range(head, head + 2)) for layer in (0, 3) for head in (0, 2)],
    ],
)
def test_cuts_that_tile_every_plane_are_taken(layout: CacheLayout, parts: list[tuple[range, range]]) -> None:
    ShardedStore(layout, cuts(*parts))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "'k': no shard holds 24 of its 6 layers × 4 heads"),
        ([(range(6), range(3))], "'k': no shard holds 6 of its 6 layers × 4 heads"),
        ([(range(5), range(4))], "'k': no shard holds 4 of its"),
        ([(range(6), range(3)), (range(6), range(2, 4))], "shards 0 and 1 both hold a part of plane 'k'"),
        ([(range(6), range(4)), (range(6), range(4))], "shards 0 and 1 both hold a part of plane 'k'"),
        ([(range(6), range(5))], r"shard 0: heads \[0, 5\) of plane 'k', which has 4"),
        ([(range(7), range(4))], r"shard 0: layers \[0, 7\) of plane 'k', which has 6"),
        ([(range(6), range(0))], r"shard 0: heads \[0, 0\)"),
        ([(range(0, 6, 2), range(4))], "shard 0: layers"),
    ],
)
def test_cuts_that_do_not_are_refused(parts: list[tuple[range, range]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardedStore(LAYOUT, cuts(*parts))


def test_a_replicated_plane_may_be_held_repeatedly_but_not_in_overlapping_layers() -> None:
    latent = CacheLayout((plane("latent", 6, 1),), 16)
    ShardedStore(latent, cuts((range(6), range(2)), (range(6), range(2, 4))))
    with pytest.raises(ValueError, match="shards 0 and 1 both hold a part of plane 'latent'"):
        ShardedStore(latent, cuts((range(4), range(2)), (range(2, 6), range(2, 4))))
