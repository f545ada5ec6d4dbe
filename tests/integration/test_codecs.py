"""Codecs: what comes back, what it costs at most, and what happens to payloads that are none."""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.codecs import CODECS, Fidelity, UnknownCodec, find_codec, loops, newest_codec
from kvtransfer.codecs.fieldwise import FieldBox
from kvtransfer.codecs.grid import (
    Grid,
    Sharing,
    extremes,
    extremes_anywhere,
    nearest_anywhere,
    or_escapes_anywhere,
)
from kvtransfer.codecs.memory import readable
from kvtransfer.codecs.nibbles import ESCAPE, escape_positions, pack_pairs, unpack_pairs
from kvtransfer.codecs.split import code, code_anywhere, take_apart, take_apart_anywhere
from kvtransfer.layouts import DTYPE_BYTES, Field, Paged, Piece, Plane, Window
from tests.integration.kvtransfer_harness import MIXED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvtransfer.codecs import Codec

pytestmark = pytest.mark.integration

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOSSY = [codec for codec in CODECS if codec.fidelity is not Fidelity.EXACT]
EXACT = [codec for codec in CODECS if codec.fidelity is Fidelity.EXACT]
CODED = [codec for codec in CODECS if codec.name != "raw"]
SCALES = ("channel", "token")
WORST_ERROR = {"int8": 0.01, "fp8": 0.04, "int4": 0.13, "ecsq": 0.2}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in a worker's transfer threads; small tensors lose time when they are shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def named(codec: Codec) -> str:
    return codec.name


def make_plane(
    dtype: str = "bfloat16", heads: int = 2, width: int = 64, scale_along: Any = "channel"
) -> Plane:
    return Plane("k", 8, Paged(1), heads, (Field("k", width, dtype),), scale_along)


def make_piece(plane: Plane, layers: int = 2, entries: int = 96, start: int = 0) -> Piece:
    return Piece(plane.name, range(layers), range(plane.heads), range(start, start + entries))


def keys_like(plane: Plane, piece: Piece, seed: int = 0) -> torch.Tensor:
    """Numbers as keys have them: channels of different mean and size, entries of different size, a first entry
    with outliers. [layers, entries, heads, width] of the plane's dtype."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(piece.layers), len(piece.entries), len(piece.heads), plane.fields[0].width)
    numbers = (
        torch.randn(shape, generator=generator) * torch.randn((1, 1, *shape[2:]), generator=generator).exp()
    )
    numbers += 3 * torch.randn((1, 1, *shape[2:]), generator=generator)
    numbers *= torch.randn((*shape[:2], 1, 1), generator=generator).mul(0.3).exp()
    if piece.entries.start == 0:
        numbers[:, 0] *= 10
    return numbers.to(DTYPES[plane.fields[0].dtype])


def to_bytes(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.contiguous().view(-1).view(torch.uint8)


def round_trip(codec: Codec, numbers: torch.Tensor, plane: Plane, piece: Piece) -> torch.Tensor:
    payload = codec.encode(to_bytes(numbers), plane, piece)
    return codec.decode(payload, plane, piece).view(numbers.dtype).view(numbers.shape)


def error(result: torch.Tensor, numbers: torch.Tensor) -> float:
    """Root of the relative squared error."""
    difference = result.double() - numbers.double()
    return float(difference.norm() / numbers.double().norm())


# --- the registry -----------------------------------------------------------------------------------------


def test_every_codec_is_found_by_its_name_and_version() -> None:
    for codec in CODECS:
        assert find_codec(codec.name, codec.version) is codec
        assert newest_codec(codec.name) is codec


def test_unknown_codecs_are_refused_with_the_known_ones_named() -> None:
    with pytest.raises(UnknownCodec, match=r"'int8 version 99'.*split 1"):
        find_codec("int8", 99)


def test_every_class_of_fidelity_has_a_codec_that_makes_bytes_fewer() -> None:
    assert {codec.fidelity for codec in CODED} == set(Fidelity)


# --- what comes back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", EXACT, ids=named)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_exact_codecs_give_back_every_bit_pattern(codec: Codec, dtype: str, data: st.DataObject) -> None:
    plane = make_plane(dtype, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9)))
    piece = make_piece(
        plane, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9)), data.draw(st.integers(0, 1))
    )
    num_bytes = plane.num_bytes(piece)
    raw = readable(data.draw(st.binary(min_size=num_bytes, max_size=num_bytes)))
    assert torch.equal(codec.decode(codec.encode(raw, plane, piece), plane, piece), raw)


@pytest.mark.parametrize("scale_along", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_split_gives_back_nan_payloads_infinities_zeros_and_denormals(dtype: str, scale_along: str) -> None:
    plane = make_plane(dtype, scale_along=scale_along)
    piece = make_piece(plane, entries=160)
    raw = to_bytes(keys_like(plane, piece)).clone()
    words = raw.view(torch.int32 if dtype == "float32" else torch.int16)
    bits = 8 * DTYPE_BYTES[dtype]
    for i, pattern in enumerate((0, -1, 1, 1 << (bits - 2), -(1 << (bits - 1)), 3 << (bits - 10))):
        words[37 * i :: 1009] = pattern
    split = newest_codec("split")
    assert torch.equal(split.decode(split.encode(raw, plane, piece), plane, piece), raw)


@pytest.mark.parametrize("codec", CODED, ids=named)
@pytest.mark.parametrize("scale_along", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_payloads_of_real_looking_numbers_are_small_and_close(
    codec: Codec, scale_along: str, dtype: str
) -> None:
    plane = make_plane(dtype, scale_along=scale_along)
    piece = make_piece(plane, entries=256)
    numbers = keys_like(plane, piece)
    ratio = 2 * numbers.numel() / len(memoryview(codec.encode(to_bytes(numbers), plane, piece)))
    assert ratio > {"split": 0.59 if dtype == "float32" else 1.14}.get(codec.name, 1.7)
    assert error(round_trip(codec, numbers, plane, piece), numbers) <= WORST_ERROR.get(codec.name, 0)


@pytest.mark.parametrize("scale_along", SCALES)
@pytest.mark.parametrize(("codec", "steps"), [("int8", 127), ("int4", 7.5)])
def test_integers_are_off_by_half_a_step_of_their_group_at_most(
    codec: str, steps: float, scale_along: str
) -> None:
    plane = make_plane("float32", scale_along=scale_along)
    piece = make_piece(plane, entries=128, start=64)
    numbers = keys_like(plane, piece)
    off = (round_trip(newest_codec(codec), numbers, plane, piece) - numbers).abs()
    groups, axis = ((2, 2, 64, 2, 64), 2) if scale_along == "channel" else ((2, 128, 2, 64), 3)
    largest = numbers.view(groups).abs().amax(axis, keepdim=True)
    reach = largest.expand(groups).reshape(numbers.shape)
    assert bool((off <= reach / steps * 0.5 * 1.1).all())


@pytest.mark.parametrize("codec", ["int4", "ecsq"])
def test_the_first_entry_of_a_sequence_comes_back_exact_and_spoils_no_other(codec: str) -> None:
    plane = make_plane()
    first, later = make_piece(plane), make_piece(plane, start=96)
    numbers = keys_like(plane, first)
    numbers[:, 0] *= 100
    there = round_trip(newest_codec(codec), numbers, plane, first)
    assert torch.equal(there[:, 0], numbers[:, 0])
    assert error(there[:, 1:], numbers[:, 1:]) < 0.13
    assert error(round_trip(newest_codec(codec), numbers, plane, later)[:, 1:], numbers[:, 1:]) > 0.13


@pytest.mark.parametrize("codec", LOSSY, ids=named)
@pytest.mark.parametrize("scale_along", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_numbers_that_are_not_finite_spoil_no_others(
    codec: Codec, scale_along: str, dtype: str, bad: float
) -> None:
    plane = make_plane(dtype, scale_along=scale_along)
    piece = make_piece(plane, entries=300, start=64)
    numbers = keys_like(plane, piece)
    numbers[1, 77, 1, 5] = bad  # not among the sampled entries
    result = round_trip(codec, numbers, plane, piece)
    finite = numbers.isfinite()
    assert torch.equal(result.isfinite(), finite)
    assert error(result[finite], numbers[finite]) < 0.2


@pytest.mark.parametrize("codec", CODED, ids=named)
@pytest.mark.parametrize("scale_along", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["zero", "constant", "denormal", "largest", "huge and tiny", "one outlier"])
def test_extreme_numbers_stay_finite_and_close(codec: Codec, scale_along: str, dtype: str, case: str) -> None:
    plane = make_plane(dtype, scale_along=scale_along)
    piece = make_piece(plane, start=64)
    info = torch.finfo(DTYPES[dtype])
    numbers = keys_like(plane, piece)
    match case:
        case "zero":
            numbers.zero_()
        case "constant":
            numbers.fill_(-3.0)
        case "denormal":
            numbers.fill_(info.smallest_normal / 2)
        case "largest":
            numbers.copy_(torch.where(numbers > 0, info.max, info.min))
        case "huge and tiny":
            numbers[:, ::2] *= info.max / 1000
            numbers[:, 1::2] *= 1e-3
        case "one outlier":
            numbers[0, 50, 0, 3] = 30_000.0
    result = round_trip(codec, numbers, plane, piece)
    assert bool(result.isfinite().all())
    largest = float(numbers.double().abs().max())
    tolerance = 0.35 if case in ("huge and tiny", "one outlier") else 0.2
    reach = 0.0 if codec.fidelity is Fidelity.EXACT else max(tolerance * largest, 2.0**-33)
    assert float((result.double() - numbers.double()).abs().max()) <= reach


@pytest.mark.parametrize("codec", CODED, ids=named)
@pytest.mark.parametrize("scale_along", SCALES)
@pytest.mark.parametrize(
    ("layers", "entries", "heads", "width"),
    [
        (1, 1, 1, 1),
        (1, 2, 1, 3),
        (3, 1, 1, 65),
        (1, 65, 1, 7),
        (3, 67, 3, 5),
        (2, 129, 1, 130),
        (1, 1500, 1, 100),
    ],
)
def test_any_shape_goes_through(
    codec: Codec, scale_along: str, layers: int, entries: int, heads: int, width: int
) -> None:
    for dtype, start in (("bfloat16", 0), ("float32", 5), ("float16", 5)):
        plane = make_plane(dtype, heads, width, scale_along)
        piece = make_piece(plane, layers, entries, start)
        numbers = keys_like(plane, piece)
        payload = codec.encode(to_bytes(numbers), plane, piece)
        assert len(memoryview(payload)) <= plane.num_bytes(piece) + 64
        result = codec.decode(payload, plane, piece).view(numbers.dtype).view(numbers.shape)
        assert error(result, numbers) <= WORST_ERROR.get(codec.name, 0) * 2


@pytest.mark.parametrize("codec", CODECS, ids=named)
def test_fields_of_any_kind_share_a_plane(codec: Codec) -> None:
    rng = np.random.default_rng(0)
    for plane in MIXED.planes:
        piece = Piece(plane.name, range(plane.layers), range(plane.heads), range(16))
        raw = readable(rng.bytes(plane.num_bytes(piece))).clone()
        fields = raw.view(-1, plane.record_bytes).split([field.num_bytes for field in plane.fields], dim=1)
        for field, part in zip(plane.fields, fields, strict=True):
            if field.dtype in DTYPES:
                numbers = torch.from_numpy(rng.normal(size=(part.shape[0], field.width)))
                part.copy_(numbers.to(DTYPES[field.dtype]).view(torch.uint8))
        back = codec.decode(codec.encode(raw, plane, piece), plane, piece)
        assert len(back) == len(raw)
        there = back.view(-1, plane.record_bytes).split([field.num_bytes for field in plane.fields], dim=1)
        for field, before, after in zip(plane.fields, fields, there, strict=True):
            if codec.fidelity is Fidelity.EXACT or field.dtype not in DTYPES:
                assert torch.equal(before, after), field.name
            else:
                as_numbers = [part.contiguous().view(DTYPES[field.dtype]) for part in (after, before)]
                assert error(*as_numbers) < 0.25, field.name


@pytest.mark.parametrize("codec", CODECS, ids=named)
@pytest.mark.parametrize("num_entries", [1, 5])
def test_fields_of_one_byte_go_through(codec: Codec, num_entries: int) -> None:
    fields = Field("nope", 28, "float8_e4m3"), Field("rope", 4, "bfloat16"), Field("scale", 1, "float8_e8m0")
    plane = Plane("latent", 2, Paged(4), 1, fields)
    piece = Piece("latent", range(2), range(1), range(num_entries))
    raw = torch.randint(0, 100, (plane.num_bytes(piece),), dtype=torch.uint8)
    back = codec.decode(codec.encode(raw, plane, piece), plane, piece).view(-1, 37)
    assert torch.equal(back[:, :28], raw.view(-1, 37)[:, :28])
    assert torch.equal(back[:, 36:], raw.view(-1, 37)[:, 36:])


def test_rows_of_a_window_are_not_taken_for_the_first_of_the_sequence() -> None:
    plane = Plane("w", 1, Window(64, 1), 1, (Field("kv", 64, "bfloat16"),), "channel")
    piece = Piece("w", range(1), range(1), range(64))
    numbers = keys_like(plane, piece)
    assert not torch.equal(round_trip(newest_codec("ecsq"), numbers, plane, piece)[:, 0], numbers[:, 0])


# --- the same bytes again, from anywhere --------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODED, ids=named)
def test_a_piece_encoded_again_is_the_same_bytes_in_any_thread(codec: Codec) -> None:
    plane = make_plane()
    piece = make_piece(plane, layers=8, entries=200)
    raw = to_bytes(keys_like(plane, piece))
    expected = bytes(codec.encode(raw, plane, piece))
    seen: list[bytes] = []

    def encode() -> None:
        for _ in range(5):
            payload = codec.encode(raw, plane, piece)
            codec.decode(payload, plane, piece)
            seen.append(bytes(payload))

    threads = [threading.Thread(target=encode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 20
    assert set(seen) == {expected}


@pytest.mark.parametrize("codec", CODED, ids=named)
def test_bytes_may_begin_at_any_address_and_are_not_changed(codec: Codec) -> None:
    plane = make_plane("float32")
    piece = make_piece(plane)
    raw = to_bytes(keys_like(plane, piece))
    shifted = torch.empty(len(raw) + 1, dtype=torch.uint8)[1:].copy_(raw)
    payload = bytes(codec.encode(shifted, plane, piece))
    assert torch.equal(shifted, raw)
    assert payload == bytes(codec.encode(raw, plane, piece))
    moved = memoryview(b"x" + payload)[1:]
    assert torch.equal(codec.decode(moved, plane, piece), codec.decode(payload, plane, piece))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_second_trip_through_integers_changes_next_to_nothing(name: str) -> None:
    plane, codec = make_plane("float32"), newest_codec(name)
    piece = make_piece(plane)
    once = round_trip(codec, keys_like(plane, piece), plane, piece)
    assert error(round_trip(codec, once, plane, piece), once) < 0.005


# --- payloads that are none -----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODED, ids=named)
@pytest.mark.parametrize("scale_along", SCALES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_payloads_raise_value_error_or_give_the_right_number_of_bytes(
    codec: Codec, scale_along: str, data: st.DataObject
) -> None:
    plane = make_plane(data.draw(st.sampled_from(sorted(DTYPES))), 1, 8, scale_along)
    piece = make_piece(plane, 2, data.draw(st.sampled_from([1, 5, 130])), data.draw(st.integers(0, 1)))
    payload = bytearray(codec.encode(to_bytes(keys_like(plane, piece)), plane, piece))
    match data.draw(st.sampled_from(["random", "truncated", "longer", "mutated"])):
        case "random":
            payload = bytearray(data.draw(st.binary(max_size=200)))
        case "truncated":
            del payload[data.draw(st.integers(0, len(payload) - 1)) :]
        case "longer":
            payload += data.draw(st.binary(min_size=1, max_size=20))
        case "mutated":
            for _ in range(data.draw(st.integers(1, 4))):
                # Most of what can go wrong is in the heads at the front.
                at = data.draw(
                    st.integers(0, min(len(payload) - 1, data.draw(st.sampled_from([30, 10_000]))))
                )
                payload[at] = data.draw(st.integers(0, 255))
    try:
        decoded = codec.decode(bytes(payload), plane, piece)
    except ValueError:
        return
    assert len(decoded) == plane.num_bytes(piece)


def stream(data: bytes, how: int = 1) -> bytes:
    return struct.pack("<BI", how, len(data)) + data


@pytest.mark.parametrize(
    "bomb",
    [
        zstandard.ZstdCompressor().compress(bytes(1 << 30)),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 24)),
        zstandard.ZstdCompressor().compress(bytes(512)) * 2,
    ],
    ids=["declares 1 GiB", "declares nothing", "two frames"],
)
def test_a_bomb_is_refused_before_it_goes_off(bomb: bytes) -> None:
    plane = Plane("i", 1, Paged(1), 1, (Field("i", 8, "uint8"),))
    piece = Piece("i", range(1), range(1), range(64))
    body = stream(bomb)
    with pytest.raises(ValueError, match="zstd"):
        newest_codec("split").decode(struct.pack("<BI", 1, len(body)) + body, plane, piece)


@pytest.mark.parametrize("declared", [511, 513])
def test_a_stream_of_another_size_is_refused(declared: int) -> None:
    plane = Plane("i", 1, Paged(1), 1, (Field("i", 8, "uint8"),))
    piece = Piece("i", range(1), range(1), range(64))
    for body in (
        stream(bytes(declared), how=0),
        stream(zstandard.ZstdCompressor().compress(bytes(declared))),
    ):
        with pytest.raises(ValueError, match=str(declared)):
            newest_codec("int8").decode(struct.pack("<BI", 1, len(body)) + body, plane, piece)


def test_another_codecs_way_of_writing_numbers_is_refused() -> None:
    plane = make_plane()
    piece = make_piece(plane)
    payload = newest_codec("int8").encode(to_bytes(keys_like(plane, piece)), plane, piece)
    with pytest.raises(ValueError, match="mode 3 is none of split 1"):
        newest_codec("split").decode(payload, plane, piece)


# --- loops, and what accelerators do instead ---------------------------------------------------------------


@given(rows=st.integers(1, 7), columns=st.integers(1, 40), seed=st.integers(0, 99))
def test_pairs_and_escapes_are_found_again(rows: int, columns: int, seed: int) -> None:
    numbers = torch.from_numpy(np.random.default_rng(seed).integers(0, 16, (rows, columns), dtype=np.uint8))
    pairs = pack_pairs(numbers)
    assert torch.equal(unpack_pairs(pairs, rows), numbers)
    expected = (numbers.reshape(-1) == ESCAPE).nonzero().squeeze(1)
    assert torch.equal(escape_positions(numbers), expected)
    assert loops.count_escapes(pairs.numpy(), rows) == len(expected)


BOXES = [
    FieldBox(2, 96, 2, 64, torch.bfloat16, True, False),
    FieldBox(3, 67, 3, 5, torch.float32, True, True),
    FieldBox(2, 67, 2, 100, torch.bfloat16, False, True),
    FieldBox(1, 33, 1, 7, torch.float16, False, False),
]


def values_of(box: FieldBox) -> torch.Tensor:
    numbers = torch.randn(box.shape, generator=torch.Generator().manual_seed(3))
    return (numbers + torch.arange(box.width) / 8).to(box.dtype)


def codes_of(pairs: torch.Tensor, box: FieldBox) -> torch.Tensor:
    return unpack_pairs(pairs, box.rows).int()


def sharing_of(box: FieldBox) -> Sharing:
    return Sharing(box, 40, 1) if box.per_channel else Sharing(box, 1, min(64, box.width))


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_extremes_are_those_of_what_shares_a_step(box: FieldBox) -> None:
    values, sharing = values_of(box), sharing_of(box)
    least, largest = extremes(values, sharing)
    lines = least.view(box.layers, -1, sharing.spans)
    skipped = int(box.has_sink)
    for layer in range(box.layers):
        for i in range(lines.shape[1]):
            entries = slice(max(skipped, i * sharing.line_entries), (i + 1) * sharing.line_entries)
            if not box.per_channel and i == 0 and skipped:
                entries = slice(1, 2)  # the sink's line
            some = values[layer, entries].float().amin(0).view(box.heads, -1)
            expected = torch.cat([part.amin(1) for part in some.split(sharing.span_columns, dim=1)])
            by_head = expected.view(-1, box.heads).T.reshape(-1)
            assert torch.equal(lines[layer, i], by_head)
    assert all(
        torch.equal(*pair) for pair in zip((least, largest), extremes_anywhere(values, sharing), strict=True)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("box", BOXES, ids=str)
def test_extremes_show_what_is_not_finite(box: FieldBox, bad: float) -> None:
    values = values_of(box)
    values[-1, 7, 0, 3] = bad
    assert not all(bool(found.isfinite().all()) for found in extremes(values, sharing_of(box)))


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_accelerators_place_numbers_as_the_loops_do(box: FieldBox) -> None:
    values, sharing = values_of(box), sharing_of(box)
    least, largest = extremes(values, sharing)
    grid = Grid(sharing, least, (largest - least) / 15)
    off = codes_of(grid.nearest(values), box) - codes_of(nearest_anywhere(grid, values), box)
    assert bool((off.abs() <= 1).all())  # where a number lies between two codes, either may be taken
    assert float((off != 0).float().mean()) < 0.01


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_accelerators_let_escape_what_the_loops_do(box: FieldBox) -> None:
    values, sharing = values_of(box), sharing_of(box)
    least, largest = extremes(values, sharing)
    grid = Grid(sharing, least + (largest - least) / 8, (largest - least) / 13)
    here, there = grid.or_escapes(values, box.numel), or_escapes_anywhere(grid, values, box.numel)
    assert here is not None and there is not None
    assert len(here[1]) > 0
    for pairs, escaped in (here, there):
        restored = grid.restore(pairs, escaped).float()
        off = (restored - values.float())[:, int(box.has_sink) :].abs().view(-1)
        steps = sharing.spread(grid.step).view(box.shape)[:, int(box.has_sink) :].reshape(-1)
        assert bool((off <= 0.51 * steps + 2.0**-7 * values.float().abs().max()).all())
    assert grid.or_escapes(values, len(here[1]) - 1) is None
    assert or_escapes_anywhere(grid, values, len(there[1]) - 1) is None


@pytest.mark.parametrize("places", [[], [3] * 9])
def test_numbers_for_other_than_all_escapes_are_refused(places: list[int]) -> None:
    box = BOXES[0]
    sharing = sharing_of(box)
    grid = Grid(sharing, torch.zeros(sharing.lines, sharing.spans), torch.ones(sharing.lines, sharing.spans))
    pairs = torch.zeros((box.rows // 2, box.columns), dtype=torch.uint8)
    pairs[5, 7], pairs[6, 8] = ESCAPE, ESCAPE << 4
    with pytest.raises(ValueError, match=f"{len(places)} numbers for 2 escapes"):
        grid.restore(pairs, torch.tensor(places, dtype=torch.int32))


@pytest.mark.parametrize("box", BOXES[:3], ids=str)
def test_accelerators_split_floats_as_the_loops_do(box: FieldBox) -> None:
    values = values_of(box).view(box.rows, box.columns)
    values.view(-1)[::97] = 2.0**-90
    floats, plain = take_apart(values), take_apart_anywhere(values)
    assert torch.equal(floats.exponents, plain.exponents)
    assert torch.equal(floats.top, plain.top)
    assert (floats.low is None) == (plain.low is None)
    if floats.low is not None and plain.low is not None:
        assert torch.equal(floats.low.view(torch.int16), plain.low.view(torch.int16))
    bases = floats.exponents.view(box.layers, box.entries, -1).amax(1)
    coded, plainly = code(floats.exponents, bases, box), code_anywhere(floats.exponents, bases, box)
    assert coded is not None and plainly is not None
    assert all(torch.equal(*pair) for pair in zip(coded, plainly, strict=True))
    assert len(coded[1]) >= values.numel() // 97
