"""Good messages of a fetch, to be spoiled."""

from __future__ import annotations

import random

from kvtransfer.fetch_messages import NotServed, Served, encode_closing, encode_request
from kvtransfer.frames import FrameRecord, LeaseRef
from kvtransfer.sources import FetchRequest


def good_request(rng: random.Random) -> bytes:
    return encode_request(
        FetchRequest(
            lease=LeaseRef(bytes(16), 1, 2, 3),
            keys=tuple(rng.randbytes(16) for _ in range(rng.randrange(1, 6))),
            first_block=rng.randrange(4),
            block_tokens=16,
            layout="layout",
            dtypes=(("bfloat16",), ("bfloat16",)),
            fidelity=0,
            codecs=(("raw", 1), ("split", 1)),
        )
    )


def good_closing(rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return encode_closing(NotServed("NO_BLOCKS", "none of them is here"))
    records = {number: FrameRecord(1024, rng.getrandbits(64)) for number in range(rng.randrange(1, 5))}
    return encode_closing(Served(2, records))
