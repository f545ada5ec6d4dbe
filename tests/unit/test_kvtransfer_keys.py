"""Block keys: the same prefix under the same root has the same name, and nothing else has."""

import pytest

from kvtransfer.keys import block_key, keys_for, root_key, tenant_secret

pytestmark = pytest.mark.unit

CLUSTER = bytes(range(32))
SECRET = tenant_secret(CLUSTER, "alice")
ROOT = root_key("identity", "", SECRET)


def test_hkdf_matches_rfc_5869() -> None:
    """Recomputed from the RFC's definition with one block of output."""
    import hashlib
    import hmac

    prk = hmac.new(b"headrace tenant secret", CLUSTER, hashlib.sha256).digest()
    assert hmac.new(prk, b"alice\x01", hashlib.sha256).digest() == SECRET


def test_keys_are_stable_across_versions() -> None:
    assert ROOT.hex() == "b3752db39ee84e0d5d6d678b924c6acb"
    assert block_key(ROOT, [1, 2, 2**32 - 1]).hex() == "409124610569ede5a7c9bf2d370cf113"


def test_only_full_blocks_have_keys_and_each_names_its_whole_prefix() -> None:
    tokens = list(range(200))
    keys = keys_for(ROOT, tokens, 64)
    assert len(keys) == 3
    assert keys_for(ROOT, tokens[:191], 64) == keys[:2]
    assert keys_for(ROOT, [9, *tokens[1:]], 64)[1:] != keys[1:]
    assert keys[0] == block_key(ROOT, tokens[:64])
    assert keys[1] == block_key(keys[0], tokens[64:128])


def test_tenant_adapter_and_identity_separate_keys() -> None:
    roots = {
        ROOT,
        root_key("identity", "adapter", SECRET),
        root_key("identityadapter", "", SECRET),
        root_key("other", "", SECRET),
        root_key("identity", "", tenant_secret(CLUSTER, "bob")),
        root_key("identity", "", tenant_secret(CLUSTER[::-1], "alice")),
    }
    assert len(roots) == 6


@pytest.mark.parametrize("token", [-1, 2**32, 1.5, "a"])
def test_a_token_id_out_of_range_is_an_error(token: object) -> None:
    with pytest.raises(ValueError, match="token ids must be integers"):
        block_key(ROOT, [token])  # type: ignore[list-item]


def test_weak_secrets_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 16 bytes"):
        tenant_secret(b"short", "alice")
    with pytest.raises(ValueError, match="32 bytes"):
        root_key("identity", "", b"short")
    with pytest.raises(ValueError, match="key_block_tokens"):
        keys_for(ROOT, [1], 0)
