"""The codecs that this build speaks, by name and version. A new one is a file here and a line in CODECS."""

from __future__ import annotations

from kvtransfer.codecs.base import Codec, Fidelity
from kvtransfer.codecs.ecsq import EcsqCodec
from kvtransfer.codecs.fp8 import Fp8Codec
from kvtransfer.codecs.int4 import Int4Codec
from kvtransfer.codecs.int8 import Int8Codec
from kvtransfer.codecs.raw import RawCodec
from kvtransfer.codecs.split import SplitCodec

__all__ = ["CODECS", "Codec", "Fidelity", "UnknownCodec", "find_codec", "newest_codec"]

CODECS: tuple[Codec, ...] = (
    RawCodec(),
    SplitCodec(),
    Int8Codec(),
    Fp8Codec(),
    EcsqCodec(),
    Int4Codec(),
)

_BY_NAME = {(codec.name, codec.version): codec for codec in CODECS}


class UnknownCodec(LookupError):
    """The name or version is not spoken here; the message lists those that are."""

    def __init__(self, name: str, version: int | None) -> None:
        wanted = name if version is None else f"{name} version {version}"
        known = ", ".join(f"{codec.name} {codec.version}" for codec in CODECS)
        super().__init__(f"codec {wanted!r} is not known here; known are: {known}")


def find_codec(name: str, version: int) -> Codec:
    """Raises UnknownCodec."""
    codec = _BY_NAME.get((name, version))
    if codec is None:
        raise UnknownCodec(name, version)
    return codec


def newest_codec(name: str) -> Codec:
    """The newest version of a name, as a sender chooses it. Raises UnknownCodec."""
    versions = [codec for codec in CODECS if codec.name == name]
    if not versions:
        raise UnknownCodec(name, None)
    return max(versions, key=lambda codec: codec.version)
