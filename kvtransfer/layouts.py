"""What a KV cache is made of, and how it is cut into pieces that travel.

A model declares its cache as planes. A paged plane has one entry for so many tokens; a window plane
keeps only the last rows. An entry is a record of named fields; heads are an axis of their own.
Everything here is arithmetic on ranges: it knows no tensor, no block table and no network.

Canonical order of a piece's bytes: [layer, entry, head, field], fields in the order of the plane,
little endian, no padding.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DTYPE_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3": 1,
    "float8_e8m0": 1,
    "int8": 1,
    "uint8": 1,
}

CONVERTIBLE = frozenset({"float32", "bfloat16", "float16"})
"""Dtypes whose numbers may change into each other on the way; all others travel as they are."""

# A frame costs both ends together half a millisecond of processor time, whatever it carries. From 1 to 2 MiB, raw and
# `split` took a tenth less; 4 MiB took another tenth, but a thread that receives one holds Python for 2 ms.
DEFAULT_PIECE_BYTES = 2 << 20


def convertible(source: str, target: str) -> bool:
    """Whether numbers stored as `source` may travel or be stored as `target`."""
    return source == target or (source in CONVERTIBLE and target in CONVERTIBLE)


@dataclass(frozen=True, slots=True)
class Field:
    """`width` numbers of `dtype` (a key of DTYPE_BYTES) in an entry, for one layer and one head."""

    name: str
    width: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            known = ", ".join(DTYPE_BYTES)
            raise ValueError(f"field {self.name!r}: unknown dtype {self.dtype!r}; known are {known}")
        if self.width < 1:
            raise ValueError(f"field {self.name!r}: width must be at least 1, got {self.width}")

    @property
    def num_bytes(self) -> int:
        return self.width * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Paged:
    """One entry for every `tokens_per_entry` tokens; an entry exists once all of its tokens do."""

    tokens_per_entry: int

    def __post_init__(self) -> None:
        if self.tokens_per_entry < 1:
            raise ValueError(f"tokens_per_entry must be at least 1, got {self.tokens_per_entry}")


@dataclass(frozen=True, slots=True)
class Window:
    """One row per token; at length N the rows [max(0, align·⌊N/align⌋ − (rows − align)), N) are live."""

    rows: int
    align: int

    def __post_init__(self) -> None:
        if not 1 <= self.align <= self.rows:
            raise ValueError(f"a window needs 1 <= align <= rows, got align {self.align}, rows {self.rows}")


Kind: TypeAlias = Paged | Window


@dataclass(frozen=True, slots=True)
class Plane:
    """One kind of state of all `layers` that have it. `heads` = 1: replicated, sent by one rank.

    `scale_along`: what shares a scale when the plane is quantized. Keys have outliers in fixed channels
    ("channel"), values in single tokens ("token"). A hint to codecs, no part of the identity.
    """

    name: str
    layers: int
    kind: Kind
    heads: int
    fields: tuple[Field, ...]
    scale_along: Literal["token", "channel"] = "token"

    def __post_init__(self) -> None:
        if self.layers < 1 or self.heads < 1 or not self.fields:
            raise ValueError(f"plane {self.name!r} needs at least one layer, one head and one field")

    @property
    def record_bytes(self) -> int:
        """Bytes of one entry, one layer, one head."""
        return sum(field.num_bytes for field in self.fields)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Of the fields, in order."""
        return tuple(field.dtype for field in self.fields)

    def with_dtypes(self, dtypes: Sequence[str]) -> Plane:
        """The same plane with other dtypes on the wire or in memory. Raises ValueError for another number of
        them, an unknown one, or one that numbers of this field are not converted to (`convertible`)."""
        if len(dtypes) != len(self.fields):
            raise ValueError(f"plane {self.name!r} has {len(self.fields)} fields, got {len(dtypes)} dtypes")
        for field, dtype in zip(self.fields, dtypes, strict=True):
            if not convertible(field.dtype, dtype):
                raise ValueError(
                    f"plane {self.name!r}: field {field.name!r} is {field.dtype} here, cannot be {dtype}"
                )
        if tuple(dtypes) == self.dtypes:
            return self
        fields = tuple(replace(field, dtype=d) for field, d in zip(self.fields, dtypes, strict=True))
        return replace(self, fields=fields)

    def num_bytes(self, piece: Piece) -> int:
        """Canonical bytes of a piece of this plane in this plane's dtypes."""
        return len(piece.layers) * len(piece.heads) * len(piece.entries) * self.record_bytes

    def live(self, num_tokens: int) -> range:
        """The entries that hold something at a length of `num_tokens`."""
        match self.kind:
            case Paged(tokens_per_entry):
                return range(num_tokens // tokens_per_entry)
            case Window(rows, align):
                return range(max(0, num_tokens // align * align - (rows - align)), num_tokens)


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of one plane: the unit of frame, manifest and codec."""

    plane: str
    layers: range
    heads: range
    entries: range

    def num_bytes(self, layout: CacheLayout) -> int:
        """Canonical bytes. Raises KeyError when the layout lacks the plane."""
        return layout.plane(self.plane).num_bytes(self)

    def overlaps(self, other: Piece) -> bool:
        """Whether some record is part of both."""
        pairs = (
            (self.layers, other.layers),
            (self.heads, other.heads),
            (self.entries, other.entries),
        )
        return self.plane == other.plane and all(
            one.start < two.stop and two.start < one.stop for one, two in pairs
        )

    def without(self, other: Piece) -> list[Piece]:
        """What of this box is not in the other one, as boxes that do not overlap."""
        if not self.overlaps(other):
            return [self]
        rest, box = list[Piece](), self
        for axis in ("layers", "heads", "entries"):
            one, two = getattr(box, axis), getattr(other, axis)
            inner = range(max(one.start, two.start), min(one.stop, two.stop))
            for outer in (range(one.start, inner.start), range(inner.stop, one.stop)):
                if outer:
                    rest.append(box._with(axis, outer))
            box = box._with(axis, inner)
        return rest

    def _with(self, axis: str, along: range) -> Piece:
        changed: dict[str, Any] = {axis: along}
        return replace(self, **changed)


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """The planes of a model's cache. `block_tokens` is the local block size: shape, not identity."""

    planes: tuple[Plane, ...]
    block_tokens: int

    def __post_init__(self) -> None:
        if len({plane.name for plane in self.planes}) != len(self.planes):
            raise ValueError("two planes of one layout have the same name")
        if self.block_tokens < 1:
            raise ValueError(f"block_tokens must be at least 1, got {self.block_tokens}")

    def plane(self, name: str) -> Plane:
        """Raises KeyError for a name the layout lacks."""
        for plane in self.planes:
            if plane.name == name:
                return plane
        raise KeyError(f"no plane {name!r} in this layout; it has {[plane.name for plane in self.planes]}")

    def live(self, plane: str | Plane, num_tokens: int) -> range:
        """The entries of a plane that hold something at a length of `num_tokens`."""
        return (plane if isinstance(plane, Plane) else self.plane(plane)).live(num_tokens)

    def entry_bytes(self, plane: str | Plane) -> int:
        """Bytes of one entry of one layer, all heads."""
        plane = plane if isinstance(plane, Plane) else self.plane(plane)
        return plane.heads * plane.record_bytes

    def num_bytes(self, num_tokens: int) -> int:
        """Canonical bytes of a whole sequence of `num_tokens`, windows included."""
        return sum(p.layers * self.entry_bytes(p) * len(p.live(num_tokens)) for p in self.planes)

    @property
    def dtypes(self) -> tuple[tuple[str, ...], ...]:
        """Of the fields, plane by plane."""
        return tuple(plane.dtypes for plane in self.planes)

    def with_dtypes(self, dtypes: Sequence[Sequence[str]]) -> CacheLayout:
        """The same layout with other dtypes, given plane by plane. Raises ValueError as Plane.with_dtypes does."""
        planes = zip(self.planes, dtypes, strict=True)
        return replace(self, planes=tuple(plane.with_dtypes(fields) for plane, fields in planes))

    def narrowed(self, others: Sequence[Sequence[str]]) -> CacheLayout:
        """In the dtypes that travel between this cache and one of `others`: field by field the narrower, ours where
        both are equally wide. Raises ValueError for what cannot be converted."""
        if len(others) != len(self.planes):
            raise ValueError(f"dtypes of {len(others)} planes, the layout has {len(self.planes)}")
        dtypes = []
        for plane, theirs in zip(self.planes, others, strict=True):
            plane.with_dtypes(theirs)
            pairs = zip(plane.dtypes, theirs, strict=True)
            dtypes.append([min(pair, key=DTYPE_BYTES.__getitem__) for pair in pairs])
        return self.with_dtypes(dtypes)

    def identity(self) -> str:
        """Hex digest, equal for two workers whose pieces mean the same: planes and fields, not their dtypes and
        not the block size, which are shape and are converted (design §3.6)."""
        digest = hashlib.blake2b(digest_size=16, person=b"headrace-layout2")
        for plane in self.planes:
            fields = [(field.name, field.width) for field in plane.fields]
            facts = (plane.name, plane.layers, str(plane.kind), plane.heads, fields)
            digest.update(f"{facts!r}\n".encode())
        return digest.hexdigest()

    def check(self, piece: Piece) -> None:
        """Raises ValueError when the piece is empty, strided or outside of its plane's layers and heads."""
        try:
            plane = self.plane(piece.plane)
        except KeyError as error:
            raise ValueError(error.args[0]) from None
        for axis, box, limit in (
            ("layers", piece.layers, plane.layers),
            ("heads", piece.heads, plane.heads),
            ("entries", piece.entries, None),
        ):
            if box.step != 1 or box.start < 0 or box.stop <= box.start:
                raise ValueError(
                    f"plane {plane.name!r}: {axis} [{box.start}, {box.stop}) is empty or negative"
                )
            if limit is not None and box.stop > limit:
                raise ValueError(f"plane {plane.name!r}: {axis} end at {box.stop}, the plane has {limit}")


def pieces_for(
    layout: CacheLayout,
    tokens: range,
    target_bytes: int = DEFAULT_PIECE_BYTES,
    layers: range | None = None,
    align_tokens: int | None = None,
) -> list[Piece]:
    """Cuts the positions `tokens` of all paged planes, in all layers or in `layers`, into pieces of at most
    about `target_bytes`.

    Consecutive ranges tile: an entry belongs to the range in which its last token lies. A piece is
    larger than the target only where one entry of one layer already is. `align_tokens`: no piece crosses a
    multiple of it, for a receiver that keeps what it gets block by block; raises ValueError where it is no
    multiple of a plane's tokens per entry.
    """
    pieces: list[Piece] = []
    for plane in layout.planes:
        if isinstance(plane.kind, Paged):
            per_entry = plane.kind.tokens_per_entry
            entries = range(tokens.start // per_entry, tokens.stop // per_entry)
            for part in _aligned(plane, entries, per_entry, align_tokens):
                pieces.extend(_cut(plane, part, target_bytes, layers))
    return pieces


def window_pieces_for(
    layout: CacheLayout, num_tokens: int, target_bytes: int = DEFAULT_PIECE_BYTES
) -> list[Piece]:
    """Cuts the live rows of all window planes at a length of `num_tokens`."""
    pieces: list[Piece] = []
    for plane in layout.planes:
        if isinstance(plane.kind, Window):
            pieces.extend(_cut(plane, plane.live(num_tokens), target_bytes))
    return pieces


def _aligned(plane: Plane, entries: range, per_entry: int, align_tokens: int | None) -> Iterator[range]:
    """`entries` in parts that end at multiples of `align_tokens`."""
    if align_tokens is None:
        yield entries
        return
    if align_tokens < 1 or align_tokens % per_entry:
        text = (
            f"plane {plane.name!r} has an entry for {per_entry} tokens; {align_tokens} is no multiple of it"
        )
        raise ValueError(text)
    step = align_tokens // per_entry
    start = entries.start
    while start < entries.stop:
        stop = min(entries.stop, (start // step + 1) * step)
        yield range(start, stop)
        start = stop


def _cut(plane: Plane, entries: range, target_bytes: int, layers: range | None = None) -> Iterator[Piece]:
    wanted = range(plane.layers) if layers is None else layers
    if not entries or not wanted:
        return
    entry_bytes = plane.heads * plane.record_bytes
    for part in _split(entries, max(1, target_bytes // entry_bytes)):
        layers_per_piece = max(1, target_bytes // (entry_bytes * len(part)))
        for group in _split(wanted, layers_per_piece):
            yield Piece(plane.name, group, range(plane.heads), part)


def _split(whole: range, at_most: int) -> Iterator[range]:
    """Parts of nearly equal length, none longer than `at_most`: no small rest that costs a frame."""
    num_parts = -(-len(whole) // at_most)
    for i in range(num_parts):
        yield whole[len(whole) * i // num_parts : len(whole) * (i + 1) // num_parts]
