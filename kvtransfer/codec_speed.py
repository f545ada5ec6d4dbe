"""What the codecs cost here and how far they shrink: guesses taken at start, corrected by every frame that is sent.

Pure, but for `probe_codecs`, which takes the guesses by running each codec for some milliseconds on
made-up cache contents. One book per process; any thread may call.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from kvtransfer.codecs import Codec
    from kvtransfer.layouts import CacheLayout, Piece, Plane

HALF_LIFE_BYTES = 8 << 20
"""After so many more bytes of a codec, what was measured before counts half."""
HALF_LIFE_S = 60.0
"""A codec that is not used is not measured: what is known of it counts half after so long."""
GUESS_BYTES = 128 << 10
"""A guess counts as much as a measurement of so many bytes."""

_PROBE_LAYERS, _PROBE_HEADS, _PROBE_TOKENS, _PROBE_WIDTH = 2, 2, 256, 64
_PROBE_RUNS = (3, 20)  # at least, at most
_PROBE_S = 0.02  # enough of it, per codec


@dataclass(frozen=True, slots=True)
class CodecSpeed:
    """Seconds per raw byte on idle cores, and raw bytes per payload byte."""

    encode_s_per_byte: float
    decode_s_per_byte: float
    ratio: float


@dataclass(slots=True)
class _Sums:
    amount: float
    num_bytes: float
    noted_at: float


class MeasuredCosts:
    """What one raw byte takes (seconds, or payload bytes), per codec. Few and old measurements weigh little
    against a guess, so that a codec which was slow once, under load, is tried again."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._sums: dict[str, _Sums] = {}

    def note(self, codec: str, amount: float, raw_bytes: int) -> None:
        """`raw_bytes` took `amount` in all."""
        now = self._clock()
        known = self._sums.setdefault(codec, _Sums(0.0, 0.0, now))
        fade = _half(now - known.noted_at, HALF_LIFE_S) * _half(raw_bytes, HALF_LIFE_BYTES)
        known.amount = known.amount * fade + amount
        known.num_bytes = known.num_bytes * fade + raw_bytes
        known.noted_at = now

    def estimate(self, codec: str, guess: float) -> float:
        """Per raw byte."""
        known = self._sums.get(codec)
        if known is None:
            return guess
        fade = _half(self._clock() - known.noted_at, HALF_LIFE_S)
        return (known.amount * fade + guess * GUESS_BYTES) / (known.num_bytes * fade + GUESS_BYTES)

    def overhead(self, guesses: Mapping[str, float]) -> float:
        """What a raw byte takes beyond the codecs' own work as guessed (reading the cache, writing it): the least
        that any measured codec shows, since all of them pay it."""
        measured = [
            self.estimate(codec, guesses[codec]) - guesses[codec] for codec in self._sums if codec in guesses
        ]
        return max(0.0, min(measured, default=0.0))


@dataclass(slots=True)
class _DtypeBook:
    """Of one dtype. The guesses are of the codec alone, what is measured has the cache's reading in it."""

    encode: MeasuredCosts
    payload: MeasuredCosts
    guesses: dict[str, CodecSpeed] = field(default_factory=dict)


class SpeedBook:
    """Speeds by codec (its name) and by the dtype of what is encoded (`dtype_label`)."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._books: dict[str, _DtypeBook] = {}
        self._encode_s = 0.0

    @property
    def encode_s(self) -> float:
        """Seconds spent encoding since the book was made: what is not other people's load."""
        with self._lock:
            return self._encode_s

    def guess(self, codec: str, dtype: str, speed: CodecSpeed) -> None:
        """What is assumed before anything was measured."""
        with self._lock:
            self._book(dtype).guesses[codec] = speed

    def note_encoded(
        self, codec: str, dtype: str, raw_bytes: int, payload_bytes: int, encode_s: float, slowdown: float
    ) -> None:
        """A frame was gathered and encoded in `encode_s`, which the load of the cores made `slowdown` times (at
        least 1) as long as it would have been."""
        with self._lock:
            self._encode_s += encode_s
            if raw_bytes < 1:
                return
            book = self._book(dtype)
            book.encode.note(codec, encode_s / slowdown, raw_bytes)
            book.payload.note(codec, payload_bytes, raw_bytes)

    def speeds(self, dtype: str) -> dict[str, CodecSpeed]:
        """Of every codec that was guessed; the decoding is a guess, which nobody measures here."""
        with self._lock:
            book = self._books.get(dtype)
            if book is None:
                return {}
            overhead = book.encode.overhead({c: g.encode_s_per_byte for c, g in book.guesses.items()})
            return {
                codec: CodecSpeed(
                    book.encode.estimate(codec, guess.encode_s_per_byte + overhead),
                    guess.decode_s_per_byte,
                    1 / max(1e-3, book.payload.estimate(codec, 1 / guess.ratio)),
                )
                for codec, guess in book.guesses.items()
            }

    def _book(self, dtype: str) -> _DtypeBook:
        book = self._books.get(dtype)
        if book is None:
            book = self._books[dtype] = _DtypeBook(MeasuredCosts(self._clock), MeasuredCosts(self._clock))
        return book


def dtype_label(layout: CacheLayout) -> str:
    """The dtypes of a cache as one word: "bfloat16", or "bfloat16+float8_e4m3" where fields differ."""
    return "+".join(sorted({field.dtype for plane in layout.planes for field in plane.fields}))


def probe_codecs(
    book: SpeedBook,
    codecs: Iterable[Codec],
    layout: CacheLayout,
    clock: Callable[[], float],
    device: str = "cpu",
) -> None:
    """Fills `book` with a first guess for each codec on contents of `layout`'s dtypes.

    Takes some milliseconds per codec. `device`: where the cache lies that will be encoded. The best of
    some runs counts: the first one warms up, and a start is a busy moment.
    """
    label = dtype_label(layout)
    samples = [_sample(plane, device) for plane in layout.planes]
    raw_bytes = sum(raw.numel() for raw, _, _ in samples)
    for codec in codecs:
        encode_s: list[float] = []
        decode_s: list[float] = []
        payload_bytes = 0
        while len(encode_s) < _PROBE_RUNS[0] or (
            len(encode_s) < _PROBE_RUNS[1] and sum(encode_s) + sum(decode_s) < _PROBE_S
        ):
            begun = clock()
            payloads = [codec.encode(raw, plane, piece) for raw, plane, piece in samples]
            encoded = clock()
            for payload, (_, plane, piece) in zip(payloads, samples, strict=True):
                codec.decode(payload, plane, piece)
            encode_s.append(encoded - begun)
            decode_s.append(clock() - encoded)
            payload_bytes = sum(memoryview(payload).nbytes for payload in payloads)
        speed = CodecSpeed(
            min(encode_s) / raw_bytes, min(decode_s) / raw_bytes, raw_bytes / max(1, payload_bytes)
        )
        book.guess(codec.name, label, speed)


def _sample(plane: Plane, device: str) -> tuple[torch.Tensor, Plane, Piece]:
    """Canonical bytes like those of a cache: normal numbers, each channel with a scale and an offset of its own."""
    import torch  # the book is pure, only its first guesses need tensors

    from kvtransfer.layouts import DTYPE_BYTES, Piece, Plane

    layers, heads = min(plane.layers, _PROBE_LAYERS), min(plane.heads, _PROBE_HEADS)
    whole_entries = _PROBE_TOKENS * _PROBE_WIDTH * DTYPE_BYTES["bfloat16"] // plane.record_bytes
    entries = max(16, min(_PROBE_TOKENS, whole_entries))
    random = torch.Generator().manual_seed(1)
    parts = []
    for part in plane.fields:
        shape = (layers, entries, heads, part.width)
        scale = torch.exp(torch.randn(layers, 1, heads, part.width, generator=random))
        offset = torch.randn(layers, 1, heads, part.width, generator=random)
        numbers = torch.randn(shape, generator=random) * scale + offset
        parts.append(_as_bytes(numbers, part.dtype))
    raw = torch.cat(parts, dim=-1).reshape(-1).to(device)
    box = Plane(plane.name, layers, plane.kind, heads, plane.fields, plane.scale_along)
    return raw, box, Piece(plane.name, range(layers), range(heads), range(entries))


def _as_bytes(numbers: torch.Tensor, dtype: str) -> torch.Tensor:
    import torch

    floats = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float8_e4m3": torch.float8_e4m3fn,
    }
    stored = numbers.to(floats[dtype]) if dtype in floats else numbers.mul(16).to(torch.int32).to(torch.int8)
    return stored.contiguous().view(torch.uint8)


def _half(passed: float, half_life: float) -> float:
    return float(0.5 ** (max(0.0, passed) / half_life))
