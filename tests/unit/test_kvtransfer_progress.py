"""Whatever is reported in whatever order, every record of every position is cut exactly once."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.layouts import CacheLayout, Field, Paged, Piece, Plane
from kvtransfer.progress import PushProgress

pytestmark = pytest.mark.unit

LAYERS = 5


def layout(*layers: int) -> CacheLayout:
    planes = [Plane(f"p{i}", n, Paged(1), 2, (Field("f", 4, "float32"),)) for i, n in enumerate(layers)]
    return CacheLayout(tuple(planes), 8)


def records(pieces: list[Piece]) -> Counter[tuple[str, int, int]]:
    return Counter((p.plane, layer, entry) for p in pieces for layer in p.layers for entry in p.entries)


def whole(planes: tuple[int, ...], start: int, end: int) -> Counter[tuple[str, int, int]]:
    return Counter(
        (f"p{i}", layer, entry)
        for i, n in enumerate(planes)
        for layer in range(n)
        for entry in range(start, end)
    )


@settings(max_examples=200, deadline=None)
@given(data=st.data(), start=st.integers(0, 8), frame_bytes=st.integers(32, 600))
def test_every_record_is_cut_exactly_once_and_never_before_it_is_ready(
    data: st.DataObject, start: int, frame_bytes: int
) -> None:
    progress = PushProgress(layout(LAYERS, LAYERS), start, frame_bytes)
    cut: Counter[tuple[str, int, int]] = Counter()
    end = start
    for size in data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5)):
        begin, end = end, end + size
        most_layers = 0
        for num_layers in data.draw(st.lists(st.integers(1, LAYERS - 1), max_size=4)):
            progress.advance(end, num_layers)
            most_layers = max(most_layers, num_layers)
            if data.draw(st.booleans()):
                taken = records(progress.take())
                assert all(
                    entry < begin or (entry < end and layer < most_layers) for _, layer, entry in taken
                )
                cut += taken
        assert progress.num_ready == begin
        progress.advance(end)
        if data.draw(st.booleans()):
            cut += records(progress.take())
    cut += records(progress.take())
    assert cut == whole((LAYERS, LAYERS), start, end)
    assert progress.num_cut == end


def test_layers_of_a_chunk_are_cut_while_the_rest_is_computed() -> None:
    progress = PushProgress(layout(LAYERS), 0, 1 << 20)
    progress.advance(8, 2)
    assert records(progress.take()) == Counter(
        {("p0", layer, entry): 1 for layer in range(2) for entry in range(8)}
    )
    assert (progress.num_ready, progress.num_cut) == (0, 0)
    progress.advance(8, 4)
    assert {layer for _, layer, _ in records(progress.take())} == {2, 3}
    progress.advance(8)
    assert {layer for _, layer, _ in records(progress.take())} == {4}


def test_old_news_is_none() -> None:
    progress = PushProgress(layout(LAYERS), 16, 1 << 20)
    assert not progress.advance(16)
    assert not progress.advance(12, 3)
    assert progress.advance(24, 3)
    assert not progress.advance(24, 3)
    assert progress.advance(24)
    assert not progress.advance(24, 4)


def test_planes_of_unequal_depth_wait_for_the_whole_chunk() -> None:
    progress = PushProgress(layout(5, 3), 0, 1 << 20)
    assert not progress.advance(8, 3)
    assert progress.take() == []
    progress.advance(8)
    assert records(progress.take()) == whole((5, 3), 0, 8)


def test_no_piece_crosses_a_block_where_that_is_asked_for() -> None:
    progress = PushProgress(layout(LAYERS), 3, 1 << 20, align_tokens=8)
    progress.advance(21)
    pieces = progress.take()
    assert sorted({(p.entries.start, p.entries.stop) for p in pieces}) == [(3, 8), (8, 16), (16, 21)]
    assert records(pieces) == whole((LAYERS,), 3, 21)
