"""Records and segments as bytes: what was written is read, and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.keys import tenant_label, tenant_secret
from kvtransfer.tiers.catalog import best_of
from kvtransfer.tiers.records import (
    BadRecord,
    ForeignRecord,
    RecordId,
    Sealer,
    Shape,
    checksum_of,
    decode_record,
    encode_record,
)
from kvtransfer.tiers.segment_file import UnknownSegment, encode_segment, read_record, read_table
from tests.tier_blocks import ALICE, BOB, SECRET, SHAPE, block, key, same

pytestmark = pytest.mark.unit

SEALER = Sealer(SECRET)
OTHER_CLUSTER = Sealer(b"another cluster's secret........")


def joined(number: int = 1, payload_bytes: int = 300) -> bytes:
    return b"".join(encode_record(block(number, payload_bytes), SEALER))


def segment(count: int = 3) -> bytes:
    return b"".join(encode_segment([block(number, 200) for number in range(count)], SEALER)[1])


def table_of(data: bytes, sealer: Sealer | None = SEALER):
    return read_table(lambda at, size: data[at : at + size], len(data), sealer)


def test_a_record_comes_back_as_it_went() -> None:
    assert same(decode_record(joined(), SEALER), block(1, 300))


def test_every_flipped_bit_of_a_record_is_seen() -> None:
    data = bytearray(joined(payload_bytes=40))
    for offset in range(len(data)):
        data[offset] ^= 1 << offset % 8
        with pytest.raises(BadRecord):
            decode_record(data, SEALER)
        data[offset] ^= 1 << offset % 8
    decode_record(data, SEALER)


def test_every_truncation_of_a_record_is_seen() -> None:
    data = joined(payload_bytes=40)
    for length in range(len(data)):
        with pytest.raises(BadRecord):
            decode_record(data[:length], SEALER)


def test_another_clusters_record_is_told_from_a_damaged_one() -> None:
    with pytest.raises(ForeignRecord):
        decode_record(joined(), OTHER_CLUSTER)
    assert same(decode_record(joined(), None), block(1, 300))  # without a secret only damage can be found


def test_a_checksum_made_anew_does_not_hide_a_change() -> None:
    """Whoever can write the directory, but lacks the secret, changes a byte and mends the checksum."""
    forged = bytearray(joined())
    forged[-1] ^= 1
    forged[16:32] = checksum_of([forged[:16], forged[48:]])
    with pytest.raises(ForeignRecord):
        decode_record(forged, SEALER)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_refused_and_nothing_else_happens(data: bytes) -> None:
    for candidate in (data, b"HRB1" + data):
        with pytest.raises(BadRecord):
            decode_record(candidate, SEALER)
    for candidate in (data, b"HRT1" + data):
        with pytest.raises(BadRecord):
            table_of(candidate)


def test_a_segments_table_leads_to_its_records() -> None:
    data = segment()
    table = table_of(data)
    assert table.tenant == ALICE
    assert [row.id.key for row in table.rows] == [key(0), key(1), key(2)]
    for number, row in enumerate(table.rows):
        assert row.codecs == {("raw", 1)}
        record = read_record(data[row.offset : row.offset + row.num_bytes], row.id, table.tenant, SEALER)
        assert same(record, block(number, 200))


def test_every_flipped_bit_of_a_segments_table_is_seen() -> None:
    data = bytearray(segment(1))
    end = table_of(bytes(data)).rows[0].offset
    for offset in range(end):
        data[offset] ^= 0x10
        with pytest.raises(BadRecord):
            table_of(bytes(data))
        data[offset] ^= 0x10


def test_a_segment_that_was_cut_short_keeps_its_whole_records() -> None:
    data = segment()
    last = table_of(data).rows[-1]
    table = table_of(data[: last.offset + last.num_bytes - 1])
    assert (len(table.rows), table.num_cut) == (2, 1)


def test_records_that_changed_places_are_refused() -> None:
    data = segment(2)
    first, second = table_of(data).rows
    assert first.num_bytes == second.num_bytes
    with pytest.raises(BadRecord, match="not the one"):
        read_record(data[second.offset : second.offset + second.num_bytes], first.id, ALICE, SEALER)


def test_another_version_and_another_cluster_are_not_torn() -> None:
    with pytest.raises(UnknownSegment):
        table_of(b"HRT9" + segment()[4:])
    with pytest.raises(ForeignRecord):
        table_of(segment(), OTHER_CLUSTER)


def test_a_segment_has_one_tenant() -> None:
    with pytest.raises(ValueError, match="2 tenants"):
        encode_segment([block(1), block(2, tenant=BOB)], SEALER)


def test_a_reader_gets_the_best_rank_within_its_bound() -> None:
    exact, near, compact = (RecordId(key(1), rank, SHAPE) for rank in range(3))
    assert best_of([compact, near], 0, SHAPE) is None
    assert best_of([compact, near], 1, SHAPE) == near
    assert best_of([compact, near, exact], 2, SHAPE) == exact


def test_a_record_whose_numbers_must_be_converted_counts_as_near() -> None:
    narrow = Shape("layout", 16, (("bfloat16",), ("bfloat16",)))
    exact = RecordId(key(1), 0, SHAPE)
    assert best_of([exact], 0, narrow) is None
    assert best_of([exact], 1, narrow) == exact
    assert best_of([exact, RecordId(key(1), 1, narrow)], 1, narrow) == RecordId(key(1), 1, narrow)


@pytest.mark.parametrize(
    "other",
    [
        Shape("another", 16, SHAPE.dtypes),
        Shape("layout", 32, SHAPE.dtypes),
        Shape("layout", 16, (("int8",), ("float32",))),
        Shape("layout", 16, (("float32",),)),
    ],
)
def test_a_record_of_another_kind_is_not_there(other: Shape) -> None:
    assert best_of([RecordId(key(1), 0, SHAPE)], 2, other) is None


def test_tenants_are_known_by_labels_that_say_nothing() -> None:
    label = tenant_label(SECRET, "alice")
    assert len(label) == 16
    assert label != tenant_label(SECRET, "bob")
    assert label != tenant_label(b"another cluster's secret........", "alice")
    assert label not in tenant_secret(SECRET, "alice")
