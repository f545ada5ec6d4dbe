"""Names of cached blocks: what makes two pieces of cache the same.

A block key is a keyed hash of the parent's key and the token ids of one key block, so that a key
names a whole prefix. The root covers the identity of the computation, the adapter and a secret
derived for the tenant: no tenant can name, and so find, another's blocks. A key says nothing about
bytes; those have checksums (frames.py).
"""

from __future__ import annotations

import hashlib
import hmac
import sys
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

KEY_BYTES = 16
SECRET_BYTES = 32
LABEL_BYTES = 16
MIN_CLUSTER_SECRET_BYTES = 16


def derive(cluster_secret: bytes, purpose: str, info: str = "") -> bytes:
    """32 bytes by HKDF-SHA256 (RFC 5869) that only holders of the cluster secret can make; different for every
    `purpose` (the salt) and `info`. Raises ValueError for a short cluster secret.
    """
    if len(cluster_secret) < MIN_CLUSTER_SECRET_BYTES:
        raise ValueError(f"the cluster secret must have at least {MIN_CLUSTER_SECRET_BYTES} bytes")
    pseudo_random_key = hmac.digest(purpose.encode(), cluster_secret, "sha256")
    return hmac.digest(pseudo_random_key, info.encode() + b"\x01", "sha256")


def tenant_secret(cluster_secret: bytes, tenant: str) -> bytes:
    """32 bytes for a tenant, which salt the keys of its blocks. Raises ValueError for a short cluster secret."""
    return derive(cluster_secret, "headrace tenant secret", tenant)


def tenant_label(cluster_secret: bytes, tenant: str) -> bytes:
    """16 bytes by which a store tells tenants apart; says neither the tenant's name nor its secret. Raises
    ValueError for a short cluster secret."""
    return derive(cluster_secret, "headrace tenant label", tenant)[:LABEL_BYTES]


def root_key(identity: str, adapter: str, secret: bytes) -> bytes:
    """The parent of a sequence's first block.

    `identity`: digest of weights, arithmetic, tokenizer and layout; `adapter`: digest, or "" for none;
    `secret`: the tenant's (32 bytes).
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a tenant secret has {SECRET_BYTES} bytes, got {len(secret)}")
    root = hashlib.blake2b(key=secret, digest_size=KEY_BYTES, person=b"headrace-root")
    for part in (identity.encode(), adapter.encode()):
        root.update(len(part).to_bytes(8, "little") + part)
    return root.digest()


def block_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """16 bytes. Token ids are packed as little-endian uint32; one out of range raises ValueError."""
    try:
        packed = array("I", token_ids)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"token ids must be integers in [0, 2**32): {error}") from None
    if sys.byteorder == "big":
        packed.byteswap()
    return hashlib.blake2b(
        packed.tobytes(), key=parent, digest_size=KEY_BYTES, person=b"headrace-block"
    ).digest()


def keys_for(root: bytes, token_ids: Sequence[int], key_block_tokens: int) -> list[bytes]:
    """The keys of all full key blocks of a prompt; a partial last block has none."""
    if key_block_tokens < 1:
        raise ValueError(f"key_block_tokens must be at least 1, got {key_block_tokens}")
    keys: list[bytes] = []
    parent = root
    for start in range(0, len(token_ids) - key_block_tokens + 1, key_block_tokens):
        parent = block_key(parent, token_ids[start : start + key_block_tokens])
        keys.append(parent)
    return keys
