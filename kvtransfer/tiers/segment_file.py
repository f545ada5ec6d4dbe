"""One segment file as bytes: a table of its records, and the records behind it. Written once, never changed.

    offset  size  field
    0       4     magic "HRT1"
    4       4     table length T, at most MAX_TABLE_BYTES, unsigned little endian
    8       8     length of the file, unsigned little endian
    16      16    xxh3-128 of offsets 0 to 16 and the table
    32      16    MAC of offsets 0 to 32 and the table (records.Sealer)
    48      T     table, msgpack: [tenant label, shapes, sets of codecs,
                  [[key, fidelity rank, index of shape, index of codecs, length], ...]]
    48+T    ...   the records (records.py) in the table's order, one behind the other

All records are of one tenant. The table is all that a start reads of a segment; each record is verified again
when it is read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, cast

import msgpack  # type: ignore[import-untyped]  # it ships no types

from kvtransfer.keys import KEY_BYTES, LABEL_BYTES
from kvtransfer.tiers.records import (
    MAC_BYTES,
    MAX_FIDELITY,
    BadRecord,
    ForeignRecord,
    RecordId,
    Sealer,
    checksum_of,
    decode_record,
    decode_shape,
    encode_record,
    encode_shape,
    unpack_bounded,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

    from kvtransfer.tiers.records import BlockRecord, CodecSet, Shape

MAGIC = b"HRT1"
MAX_TABLE_BYTES = 1 << 20
MAX_RECORDS = 8192

_START = struct.Struct("<4sIQ")
PREFIX_BYTES = _START.size + 16 + MAC_BYTES
_LIMITS = {
    "max_array_len": MAX_RECORDS,
    "max_str_len": 256,
    "max_bin_len": max(KEY_BYTES, LABEL_BYTES),
    "max_map_len": 0,
    "max_ext_len": 0,
}


class UnknownSegment(BadRecord):
    """Not a segment of this version."""


class Row(NamedTuple):
    """A record, where it lies in its file, and what a reader of it must speak."""

    id: RecordId
    offset: int
    num_bytes: int
    codecs: CodecSet


@dataclass(frozen=True, slots=True)
class SegmentTable:
    """`rows`: what the file holds. `num_cut`: records that the file is too short for."""

    tenant: bytes
    rows: tuple[Row, ...]
    num_cut: int = 0


def encode_segment(records: Sequence[BlockRecord], sealer: Sealer) -> tuple[SegmentTable, list[Buffer]]:
    """The table and the file's bytes in pieces, payloads not copied. Raises ValueError for records of several
    tenants, or more than a segment holds."""
    tenants = {record.tenant for record in records}
    if len(tenants) != 1 or len(records) > MAX_RECORDS:
        raise ValueError(f"{len(records)} records of {len(tenants)} tenants do not make a segment")
    bodies = [encode_record(record, sealer) for record in records]
    lengths = [sum(memoryview(part).nbytes for part in body) for body in bodies]
    shapes: dict[Shape, int] = {}
    codecs: dict[CodecSet, int] = {}
    packed_rows = [
        (
            record.id.key,
            record.id.fidelity,
            shapes.setdefault(record.id.shape, len(shapes)),
            codecs.setdefault(record.codecs, len(codecs)),
            length,
        )
        for record, length in zip(records, lengths, strict=True)
    ]
    (tenant,) = tenants
    packed_shapes, packed_codecs = (
        [encode_shape(shape) for shape in shapes],
        [sorted(each) for each in codecs],
    )
    table = cast("bytes", msgpack.packb([tenant, packed_shapes, packed_codecs, packed_rows]))
    if len(table) > MAX_TABLE_BYTES:
        raise ValueError(f"a table of {len(table)} bytes is beyond {MAX_TABLE_BYTES}")
    first = PREFIX_BYTES + len(table)
    start = _START.pack(MAGIC, len(table), first + sum(lengths))
    checksum = checksum_of([start, table])
    parts: list[Buffer] = [start, checksum, sealer.seal([start, checksum, table]), table]
    parts += [part for body in bodies for part in body]
    offsets = accumulate(lengths[:-1], initial=first)
    rows = (Row(r.id, at, length, r.codecs) for r, at, length in zip(records, offsets, lengths, strict=True))
    return SegmentTable(tenant, tuple(rows)), parts


def read_table(read: Callable[[int, int], Buffer], file_bytes: int, sealer: Sealer | None) -> SegmentTable:
    """The table of a file of `file_bytes`; `read(offset, num_bytes)` reads it, and may raise OSError.

    Without a sealer the MAC is not looked at. Raises UnknownSegment, ForeignRecord for another cluster's, and
    BadRecord for one that is torn or damaged.
    """
    if file_bytes < PREFIX_BYTES:
        raise BadRecord(f"a segment has at least {PREFIX_BYTES} bytes, the file {file_bytes}")
    prefix = memoryview(read(0, PREFIX_BYTES))
    magic, table_bytes, said_bytes = _START.unpack_from(prefix)
    if magic != MAGIC:
        raise UnknownSegment(f"a segment begins with {MAGIC!r}, the file with {bytes(magic)!r}")
    if table_bytes > min(MAX_TABLE_BYTES, file_bytes - PREFIX_BYTES):
        raise BadRecord(f"the table says {table_bytes} bytes, the file has {file_bytes}")
    table = memoryview(read(PREFIX_BYTES, table_bytes))
    start, checksum, mac = prefix[: _START.size], prefix[_START.size : -MAC_BYTES], prefix[-MAC_BYTES:]
    if checksum_of([start, table]) != checksum:
        raise BadRecord("the table's checksum does not match")
    if sealer is not None and not sealer.matches(mac, [start, checksum, table]):
        raise ForeignRecord("the segment was not written under this cluster's secret")
    tenant, rows = _unpack_table(table, PREFIX_BYTES + table_bytes)
    end = rows[-1].offset + rows[-1].num_bytes if rows else PREFIX_BYTES + table_bytes
    if end != said_bytes:
        raise BadRecord(f"the records end at {end}, the table says {said_bytes}")
    whole = tuple(row for row in rows if row.offset + row.num_bytes <= file_bytes)
    return SegmentTable(tenant, whole, len(rows) - len(whole))


def read_record(data: Buffer, expected: RecordId, tenant: bytes, sealer: Sealer | None) -> BlockRecord:
    """A record's bytes, verified, and being the one that the table says. Raises BadRecord."""
    record = decode_record(data, sealer)
    if record.id != expected or record.tenant != tenant:
        raise BadRecord("a whole record, but not the one that the table says is there")
    return record


def _unpack_table(table: memoryview, offset: int) -> tuple[bytes, list[Row]]:
    match unpack_bounded(table, _LIMITS):
        case [bytes(tenant), list(packed_shapes), list(packed_codecs), list(packed_rows)] if (
            len(tenant) == LABEL_BYTES
        ):
            shapes = [decode_shape(shape) for shape in packed_shapes]
            codecs = [_unpack_codecs(each) for each in packed_codecs]
            rows = []
            for packed in packed_rows:
                rows.append(_unpack_row(packed, offset, shapes, codecs))
                offset += rows[-1].num_bytes
            return tenant, rows
    raise BadRecord("the table is not a segment's")


def _unpack_codecs(value: object) -> CodecSet:
    match value:
        case [*pairs] if pairs:
            return frozenset(_unpack_codec(pair) for pair in pairs)
    raise BadRecord("not a set of codecs")


def _unpack_codec(value: object) -> tuple[str, int]:
    match value:
        case [str(name), int(version)]:
            return name, version
    raise BadRecord("not a codec")


def _unpack_row(row: object, offset: int, shapes: Sequence[Shape], codecs: Sequence[CodecSet]) -> Row:
    match row:
        case [bytes(key), int(fidelity), int(shape), int(codec), int(num_bytes)] if (
            len(key) == KEY_BYTES
            and 0 <= fidelity <= MAX_FIDELITY
            and 0 <= shape < len(shapes)
            and 0 <= codec < len(codecs)
            and num_bytes > 0
        ):
            return Row(RecordId(key, fidelity, shapes[shape]), offset, num_bytes, codecs[codec])
    raise BadRecord("a row of the table is not one")
