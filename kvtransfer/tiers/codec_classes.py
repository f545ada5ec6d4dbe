"""The fidelity rank of each codec, without the codecs: a store keeps payloads and cannot import torch.

The same as `kvtransfer.codecs` says; a test compares the two.
"""

from __future__ import annotations

CODEC_RANKS: dict[tuple[str, int], int] = {
    ("raw", 1): 0,
    ("split", 1): 0,
    ("int8", 1): 1,
    ("fp8", 1): 1,
    ("ecsq", 1): 2,
    ("int4", 3): 2,
}
"""0 exact, 1 near, 2 compact, by (name, version)."""
