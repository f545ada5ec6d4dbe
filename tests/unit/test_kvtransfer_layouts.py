"""Layouts: which entries are live, and how a token range is cut into pieces."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.coverage import find_gap, leading_tokens
from kvtransfer.layouts import (
    CacheLayout,
    Field,
    Paged,
    Piece,
    Plane,
    Window,
    pieces_for,
    window_pieces_for,
)

pytestmark = pytest.mark.unit

GQA = CacheLayout(
    (
        Plane("k", 30, Paged(1), 3, (Field("k", 64, "float32"),)),
        Plane("v", 30, Paged(1), 3, (Field("v", 64, "float32"),)),
    ),
    block_tokens=16,
)


@pytest.mark.parametrize(
    ("window", "num_tokens", "live"),
    [
        (Window(128, 1), 0, (0, 0)),
        (Window(128, 1), 100, (0, 100)),
        (Window(128, 1), 1000, (873, 1000)),
        (Window(8, 4), 3, (0, 3)),
        (Window(8, 4), 4, (0, 4)),
        (Window(8, 4), 9, (4, 9)),
        (Window(8, 4), 12, (8, 12)),
        (Window(128, 128), 256, (256, 256)),
        (Window(128, 128), 300, (256, 300)),
        (Window(1, 1), 7, (7, 7)),
    ],
)
def test_live_rows_of_a_window(window: Window, num_tokens: int, live: tuple[int, int]) -> None:
    plane = Plane("w", 1, window, 1, (Field("x", 1, "float32"),))
    assert plane.live(num_tokens) == range(*live)


def test_an_entry_of_several_tokens_is_live_once_all_of_them_are() -> None:
    plane = Plane("latent", 1, Paged(4), 1, (Field("x", 1, "float32"),))
    assert [len(plane.live(n)) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_bytes_of_a_mixed_record() -> None:
    plane = Plane("v4", 2, Paged(4), 1, (Field("nope", 448, "float8_e4m3"), Field("rope", 64, "bfloat16")))
    layout = CacheLayout((plane,), 64)
    assert plane.record_bytes == 576
    assert layout.entry_bytes("v4") == 576
    assert layout.num_bytes(9) == 2 * 2 * 576
    assert Piece("v4", range(2), range(1), range(1, 3)).num_bytes(layout) == 4 * 576


def test_identity_covers_planes_but_neither_dtypes_nor_the_block_size() -> None:
    narrower = Plane("v", 30, Paged(1), 3, (Field("v", 64, "bfloat16"),))
    wider = Plane("v", 30, Paged(1), 3, (Field("v", 128, "float32"),))
    assert CacheLayout(GQA.planes, 64).identity() == GQA.identity()
    assert CacheLayout((GQA.planes[0], narrower), 16).identity() == GQA.identity()
    assert CacheLayout((GQA.planes[0], wider), 16).identity() != GQA.identity()
    assert CacheLayout(GQA.planes[::-1], 16).identity() != GQA.identity()


@pytest.mark.parametrize(
    "piece",
    [
        Piece("k", range(29, 31), range(3), range(4)),
        Piece("k", range(30), range(4), range(4)),
        Piece("k", range(0), range(3), range(4)),
        Piece("k", range(30), range(3), range(4, 4)),
        Piece("k", range(-1, 3), range(3), range(4)),
        Piece("other", range(30), range(3), range(4)),
    ],
)
def test_a_piece_outside_of_the_layout_is_told(piece: Piece) -> None:
    with pytest.raises(ValueError, match="plane"):
        GQA.check(piece)


def test_bad_declarations_are_told() -> None:
    with pytest.raises(ValueError, match="unknown dtype 'float31'; known are float32"):
        Field("x", 1, "float31")
    with pytest.raises(ValueError, match="align"):
        Window(4, 8)
    with pytest.raises(ValueError, match="same name"):
        CacheLayout((GQA.planes[0], GQA.planes[0]), 16)
    with pytest.raises(KeyError, match="no plane 'q'"):
        GQA.plane("q")


fields = st.builds(Field, st.just("x"), st.integers(1, 32), st.sampled_from(["float32", "bfloat16", "uint8"]))
windows = st.tuples(st.integers(1, 40), st.integers(1, 40)).map(lambda p: Window(max(p), min(p)))
kinds = st.one_of(st.builds(Paged, st.sampled_from([1, 2, 4, 16])), windows)
planes = st.builds(
    Plane, st.uuids().map(str), st.integers(1, 8), kinds, st.integers(1, 4), st.tuples(fields, fields)
)
layouts = st.lists(planes, min_size=1, max_size=4).map(lambda several: CacheLayout(tuple(several), 16))


@settings(deadline=None, max_examples=60)
@given(layouts, st.lists(st.integers(0, 80), min_size=1, max_size=5), st.integers(1, 4000))
def test_pieces_of_consecutive_chunks_tile_the_sequence(
    layout: CacheLayout, chunks: list[int], target: int
) -> None:
    pieces: list[Piece] = []
    done = 0
    for chunk in chunks:
        pieces += pieces_for(layout, range(done, done + chunk), target)
        done += chunk
    pieces += window_pieces_for(layout, done, target)

    assert find_gap(layout, pieces, 0, done) is None
    assert sum(piece.num_bytes(layout) for piece in pieces) == layout.num_bytes(done)
    for piece in pieces:
        layout.check(piece)
        one_entry = layout.entry_bytes(piece.plane)
        assert piece.num_bytes(layout) <= max(target, one_entry)


def test_a_chunk_is_cut_into_pieces_of_about_two_mebibytes() -> None:
    pieces = pieces_for(GQA, range(512))
    sizes = [piece.num_bytes(GQA) for piece in pieces]
    assert sum(sizes) == GQA.num_bytes(512)
    assert (1 << 20) < min(sizes) <= max(sizes) <= 2 << 20


def test_gaps_and_overlaps_are_named() -> None:
    pieces = pieces_for(GQA, range(512))
    assert find_gap(GQA, pieces, 0, 512) is None
    assert "did not land" in str(find_gap(GQA, pieces[1:], 0, 512))
    assert "did not land" in str(find_gap(GQA, pieces, 0, 513))
    assert "beyond the sequence" in str(find_gap(GQA, pieces, 0, 511))
    assert "not asked for" in str(find_gap(GQA, pieces, 16, 512))
    assert "landed twice" in str(find_gap(GQA, [*pieces, pieces[3]], 0, 512))
    assert find_gap(GQA, pieces_for(GQA, range(64, 512)), 64, 512) is None
    assert find_gap(GQA, [], 512, 512) is None


@settings(max_examples=100, deadline=None)
@given(
    start=st.integers(0, 40),
    length=st.integers(0, 80),
    align_tokens=st.sampled_from([4, 8, 16, 64]),
    target_bytes=st.integers(100, 40_000),
)
def test_aligned_pieces_tile_and_cross_no_block(
    start: int, length: int, align_tokens: int, target_bytes: int
) -> None:
    planes = (
        Plane("k", 3, Paged(1), 2, (Field("k", 8, "float32"),)),
        Plane("latent", 3, Paged(4), 1, (Field("x", 8, "float32"),)),
    )
    layout = CacheLayout(planes, 16)
    start -= start % 4
    pieces = pieces_for(layout, range(start, start + length), target_bytes, align_tokens=align_tokens)
    assert find_gap(layout, pieces, start, start + length) is None
    for piece in pieces:
        per_entry = layout.plane(piece.plane).kind.tokens_per_entry  # type: ignore[union-attr]
        first, last = piece.entries.start * per_entry, (piece.entries.stop - 1) * per_entry
        assert first // align_tokens == last // align_tokens


def test_pieces_cannot_be_aligned_within_an_entry() -> None:
    layout = CacheLayout((Plane("latent", 3, Paged(4), 1, (Field("x", 8, "float32"),)),), 16)
    with pytest.raises(ValueError, match="no multiple"):
        pieces_for(layout, range(16), align_tokens=6)


@settings(deadline=None, max_examples=100)
@given(layouts, st.integers(0, 40), st.integers(1, 60), st.integers(1, 2000), st.data())
def test_leading_tokens_are_those_of_which_every_part_landed(
    layout: CacheLayout, start: int, length: int, target: int, data: st.DataObject
) -> None:
    """Against the set of all (plane, layer, head, entry) that landed."""
    start, num_tokens = start // 16 * 16, start // 16 * 16 + length
    pieces = pieces_for(layout, range(start, num_tokens), target)
    landed = [piece for piece in pieces if data.draw(st.booleans())]
    there = {
        (piece.plane, layer, head, entry)
        for piece in landed
        for layer in piece.layers
        for head in piece.heads
        for entry in piece.entries
    }
    expected = num_tokens
    for plane in layout.planes:
        if isinstance(plane.kind, Paged):
            size = plane.kind.tokens_per_entry
            entries = start // size
            while all(
                (plane.name, layer, head, entries) in there
                for layer in range(plane.layers)
                for head in range(plane.heads)
            ):
                entries += 1
            expected = min(expected, max(start, entries * size))
    assert leading_tokens(layout, landed, start, num_tokens) == expected


boxes = st.builds(
    lambda layers, heads, entries: Piece("k", range(*layers), range(*heads), range(*entries)),
    *[
        st.tuples(st.integers(0, 4), st.integers(1, 3)).map(lambda pair: (pair[0], pair[0] + pair[1]))
        for _ in range(3)
    ],
)


def records(piece: Piece) -> set[tuple[int, int, int]]:
    return {(layer, head, entry) for layer in piece.layers for head in piece.heads for entry in piece.entries}


@given(boxes, boxes)
def test_a_box_without_another_is_what_is_left_of_it(one: Piece, other: Piece) -> None:
    rest = one.without(other)
    assert set().union(*(records(piece) for piece in rest)) == records(one) - records(other)
    assert sum(len(records(piece)) for piece in rest) == len(records(one) - records(other))
    assert one.overlaps(other) == bool(records(one) & records(other))
